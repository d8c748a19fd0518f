"""An evaluation beside the weights that it measured: the figures without the single pictures, and a page to read."""

import json
import textwrap
from pathlib import Path

from ..checkpoint.shipped import keep_evaluation, model_folder
from .command import FIGURES, FRECHET
from .report import percent
from .tasks import GENEVAL


def keep(out: Path, model: str | Path) -> Path:
    """Take the figures that `command.run` wrote into `out` over into the model's folder, which is given back.

    Raises CheckpointError for a model that has no folder here.
    """
    folder = model_folder(model)
    figures = json.loads((out / FIGURES).read_text(encoding="utf-8"))
    del figures["pictures"]
    keep_evaluation(folder, figures, page(figures))
    return folder


def page(figures: dict) -> str:
    """The figures as Markdown."""
    columns, settings = figures["columns"], figures["settings"]
    ceiling = columns["ceiling"]
    tasks = list(ceiling["tasks"])
    rows = [[task, *(cell(one, task) for one in columns.values())] for task in tasks]
    if GENEVAL.keys() <= set(tasks):
        rows.append(["overall, the mean of GenEval's six", *(percent(one["overall"]) for one in columns.values())])
        rows.append(["overall, of the ceiling", *(percent(one["overall"] / ceiling["overall"]) if ceiling["overall"]
                                                  else "-" for one in columns.values())])
    rows += [[told, *(percent(one[name]) for one in columns.values())] for told, name in (
        ("background, where asked", "background"), ("more than was asked for", "more than was asked for"))]
    measures = list(dict.fromkeys(name for one in columns.values() for name in one
                                  if name in ("saturation", "clipped") or name.startswith("diversity")))
    rows += [[name, *(f"{one[name]:.3f}" if name in one else "-" for one in columns.values())] for name in measures]
    if FRECHET in figures:
        rows.append(["Fréchet distance", *(f"{figures[FRECHET][title]:.3f}" if title in figures[FRECHET] else
                                          f"floor {figures[FRECHET]['floor']:.3f}" for title in columns)])
    told = f"""`python -m sdlearn evaluate --keep`, {figures['date']}, {figures['machine']}:
        {settings['prompts']} prompts of each task, {settings['seeds']} seeds each, {settings['steps']} steps of
        {settings['sampler']}. Percent of pictures that the judge finds right, with the standard error; w is the
        guidance scale. `scenes` are real scenes of the same prompts, so they tell the judge's own errors; `ceiling` is
        what is left of them after the autoencoder. The Fréchet distance is one of the towers' features to those of the
        scenes; its floor is that of as many other scenes."""
    table = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    told = textwrap.fill(" ".join(told.split()), 118)
    return "\n".join((f"# How well `{figures['model']}` follows prompts", "", told, "",
                      *(f"| {' | '.join(row)} |" for row in table), ""))


def cell(one: dict, task: str) -> str:
    error = one["standard error"].get(task)
    return percent(one["tasks"][task]) + (f" ± {100 * error:.1f}" if error is not None else "")
