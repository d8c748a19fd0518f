"""Figures and widget of notebook 04: shapes are those of a run, maps lie over their image, words have places."""

import io

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from models import one_thread, tiny_parts  # noqa: F401
from PIL import Image

from sdlearn.config import PRESETS
from sdlearn.diagnostics.attention import heat_maps, record_attention
from sdlearn.explore.attention_levels import changed, count_flops, text_levels, where_it_reads
from sdlearn.explore.attention_maps import (
    ALL,
    MOST,
    AttentionExplorer,
    bars,
    by_place,
    cells_asking,
    finest,
    image_rows,
    overlay,
    places,
    short_name,
    word_maps,
)
from sdlearn.explore.figures import WIDTH
from sdlearn.pipeline import StableDiffusion

PROMPT = "a (red:1.5) apple above a cat"


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts())


@pytest.fixture(scope="module")
def explorer(model):
    return AttentionExplorer(model, PROMPT, steps=4)


def words(drawing) -> list[str]:
    return [text.get_text() for text in drawing.findobj(Text) if text.get_text()]


def inside(drawing):
    """Nothing leaves the drawing."""
    drawing.canvas.draw()
    box = drawing.get_tightbbox()          # in inches
    width, height = drawing.get_size_inches()
    return -0.01 <= box.x0 and -0.01 <= box.y0 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01


# --- layers ----------------------------------------------------------------------------------------

def test_modules_are_called_with_other_inputs_inside_and_with_their_own_behind():
    one, other = torch.nn.Linear(3, 2), torch.nn.Bilinear(3, 3, 2)
    x = torch.ones(1, 3)
    with changed([one], lambda x: 2 * x):
        assert torch.equal(one(x), torch.nn.functional.linear(2 * x, one.weight, one.bias))
    with changed([other], lambda a, b: (b, a)):
        assert torch.equal(other(x, 2 * x), torch.nn.functional.bilinear(2 * x, x, other.weight, other.bias))
    with pytest.raises(RuntimeError), changed([one], lambda x: x[:, :2]):
        one(x)
    assert torch.equal(one(x), torch.nn.functional.linear(x, one.weight, one.bias))


def test_the_finest_maps_have_the_most_cells():
    maps = {name: torch.zeros(1, 2, cells, 5) for name, cells in (("a", 4), ("b", 16), ("c", 16))}
    assert list(finest(maps)) == ["b", "c"]


# --- places -------------------------------------------------------------------------------------------

def test_places_are_start_tokens_end_and_padding(model):
    ids = model.tokenizer("a red apple above a cat")[0].tolist()
    names = places(PROMPT, model.tokenizer)
    assert names[0] == "START" and names[-2:] == ["END", "padding"]
    assert len(names) - 2 == ids.index(model.tokenizer.end) and names[1:4] == ["a", "red", "apple"]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_padding_is_added_up_and_nothing_is_lost(dim):
    weights = torch.rand(7, 7).softmax(dim)
    short = by_place(weights, ["START", "a", "END", "padding"], dim)
    assert short.shape[dim] == 4
    torch.testing.assert_close(short.sum(dim), torch.ones(7))
    torch.testing.assert_close(short.select(dim, 2), weights.select(dim, 2))


def test_a_prompt_that_fills_its_row_has_no_padding(model):
    names = places("cat " * 100, model.tokenizer)
    assert len(names) == 78
    assert (by_place(torch.rand(3, 77), names)[:, -1] == 0).all()


def test_layers_have_short_names_of_their_own(model):
    layers = [name for name, _ in model.unet.named_modules() if name.endswith("attn2")]
    names = [short_name(name) for name in layers]
    assert len(set(names)) == len(layers) and "mid" in names and "up 1.0" in names and max(map(len, names)) < 9


# --- drawings -----------------------------------------------------------------------------------------

def test_the_overlay_is_red_where_the_map_is_high_and_grey_where_it_is_nothing():
    heat = torch.zeros(8, 8)
    heat[0, 0] = 0.3
    shown = overlay(np.full((32, 32, 3), 200, np.uint8), heat).astype(int)
    assert shown.shape == (32, 32, 3)
    assert np.ptp(shown[-1, -1]) == 0 and shown[0, 0, 0] > shown[0, 0, 2] + 50


@pytest.mark.parametrize("heat", [torch.zeros(4, 4), torch.ones(2, 2)])
def test_a_map_without_a_peak_can_be_shown(heat):
    assert overlay(np.zeros((16, 16, 3), np.uint8), heat).dtype == np.uint8


def test_word_maps_have_a_row_for_each_image_and_tell_the_highest_weight():
    maps = torch.stack([torch.full((4, 4), 0.25), torch.eye(4)])
    image = np.full((128, 128, 3), 90, np.uint8)
    drawing = word_maps({"t = 1": (image, maps), "t = 2": (image, maps)}, ["cat", "$x$"], title="Maps")
    said = words(drawing)
    assert said.count("cat\nup to 0.25") == said.count("\\$x\\$\nup to 1.00") == 2
    assert {"Maps", "t = 1", "t = 2"} <= set(said) and len(drawing.axes) == 6
    assert drawing.width <= WIDTH + 1 and inside(drawing)


def test_rows_of_images_keep_their_order():
    levels = [[0, 80], [160, 240]]
    rows = {f"row {i}": [np.full((8, 8, 3), level, np.uint8) for level in row] for i, row in enumerate(levels)}
    drawing = image_rows(rows, ["left", "right"], title="Rows")
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in drawing.axes] == [0, 80, 160, 240]
    assert words(drawing) == ["Rows", "row 0", "row 1", "left", "right"]


