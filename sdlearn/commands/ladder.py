"""`python -m sdlearn ladder`: what makes sampling fast, one change after the other, each measured and compared."""

import argparse
from pathlib import Path

from tqdm import tqdm

from ..training.command import positive
from .bench import add_race_arguments, checked_race, keep


def add_arguments(parser: argparse.ArgumentParser):
    from ..bench import Race

    add_race_arguments(parser, Race())
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder of that preset, for its weights")
    parser.add_argument("--steps", type=positive(int), default=50, help="of DDIM, on the first rungs (%(default)s)")
    parser.add_argument("--fewer", type=positive(int), default=20, help="of DPM++ 2M, on the last (%(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what compiles")


def run(args: argparse.Namespace):
    from ..bench import ImagesDiffer, climb, rungs_for

    result = climb(checked_race(args), rungs_for(args.device, args.steps, args.fewer, args.compile), watch=tqdm,
                   folder=args.model)
    keep(args, result)
    print(table(result))
    if off := [told["rung"] for told in result["ladder"]
               if told["exact"] and not (told["the same image"] and told["the first's image"])]:
        raise ImagesDiffer("these rungs should paint the image of the one before and of the first, but do not: "
                             f"{', '.join(off)}")


def table(result: dict) -> str:
    """A line for each rung."""
    lines = [f"{'':26}{'seconds':>9}{'steps/s':>9}{'before':>8}{'first':>7}{'MiB':>8}{'differs by':>12}"
             f"{'from the first':>16}"]
    for told in result["ladder"]:
        lines.append(f"{told['rung']:26}{told['seconds']:9.3f}{told['guided steps a second']:9.1f}"
                     f"{told['of the rung before']:8.2f}{told['of the first']:7.2f}"
                     f"{told.get('peak memory, MiB', '-'):>8}{told['largest difference']:7} /255"
                     f"{told['largest difference from the first']:11} /255"
                     f"{'' if told['exact'] else '  another image'}")
    return "\n".join([*lines, f"decoding takes {result['seconds to decode']:.3f} seconds more"])
