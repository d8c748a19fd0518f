"""`python -m sdlearn train`: the model's parts, and the judge that tells how good they are."""

import argparse
from pathlib import Path

from ..config import ModelConfig
from ..evaluation.accuracy import measure_on_scenes
from ..evaluation.card import package_judge
from ..evaluation.detector import Detector, detection_loss
from ..pipeline import StableDiffusion
from ..training import command, stages
from ..training.judge import JudgeRecipe
from ..training.loop import load_state

SHIP_JUDGE = "ship-judge"


def make_judge(config: ModelConfig, run: Path, **options) -> JudgeRecipe:
    """The judge's recipe: network, loss and figures belong to evaluation, which does not know training, nor the
    other way round."""
    return JudgeRecipe(Detector(), detection_loss, measure_on_scenes, **options)


JUDGE = {JudgeRecipe.name: stages.Stage(make_judge, 40)}


def add_arguments(parser: argparse.ArgumentParser):
    command.add_arguments(parser, beside=(*JUDGE, SHIP_JUDGE))


def run(args: argparse.Namespace):
    if args.stage in JUDGE:
        command.run(args, beside=JUDGE)
    elif args.stage == SHIP_JUDGE:
        ship(args)
    else:
        command.run(args)


def ship(args: argparse.Namespace):
    """Write a run's judge with its figures, those of scenes through `mini`'s autoencoder among them."""
    detector = stages.load_averaged(Detector(), args.run, JudgeRecipe.name)
    progress = load_state(args.run / f"{JudgeRecipe.name}-state.pt")["progress"]
    print(f"written: {package_judge(detector, progress, args.out, vae=StableDiffusion.load(device='cpu').vae)}")
