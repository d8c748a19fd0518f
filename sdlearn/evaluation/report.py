"""An evaluation as a table, as JSON with every single result, and as a sheet of failures."""

import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import torch
from PIL import Image

from ..machine import machine_name
from .accuracy import describe_detections, detection_sheet
from .metrics import clipped_share, feature_diversity, group_by_prompt, pixel_diversity, saturation
from .sampling import JudgedImage, score_images
from .scoring import Scores, count_confusion, mean
from .tasks import GENEVAL
from .wordings import compare_wordings

MAX_FAILURES = 28              # failures on the sheet


@dataclass(frozen=True)
class Column:
    """One column of the table: where the images come from, and what the judge says of them."""

    title: str
    scores: Scores
    measures: dict[str, float]
    counts: dict[int, dict[int, int]]           # see `scoring.count_confusion`
    wordings: dict[str, dict[str, float]]       # see `wordings.compare_wordings`


def make_column(title: str, judged: Sequence[JudgedImage], clip=None) -> Column:
    """Scores of images, and measures of those of prompts in the captions' words.

    clip: the model's encoders, if it has any that see images of this size.
    """
    plain = with_caption_wording(judged)
    groups = [group for group in group_by_prompt([one.image for one in plain], [one.prompt for one in plain]).values()
              if len(group) > 1]
    images = [one.image for one in plain]
    measures = {"saturation": float(saturation(images).mean()), "clipped": float(clipped_share(images).mean())}
    if groups:
        measures["diversity, pixels"] = mean([pixel_diversity(group) for group in groups])
    side = clip.vision_model.config.image_size if clip is not None else None
    if groups and images[0].shape[:2] == (side, side):
        measures["diversity, features"] = mean([feature_diversity(clip, group) for group in groups])
    counts = count_confusion([one.prompt for one in judged], [one.verdict for one in judged])
    return Column(title, score_images(judged), measures, counts, compare_wordings(judged))


def with_caption_wording(judged: Sequence[JudgedImage]) -> list[JudgedImage]:
    """Those of the seven tasks whose prompts are drawn."""
    return [one for one in judged if one.prompt.kind is None]


def format_table(columns: Sequence[Column]) -> str:
    """Tasks as rows, in percent; the measures beneath."""
    tasks = list(columns[0].scores.tasks)
    rows = [(task, [one.scores.tasks[task] for one in columns]) for task in tasks]
    if GENEVAL.keys() <= set(tasks):
        rows.append(("overall (mean of the six)", [one.scores.overall for one in columns]))
    rows.append(("background, where asked", [one.scores.background for one in columns]))
    rows.append(("more than was asked for", [one.scores.duplicates for one in columns]))
    lines = [format_row("% of images", [one.title for one in columns])]
    lines += [format_row(name, [format_percent(share) for share in shares]) for name, shares in rows]
    names = list(dict.fromkeys(name for one in columns for name in one.measures))
    lines += [format_row(name, [format_number(one.measures.get(name)) for one in columns]) for name in names]
    return "\n".join(lines)


def format_row(name: str, cells: Sequence[str]) -> str:
    return f"{name:26}" + "".join(f"{cell:>11}" for cell in cells)


def format_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def column_to_dict(one: Column) -> dict:
    """A column for JSON; the standard errors are clustered by prompt."""
    return {"tasks": one.scores.tasks, "standard error": one.scores.errors,
            "overall": one.scores.overall, "standard error of overall": one.scores.overall_error,
            "background": one.scores.background, "more than was asked for": one.scores.duplicates,
            "images": one.scores.images, **one.measures, "counts": one.counts, "wordings": one.wordings}


def results_to_dicts(judged: Sequence[JudgedImage]) -> list[dict]:
    """Every image for JSON: what was asked, what the judge saw, and the verdict."""
    return [{"task": one.prompt.task, "kind": one.prompt.kind, "prompt": one.prompt.text, "seed": one.seed,
             "right": one.verdict.right, "wrong": list(one.verdict.wrong), "background": one.verdict.background,
             "seen": describe_detections(one.verdict.detections)}
            for one in judged]


def pick_failures(judged: Sequence[JudgedImage], count: int = MAX_FAILURES) -> list[JudgedImage]:
    """Failures, evenly from all tasks: those with the most that is wrong first, then those in which the judge
    found least."""
    tasks = defaultdict(list)
    for one in judged:
        if not one.verdict.right:
            tasks[one.prompt.task].append(one)
    for some in tasks.values():
        some.sort(key=lambda one: (-len(one.verdict.wrong), sum(d.score for d in one.verdict.detections.objects)))
    ranked = sorted(((place, order, one) for order, some in enumerate(tasks.values())
                     for place, one in enumerate(some)), key=lambda item: item[:2])
    chosen = [one for _, _, one in ranked[:count]]
    return sorted(chosen, key=lambda one: list(tasks).index(one.prompt.task))


def failure_sheet(judged: Sequence[JudgedImage]) -> Image.Image:
    """Images with the boxes of what the judge saw; beneath, what was asked, and why it is wrong."""
    captions = [f"{one.prompt.text} (seed {one.seed}) - {'; '.join(one.verdict.wrong)}" for one in judged]
    return detection_sheet([one.image for one in judged], [one.verdict.detections for one in judged], captions=captions)


def describe_environment() -> dict:
    """Where and with what an evaluation was run."""
    return {"machine": machine_name("cuda" if torch.cuda.is_available() else "cpu"),
            "python": platform.python_version(), "torch": torch.__version__, "date": str(date.today())}
