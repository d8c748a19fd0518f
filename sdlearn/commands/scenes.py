"""`python -m sdlearn scenes`: a sheet of the scenes that the model learns from."""

import argparse
from pathlib import Path

from .. import data
from ..data import WORLDS
from ..data.scenes import SPLITS
from ..pipeline import SettingsError
from .files import check_writable, save_png


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (%(default)s)")
    parser.add_argument("--count", type=int, default=32, help="scenes (%(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="(%(default)s)")
    parser.add_argument("--world", choices=sorted(WORLDS), default="full", help="of objects (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("scenes.png"), help="a .png file (%(default)s)")


def run(args: argparse.Namespace):
    if not 1 <= args.count <= 1024:
        raise SettingsError(f"count is {args.count}; give a whole number from 1 to 1024")
    [file] = check_writable([args.out])
    drawn = list(data.draw_scenes(args.seed, args.count, args.split, data.WORLDS[args.world]))
    sheet = data.contact_sheet([one.image for one in drawn], [one.caption for one in drawn])
    save_png(file, sheet, {"seed": args.seed, "count": args.count, "split": args.split, "world": args.world})
    print(file)
