"""`python -m sdlearn bench`: how long an image takes, side by side with diffusers."""

import argparse
from pathlib import Path

from tqdm import tqdm

from ..checkpoint import write_json
from ..config import PRESETS
from ..files import write_atomically
from ..training.command import positive
from .export import DTYPES
from .files import check_json


def add_arguments(parser: argparse.ArgumentParser):
    from ..bench import SAMPLERS, Race

    default = Race()
    add_race_arguments(parser, default)
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="to compute in (%(default)s)")
    parser.add_argument("--steps", type=positive(int), default=default.steps, help="(%(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default=default.sampler, help="(%(default)s)")
    parser.add_argument("--against", choices=("diffusers", "none"), default="diffusers", help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="both sides compiled as well; takes minutes")


def add_race_arguments(parser: argparse.ArgumentParser, default):
    """What `ladder` asks, too. default: a `bench.Race`."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default=default.preset,
                        help="shipped weights where there are some, else random ones (%(default)s)")
    parser.add_argument("--device", default=default.device, help="cpu or cuda (%(default)s)")
    parser.add_argument("--batch", type=positive(int), default=default.batch, help="images at once (%(default)s)")
    parser.add_argument("--guidance", type=float, default=default.guidance, help="(%(default)s)")
    parser.add_argument("--size", type=positive(int), help="pixels of a side (the preset's own)")
    parser.add_argument("--rounds", type=positive(int), default=default.rounds, help="turns that count (%(default)s)")
    parser.add_argument("--threads", type=positive(int), help="of the CPU (PyTorch's own choice)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .json file for all that was measured")


def checked_race(args: argparse.Namespace):
    """The race that is asked for. Raises SettingsError for a device, CheckpointError for a file that cannot be."""
    from ..bench import Race
    from ..pipeline.settings import find_device

    if args.out:
        check_json(args.out)
    find_device(args.device)
    return Race(**{name: getattr(args, name) for name in Race.__dataclass_fields__ if hasattr(args, name)})


def keep(args: argparse.Namespace, result: dict):
    """Write what was measured where it was asked for."""
    if args.out:
        with write_atomically(args.out) as beside:
            write_json(beside, result)


def run(args: argparse.Namespace):
    from ..bench import CONTENDERS, ImagesDiffer
    from ..bench import run as race_of

    race = checked_race(args)
    names = tuple(name for name in CONTENDERS if (args.compile or not name.endswith("compiled"))
                  and (args.against != "none" or name.startswith("sdlearn")))
    result = race_of(race, names, watch=tqdm)
    keep(args, result)
    print(table(result))
    if not result["alike"]:
        raise ImagesDiffer("the images differ by more than rounding, so there is no ratio")


def table(result: dict) -> str:
    """A line for each contender."""
    first, *_ = result["contenders"]
    ratios = result.get(f"time of {first} to that of", {})
    shares = any("share of the roofline" in told for told in result["contenders"].values())
    lines = [f"{'':20}{'seconds':>9}{'steps/s':>9}{'MiB':>8}{'differs by':>12}{f'{first} takes':>16}"
             f"{'  of the roofline' if shares else ''}"]
    for name, told in result["contenders"].items():
        share = f"{told['share of the roofline']:17.1%}" if shares else ""
        ratio = f"{ratios[name]:.2f} of it" if name in ratios else ""
        lines.append(f"{name:20}{told['seconds']:9.3f}{told['guided steps a second']:9.1f}"
                     f"{told['peak memory, MiB']:8}{told['largest difference']:7} /255{ratio:>16}{share}")
    return "\n".join(lines)
