"""`python -m sdlearn train`: train the model's parts or the judge, with a progress bar, a budget and resuming."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..config import PRESETS
from ..data import WORLDS
from ..evaluation import card as judge_card
from ..evaluation.detector import Detector
from ..pipeline import StableDiffusion
from ..training import stages
from ..training.card import package_weights
from ..training.judge import JudgeRecipe
from ..training.loop import fit, load_state
from .arguments import positive

NEGLIGIBLE = 0.01       # a remainder of a phase, as a share of it, that `all` does not train
ALL, PACKAGE, PACKAGE_JUDGE = "all", "package", "package-judge"
OLD_SPELLINGS = {"ship": PACKAGE, "ship-judge": PACKAGE_JUDGE}


def stage_name(text: str) -> str:
    """An argparse type: a stage, or what else `train` does, also in an older spelling."""
    if text in OLD_SPELLINGS:
        print(f"`train {text}` is called `train {OLD_SPELLINGS[text]}` now", file=sys.stderr)
    return OLD_SPELLINGS.get(text, text)


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("stage", type=stage_name, choices=[*stages.STAGES, ALL, PACKAGE, *stages.JUDGE, PACKAGE_JUDGE],
                        help="what to train; 'package' writes a run's averaged weights as a model folder")
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
                        "and average over this call alone: the last minutes of unet, before it is packaged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder that 'package' writes (default: the package's own weights)")


def run(args: argparse.Namespace):
    """Train one stage, or all of the model's one after the other, or package a run."""
    if args.stage == PACKAGE_JUDGE:
        print(f"written: {package_judge(args.run, args.out)}")
        return
    join_processes()
    if args.stage == PACKAGE:
        if PartialState().is_main_process:
            print(f"written: {package_weights(PRESETS[args.preset], args.run, args.out)}")
        return
    with PartialState().main_process_first():                  # it fills the run, and the others find it filled
        if args.start and (filled := stages.start_from(args.start, args.run, PRESETS[args.preset])):
            print(f"{args.run} starts from {args.start}: {', '.join(filled)}")
    if args.stage == ALL:
        for name, stage in stages.STAGES.items():
            train_rest(name, stage, args)
    else:
        stage = {**stages.STAGES, **stages.JUDGE}[args.stage]
        train_stage(args.stage, stage, args, minutes=budget(stage, args), world=args.world, anneal=args.anneal)
    leave_processes()


def package_judge(run: Path, out: Path | None) -> Path:
    """Write a run's judge with its figures, those of scenes through `mini`'s autoencoder among them."""
    detector = stages.load_averaged(Detector(), run, JudgeRecipe.name)
    progress = load_state(run / f"{JudgeRecipe.name}-state.pt")["progress"]
    return judge_card.package_judge(detector, progress, out, vae=StableDiffusion.load(device="cpu").vae)


def join_processes():
    """Join the processes that torchrun has started, also on a machine without a GPU."""
    PartialState(cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available())


def leave_processes():
    """Exit all processes together and at once: gloo's threads may abort a process during the usual shutdown."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def budget(stage: stages.Stage, args: argparse.Namespace) -> float:
    """Minutes of a stage: `--minutes`, or its share of it under `all`, or the stage's default."""
    if args.stage != ALL:
        return args.minutes or stage.minutes
    if args.minutes is None:
        return stage.usual_minutes
    return args.minutes * stage.usual_minutes / sum(each.usual_minutes for each in stages.STAGES.values())


def train_rest(name: str, stage: stages.Stage, args: argparse.Namespace):
    """Train what is left of a stage's budget under `all`, phase by phase; the next call resumes an interrupted one."""
    minutes, trains = budget(stage, args), False
    if stage.settled_by and stages.read_trained_seconds(args.run, stage.settled_by) is not None:
        report_skipped(f"{name}: stays as it is, as '{stage.settled_by}' has been trained on what it makes")
        return
    for phase, begin, end in stage.spans(60 * minutes):
        done = stages.read_trained_seconds(args.run, name) or 0.0
        if end - done > NEGLIGIBLE * (end - begin):
            trains = True
            train_stage(name, stage, args, minutes=(end - done) / 60, world=args.world or phase.world,
                        anneal=args.anneal or phase.anneal, span=(begin, end))
    if not trains:
        report_skipped(f"{name}: skipped, has been trained for {done / 60:.1f} minutes; its budget is {minutes:.1f}")


def report_skipped(why: str):
    if PartialState().is_main_process:
        print(why, flush=True)


def train_stage(name: str, stage: stages.Stage, args: argparse.Namespace, *, minutes: float, world: str | None,
                anneal: bool, span: tuple[float, float] | None = None):
    """Train for `minutes`, or to the end of a `span` (see `fit`), of which `minutes` is then the expected length."""
    options = {"batch_size": args.batch, "learning_rate": args.rate, "world": WORLDS[world] if world else None,
               "shift": args.shift if name == "unet" else None}
    with PartialState().main_process_first():                   # it writes tokenizer and scaling factor
        recipe = stage.make(PRESETS[args.preset], args.run, **{k: v for k, v in options.items() if v is not None})
    main = PartialState().is_main_process
    steps = fit(recipe, args.run, minutes=None if span else minutes, span=span, precision=args.precision,
                compiled=args.compile, report_minutes=args.report_minutes, seed=args.seed, anneal=anneal)
    bar = tqdm(total=round(60 * minutes), unit="s", desc=name, mininterval=2.0, disable=not main)
    first = printed = None
    for progress, _ in steps:
        if first is None:
            first = progress.samples, progress.seconds
        samples, seconds = progress.samples - first[0], progress.seconds - first[1]
        bar.update(min(int(seconds), bar.total) - bar.n)
        bar.set_postfix_str(f"step {progress.step}, loss {progress.loss:.4f}, "
                            f"{samples / max(seconds, 1e-9):.1f} samples/s", refresh=False)
        if progress.history and progress.history[-1] is not printed:
            printed = progress.history[-1]
            tqdm.write(json.dumps({key: round(value, 5) for key, value in printed.items()}))
    bar.close()
    if main and progress.history[-1] is not printed:
        print(json.dumps({key: round(value, 5) for key, value in progress.history[-1].items()}))
