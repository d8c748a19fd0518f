"""Figures and widget of notebook 07: residuals land where the U-Net adds them, strokes become edges."""

import numpy as np
import pytest
import torch
from drawings import assert_shows
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.config import PRESETS, ControlNetConfig
from sdlearn.controlnet import ControlNet
from sdlearn.explore.architecture import spelled
from sdlearn.explore.control_figures import (
    KEPT,
    SHAPES,
    Shape,
    SketchExplorer,
    as_image,
    borders,
    control_diagram,
    edge_map_of,
    landings,
)
from sdlearn.explore.figures import WIDTH
from sdlearn.pipeline import StableDiffusion

CIRCLE = Shape("ellipse", 32, 32, 30, 30)


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts(config=tiny_config()))


@pytest.fixture(scope="module")
def net(model):
    made = ControlNet.from_unet(model.unet, hint_widths=(4,) * model.vae.config.factor.bit_length())
    for conv in (*made.controlnet_down_blocks, made.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(conv.weight)
    return made.eval()


@pytest.mark.parametrize("preset", ["tiny", "mini"])
def test_residuals_land_on_features_of_their_shape(preset):
    config = PRESETS[preset].unet
    net = ControlNet(ControlNetConfig(config, 3, (4, 4)))
    with torch.no_grad():
        found = net(torch.zeros(1, 4, 12, 12), 0.0, torch.zeros(1, 5, config.context_dim), torch.zeros(1, 3, 24, 24))
    rows = landings(config, 12)
    assert [row.shape for row in rows] == [tuple(one.shape[1:]) for one in found]
    assert rows[0].onto == "conv_in" and rows[-1].onto == "mid_block"
    convs = [*net.controlnet_down_blocks, net.controlnet_mid_block]
    assert [row.parameters for row in rows] == [sum(p.numel() for p in conv.parameters()) for conv in convs]


def test_stable_diffusion_has_thirteen():
    rows = landings(PRESETS["sd15"].unet, 64)
    assert len(rows) == 13 and rows[0].shape == (320, 64, 64) and rows[-1].shape == (1280, 8, 8)


@pytest.mark.parametrize(("preset", "side"), [("mini", 16), ("sd15", 64)])
def test_the_diagram_names_every_residual(preset, side):
    config = PRESETS[preset].unet
    drawing = control_diagram(config, side, title="Residuals")
    [axes] = drawing.axes
    rows = landings(config, side)
    column = {head: next(text.get_position()[0] for text in axes.texts if head in text.get_text())
              for head in ("the copy", "zero convolution", "added to the U-Net")}

    def below(head):                                    # what is written in a column, from the top
        found = [text for text in axes.texts if text.get_position()[0] == column[head]]
        found = sorted(found, key=lambda text: text.get_position()[1])
        return [text.get_text() for text in found][-len(rows):]
    assert below("added to the U-Net") == [row.onto for row in rows]
    assert below("the copy") == [spelled(row.shape) for row in rows]
    assert below("zero convolution") == [f"{row.shape[0]} to {row.shape[0]}: {row.parameters:,}" for row in rows]
    assert drawing.width <= WIDTH and drawing.png().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", SHAPES)
def test_a_stroke_has_two_borders(kind):
    drawn = edge_map_of([Shape(kind, 32, 32, 40, 40)], 64)
    assert drawn.shape == (64, 64) and set(np.unique(drawn)) == {0, 255}
    rows = (drawn > 0).sum(axis=1)
    assert rows[32] >= 2 and not drawn[:8].any() and not drawn[:, :8].any()         # nothing far away from it


def test_a_line_drawn_by_hand_has_two_borders_as_well():
    drawn = np.zeros((96, 96), np.uint8)
    drawn[40:44, 20:80] = 255
    found = borders(drawn)
    assert found.shape == drawn.shape and set(np.unique(found)) == {0, 255}
    assert not borders(np.zeros_like(drawn)).any()
    column = np.nonzero(found[:, 50])[0]
    assert len(column) == 2 and np.ptp(column) == 4, "one border above the line, one below it"


def test_no_stroke_is_no_edge_and_an_unknown_one_is_told():
    assert not edge_map_of([], 32).any()
    with pytest.raises(ValueError, match="no shape 'star'"):
        edge_map_of([Shape("star", 1, 1, 1, 1)])


def test_the_lines_cross():
    falling, rising = (edge_map_of([Shape(f"line, {way}", 32, 32, 40, 40)], 64) > 0 for way in ("falling", "rising"))
    assert falling[14:20, 12:20].any() and not falling[14:20, 44:52].any()
    assert rising[14:20, 44:52].any() and not rising[14:20, 12:20].any()


def test_the_explorer_draws_the_strokes(model, net):
    explorer = SketchExplorer(model, net, "a red apple", [CIRCLE], steps=2)
    before = explorer.map.value
    explorer.kind.value, explorer.x.value, explorer.y.value = "box", 20, 10
    assert explorer.map.value != before and explorer.strokes == [CIRCLE]           # shown, not kept
    explorer.add.click()
    assert explorer.strokes == [CIRCLE, explorer.pen()]
    explorer.strength.value, explorer.end.value, explorer.seed.value = 0.5, 0.5, 3
    explorer.button.click()
    said, drawn, image = explorer.rows[0]
    assert said == "a red apple, strength 0.5, end 0.5, seed 3"
    assert np.array_equal(drawn, as_image(edge_map_of(explorer.strokes, explorer.side)))
    [expected] = model.control("a red apple", net, drawn, conditioning_scale=0.5, end=0.5, seed=3,
                               num_inference_steps=2)
    assert image.tobytes() == expected.tobytes() and not explorer.button.disabled
    explorer.undo.click()
    assert explorer.strokes == [CIRCLE] and explorer.map.value == before


def test_the_explorer_keeps_the_last_and_has_a_still(model, net):
    explorer = SketchExplorer(model, net, "a red apple", [CIRCLE], steps=1)
    for seed in range(1, KEPT + 2):
        explorer.seed.value = seed
        explorer.button.click()
    assert [said[-1] for said, *_ in explorer.rows] == [str(seed) for seed in range(KEPT + 1, 1, -1)]
    assert "image/png" in explorer._repr_mimebundle_()[0] and explorer.still().width <= WIDTH


def test_the_still_shows_each_edge_map_before_its_image_the_newest_first(model, net):
    explorer = SketchExplorer(model, net, "a red apple", [CIRCLE], steps=1)
    explorer.add.click()
    explorer.seed.value = 3
    explorer.button.click()
    expected = []
    for strokes, seed in ((explorer.strokes, 3), ([CIRCLE], 0)):
        drawn = as_image(edge_map_of(strokes, explorer.side))
        expected += [drawn, *model.control("a red apple", net, drawn, seed=seed, num_inference_steps=1)]
    assert_shows(explorer.still(), expected)


def test_the_explorer_tells_and_does_not_raise(model, net, monkeypatch):
    explorer = SketchExplorer(model, net, "a red apple", [CIRCLE], steps=1)
    monkeypatch.setattr(model, "control", lambda **given: (_ for _ in ()).throw(ValueError("too <much>")))
    explorer.button.click()
    assert explorer.message.value == "too &lt;much&gt;" and not explorer.button.disabled and len(explorer.rows) == 1
