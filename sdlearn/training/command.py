"""`python -m sdlearn train`: stages from the command line, with a progress bar, a budget, and resuming."""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..config import PRESETS
from ..data import WORLDS
from . import stages
from .card import package_weights
from .loop import fit

NOTHING = 0.01      # what is left of a phase, as a share of it, for which `all` does not go on


def positive(kind: type):
    """An argparse type: a finite number of `kind` above zero."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number above zero")
        return value
    return read


def add_arguments(parser: argparse.ArgumentParser, beside: Iterable[str] = ()):
    """`beside`: what may be asked for beside the model's own stages."""
    parser.add_argument("stage", choices=[*stages.STAGES, "all", "ship", *beside],
                        help="what to train; 'ship' writes a run's averaged weights as a model folder")
    parser.add_argument("--run", type=Path, default=Path("runs/mini"), help="folder of states and sheets")
    parser.add_argument("--start", type=Path, metavar="MODEL",
                        help="a model folder whose weights an empty run starts from")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--world", choices=sorted(WORLDS), help="which scenes (default: the stage's own)")
    parser.add_argument("--minutes", type=positive(float),
                        help="budget of this call; of 'all': of all its calls together, shared out among the stages "
                             "(default: the stage's own)")
    parser.add_argument("--batch", type=positive(int), help="scenes in a batch")
    parser.add_argument("--rate", type=positive(float), help="learning rate")
    parser.add_argument("--shift", type=positive(float), help="above 1, noisy timesteps come more often (of the U-Net; "
                                                              "default: 3)")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), help="chosen by a short trial when left out")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model")
    parser.add_argument("--report-minutes", type=positive(float), default=10.0, help="between sheets of samples")
    parser.add_argument("--anneal", action="store_true", help="let the learning rate fall to zero within the budget, "
                        "and average over this call alone: the last minutes of unet, before it is shipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder that 'ship' writes (default: the package's own weights)")


def run(args: argparse.Namespace, beside: Mapping[str, stages.Stage] = MappingProxyType({})):
    """Train one stage, or all of the model's one after the other, or ship a run. `beside`: stages of other things."""
    join_processes()
    if args.stage == "ship":
        if PartialState().is_main_process:
            print(f"written: {package_weights(PRESETS[args.preset], args.run, args.out)}")
        return
    with PartialState().main_process_first():                  # it fills the run, and the others find it filled
        if args.start and (filled := stages.start_from(args.start, args.run, PRESETS[args.preset])):
            print(f"{args.run} starts from {args.start}: {', '.join(filled)}")
    if args.stage == "all":
        for name, stage in stages.STAGES.items():
            train_rest(name, stage, args)
    else:
        stage = {**stages.STAGES, **beside}[args.stage]
        train_stage(args.stage, stage, args, minutes=budget(stage, args), world=args.world, anneal=args.anneal)
    leave_processes()


def join_processes():
    """Train together with the other processes that torchrun has started, on a machine without a GPU as well."""
    PartialState(cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available())


def leave_processes():
    """End together, and at once: gloo's threads may abort a process on the usual way out, when all is done."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def budget(stage: stages.Stage, args: argparse.Namespace) -> float:
    """Minutes of a stage: its own unless told, and of what is told for all of them together its share."""
    if args.stage != "all":
        return args.minutes or stage.minutes
    if args.minutes is None:
        return stage.usual_minutes
    return args.minutes * stage.usual_minutes / sum(each.usual_minutes for each in stages.STAGES.values())


def train_rest(name: str, stage: stages.Stage, args: argparse.Namespace):
    """What is left of a stage's budget in `all`, phase by phase. So a call after a cut goes on where that one was."""
    minutes, trains = budget(stage, args), False
    if stage.settled_by and stages.read_trained_seconds(args.run, stage.settled_by) is not None:
        skip(f"{name}: stays as it is, as '{stage.settled_by}' has been trained on what it makes")
        return
    for phase, begin, end in stage.spans(60 * minutes):
        done = stages.read_trained_seconds(args.run, name) or 0.0
        if end - done > NOTHING * (end - begin):
            trains = True
            train_stage(name, stage, args, minutes=(end - done) / 60, world=args.world or phase.world,
                        anneal=args.anneal or phase.anneal, span=(begin, end))
    if not trains:
        skip(f"{name}: skipped, has been trained for {done / 60:.1f} minutes; its budget is {minutes:.1f}")


def skip(why: str):
    if PartialState().is_main_process:
        print(why, flush=True)


def train_stage(name: str, stage: stages.Stage, args: argparse.Namespace, *, minutes: float, world: str | None,
                anneal: bool, span: tuple[float, float] | None = None):
    """Train for so many minutes, or to the end of a `span` (see `fit`), for which these are what is expected."""
    options = {"batch_size": args.batch, "learning_rate": args.rate, "world": WORLDS[world] if world else None,
               "shift": args.shift if name == "unet" else None}
    with PartialState().main_process_first():                   # so too with tokenizer and scaling factor
        recipe = stage.make(PRESETS[args.preset], args.run, **{k: v for k, v in options.items() if v is not None})
    main = PartialState().is_main_process
    steps = fit(recipe, args.run, minutes=None if span else minutes, span=span, precision=args.precision,
                compiled=args.compile, report_minutes=args.report_minutes, seed=args.seed, anneal=anneal)
    bar = tqdm(total=round(60 * minutes), unit="s", desc=name, mininterval=2.0, disable=not main)
    first = told = None
    for progress, _ in steps:
        if first is None:
            first = progress.samples, progress.seconds
        samples, seconds = progress.samples - first[0], progress.seconds - first[1]
        bar.update(min(int(seconds), bar.total) - bar.n)
        bar.set_postfix_str(f"step {progress.step}, loss {progress.loss:.4f}, "
                            f"{samples / max(seconds, 1e-9):.1f} samples/s", refresh=False)
        if progress.history and progress.history[-1] is not told:
            told = progress.history[-1]
            tqdm.write(json.dumps({key: round(value, 5) for key, value in told.items()}))
    bar.close()
    if main and progress.history[-1] is not told:
        print(json.dumps({key: round(value, 5) for key, value in progress.history[-1].items()}))
