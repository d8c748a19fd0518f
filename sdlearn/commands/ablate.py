"""`python -m sdlearn ablate`: leave one thing out, all else equal, and store the measurements as data."""

import argparse
import json
import os
from pathlib import Path

from tqdm import tqdm

from ..ablations import (
    ABLATIONS,
    RESULTS,
    check_model,
    default_minutes,
    load_or_fit_plan,
    run_ablation,
    write_results,
)
from ..pipeline import SettingsError, StableDiffusion
from .arguments import positive


def add_arguments(parser: argparse.ArgumentParser):
    names = " ".join(f"{name}: {one.question}" for name, one in ABLATIONS.items())
    parser.add_argument("name", choices=[*ABLATIONS, "all"], metavar="NAME", help=f"{names} Or all of them.")
    parser.add_argument("--minutes", type=positive(float),
                        help="budget, shared out among the ablations for 'all' (default: "
                             f"{sum(one.minutes for one in ABLATIONS.values()):.0f} for all, a sixth of it on a GPU)")
    parser.add_argument("--run", type=Path, default=Path("runs/ablations"), metavar="FOLDER",
                        help="where variants are stored as they finish (%(default)s)")
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
        check_model(model)
        whole = sum(default_minutes(one, model.device) for one in chosen)
        for ablation in chosen:
            minutes = args.minutes and args.minutes * default_minutes(ablation, model.device) / whole
            print(write_results(ablation, model, show_progress(ablation, model, args.run, minutes), args.run, args.out))
    except ValueError as error:                 # of lower layers, which do not know SettingsError
        raise SettingsError(str(error)) from error


def check_folder(folder: Path):
    """Raises SettingsError for a folder that cannot be written to: asked before the work, not after."""
    above = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SettingsError(f"{folder} cannot be written: {above} is no folder that may be written to")


def show_progress(ablation, model: StableDiffusion, folder: Path, minutes: float | None):
    """Run an ablation with a progress bar for each variant and a line for each measurement; returns its plan."""
    plan = load_or_fit_plan(ablation, model, folder, minutes)
    bar, current = None, None
    for variant, measurement in run_ablation(ablation, model, plan, folder):
        if variant is not current:
            if bar is not None:
                bar.close()
            bar, current = tqdm(total=variant.steps, desc=f"{ablation.name}, {variant.name}", mininterval=2.0), variant
        bar.update(1 if measurement.step else 0)
        if measurement.figures:
            figures = {name: round(value, 4) for name, value in measurement.figures.items()}
            tqdm.write(json.dumps({"variant": variant.name, "step": measurement.step, **figures}))
    if bar is not None:
        bar.close()
    return plan
