"""`python -m sdlearn ablate`: leave one thing out, all else equal, and keep what comes of it as data."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..ablations import (
    ABLATIONS,
    RESULTS,
    Base,
    Measures,
    default_minutes,
    load_or_fit_plan,
    run_ablation,
    write_results,
)
from ..data import World
from ..evaluation import compose_prompt_scene, compute_scores, duplicate_rate, judge_images, load_judge, make_prompts
from ..evaluation.metrics import ssim
from ..pipeline import SettingsError, StableDiffusion
from ..training.command import positive

# The kinds of prompts that a world's scenes answer, by the form of scene.
TASKS = {"single": ("one object", "colours"), "count": ("counting",),
         "pair": ("two objects", "position", "colour binding")}


def add_arguments(parser: argparse.ArgumentParser):
    names = " ".join(f"{name}: {one.question}" for name, one in ABLATIONS.items())
    parser.add_argument("name", choices=[*ABLATIONS, "all"], metavar="NAME", help=f"{names} Or all of them.")
    parser.add_argument("--minutes", type=positive(float),
                        help="budget, shared out among the ablations for 'all' (default: "
                             f"{sum(one.minutes for one in ABLATIONS.values()):.0f} for all, a sixth of it on a GPU)")
    parser.add_argument("--run", type=Path, default=Path("runs/ablations"), metavar="FOLDER",
                        help="where variants are kept as they are done (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER",
                        help="for a .json and a .png of each ablation (default: the package's own)")
    parser.add_argument("--model", default="mini", help="to build on: a name or a model folder (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda ... (a GPU where there is one)")


def run(args: argparse.Namespace):
    for folder in (args.run, args.out):
        check_folder(folder)
    chosen = list(ABLATIONS.values()) if args.name == "all" else [ABLATIONS[args.name]]
    model = StableDiffusion.load(args.model, device=args.device)
    try:
        base = Base(model.parts, measures(model.device))
        whole = sum(default_minutes(one, model.device) for one in chosen)
        for ablation in chosen:
            minutes = args.minutes and args.minutes * default_minutes(ablation, model.device) / whole
            print(write_results(ablation, base, watched(ablation, base, args.run, minutes), args.run, args.out))
    except ValueError as error:                 # of lower layers, which do not know SettingsError
        raise SettingsError(str(error)) from error


def check_folder(folder: Path):
    """Raises SettingsError for a folder that cannot be written to: asked before the work, not after."""
    above = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SettingsError(f"{folder} cannot be written: {above} is no folder that may be written to")


def watched(ablation, base: Base, folder: Path, minutes: float | None):
    """Run an ablation with a bar for each variant and a line for each reading; gives its plan."""
    plan = load_or_fit_plan(ablation, base, folder, minutes)
    bar, shown = None, None
    for variant, reading in run_ablation(ablation, base, plan, folder):
        if variant is not shown:
            if bar is not None:
                bar.close()
            bar, shown = tqdm(total=variant.steps, desc=f"{ablation.name}, {variant.name}", mininterval=2.0), variant
        bar.update(1 if reading.step else 0)
        if reading.figures:
            figures = {name: round(value, 4) for name, value in reading.figures.items()}
            tqdm.write(json.dumps({"variant": variant.name, "step": reading.step, **figures}))
    if bar is not None:
        bar.close()
    return plan


def measures(device) -> Measures:
    """The judge and what belongs to it, for training, which does not know evaluation. Raises CheckpointError where
    there is no judge."""
    judge = load_judge(device=device)

    def judged(images: Sequence, asked: Sequence) -> dict[str, float]:
        verdicts = judge_images(images, asked, judge)
        found = compute_scores(asked, verdicts)
        shares = {"right": sum(one.right for one in verdicts) / len(verdicts), "background": found.background,
                  "more than asked": duplicate_rate(asked, [one.detections for one in verdicts])}
        return {name: share for name, share in shares.items() if share is not None}

    return Measures(asked_of, judged, lambda prompt: compose_prompt_scene(prompt).image, ssim)


def asked_of(world: World, count: int) -> list:
    """`count` prompts of each kind that the world's scenes answer."""
    tasks = [task for form, some in TASKS.items() if getattr(world, form) > 0 for task in some]
    return make_prompts(world.objects, count=count, tasks=tasks)