def test_cells_that_ask_show_their_own_weights():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    drawing = cells_asking(np.zeros((64, 64, 3), np.uint8), weights, ["START", "cat", "END"], [(0, 0), (3, 2)], 4,
                           title="Two cells")
    image, *panels = drawing.axes
    frames = [(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in image.patches]
    assert frames == [(0, 0), (32, 48)]                                 # x is the column's
    drawn = torch.tensor([[float(bar.get_width()) for bar in axes.patches] for axes in panels])
    torch.testing.assert_close(drawn, weights)
    assert inside(drawing)


def test_bars_are_as_long_as_their_numbers():
    drawing = bars({"one": [0.2, -0.1], "other": [0.4, 1.0]}, ["up", "down"], title="Bars", x="share",
                   line=("chance", 0.5))
    assert [bar.get_width() for bar in drawing.axes[0].patches] == [0.2, -0.1, 0.4, 1.0]
    assert {"up", "down", "chance", "one", "other", "0.20", "-0.10"} <= set(words(drawing)) and inside(drawing)


# --- levels -------------------------------------------------------------------------------------------

def test_the_levels_are_those_of_a_run(model):
    levels = [level for level in text_levels(model.config) if level.reads]
    side = model.config.latent_size
    with record_attention(model.unet) as record:
        model.unet(torch.randn(1, 4, side, side), 5, model.encode(["a cat"]))
    assert len(record.maps) == 2 * sum(level.reads for level in levels)
    expected = [level.shapes[what] for level in levels for what in ("self", "text")]
    assert {tuple(one.shape[1:]) for one in record.maps.values()} == set(expected)


@pytest.mark.parametrize("name", ["tiny", "mini", "sd15", "sd21"])
def test_the_levels_of_any_config_are_drawn_without_words_over_each_other(name):
    config = PRESETS[name]
    drawing = where_it_reads(config)
    drawing.canvas.draw()
    boxes = [one.get_window_extent().shrunk(0.97, 0.9) for one in drawing.findobj(Text) if one.get_text()]
    assert [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)] == [] and inside(drawing)
    said = words(drawing)
    shapes = [str(level.shapes["text"]) for level in text_levels(config) if level.reads]
    assert [one for one in said if one in shapes] == shapes


def test_flops_of_the_maps_are_those_of_the_formula():
    total, maps = count_flops(PRESETS["tiny"])
    levels = text_levels(PRESETS["tiny"])
    assert sum(maps.values()) == sum(4 * level.reads * level.cells * (level.cells + level.tokens) * level.channels
                                     for level in levels)
    assert len(maps) == 2 * sum(level.reads for level in levels) and total > sum(maps.values())


# --- the widget ---------------------------------------------------------------------------------------

def test_the_maps_are_those_of_the_run_with_the_prompt(model, explorer):
    steps = list(model.iter_steps(PROMPT, num_inference_steps=4))
    torch.testing.assert_close(explorer.run[-1].latent, steps[-1].latent, atol=1e-2, rtol=1e-3)     # only watched
    context = model.encode([PROMPT])
    with record_attention(model.unet, only="attn2") as record:
        model.unet(steps[1].latent, steps[2].t, context)                # what the third step saw
    for name, one in explorer.maps[2].items():
        torch.testing.assert_close(one, record.maps[name], atol=1e-4, rtol=1e-3)
    heat = explorer.heat(2, ALL)
    expected = heat_maps(record.maps, steps[0].latent.shape[2:])[0]
    torch.testing.assert_close(heat[:3], expected[:3], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(heat.sum(dim=0), torch.ones(heat.shape[1:]))


def test_words_steps_and_layers_change_the_images(explorer):
    def shown():
        return tuple(image.value for image in explorer.images)
    seen = [shown()]
    for control, value in ((explorer.word, 6), (explorer.step, 3), (explorer.layer, ALL)):
        control.value = value
        seen.append(shown())
    assert len({left for left, _ in seen}) == 4
    assert len({right for _, right in seen}) == 2                       # the step's own image, without a map
    [image] = explorer.run[3].images()
    large = np.asarray(Image.open(io.BytesIO(seen[-1][1])))
    times = large.shape[0] // image.height
    assert np.array_equal(large[::times, ::times], np.asarray(image)) and "dark red" in explorer.heads.value
    assert Image.open(io.BytesIO(seen[0][0])).width >= 320


def test_another_prompt_has_other_words(model):
    explorer = AttentionExplorer(model, "two cars", steps=2)
    explorer.word.index = 2
    explorer.prompt.value = "a cat"
    assert [name for name, _ in explorer.word.options] == places("a cat", model.tokenizer) and explorer.word.index == 2
    explorer.prompt.value = "a <b>penguin</b>"
    assert "penguin" in explorer.message.value and "<b>" not in explorer.message.value
    explorer.prompt.value = "a (cat:99)"                                # cannot be: told, and the last one stays
    assert "99" in explorer.message.value and explorer.shown == "a <b>penguin</b>"
    with pytest.raises(ValueError, match="99"):
        AttentionExplorer(model, "a (cat:99)", steps=2)


@pytest.mark.parametrize("prompt", ["", "a cat", "the $x$ of " * 30])
def test_a_still_image_stands_where_no_widget_runs(model, prompt):
    explorer = AttentionExplorer(model, prompt, steps=2)
    drawing = explorer.still()
    assert drawing.width <= max(WIDTH + 1, 10 * len(drawing.title)) and len(drawing.axes) <= 2 * (MOST + 1)
    bundle, _ = explorer._repr_mimebundle_()
    assert "image/png" in bundle and "application/vnd.jupyter.widget-view+json" in bundle
