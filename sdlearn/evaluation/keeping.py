"""An evaluation beside the weights that it measured: the figures without the single pictures, and a page to read."""

import json
import textwrap
from pathlib import Path

from ..checkpoint.shipped import keep_evaluation, model_folder
from .command import FIGURES, FRECHET
from .report import percent
from .tasks import GENEVAL, HELD_OUT

# What the weights are meant to reach: shares of the ceiling, dB, and how many times the agreement without a hint.
SIX_TASKS, HELD_OUT_TASK, AUTOENCODER, EDGES = 0.95, 0.85, 30.0, 3.0
PSNR = "autoencoder PSNR on 500 unseen scenes, dB"


def keep(out: Path, model: str | Path) -> Path:
    """Take the figures that `command.run` wrote into `out` over into the model's folder, which is given back.

    Raises CheckpointError for a model that has no folder here.
    """
    folder = model_folder(model)
    figures = json.loads((out / FIGURES).read_text(encoding="utf-8"))
    del figures["pictures"]
    card = folder / "figures.json"
    trained = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
    keep_evaluation(folder, figures, page(figures, trained))
    return folder


def page(figures: dict, trained: dict | None = None) -> str:
    """The figures as Markdown. `trained`: what `train ship` measured of the same weights, if it is known."""
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
                      *(f"| {' | '.join(row)} |" for row in table), "", *reached(figures, trained or {}), ""))


def reached(figures: dict, trained: dict) -> list[str]:
    """Lines of Markdown: what was aimed at, what was measured, and what stands in the way of what is not reached."""
    rows = aims(figures, trained)
    if not rows:
        return []
    table = [["", "aim", "measured", "reached"], ["---"] * 4]
    table += [[what, f"{aim:g}{unit}", "-" if value is None else f"{value:.1f}{unit}", "yes" if value is not None
               and value >= aim else "no"] for what, aim, value, unit in rows]
    lines = ["## What is reached, and what is not", "", *(f"| {' | '.join(row)} |" for row in table), ""]
    if all(row[-1] == "yes" for row in table[2:]):
        return [*lines, "All that was aimed at is reached."]
    return lines + textwrap.wrap(in_the_way(trained), 118)


def aims(figures: dict, trained: dict) -> list[tuple[str, float, float | None, str]]:
    """What, the aim, what was measured, and the unit of both: of whatever there are figures of."""
    columns, ceiling, rows = figures["columns"], figures["columns"]["ceiling"], []
    scales = [title for title in columns if title.startswith("w = ")]
    if scales and GENEVAL.keys() <= set(ceiling["tasks"]):
        best = max(scales, key=lambda title: columns[title]["overall"])
        found = [("mean of GenEval's six", SIX_TASKS, columns[best]["overall"], ceiling["overall"])]
        if HELD_OUT in ceiling["tasks"]:
            found.append(("held-out combinations", HELD_OUT_TASK, *(one["tasks"][HELD_OUT]
                                                                    for one in (columns[best], ceiling))))
        rows += [(f"{what}, of the ceiling, at {best}, the best for the six", 100 * aim,
                  100 * share / most if most else None, " %") for what, aim, share, most in found]
    if PSNR in trained:
        rows.append(("autoencoder, PSNR of unseen scenes", AUTOENCODER, trained[PSNR], " dB"))
    if edges := trained.get("on top", {}).get("edges"):
        rows.append(("edges: agreement with the hint, beside that without it", EDGES,
                     edges["edge_f1_with_hint"] / max(edges["edge_f1_without"], 1e-9), " times"))
    return rows


def in_the_way(trained: dict) -> str:
    """Of what is not reached."""
    told = trained.get("training", {})
    if not told:
        return "How long these weights were trained is not told beside them."
    hours = {stage: one.get("seconds", 0.0) / 3600 for stage, one in told.items()}
    longest, machine = max(hours, key=hours.get), trained.get("machine", "an unknown machine")
    return (f"These weights have had {sum(hours.values()):.1f} hours of training in all ({longest}: "
            f"{hours[longest]:.1f}) on {machine}. Whether more of it would do for the rest, or other recipes are "
            "needed, this table does not tell; the model card has what was tried. `python -m sdlearn train` goes on "
            "from them.")


def cell(one: dict, task: str) -> str:
    error = one["standard error"].get(task)
    return percent(one["tasks"][task]) + (f" ± {100 * error:.1f}" if error is not None else "")
