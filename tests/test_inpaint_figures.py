"""Figures and widget of notebook 08: masks in cells, nine channels, a mask painted by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawings import assert_shows
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.explore import Stroke
from sdlearn.explore.figures import WIDTH
from sdlearn.explore.inpaint_figures import (
    BLENDED,
    BOTH,
    KEPT,
    LEFT,
    MORE,
    NINE,
    SEEN_THROUGH,
    InpaintExplorer,
    cell_map,
    nine_maps,
)
from sdlearn.explore.latents import channel_maps
from sdlearn.inpaint import soft_mask
from sdlearn.pipeline import StableDiffusion
from sdlearn.training.inpaint import widen_unet

GREY = np.full((16, 24, 3), 200, np.uint8)
ACROSS = Stroke(((10, 30), (50, 30)), 16)


def veiled(colour):
    return (200 * (1 - SEEN_THROUGH) + np.array(colour) * SEEN_THROUGH).round()


def test_cells_are_told_apart_by_what_becomes_of_them():
    mask = np.zeros((16, 24), bool)
    mask[4:12, 8:20] = True                     # the upper left pixels of one cell, (8, 8), and of (8, 16)
    shown = cell_map(GREY, mask, 8)
    assert shown.shape == GREY.shape and shown.dtype == np.uint8
    for (y, x), colour in {(9, 9): BOTH, (6, 9): LEFT, (14, 9): MORE, (9, 22): MORE}.items():
        assert (shown[y, x] == veiled(colour)).all()
    assert (shown[6, 3] == 200).all() and (shown[8, 3] < 200).all()                 # a line between cells


def test_a_mask_of_which_nothing_is_left_is_red_all_over():
    mask = np.zeros((16, 24), bool)
    mask[3:6] = True
    shown = cell_map(GREY, mask, 8)
    assert (shown[4, 1:8] == veiled(LEFT)).all() and (shown[10, 1:8] == 200).all()


def test_nine_channels_are_shown_in_their_order():
    x, masked, mask = torch.randn(4, 6, 6), torch.randn(4, 6, 6), torch.zeros(1, 6, 6)
    mask[0, :3] = 1
    drawing = nine_maps(x, mask, masked, title="Nine")
    said = [text.get_text().replace("\n", " ") for text in drawing.texts]
    assert [one for one in said if one[:1].isdigit()] == [
        *(f"{i}: noisy latent" for i in range(4)), "4: mask", *(f"{i}: masked latent" for i in range(5, 9))]
    assert drawing.width <= WIDTH
    maps = [axes.images[0].get_array() for axes in drawing.axes]
    for shown, expected in zip([*maps[:4], *maps[5:]], [*channel_maps(x), *channel_maps(masked)], strict=True):
        assert np.array_equal(shown, expected)
    half = len(maps[4]) // 2
    assert maps[4][:half].min() == 255 and maps[4][half:].max() == 0        # white is to be repainted


@pytest.fixture(scope="module")
def models():
    base, parts = (tiny_parts(config=tiny_config()) for _ in range(2))
    wide = widen_unet(parts.unet)
    parts = replace(parts, unet=wide, config=replace(parts.config, unet=wide.config))
    return StableDiffusion(base), StableDiffusion(parts)


@pytest.fixture
def explorer(models):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return InpaintExplorer(*models, image, "a red apple", [ACROSS], steps=2)


def test_the_explorer_repaints_what_is_painted_and_nothing_else(explorer):
    [(said, image)] = explorer.rows
    assert said == f"a red apple; {NINE}, strength 1"
    mask = torch.from_numpy(explorer.pad.drawn > 0).float()[None, None]
    beyond = soft_mask(mask, explorer.seam.value)[0, 0].numpy() == 0
    changed = (np.asarray(image) != explorer.ground).any(axis=2)
    assert changed.any() and not changed[beyond].any()
    assert np.array_equal(np.asarray(explorer.pad.made), np.asarray(image))


def test_every_way_and_setting_is_used(explorer, models):
    base, _ = models
    asked = []
    for model in models:
        model.inpaint = lambda prompt, image, mask, model=model, **given: (
            asked.append((model, given)), StableDiffusion.inpaint(model, prompt, image, mask, **given))[1]
    try:
        explorer.strength.value, explorer.seed.value = 0.5, 3
        for way in explorer.ways:
            explorer.way.value = way
            explorer.pad.run()
    finally:
        for model in models:
            del model.inpaint
    assert [model is base for model, _ in asked] == [False, True, True]
    assert [given.get("resample", 1) for _, given in asked] == [1, 1, 4]
    assert all(given["strength"] == 0.5 and given["seed"] == 3 for _, given in asked)
    assert explorer.rows[0][0] == f"a red apple; {BLENDED}, 4 times, strength 0.5"


def test_one_can_go_on_from_the_last_and_has_the_last_ones_to_compare(explorer):
    for seed in range(1, KEPT + 2):
        explorer.seed.value = seed
        explorer.pad.run()
    assert len(explorer.rows) == KEPT
    last = np.asarray(explorer.rows[0][1])
    explorer.pad.prompt.value = "a cat"
    explorer.on.click()
    assert np.array_equal(explorer.ground, last) and explorer.pad.strokes == [] and explorer.pad.prompt.value == "a cat"
    assert explorer.children[0] is explorer.pad
    assert "image/png" in explorer._repr_mimebundle_()[0] and explorer.still().width <= WIDTH


def test_what_cannot_be_made_is_told(explorer):
    explorer.pad.clear()
    explorer.pad.run()
    assert "0 everywhere" in explorer.pad.message.value and len(explorer.rows) == 1


def test_the_still_shows_the_mask_and_then_the_newest_image_first(explorer):
    first = explorer.rows[0][1]
    explorer.seed.value = 3
    explorer.pad.run()
    still = explorer.still()
    newest = explorer.pad.made
    assert newest.tobytes() != first.tobytes()
    assert_shows(still, [newest, first], start=1)
    painted = still.axes[0].images[0].get_array()
    changed = (painted != explorer.ground).any(axis=2)
    assert np.array_equal(changed, explorer.pad.drawn > 0)
