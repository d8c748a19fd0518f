"""An evaluation beside the weights that it measured: the figures without the single images, and a page to read."""

import json
import textwrap
from pathlib import Path

from ..checkpoint.shipped import find_model_folder, write_evaluation
from .command import AUTOENCODER, DEFAULTS, FIGURES, FRECHET
from .report import format_percent
from .tasks import GENEVAL, HELD_OUT
from .wordings import ALL

# What the weights are meant to reach: shares of the ceiling, a share of the same scenes' prompts in the captions'
# words, a share of images, dB, and how many times the agreement without a hint.
SIX_TASKS, HELD_OUT_TASK, WORDINGS_TASK, COUNTING, PSNR, EDGES = 0.95, 0.90, 0.85, 0.85, 32.0, 3.0
MIN_PROMPTS = 40     # of a task: with fewer, a standard error is ten points and more
OVER_ALL_OBJECTS = "autoencoder PSNR on 500 unseen scenes, dB"
DRAWN = ("none", "one", "two", "three", "more")


def check_prompts(prompts: int, fewest: int = MIN_PROMPTS):
    """Raises ValueError where there are too few prompts of a task for figures that are worth keeping."""
    if prompts < fewest:
        raise ValueError(f"{prompts} prompts of each task are too few for figures to be kept; give --prompts {fewest} "
                         "or more, or leave --keep out")


def save_evaluation(out: Path, model: str | Path, *, fewest: int = MIN_PROMPTS) -> Path:
    """Save the figures that `command.run_evaluation` wrote into `out` in the model's folder; returns the folder.

    Raises ValueError for figures of fewer than `fewest` prompts a task, CheckpointError for a model that has no
    folder here; nothing is written then.
    """
    folder = find_model_folder(model)
    figures = json.loads((out / FIGURES).read_text(encoding="utf-8"))
    check_prompts(figures["settings"]["prompts"], fewest)
    del figures["images"]
    card = folder / "figures.json"
    trained = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
    write_evaluation(folder, figures, format_page(figures, trained))
    return folder


def format_page(figures: dict, trained: dict | None = None) -> str:
    """The figures as Markdown. `trained`: what `train package` measured of the same weights, if it is known."""
    columns, settings = figures["columns"], figures["settings"]
    ceiling = columns["ceiling"]
    tasks = list(ceiling["tasks"])
    rows = [[task, *(format_cell(one, task) for one in columns.values())] for task in tasks]
    if GENEVAL.keys() <= set(tasks):
        rows.append(["overall, the mean of GenEval's six",
                     *(format_with_error(one["overall"], one["standard error of overall"])
                       for one in columns.values())])
        rows.append(["overall, of the ceiling",
                     *(format_percent(one["overall"] / ceiling["overall"] if ceiling["overall"] else None)
                       for one in columns.values())])
    rows += [[told, *(format_percent(one[name]) for one in columns.values())] for told, name in (
        ("background, where asked", "background"), ("more than was asked for", "more than was asked for"))]
    measures = list(dict.fromkeys(name for one in columns.values() for name in one
                                  if name in ("saturation", "clipped") or name.startswith("diversity")))
    rows += [[name, *(f"{one[name]:.3f}" if name in one else "-" for one in columns.values())] for name in measures]
    if FRECHET in figures:
        rows.append(["Fréchet distance", *(f"{figures[FRECHET][title]:.3f}" if title in figures[FRECHET] else
                                          f"floor {figures[FRECHET]['floor']:.3f}" for title in columns)])
    told = f"""`python -m sdlearn evaluate --keep`, {figures['date']}, {figures['machine']}:
        {settings['prompts']} prompts of each task, {settings['seeds']} seeds each, {settings['steps']} steps of
        {settings['sampler']}. Percent of images that the judge finds right, with the standard error, clustered by
        prompt; w is the guidance scale. `draw_scenes` are real scenes of the same prompts, so they tell the judge's own
        errors; `ceiling` is what is left of them after the autoencoder. The rows below the overall figures are of the
        prompts in the captions' words alone. The Fréchet distance is one of the encoders' features to those of the
        scenes; its floor is that of as many other scenes."""
    table = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    told = textwrap.fill(" ".join(told.split()), 118)
    return "\n".join((f"# How well `{figures['model']}` follows prompts", "", told, "",
                      *markdown_table(table), "", *format_wordings(figures), *format_counts(figures),
                      *format_autoencoder(figures, trained or {}), *format_targets(figures, trained or {}), ""))


def format_wordings(figures: dict) -> list[str]:
    """Lines of Markdown: prompts in other wordings beside those for the same scenes in the captions' words."""
    title, _ = reported_column(figures)
    table = figures["columns"].get(title, {}).get("wordings")
    if not table:
        return []
    rows = [["at " + title, "images", "other wording", "captions' words", "ratio", "background",
             "background, captions' words"], ["---"] * 7]
    rows += [[kind, str(one["images"]), format_percent(one["other wording"]), format_percent(one["captions' words"]),
              format_with_error(one["ratio"], one["standard error of the ratio"]),
              *(format_percent(one[f"background, {name}"]) for name in ("other wording", "captions' words"))]
             for kind, one in table.items()]
    return ["## Other wordings", "", *textwrap.wrap(
        "Prompts that were written by hand and that training never renders, beside prompts for the same scenes in the "
        "captions' words: percent of images that are right, by kind of wording.", 118), "", *markdown_table(rows), ""]


