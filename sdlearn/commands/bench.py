"""`python -m sdlearn bench`: how long an image takes, side by side with diffusers."""

import argparse
from pathlib import Path

from tqdm import tqdm

from ..checkpoint import write_json
from ..config import PRESETS
from ..files import write_atomically
from .arguments import positive
from .export import DTYPES
from .files import check_json


def add_arguments(parser: argparse.ArgumentParser):
    from ..bench import SAMPLERS, Benchmark

    default = Benchmark()
    add_benchmark_arguments(parser, default)
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="to compute in (%(default)s)")
    parser.add_argument("--steps", type=positive(int), default=default.steps, help="(%(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default=default.sampler, help="(%(default)s)")
    parser.add_argument("--against", choices=("diffusers", "none"), default="diffusers", help="(%(default)s)")
    parser.add_argument("--compile", action="store_true", help="also compiled, both of them; takes minutes")


def add_benchmark_arguments(parser: argparse.ArgumentParser, default):
    """Options that `optimizations` has, too. default: a `bench.Benchmark`."""
    parser.add_argument("--preset", choices=sorted(PRESETS), default=default.preset,
                        help="shipped weights where there are some, else random ones (%(default)s)")
    parser.add_argument("--device", default=default.device, help="cpu or cuda (%(default)s)")
    parser.add_argument("--batch", type=positive(int), default=default.batch, help="images at once (%(default)s)")
    parser.add_argument("--guidance", type=float, default=default.guidance, help="(%(default)s)")
    parser.add_argument("--size", type=positive(int), help="pixels of a side (the preset's own)")
    parser.add_argument("--rounds", type=positive(int), default=default.rounds, help="timed turns (%(default)s)")
    parser.add_argument("--threads", type=positive(int), help="of the CPU (PyTorch's own choice)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .json file for the result")


def parse_benchmark(args: argparse.Namespace):
    """The `bench.Benchmark` of the arguments. Raises SettingsError for a device, CheckpointError for a bad --out."""
    from ..bench import Benchmark
    from ..pipeline.settings import find_device

    if args.out:
        check_json(args.out)
    find_device(args.device)
    return Benchmark(**{name: getattr(args, name) for name in Benchmark.__dataclass_fields__ if hasattr(args, name)})


def write_result(args: argparse.Namespace, result: dict):
    """Write a result to --out, if it is given."""
    if args.out:
        with write_atomically(args.out) as partial:
            write_json(partial, result)


def run(args: argparse.Namespace):
    from ..bench import IMPLEMENTATIONS, ImagesDiffer, run_benchmark

    benchmark = parse_benchmark(args)
    names = tuple(name for name in IMPLEMENTATIONS if (args.compile or not name.endswith("compiled"))
                  and (args.against != "none" or name.startswith("sdlearn")))
    result = run_benchmark(benchmark, names, progress=tqdm)
    write_result(args, result)
    print(format_table(result))
    if not result["alike"]:
        raise ImagesDiffer("the images differ by more than rounding, so there is no ratio")


def format_table(result: dict) -> str:
    """A line for each implementation."""
    first, *_ = result["implementations"]
    ratios = result.get(f"time of {first} to that of", {})
    shares = any("share of the roofline" in one for one in result["implementations"].values())
    lines = [f"{'':20}{'seconds':>9}{'steps/s':>9}{'MiB':>8}{'differs by':>12}{f'{first} takes':>16}"
             f"{'  of the roofline' if shares else ''}"]
    for name, one in result["implementations"].items():
        share = f"{one['share of the roofline']:17.1%}" if shares else ""
        ratio = f"{ratios[name]:.2f} of it" if name in ratios else ""
        lines.append(f"{name:20}{one['seconds']:9.3f}{one['guided steps a second']:9.1f}"
                     f"{one['peak memory, MiB']:8}{one['largest difference']:7} /255{ratio:>16}{share}")
    return "\n".join(lines)
