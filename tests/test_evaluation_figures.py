"""An evaluation's figures: over what a standard error is, what its columns show, and the order of failures."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from models import one_thread, tiny_parts  # noqa: F401

from sdlearn.config import PRESETS
from sdlearn.evaluation import (
    TASKS,
    Detection,
    Detections,
    JudgedImage,
    ObjectSpec,
    Prompt,
    SceneSpec,
    Verdict,
    compose_prompt_scene,
    evaluate,
    evaluate_scenes,
    make_prompts,
    visible_colour,
)
from sdlearn.evaluation.command import EvaluationPlan
from sdlearn.evaluation.command import run_evaluation as measure
from sdlearn.evaluation.metrics import group_by_prompt, pixel_diversity, saturation
from sdlearn.evaluation.report import column_to_dict, make_column, pick_failures, results_to_dicts
from sdlearn.evaluation.tasks import reword_as_captions
from sdlearn.pipeline import StableDiffusion

NAMES = ["apple", "ball", "balloon", "car", "cat", "elephant", "star", "tree"]


def shown(wanted):
    """An image's detections that are right in everything: one object beside the other as the relation says."""
    step = {"left": (40, 0), "right": (-40, 0), "above": (0, 40), "below": (0, -40), None: (30, 10)}[wanted.relation]
    found = [Detection(name, (50 + i * step[0], 50 + i * step[1], 66 + i * step[0], 66 + i * step[1]), 0.9,
                       colour or visible_colour(name, None)) for i, (name, colour) in enumerate(wanted.instances)]
    return Detections(tuple(found), wanted.background or "white")


class Half:
    """A judge that knows what was asked for: every second prompt's images are right, all others show nothing.

    Images are given to it in the order of evaluations, all seeds of a prompt together. It keeps them.
    """

    def __init__(self, prompts, seeds):
        self.prompts, self.seeds, self.images = prompts, seeds, []

    def detect(self, images):
        found = []
        for image in images:
            at = len(self.images) // self.seeds % len(self.prompts)
            found.append(shown(self.prompts[at].spec) if at % 2 == 0 else Detections((), "none"))
            self.images.append(np.asarray(image))
        return found


class Blind:
    """A judge that sees nothing."""

    def detect(self, images):
        return [Detections((), "white") for _ in images]


def model_of(side=32):
    """The tiny model, whose image encoder sees images of its size."""
    tiny = PRESETS["tiny"]
    parts = tiny_parts(config=replace(tiny, image_size=side, vision=replace(tiny.vision, image_size=side)))
    parts.world = {**parts.world, "objects": NAMES}
    return StableDiffusion(parts)


@pytest.fixture(scope="module")
def model():
    return model_of()


def figures_of(model, out, judge, **plan):
    measure(model, EvaluationPlan(steps=1, **plan), out, judge=judge)
    return json.loads((out / "evaluation.json").read_text(encoding="utf-8"))


# --- standard errors --------------------------------------------------------------------------------

def errors_of(prompts, seeds, right):
    """Standard errors of two tasks, of whose prompts `right` give right images with all seeds, the others none."""
    judged = [judged_of(task, 0 if at < right else 1, seed=seed, text=f"{task} {at}")
              for task in ("counting", "colours") for at in range(prompts) for seed in range(seeds)]
    return column_to_dict(make_column("w = 1", judged))["standard error"]


@pytest.mark.parametrize("seeds", [1, 4])
@pytest.mark.parametrize("prompts, right", [(40, 20), (40, 4), (100, 90)])
def test_a_standard_error_is_over_prompts_and_not_over_images(prompts, right, seeds):
    """Images of one prompt that are all right or all wrong tell no more than one of them does."""
    share = right / prompts
    errors = errors_of(prompts, seeds, right)
    assert errors.keys() == {"counting", "colours"}
    for error in errors.values():
        assert error == pytest.approx(math.sqrt(share * (1 - share) / prompts), rel=0.03)


def test_a_share_without_exception_has_no_standard_error():
    assert set(errors_of(40, 2, 40).values()) == set(errors_of(40, 2, 0).values()) == {0}


