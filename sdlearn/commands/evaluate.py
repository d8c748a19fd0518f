"""`python -m sdlearn evaluate`: how well a model follows prompts, beside its ceiling and the judge's own errors."""

import argparse
from pathlib import Path

from tqdm import tqdm

from ..evaluation.command import FIGURES, EvaluationPlan
from ..evaluation.command import run_evaluation as measure
from ..evaluation.page import MIN_PROMPTS, check_prompts, save_evaluation
from ..pipeline import SettingsError, StableDiffusion, shipped
from ..samplers import SAMPLERS


def add_arguments(parser: argparse.ArgumentParser):
    plan = EvaluationPlan()
    parser.add_argument("--model", default="mini", help=f"{', '.join(shipped())} or a model folder (%(default)s)")
    parser.add_argument("--prompts", type=int, default=plan.prompts, help="of each of the eight tasks (%(default)s)")
    parser.add_argument("--seeds", type=int, default=plan.seeds, help="images of each prompt (%(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", metavar="SCALE",
                        help="one or more, each a column of the table (the model's default: 3 for mini)")
    parser.add_argument("--steps", type=int, help="of the sampler (the model's default: 20 for mini)")
    parser.add_argument("--sampler", default=plan.sampler, help=f"{', '.join(SAMPLERS)} (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda ... (a GPU where there is one)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="FOLDER",
                        help=f"for {FIGURES} and sheets of failures (%(default)s)")
    parser.add_argument("--keep", action="store_true",
                        help=f"put the figures into the model's own folder; {MIN_PROMPTS} prompts a task or more")
    parser.add_argument("--allow-few-prompts", action="store_true",
                        help=f"keep figures of fewer than {MIN_PROMPTS} prompts a task: for tests of the command")


def run(args: argparse.Namespace):
    fewest = 1 if args.allow_few_prompts else MIN_PROMPTS
    try:
        if args.keep:
            check_prompts(args.prompts, fewest)             # before hours of work, not after
        plan = EvaluationPlan(prompts=args.prompts, seeds=args.seeds, guidance=args.guidance and tuple(args.guidance),
                    steps=args.steps, sampler=args.sampler)
        model = StableDiffusion.load(args.model, device=args.device)
        told = measure(model, plan, args.out, watch=tqdm)
    except ValueError as error:                 # of lower layers, which do not know SettingsError
        raise SettingsError(str(error)) from error
    print(told)
    print(args.out)
    if args.keep:
        print(save_evaluation(args.out, args.model, fewest=fewest))
