"""`python -m sdlearn optimizations`: what makes sampling fast, one change after the other, measured and compared."""

import argparse
from pathlib import Path

from tqdm import tqdm

from .arguments import positive
from .bench import add_benchmark_arguments, parse_benchmark, write_result


def add_arguments(parser: argparse.ArgumentParser):
    from ..bench import Benchmark

    add_benchmark_arguments(parser, Benchmark())
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder of that preset, for its weights")
    parser.add_argument("--steps", type=positive(int), default=50, help="of DDIM, at first (%(default)s)")
    parser.add_argument("--fewer", type=positive(int), default=20, help="of DPM++ 2M, at the end (%(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what compiles")


def run(args: argparse.Namespace):
    from ..bench import ImagesDiffer, list_steps, run_steps

    steps = list_steps(args.device, args.steps, args.fewer, args.compile)
    result = run_steps(parse_benchmark(args), steps, progress=tqdm, folder=args.model)
    write_result(args, result)
    print(format_table(result))
    if different := [step["name"] for step in result["optimization steps"]
                     if step["exact"] and not (step["the same image"] and step["the first's image"])]:
        raise ImagesDiffer("these steps should make the image of the previous step and of the first one, but do not: "
                           f"{', '.join(different)}")


def format_table(result: dict) -> str:
    """A line for each optimization step."""
    lines = [f"{'':26}{'seconds':>9}{'steps/s':>9}{'previous':>9}{'first':>7}{'MiB':>8}{'differs by':>12}"
             f"{'from the first':>16}"]
    for step in result["optimization steps"]:
        lines.append(f"{step['name']:26}{step['seconds']:9.3f}{step['guided steps a second']:9.1f}"
                     f"{step['time relative to the previous']:9.2f}{step['time relative to the first']:7.2f}"
                     f"{step.get('peak memory, MiB', '-'):>8}{step['largest difference']:7} /255"
                     f"{step['largest difference from the first']:11} /255"
                     f"{'' if step['exact'] else '  another image'}")
    return "\n".join([*lines, f"decoding takes {result['seconds to decode']:.3f} seconds more"])