# --- columns ----------------------------------------------------------------------------------------

def test_the_scenes_are_judged_as_they_are_and_the_ceiling_after_the_autoencoder(model, tmp_path):
    asked = make_prompts(NAMES, count=2)
    asked += reword_as_captions(asked)
    plain = 2 * sum(prompt.kind is None for prompt in asked)         # images of prompts in the captions' words, first
    judge = Half(asked, seeds=2)
    figures = figures_of(model, tmp_path, judge, prompts=2, seeds=2, guidance=(1.0,))
    drawn = [compose_prompt_scene(prompt, seed).image for prompt in asked for seed in range(2)]
    made, ceiling, scenes = (judge.images[at:at + len(drawn)] for at in range(0, 3 * len(drawn), len(drawn)))
    assert np.array_equal(scenes, drawn), "every prompt with every seed, in this order"
    assert not any(np.array_equal(a, b) for a, b in zip(ceiling, drawn, strict=True))
    columns = figures["columns"]
    for title, images in (("w = 1", made[:plain]), ("ceiling", ceiling[:plain]), ("scenes", drawn[:plain])):
        assert columns[title]["saturation"] == pytest.approx(float(saturation(images).mean()))
        each = [pixel_diversity(images[at:at + 2]) for at in range(0, len(images), 2)]
        assert columns[title]["diversity, pixels"] == pytest.approx(np.mean(each)), "of the images of one prompt"
        assert set(columns[title]["tasks"].values()) == {0.5}
        assert columns[title]["images"] == len(drawn) == 2 * len(asked)
        assert all(0.3 < error < 0.6 for error in columns[title]["standard error"].values()), "of two prompts"
    assert len({columns[title]["saturation"] for title in columns}) == 3
    assert len({one.tobytes() for one in made}) == len(made), "each image from a seed of its own"


def test_each_scene_of_a_prompt_has_a_seed_of_its_own():
    asked = make_prompts(NAMES, count=1, tasks=["one object", "position"])
    judged = list(evaluate_scenes(asked, seeds=5, judge=Blind(), at_once=3))
    assert [(one.prompt, one.seed) for one in judged] == [(prompt, seed) for prompt in asked for seed in range(5)]
    assert len({one.image.tobytes() for one in judged}) == len(judged)
    for one in judged:
        assert np.array_equal(one.image, compose_prompt_scene(one.prompt, one.seed).image)


def test_each_image_of_a_prompt_has_a_seed_of_its_own(model):
    [prompt, *_] = asked = make_prompts(NAMES, count=1)
    judged = list(evaluate(model, [prompt], seeds=[4, 7], judge=Blind(), steps=1))
    assert [one.seed for one in judged] == [4, 7] and not np.array_equal(judged[0].image, judged[1].image)
    several = list(evaluate(model, asked, seeds=2, judge=Blind(), steps=1, at_once=3))
    assert [(one.prompt, one.seed) for one in several] == [(one, seed) for one in asked for seed in range(2)]


