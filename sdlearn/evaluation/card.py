"""Shipping the judge: its weights, what it gets right on scenes it has never seen, and a card that says so."""

import json
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import read_json
from ..data import CORE, FULL
from .accuracy import measure_accuracy
from .detector import Detector
from .judge import WEIGHTS, Judge, load_judge, save_judge
from .report import describe_environment, format_percent
from .sampling import encode_decode

FIGURES, CARD = "figures.json", "MODEL_CARD.md"


def measure_judge(judge: Judge, *, count: int, vae=None) -> dict[str, dict[str, float]]:
    """Accuracy on `count` unseen scenes of each kind, by kind; on a quarter as many through an autoencoder, if any."""
    kinds = {"all objects": {"world": FULL}, "core objects": {"world": CORE},
             "held-out combinations": {"split": "held_out"}}
    told = {f"{kind} ({count:,} scenes)": measure_accuracy(judge, count=count, **options)
            for kind, options in kinds.items()}
    if vae is not None:
        few = max(1, count // 4)
        told[f"core objects through mini's autoencoder ({few:,} scenes)"] = measure_accuracy(
            judge, count=few, world=CORE, change=partial(encode_decode, vae))
    return told


def package_judge(detector: Detector, progress: dict, out: Path | None = None, *, count: int = 1000, vae=None) -> Path:
    """Write a detector in half precision with its figures and card; the figures are those of the weights as written.

    progress: steps, samples and seconds of training. Raises OSError where the folder cannot be written.
    """
    folder = save_judge(out or WEIGHTS, detector, dtype=torch.float16)
    judge = load_judge(folder)
    figures = {"unseen scenes": measure_judge(judge, count=count, vae=vae),
               "training": {name: progress[name] for name in ("step", "samples", "seconds")}, **describe_environment()}
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(format_card(judge, figures), encoding="utf-8")
    return folder


def load_figures(folder: Path = WEIGHTS) -> dict | None:
    """What `package_judge` measured; None for weights without figures."""
    return read_json(folder / FIGURES) if (folder / FIGURES).exists() else None


def format_card(judge: Judge, figures: dict) -> str:
    """The judge's card, in Markdown; every number in it was measured or read off the network."""
    config, kinds, training = judge.config, figures["unseen scenes"], figures["training"]
    names = list(dict.fromkeys(name for shares in kinds.values() for name in shares))
    rows = [f"| {name} | " + " | ".join(format_percent(shares.get(name)) for shares in kinds.values()) + " |"
            for name in names]
    count = sum(parameter.numel() for parameter in judge.detector.parameters())
    return "\n".join((
        "# The judge", "",
        f"A detector of {count / 1e6:.2f} M parameters that finds the {len(config.objects)} objects of the scenes, the "
        "colours they", "show and the background, in images of any size. It says how well a model follows its "
        "prompts: see", "`python -m sdlearn evaluate`. It is made after Zhou et al. 2019, \"Objects as points\".", "",
        "## Training", "",
        "On scenes of `sdlearn.data` alone, drawn on the fly, never on images of a model. In half of them every",
        "combination of objects and colours is as likely as any other, so that the held-out ones are no stranger to it",
        "than the rest. Three in four are blurred, shifted in colour and given fine and coarse noise, so that what an",
        "autoencoder does to an image does not matter. Three in ten have blobs behind their objects, outlined, in the",
        "same colours, that are nothing: what a model draws that has learnt little. One in twenty has no object.", "",
        f"`python -m sdlearn train judge`: {training['step']:,} steps, {training['samples']:,} scenes, "
        f"{training['seconds'] / 60:.0f} minutes of", f"{figures['machine']}, shared with other work.", "",
        "## Figures", "",
        f"On scenes that training has not seen, in percent, measured {figures['date']}. A detection is right when its "
        "class is,", "and its box shares half of the area that both cover.", "",
        "| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|", *rows, "",
        "A colour is the one that is seen: an apple that is red by nature and one that is tinted red are one and the",
        "same image. Classes that come in one look only have no colour.", "",
        "## Limits", "",
        "It knows the drawings of the scenes. What it says of other images, photographs say, means nothing; a thing",
        f"that is only nearly drawn may be found or not, at its threshold of {config.threshold}, and a blob in an "
        "object's colours", "may be taken for the object: look at the sheet of failures, and at the images.", "",
        "## Licence", "",
        "Trained on OpenMoji art, so shared under CC BY-SA 4.0. All emojis designed by OpenMoji, the open-source emoji",
        "and icon project.", ""))
