"""`python -m sdlearn evaluate`: how well a model follows prompts, beside its ceiling and the judge's own errors."""

import argparse
from pathlib import Path

from tqdm import tqdm

from ..evaluation.command import FIGURES, Plan
from ..evaluation.command import run as measure
from ..evaluation.keeping import keep
from ..pipeline import SettingsError, StableDiffusion, shipped
from ..samplers import SAMPLERS


def add_arguments(parser: argparse.ArgumentParser):
    plan = Plan()
    parser.add_argument("--model", default="mini", help=f"{', '.join(shipped())} or a model folder (%(default)s)")
    parser.add_argument("--prompts", type=int, default=plan.prompts, help="of each of the seven tasks (%(default)s)")
    parser.add_argument("--seeds", type=int, default=plan.seeds, help="pictures of each prompt (%(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=list(plan.guidance), metavar="SCALE",
                        help="one or more, each a column of the table (5)")
    parser.add_argument("--steps", type=int, default=plan.steps, help="of the sampler (%(default)s)")
    parser.add_argument("--sampler", default=plan.sampler, help=f"{', '.join(SAMPLERS)} (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda ... (a GPU where there is one)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="FOLDER",
                        help=f"for {FIGURES} and sheets of failures (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="put the figures into the model's own folder, too")


def run(args: argparse.Namespace):
    try:
        plan = Plan(prompts=args.prompts, seeds=args.seeds, guidance=tuple(args.guidance), steps=args.steps,
                    sampler=args.sampler)
        model = StableDiffusion.load(args.model, device=args.device)
        told = measure(model, plan, args.out, watch=tqdm)
    except ValueError as error:                 # of the rooms below, which know no settings
        raise SettingsError(str(error)) from error
    print(told)
    print(args.out)
    if args.keep:
        print(keep(args.out, args.model))