def test_the_floor_is_of_scenes_that_the_column_of_scenes_has_not(tmp_path):
    """As many, of the same prompts, with other seeds: else its Fréchet distance would be too small."""
    model, encoded = model_of(128), []
    model.clip.vision_model.register_forward_pre_hook(lambda _, given: encoded.extend(given[0].clone()))
    figures = figures_of(model, tmp_path, Blind(), prompts=1, seeds=3, guidance=())
    asked = [prompt for prompt in make_prompts(NAMES, count=1) if prompt.kind is None]
    drawn = [compose_prompt_scene(prompt, seed).image.tobytes() for prompt in asked for seed in range(3)]
    images = [((one + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes() for one in encoded]
    last = max(at for at in range(len(images)) if images[at:at + len(drawn)] == drawn)
    floor = images[last + len(drawn):]
    assert len(floor) == len(set(floor)) == len(drawn) and not set(drawn) & set(floor)
    others = {compose_prompt_scene(prompt, seed).image.tobytes() for prompt in asked for seed in range(3, 20)}
    assert set(floor) <= others, "scenes of the same prompts"
    [distances] = [value for name, value in figures.items() if name.startswith("Fréchet")]
    assert distances["floor"] > 1e-3 and distances["ceiling"] > 1e-3 and "scenes" not in distances


def test_an_image_encoder_of_another_size_measures_no_frechet_distance(model, tmp_path):
    figures = figures_of(model, tmp_path, Blind(), prompts=1, seeds=1, guidance=(1.0,))
    assert not any(name.startswith("Fréchet") for name in figures)


def test_images_are_grouped_by_their_prompt():
    assert group_by_prompt("abcde", [1, 2, 1, 3, 2]) == {1: ["a", "c"], 2: ["b", "e"], 3: ["d"]}
    cat = SceneSpec((ObjectSpec("cat"),))
    prompts = [Prompt("one object", text, cat) for text in ("a cat", "a small cat", "a cat")]
    images = [np.full((16, 16, 3), value, np.uint8) for value in (0, 255, 51)]
    one = make_column("w = 1", [JudgedImage(prompt, 0, image, Verdict(True, (), None, Detections((), "white")))
                            for prompt, image in zip(prompts, images, strict=True)])
    assert one.measures["diversity, pixels"] == pytest.approx(51 / 127.5), "one prompt has a single image"


# --- failures ---------------------------------------------------------------------------------------

def judged_of(task, wrong, *scores, seed=0, text=None):
    """An image of a task with so many errors, and detections of these scores."""
    found = tuple(Detection("cat", (0, 0, 8, 8), score, None) for score in scores)
    prompt = Prompt(task, text or f"{task} {seed}", SceneSpec((ObjectSpec("cat"),)))
    return JudgedImage(prompt, seed, np.zeros((8, 8, 3), np.uint8),
                       Verdict(not wrong, tuple(f"error {i}" for i in range(wrong)), None, Detections(found, "white")))


def test_failures_with_the_most_errors_come_first():
    some = [judged_of("counting", wrong, 0.5, seed=wrong) for wrong in (1, 3, 0, 2, 4)]
    assert [one.seed for one in pick_failures(some)] == [4, 3, 2, 1]
    assert [one.seed for one in pick_failures(some, count=2)] == [4, 3]


def test_of_failures_with_as_many_errors_those_with_the_least_detected_come_first():
    sure, two, none, faint = (judged_of("counting", 1, *scores, seed=i) for i, scores in
                              enumerate([(0.9,), (0.5, 0.6), (), (0.3,)]))
    assert [one.seed for one in pick_failures([sure, two, none, faint])] == [2, 3, 0, 1]
    more = judged_of("counting", 2, 0.9, 0.9, seed=9)
    assert [one.seed for one in pick_failures([sure, more, none], count=2)] == [9, 2], "errors count first"


def test_failures_are_taken_evenly_from_all_tasks():
    some = [judged_of(task, 1 + seed, 0.5, seed=seed) for task in ("position", "counting", "colours")
            for seed in range(4)] + [judged_of("held out", 1, seed=0)]
    for count in (4, 5, 6, 7, 10, 13, 20):
        shown = [one.prompt.task for one in pick_failures(some, count=count)]
        assert len(shown) == min(count, 13)
        counts = [shown.count(task) for task in ("position", "counting", "colours")]
        assert max(counts) - min(counts) <= 1 and shown.count("held out") == 1
        assert shown == sorted(shown, key=["position", "counting", "colours", "held out"].index), "task by task"
    assert [one.seed for one in pick_failures(some, count=4)] == [3, 3, 3, 0], "the worst of each"


def test_every_images_result_is_listed():
    some = [judged_of("counting", 2, 0.9, seed=5), judged_of("position", 0, seed=6)]
    listed = results_to_dicts(some)
    assert [(one["task"], one["prompt"], one["seed"], one["right"], one["wrong"]) for one in listed] == [
        ("counting", "counting 5", 5, False, ["error 0", "error 1"]), ("position", "position 6", 6, True, [])]
    assert [one["seen"] for one in listed] == ["cat on white", "nothing on white"]
    assert set(TASKS) >= {"counting", "position"}
