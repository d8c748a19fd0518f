"""Is an image what the prompt asks for? GenEval's rules on what the judge saw.

Ghosh et al. 2023, section 3: all wanted objects are there; of a count, exactly so many; a colour is that of the
detections with the highest scores; a relation is read off the centres of the boxes.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.captions import RELATION_PHRASES
from .judge import Detection, Detections, Judge, load_judge
from .tasks import GENEVAL, ObjectSpec, Prompt, SceneSpec

# GenEval's reading of a relation: what centres are apart, less a tenth of both extents on each axis, points in the
# direction that is named, or up to 60 degrees (cosine 0.5) beside it.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
MARGIN, LEAST_COSINE = 0.1, 0.5


@dataclass(frozen=True)
class Verdict:
    """Right or wrong, and why. `background` is None where none was asked for."""

    right: bool
    wrong: tuple[str, ...]          # what is missing or different, in words; empty when right
    background: bool | None
    detections: Detections


def judge_image(wanted: SceneSpec, seen: Detections) -> Verdict:
    """What the judge's findings in one image mean for what was wanted of it."""
    groups = [[one for one in seen.objects if one.name == thing.name][:thing.count] for thing in wanted.objects]
    wrong = []
    for thing, group in zip(wanted.objects, groups, strict=True):
        there = sum(one.name == thing.name for one in seen.objects)
        if there < thing.count or (thing.count > 1 and there > thing.count):
            wrong.append(f"{there} {thing.name}, not {thing.count}")
        wrong += [f"{one.colour or 'natural'} {thing.name}, not {thing.colour}" for one in group
                  if thing.colour and one.colour != thing.colour]
    if wanted.relation and all(groups):
        (first, *_), (second, *_) = groups
        if not is_in_relation(first, second, wanted.relation):
            wrong.append(f"{first.name} not {RELATION_PHRASES[wanted.relation][0]} {second.name}")
    background = None if wanted.background is None else seen.background == wanted.background
    return Verdict(not wrong, tuple(wrong), background, seen)


def is_in_relation(first: Detection, second: Detection, relation: str) -> bool:
    """Whether the first lies left of, right of, above or below the second."""
    apart = []
    for low, high in ((0, 2), (1, 3)):                                                # along x, along y
        extents = first.box[high] - first.box[low] + second.box[high] - second.box[low]
        between = (first.box[low] + first.box[high] - second.box[low] - second.box[high]) / 2
        apart.append(math.copysign(max(abs(between) - MARGIN * extents, 0.0), between))
    away = math.hypot(*apart)
    across, down = DIRECTIONS[relation]
    return away > 0 and (apart[0] * across + apart[1] * down) / away > LEAST_COSINE


def judge_images(images, prompts: Sequence[Prompt], judge: Judge | None = None) -> list[Verdict]:
    """A verdict on each image: PIL images, bytes (H, W, 3), or pixels (B, 3, H, W) in [-1, 1].

    Raises ValueError when there is not one prompt for each image, CheckpointError where no judge is there.
    """
    if len(images) != len(prompts):
        raise ValueError(f"there are {len(images)} images for {len(prompts)} prompts; give one prompt for each")
    judge = judge or load_judge()
    return [judge_image(prompt.spec, seen) for prompt, seen in zip(prompts, judge.detect(images), strict=True)]


@dataclass(frozen=True)
class Scores:
    """Shares of right images."""

    tasks: dict[str, float]
    errors: dict[str, float | None]     # standard errors of these, clustered by prompt; None of a single prompt
    overall: float | None           # mean of GenEval's six tasks; None unless all six are there
    background: float | None        # share of right backgrounds where one was asked for
    duplicates: float               # share of images with more of a thing than was asked for
    images: int

    @property
    def overall_error(self) -> float | None:
        """Standard error of `overall`, the tasks being independent of each other; None where one is not known."""
        errors = [self.errors.get(task) for task in GENEVAL]
        return None if None in errors else math.hypot(*errors) / len(errors)


def compute_scores(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> Scores:
    """The shares over images; one prompt for each verdict. Raises ValueError when there is none.

    Backgrounds and duplicates are those of the prompts in the captions' words, as far as there are any.
    """
    if not verdicts or len(prompts) != len(verdicts):
        raise ValueError(f"scores need one verdict for each prompt, and one at least, not {len(verdicts)} verdicts "
                         f"for {len(prompts)} prompts")
    right = defaultdict(lambda: defaultdict(list))          # by task, and by prompt
    for prompt, one in zip(prompts, verdicts, strict=True):
        right[prompt.task][prompt.text].append(one.right)
    tasks = {task: mean([value for group in some.values() for value in group]) for task, some in right.items()}
    pairs = list(zip(prompts, verdicts, strict=True))
    pairs = [pair for pair in pairs if pair[0].kind is None] or pairs
    grounds = [one.background for _, one in pairs if one.background is not None]
    return Scores(tasks, {task: clustered_error(list(some.values())) for task, some in right.items()},
                  mean([tasks[task] for task in GENEVAL]) if GENEVAL.keys() <= tasks.keys() else None,
                  mean(grounds) if grounds else None,
                  duplicate_rate([prompt for prompt, _ in pairs], [one.detections for _, one in pairs]), len(verdicts))


def clustered_error(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the mean of all values, where those of one group depend on each other.

    Cluster-robust: sqrt(G / (G - 1) * sum over the G groups of (sum of a group's deviations from the mean)^2) / N.
    The images of one prompt are a group, since an easy prompt is right with every seed. None for a single group.
    Cameron and Miller 2015, "A practitioner's guide to cluster-robust inference", section II.
    """
    if len(groups) < 2:
        return None
    values = [value for group in groups for value in group]
    centre = mean(values)
    squares = sum(sum(value - centre for value in group) ** 2 for group in groups)
    return math.sqrt(len(groups) / (len(groups) - 1) * squares) / len(values)


def count_confusion(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> dict[int, dict[int, int]]:
    """How many images have m objects where n were asked for, as {n: {m: images}}.

    Of the tasks that ask for one kind of object in any colour: one object, and counting.
    """
    table = defaultdict(Counter)
    for prompt, one in zip(prompts, verdicts, strict=True):
        if prompt.task in ("one object", "counting"):
            [thing] = prompt.spec.objects
            table[thing.count][thing.count + count_excess(thing, one.detections)] += 1
    return {n: dict(sorted(table[n].items())) for n in sorted(table)}


def duplicate_rate(prompts: Sequence[Prompt], seen: Sequence[Detections]) -> float:
    """Share of images in which something that was asked for is there more often than asked."""
    return mean([any(count_excess(thing, one) > 0 for thing in prompt.spec.objects)
                 for prompt, one in zip(prompts, seen, strict=True)])


def count_excess(thing: ObjectSpec, seen: Detections) -> int:
    """By how many there are more of a thing than asked for; negative when there are fewer."""
    return sum(one.name == thing.name for one in seen.objects) - thing.count


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
