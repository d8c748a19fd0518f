"""Figures of training measure what their names say: the right pairs against shuffled ones, the stored weights against
the trained ones, intersection over union, the best rival.

Stand-ins for networks know the answer, or remember what they were given, so that each figure is known beforehand.
"""

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401

from sdlearn.config import NoiseConfig
from sdlearn.schedule import NoiseSchedule
from sdlearn.training import unet as unet_training
from sdlearn.training.card import image_to_text_accuracy
from sdlearn.training.control import edge_f1, foreground_iou
from sdlearn.training.judge import JudgeRecipe

# --- the shuffled-caption gap -------------------------------------------------------------------------


def test_the_shuffled_caption_gap_has_another_scenes_caption_for_every_scene():
    """A network that reads its answer off the caption: no error with the right ones, all of it with the others'."""
    schedule, asked = NoiseSchedule(NoiseConfig(prediction_type="sample")), []
    latents = torch.eye(5).reshape(5, 5, 1, 1) * 3              # any two are equally far from each other
    captions = latents.flatten(1)[:, None]                                              # (B, 1, D)

    def network(x, t, context):
        asked.append((t, x))
        return context.reshape(x.shape)

    found = unet_training.shuffled_caption_losses(network, schedule, latents, captions)
    assert found["right@999"] == found["right@700"] == 0
    assert found["wrong@999"] == found["wrong@700"] == pytest.approx(2 * 3**2 / 5)
    steps = [int(t[0]) for t, _ in asked]
    assert sorted(steps) == [700, 700, 999, 999] and all((t == t[0]).all() and len(t) == 5 for t, _ in asked)
    for step in (999, 700):
        first, second = (x for t, x in asked if t[0] == step)
        assert torch.equal(first, second), "the same noise for both"
    before = [x for _, x in asked]
    asked.clear()
    assert unet_training.shuffled_caption_losses(network, schedule, latents, captions) == found
    assert all(torch.equal(x, again) for x, (_, again) in zip(before, asked, strict=True)), "and at every call"


# --- agreement with hints -----------------------------------------------------------------------------

def rectangle(*bounds, side=32):
    """A mask that is 255 within rows top...bottom - 1 and columns left...right - 1."""
    top, bottom, left, right = bounds
    mask = np.zeros((side, side), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def image(mask):
    """White where the mask is, on a grey background."""
    return np.where(mask[..., None] > 0, 255, 90).repeat(3, axis=2).astype(np.uint8)


@pytest.mark.parametrize("drawn, wanted, iou", [
    ((8, 16, 8, 16), (8, 16, 8, 16), 1), ((8, 16, 8, 16), (8, 16, 12, 20), 32 / 96),
    ((4, 20, 4, 20), (8, 16, 8, 16), 1 / 4),
    ((8, 16, 8, 16), (4, 20, 4, 20), 1 / 4), ((8, 12, 8, 12), (20, 24, 20, 24), 0),
], ids=["equal", "shifted", "drawn too large", "drawn too small", "apart"])
def test_foreground_iou_is_intersection_over_union(drawn, wanted, iou):
    assert foreground_iou(image(rectangle(*drawn)), rectangle(*wanted)) == pytest.approx(iou)


def test_foreground_iou_of_nothing_is_zero():
    empty = np.zeros((32, 32), np.uint8)
    assert foreground_iou(image(empty), empty) == foreground_iou(image(rectangle(8, 16, 8, 16)), empty) == 0


def test_edge_f1_is_of_precision_and_recall():
    """Edges of one square of two: all that is found is right, and half of what is wanted is found; and exchanged."""
    def edges(*masks):
        found = np.zeros((48, 48), np.uint8)
        for mask in masks:
            found[:, 1:] |= np.where(np.diff(mask.astype(int), axis=1), 255, 0).astype(np.uint8)
            found[1:] |= np.where(np.diff(mask.astype(int), axis=0), 255, 0).astype(np.uint8)
        return found

    one, two = rectangle(4, 16, 4, 16, side=48), rectangle(28, 40, 28, 40, side=48)
    assert edge_f1(image(one), edges(one)) == 1
    assert edge_f1(image(one), edges(one, two)) == edge_f1(image(one | two), edges(one)) == pytest.approx(2 / 3)
    assert edge_f1(image(one), edges(two)) == 0


# --- the choice among captions ------------------------------------------------------------------------

@pytest.mark.parametrize("rivals, share", [
    ([0.9, -1.0, -1.0, -1.0], 0.0), ([0.4, 0.4, 0.4, 0.4], 1.0), ([0.9, 0.9, 0.9, 0.9], 0.0),
    ([-1.0, -1.0, -1.0, 0.6], 0.0),
], ids=["one better", "all worse", "all better", "the last one better"])
def test_a_prompt_is_chosen_if_it_is_nearer_than_the_best_of_its_rivals(rivals, share):
    """Encoders whose image is the first axis, so that a text's first number is its similarity."""
    def vectors(similarities):
        along = torch.tensor(similarities)
        return torch.stack([along, (1 - along**2).sqrt()], dim=1)

    class CLIPWithClassifier:
        def encode_image(self, pixels):
            return vectors([1.0] * len(pixels))

        def encode_text(self, ids):
            return vectors(rivals if len(ids) == len(rivals) else [0.5] * len(ids))

    def tokenizer(texts):
        return torch.tensor([[1, 2]] * len(texts))

    tokenizer.end = 2
    images, prompts = [np.zeros((8, 8, 3), np.uint8)] * 3, ["a cat", "a car", "a star"]
    assert image_to_text_accuracy(CLIPWithClassifier(), tokenizer, images, prompts, others=len(rivals)) == share


def test_each_image_is_compared_with_its_own_prompt():
    """Two images whose prompts are exchanged are both chosen wrongly where rivals lie between."""
    class CLIPWithClassifier:
        def encode_image(self, pixels):
            return torch.eye(3)[:2]

        def encode_text(self, ids):
            return torch.eye(3)[[1, 0]] if len(ids) == 2 else torch.tensor([[0.5, 0.5, 0.7]] * len(ids))

    class Right(CLIPWithClassifier):
        def encode_text(self, ids):
            return super().encode_text(ids).flip(0) if len(ids) == 2 else super().encode_text(ids)

    def tokenizer(texts):
        return torch.tensor([[1, 2]] * len(texts))

    tokenizer.end = 2
    given = tokenizer, [np.zeros((8, 8, 3), np.uint8)] * 2, ["a cat", "a car"]
    assert image_to_text_accuracy(CLIPWithClassifier(), *given, others=4) == 0
    assert image_to_text_accuracy(Right(), *given, others=4) == 1


# --- the judge ----------------------------------------------------------------------------------------

def test_the_judge_is_trained_on_seeds_that_it_is_never_measured_on(monkeypatch):
    """The lowest seed that the generator can give lies above all that are measured."""
    def lowest(*bounds, generator=None):
        *low, _, size = bounds
        return torch.full(size, low[0] if low else 0)

    shown = []

    class Model:
        def targets(self, scenes):
            shown.extend(scenes)
            return ()

    recipe = JudgeRecipe(model=Model(), batch_size=4)
    shown.clear()
    monkeypatch.setattr(torch, "randint", lowest)
    recipe.batch(torch.Generator().manual_seed(0))
    assert len(shown) == 4 and min(one.seed for one in shown) >= 1_000_000
