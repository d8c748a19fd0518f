"""How far the judge itself can be trusted: its precision and recall on scenes that it has never seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from ..data import FULL, OBJECTS, World, contact_sheet, draw_scene
from ..data.scenes import Scene
from ..data.world import SIZES
from .detector import Detector, visible_colour
from .judge import Detections, Judge, box_iou

MATCH_IOU = 0.5             # intersection over union from which a detection is of an object


@dataclass
class DetectionCounts:
    """Counts over scenes, and the shares that follow from them."""

    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))      # by size class
    there: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIZES, 0))
    detections: int = 0
    coloured: int = 0           # found objects whose class has colours
    colour: int = 0             # of these, with the right one
    background: int = 0
    whole: int = 0              # scenes with nothing wrong at all
    scenes: int = 0

    def add(self, one: Scene, seen: Detections):
        pairs = match_detections(one, seen)
        for placed in one.objects:
            self.there[placed.size] += 1
        for placed, detection in pairs:
            self.found[placed.size] += 1
            if OBJECTS[placed.name].tintable:
                self.coloured += 1
                self.colour += detection.colour == visible_colour(placed.name, placed.colour)
        self.detections += len(seen.objects)
        self.background += seen.background == one.background
        self.scenes += 1
        exact = len(pairs) == len(one.objects) == len(seen.objects) and seen.background == one.background
        self.whole += exact and all(detection.colour == visible_colour(placed.name, placed.colour)
                                    for placed, detection in pairs if OBJECTS[placed.name].tintable)

    def figures(self) -> dict[str, float]:
        """Shares, by name; a share of nothing is left out."""
        found, there = sum(self.found.values()), sum(self.there.values())
        shares = {
            "precision": (found, self.detections), "recall": (found, there),
            **{f"recall of {size} objects": (self.found[size], self.there[size]) for size in SIZES},
            "colour": (self.colour, self.coloured), "background": (self.background, self.scenes),
            "scenes without an error": (self.whole, self.scenes),
        }
        return {name: part / whole for name, (part, whole) in shares.items() if whole}


def match_detections(one: Scene, seen: Detections) -> list[tuple]:
    """(object, detection) that belong together: of one class, boxes that share half, the surest detection first;
    each object and each detection once."""
    pairs, left = [], list(one.objects)
    for detection in seen.objects:
        same = [placed for placed in left if placed.name == detection.name]
        best = max(same, key=lambda placed: box_iou(placed.box, detection.box), default=None)
        if best is not None and box_iou(best.box, detection.box) >= MATCH_IOU:
            pairs.append((best, detection))
            left.remove(best)
    return pairs


def measure_accuracy(judge: Judge, *, count: int = 1000, start: int = 0, split: str = "test", world: World = FULL,
             change=lambda images: images) -> dict[str, float]:
    """Precision, recall (all, and by size class), colour, background, and scenes without any error.

    change: what is done to the images (a list of bytes (H, W, 3)) before the judge sees them.
    """
    tally = DetectionCounts()
    for first in range(start, start + count, 32):
        drawn = [draw_scene(seed, split, world) for seed in range(first, min(first + 32, start + count))]
        for one, seen in zip(drawn, judge.detect(change([one.image for one in drawn])), strict=True):
            tally.add(one, seen)
    return tally.figures()


def measure_on_scenes(model: Detector, *, count: int = 512, shown: int = 16, world: World = FULL):
    """Figures of a detector in training, and a sheet of what it finds in the first scenes."""
    judge = Judge(model)
    drawn = [draw_scene(seed, "test", world) for seed in range(shown)]
    images = [one.image for one in drawn]
    return measure_accuracy(judge, count=count, world=world), detection_sheet(images, judge.detect(images))


def detection_sheet(images: Sequence, found: Sequence[Detections], *, columns: int = 4, zoom: int = 2,
                    captions: Sequence[str] | None = None) -> Image.Image:
    """Images (PIL, or bytes (H, W, 3)) with the boxes of what the judge saw, and its words beneath each."""
    told = captions or [describe_detections(seen) for seen in found]
    boxed = [draw_boxes(image, seen, zoom) for image, seen in zip(images, found, strict=True)]
    return contact_sheet(boxed, told, columns, lines=3)


def draw_boxes(image, seen: Detections, zoom: int = 2) -> np.ndarray:
    """The image `zoom` times larger, with a box around every object found."""
    shown = Image.fromarray(np.asarray(image))
    shown = shown.resize((shown.width * zoom, shown.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(shown)
    for one in seen.objects:
        left, top, right, bottom = (zoom * side for side in one.box)
        draw.rectangle((left, top, right, bottom), outline="#ff00aa")
        draw.text((left + 2, top + 1), f"{one.name} {one.score:.2f}", fill="#ff00aa")
    return np.asarray(shown)


def describe_detections(seen: Detections) -> str:
    """What the judge saw, in words."""
    things = [" ".join(filter(None, (one.colour, one.name))) for one in seen.objects]
    return f"{', '.join(things) or 'nothing'} on {seen.background}"
