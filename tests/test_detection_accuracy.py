"""Precision and recall of detections on scenes: which detection is of which object, and over what the shares are."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdlearn.data import CORE, PlacedObject, Scene, draw_scene
from sdlearn.evaluation import Detection, Detections, DetectorConfig, visible_colour
from sdlearn.evaluation.accuracy import DetectionCounts, match_detections, measure_accuracy
from sdlearn.evaluation.detector import STRIDE, UNIT, Heads
from sdlearn.evaluation.judge import decode_heads


def placed(name, box, colour=None, size="medium"):
    return PlacedObject(name, "animal", colour, size, box, 0)


def scene_with(*objects, background="white"):
    return Scene(0, "test", "", objects, background, (255, 255, 255), None)


def found(name, box, score=0.9, colour=None):
    return Detection(name, box, score, colour)


def seen(*detections, background="white"):
    return Detections(tuple(sorted(detections, key=lambda one: -one.score)), background)


def shifted(box, iou):
    """The box, moved to the right until the intersection over union with where it was is `iou`."""
    left, top, right, bottom = box
    by = (right - left) * (1 - iou) / (1 + iou)
    return left + by, top, right + by, bottom


BOX, FAR = (10, 20, 50, 60), (70, 70, 120, 110)


@pytest.mark.parametrize("iou, count", [(0.99, 1), (0.52, 1), (0.48, 0), (0.3, 0), (0.1, 0)])
def test_a_detection_matches_from_an_iou_of_one_half(iou, count):
    assert len(match_detections(scene_with(placed("cat", BOX)), seen(found("cat", shifted(BOX, iou))))) == count


def test_a_detection_matches_only_its_own_class():
    assert match_detections(scene_with(placed("cat", BOX)), seen(found("dog", BOX))) == []


def test_an_object_is_matched_once_by_the_detection_with_the_highest_score():
    cat, sure, doubtful = placed("cat", BOX), found("cat", shifted(BOX, 0.8), 0.9), found("cat", BOX, 0.4)
    assert match_detections(scene_with(cat), seen(sure, doubtful)) == [(cat, sure)]


def test_a_detection_is_matched_once_with_the_object_of_the_highest_iou():
    near, far = placed("cat", shifted(BOX, 0.7)), placed("cat", shifted(BOX, 0.9))
    detection = found("cat", BOX)
    assert match_detections(scene_with(near, far), seen(detection)) == [(far, detection)]
    assert match_detections(scene_with(far, near), seen(detection)) == [(far, detection)]


def test_two_objects_of_a_class_have_a_detection_each():
    a, b = placed("cat", BOX), placed("cat", FAR)
    of_a, of_b, third = found("cat", BOX, 0.5), found("cat", FAR, 0.8), found("cat", shifted(FAR, 0.9), 0.3)
    pairs = match_detections(scene_with(a, b), seen(of_a, of_b, third))
    assert sorted(pairs, key=lambda pair: pair[0].box) == [(a, of_a), (b, of_b)]


def figures_of(*cases):
    tally = DetectionCounts()
    for one, detections in cases:
        tally.add(one, detections)
    return tally.figures()


def test_precision_is_over_detections_and_recall_over_objects():
    one = scene_with(placed("cat", BOX), placed("dog", FAR))
    twice = figures_of((one, seen(found("cat", BOX), found("cat", BOX, 0.5), found("cat", shifted(BOX, 0.9), 0.4))))
    assert (twice["precision"], twice["recall"]) == (pytest.approx(1 / 3), 0.5)
    few = figures_of((one, seen(found("cat", BOX))), (one, seen()))
    assert (few["precision"], few["recall"]) == (1, 0.25), "over all scenes together, not a mean of each scene's"
    assert "precision" not in figures_of((one, seen())), "a share of nothing"
    none = figures_of((scene_with(), seen(found("cat", BOX))))
    assert none["precision"] == 0 and "recall" not in none


def test_recall_by_size_is_over_objects_of_that_size():
    one = scene_with(placed("cat", BOX, size="small"), placed("dog", FAR, size="large"))
    shares = figures_of((one, seen(found("dog", FAR))), (one, seen(found("dog", FAR), found("cat", BOX))))
    assert shares["recall of small objects"] == 0.5 and shares["recall of large objects"] == 1
    assert "recall of medium objects" not in shares


def test_colours_are_counted_over_found_objects_that_take_a_tint():
    one = scene_with(placed("cat", BOX), placed("apple", FAR, "blue"))
    right = seen(found("cat", BOX), found("apple", FAR, colour="blue"))
    wrong = seen(found("cat", BOX), found("apple", FAR, colour="red"))
    missed = seen(found("cat", BOX))
    assert figures_of((one, right), (one, wrong), (one, missed), (one, right))["colour"] == pytest.approx(2 / 3)
    assert "colour" not in figures_of((one, missed))
    natural = scene_with(placed("apple", FAR))
    assert figures_of((natural, seen(found("apple", FAR, colour="red"))))["colour"] == 1, "the colour that is seen"


def test_a_scene_without_an_error_has_all_objects_no_other_and_the_right_colours_and_background():
    one = scene_with(placed("apple", FAR, "blue"), background="pink")
    right = found("apple", FAR, colour="blue")
    cases = {1: seen(right, background="pink"), 0: seen(right, background="white")}
    for share, detections in cases.items():
        told = figures_of((one, detections))
        assert told["scenes without an error"] == told["background"] == share
    for detections in ((), (right, found("cat", BOX)), (right, replace(right, score=0.2)),
                       (found("apple", FAR, colour="red"),), (found("apple", BOX, colour="blue"),)):
        told = figures_of((one, seen(*detections, background="pink")))
        assert told["scenes without an error"] == 0 and told["background"] == 1, detections


class Oracle:
    """A judge that sees what is in the test scenes that it is given, except every third."""

    def __init__(self, known):
        self.known = {one.image.tobytes(): one for one in known}
        self.asked = []

    def detect(self, images):
        ones = [self.known[np.asarray(image).tobytes()] for image in images]
        self.asked += [one.seed for one in ones]
        return [Detections((), "none") if one.seed % 3 == 0 else
                Detections(tuple(Detection(o.name, o.box, 0.9, visible_colour(o.name, o.colour)) for o in one.objects),
                           one.background)
                for one in ones]


@pytest.mark.parametrize("split, world", [("test", CORE), ("held_out", CORE)])
def test_accuracy_is_measured_on_the_scenes_of_the_seeds_from_start_on(split, world):
    known = [draw_scene(seed, split, world) for seed in range(0, 120)]
    judge = Oracle(known)
    shares = measure_accuracy(judge, count=40, start=50, split=split, world=world)
    assert judge.asked == list(range(50, 90)), "each once, also where the last batch is not full"
    missed = [one for one in known[50:90] if one.seed % 3 == 0]
    there = sum(len(one.objects) for one in known[50:90])
    assert shares["recall"] == pytest.approx(1 - sum(len(one.objects) for one in missed) / there)
    assert shares["precision"] == shares["colour"] == 1
    assert shares["background"] == shares["scenes without an error"] == pytest.approx(1 - len(missed) / 40)


def test_accuracy_is_measured_on_changed_images():
    known = [draw_scene(seed, "test", CORE) for seed in range(4)]
    dark = [replace(one) for one in known]
    for one in dark:
        one.__dict__["image"] = one.image // 2
    shares = measure_accuracy(Oracle(dark), count=4, world=CORE, change=lambda images: [image // 2 for image in images])
    assert shares["precision"] == 1


# --- one detection for each place -------------------------------------------------------------------

CELLS = 32


def heads_of(*objects):
    """The output of a network that finds these: (class, column, row, width in pixels, height, logit)."""
    config = DetectorConfig()
    heat = torch.full((1, len(config.objects), CELLS, CELLS), -9.0)
    size = torch.zeros(1, 2, CELLS, CELLS)
    for name, column, row, width, height, logit in objects:
        heat[0, config.objects.index(name), row, column] = logit
        size[0, :, row, column] = (torch.tensor([width, height]) / UNIT).log()
    return Heads(heat, torch.zeros(1, 2, CELLS, CELLS), size, torch.zeros(1, len(config.colours) + 1, CELLS, CELLS),
                 torch.zeros(1, len(config.backgrounds)))


def names_and_centres(*objects):
    [one] = decode_heads(heads_of(*objects), DetectorConfig())
    return [(detection.name, detection.centre) for detection in one.objects]


@pytest.mark.parametrize("other", ["cat", "dog"])
@pytest.mark.parametrize("side, kept", [(34.0, 1), (40.0, 1), (30.0, 2), (24.0, 2)])
def test_of_two_detections_with_an_iou_above_six_tenths_the_one_with_the_higher_score_is_kept(other, side, kept):
    """Two cells (8 pixels) apart: an IoU of 26/42 = 0.62 with a side of 34 pixels, of 22/38 = 0.58 with 30."""
    sure, doubtful = ("cat", 10, 12, side, side, 4.0), (other, 12, 12, side, side, 2.0)
    for objects in ((sure, doubtful), (doubtful, sure)):
        found = names_and_centres(*objects)
        assert found[0] == ("cat", (10 * STRIDE, 12 * STRIDE)) and len(found) == kept
    below = names_and_centres(("cat", 10, 12, side, side, 2.0), (other, 10, 14, side, side, 4.0))
    assert below[0] == (other, (10 * STRIDE, 14 * STRIDE)) and len(below) == kept


def test_boxes_have_their_centre_and_sides_in_the_right_order():
    [one] = decode_heads(heads_of(("cat", 5, 20, 24.0, 40.0, 3.0)), DetectorConfig())
    [detection] = one.objects
    assert detection.box == pytest.approx((5 * STRIDE - 12, 20 * STRIDE - 20, 5 * STRIDE + 12, 20 * STRIDE + 20))
    assert detection.score == pytest.approx(float(torch.sigmoid(torch.tensor(3.0))))


def test_detections_come_by_falling_score_and_from_the_threshold_on():
    at = [("cat", 4, 4), ("dog", 24, 4), ("pig", 4, 24), ("star", 24, 24)]
    logits = [1.0, 3.0, -0.7, -1.0]                     # scores 0.73, 0.95, 0.33, 0.27
    found = names_and_centres(*[(*place, 20.0, 20.0, logit) for place, logit in zip(at, logits, strict=True)])
    assert [name for name, _ in found] == ["dog", "cat", "pig"]


def test_a_detection_is_compared_with_all_that_are_kept():
    near, far, again = ("cat", 4, 4, 40.0, 40.0, 4.0), ("dog", 24, 24, 40.0, 40.0, 3.0), ("pig", 6, 4, 40.0, 40.0, 2.0)
    assert [name for name, _ in names_and_centres(near, far, again)] == ["cat", "dog"]