def format_counts(figures: dict) -> list[str]:
    """Lines of Markdown: how many objects are drawn where so many are asked for."""
    columns, (title, _) = figures["columns"], reported_column(figures)
    rows = [["asked for", "from", *DRAWN], ["---"] * (len(DRAWN) + 2)]
    for name in filter(columns.__contains__, dict.fromkeys((title, "ceiling"))):
        for asked, drawn in columns[name].get("counts", {}).items():
            images = sum(drawn.values())
            shares = [0.0] * len(DRAWN)
            for number, some in drawn.items():
                shares[min(int(number), len(DRAWN) - 1)] += some / images
            rows.append([DRAWN[int(asked)], f"{name}, {images} images", *map(format_percent, shares)])
    if len(rows) == 2:
        return []
    return ["## Counting", "", *textwrap.wrap(
        "How many are drawn where one, two or three of an object are asked for and nothing else: percent of images of "
        "the tasks \"one object\" and \"counting\".", 118), "", *markdown_table(rows), ""]


def format_autoencoder(figures: dict, trained: dict) -> list[str]:
    """Lines of Markdown: what the autoencoder preserves."""
    found = figures.get(AUTOENCODER)
    if not found:
        return []
    rows = [["PSNR, dB, mean over scenes", ""], ["---"] * 2]
    rows += [[name, f"{value:.1f}"] for name, value in found.items() if name != "scenes"]
    if OVER_ALL_OBJECTS in trained:
        rows.append(["PSNR, scenes of all objects (the card's)", f"{trained[OVER_ALL_OBJECTS]:.1f}"])
    return ["## Autoencoder", "", *textwrap.wrap(
        f"Round trip of {found['scenes']} unseen scenes of the model's objects: of the latent as it is encoded, and "
        "with Gaussian noise on it; within the boxes of small objects, too.", 118), "", *markdown_table(rows), ""]


def markdown_table(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def reported_column(figures: dict) -> tuple[str | None, str]:
    """The title of the column that the aims are measured in, and why: that of the model's default guidance scale, or,
    where it was not measured, of the best scale for the six tasks. None without a column of the model."""
    columns = figures["columns"]
    scales = [title for title in columns if title.startswith("w = ")]
    if DEFAULTS in figures and (default := f"w = {figures[DEFAULTS]['guidance_scale']:g}") in scales:
        return default, "the model's default"
    if not scales:
        return None, ""
    return max(scales, key=lambda title: columns[title].get("overall") or 0.0), "the best for the six"


def format_targets(figures: dict, trained: dict) -> list[str]:
    """Lines of Markdown: what was aimed at, what was measured, and what stands in the way of what is not reached."""
    rows = measure_targets(figures, trained)
    if not rows:
        return []
    table = [["", "aim", "measured", "reached"], ["---"] * 4]
    table += [[what, f"{aim:g}{unit}", "-" if value is None else f"{value:.1f}{unit}", "yes" if value is not None
               and value >= aim else "no"] for what, aim, value, unit in rows]
    lines = ["## What is reached, and what is not", "", *markdown_table(table), ""]
    if all(row[-1] == "yes" for row in table[2:]):
        return [*lines, "All that was aimed at is reached."]
    return lines + textwrap.wrap(explain_missed_targets(trained), 118)


def measure_targets(figures: dict, trained: dict) -> list[tuple[str, float, float | None, str]]:
    """What, the aim, what was measured, and the unit of both: of whatever there are figures of."""
    ceiling, rows = figures["columns"]["ceiling"], []
    title, why = reported_column(figures)
    if title and GENEVAL.keys() <= set(ceiling["tasks"]):
        chosen, where = figures["columns"][title], f"at {title}, {why}"
        rows.append((f"mean of GenEval's six, of the ceiling, {where}", 100 * SIX_TASKS,
                     percent_of(chosen["overall"], ceiling["overall"]), " %"))
        if HELD_OUT in ceiling["tasks"]:
            rows.append((f"held-out combinations, of their ceiling, {where}", 100 * HELD_OUT_TASK,
                         percent_of(chosen["tasks"][HELD_OUT], ceiling["tasks"][HELD_OUT]), " %"))
        if wording := chosen.get("wordings", {}).get(ALL):
            rows.append((f"other wordings, of the same scenes in the captions' words, {where}", 100 * WORDINGS_TASK,
                         percent_of(wording["other wording"], wording["captions' words"]), " %"))
        rows.append((f"counting, {where}", 100 * COUNTING, 100 * chosen["tasks"]["counting"], " %"))
    if AUTOENCODER in figures:
        rows.append(("autoencoder, PSNR of unseen scenes of the model's objects", PSNR, figures[AUTOENCODER]["PSNR"],
                     " dB"))
    if edges := trained.get("on top", {}).get("edges"):
        rows.append(("edges: agreement with the hint, beside that without it", EDGES,
                     edges["edge_f1_with_hint"] / max(edges["edge_f1_without"], 1e-9), " times"))
    return rows


def explain_missed_targets(trained: dict) -> str:
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


def percent_of(share: float, most: float) -> float | None:
    return 100 * share / most if most else None


def format_cell(one: dict, task: str) -> str:
    return format_with_error(one["tasks"][task], one["standard error"].get(task))


def format_with_error(share: float | None, error: float | None) -> str:
    return format_percent(share) + (f" ± {100 * error:.1f}" if error is not None else "")
