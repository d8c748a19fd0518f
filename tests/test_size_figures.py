"""Figures and widget of notebook 10: images keep their proportions, the widget draws what is set."""

import numpy as np
import pytest
from drawings import assert_shows
from matplotlib.text import Text
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.explore.figures import WIDTH
from sdlearn.explore.size_figures import KEPT, SizeExplorer, box_map, by_steps, true_sizes
from sdlearn.pipeline import StableDiffusion, two_pass
from sdlearn.sizes import measure_spacing

IMAGES = [np.full((height, width, 3), 90, np.uint8) for width, height in ((64, 64), (256, 128), (128, 256), (400, 100))]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts(config=tiny_config()))


def boxes(drawing):
    """x, y, width and height of each image in pixels, from the upper left."""
    found = [axes.get_position() for axes in drawing.axes]
    return [(round(one.x0 * drawing.width), round((1 - one.y1) * drawing.height), round(one.width * drawing.width),
             round(one.height * drawing.height)) for one in found]


def test_images_keep_one_scale_and_do_not_overlap():
    drawing = true_sizes(IMAGES, ["one", "two", "three", "four"], title="Sizes", zoom=1.5)
    found = boxes(drawing)
    assert [box[2:] for box in found] == [(96, 96), (384, 192), (192, 384), (600, 150)]
    assert found[0][1] == found[1][1] == found[2][1] and found[3][1] > found[2][1] + 384    # a new row beneath
    assert all(a[0] + a[2] < b[0] for a, b in zip(found[:2], found[1:3], strict=True))
    assert drawing.width <= WIDTH and found[3][0] == found[0][0]
    assert {"one", "two", "three", "four", "Sizes"} <= {text.get_text() for text in drawing.findobj(Text)}
    assert drawing.png().startswith(b"\x89PNG")


def test_rows_break_where_they_are_told_to():
    found = boxes(true_sizes(IMAGES[:3], title="Rows", breaks=[1]))
    assert found[1][1] > found[0][1] and found[2][1] == found[1][1]


@pytest.mark.parametrize("given, words", [(([],), "0 images"), ((IMAGES, ["one"]), "1 captions"),
                                          ((IMAGES, (), 3.0), "smaller zoom")])
def test_what_cannot_be_shown_is_told(given, words):
    images, captions, zoom = (*given, (), 1.0)[:3] if len(given) < 3 else given
    with pytest.raises(ValueError, match=words):
        true_sizes(images, captions, title="none", zoom=zoom)


def test_things_lie_as_far_from_the_border_and_from_each_other_as_they_do():
    alone, pair = [(40, 20, 60, 40)], [(0, 50, 20, 70), (180, 50, 200, 70), (30, 90, 50, 110)]
    border, following = measure_spacing([alone, [], pair], (256, 128), 128)
    assert border == pytest.approx((30 + 10 + 60 + 28) / 4 / 128)
    near, far = np.hypot(30, 40), np.hypot(150, 40)
    assert following == pytest.approx((2 * near + far) / 3 / 128)
    assert np.isnan(measure_spacing([alone], (128, 128), 128)[1])
    assert np.isnan(measure_spacing([[]], (128, 128), 128)).all()


def test_boxes_lie_where_they_are_and_images_have_their_colours():
    drawn = box_map((96, 64), [[(10, 10, 30, 30)], [], [(50.4, 20, 80, 50)]])
    assert drawn.shape == (64, 96, 3) and drawn.dtype == np.uint8
    first, third, ground = drawn[20, 20], drawn[35, 65], drawn[5, 5]
    assert (drawn[10, 10:31] == first).all() and (drawn[20:51, 80] == third).all()
    assert len({tuple(one) for one in (first, third, ground)}) == 3 and (drawn[0] == drawn[0, 0]).all()


def test_an_ablation_has_a_line_for_each_variant_at_the_steps_that_were_measured():
    rows = [{"step": 0, "loss": 2.0}, {"step": 5, "other": 1.0}, {"step": 9, "loss": 1.0}]
    found = {"ablation": "made-up", "variants": {"one": {"measurements": rows}, "two": {"measurements": rows[:1]}}}
    [axes] = by_steps(found, {"loss": "the loss"}, "mean", title="Two").axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 9], [0]]
    assert "the loss" in axes.get_title(loc="left")
    with pytest.raises(ValueError, match="nothing was measured of unknown in the ablation 'made-up'"):
        by_steps(found, {"unknown": "none"}, "mean", title="Two")


def test_the_explorer_draws_what_is_set(model):
    explorer = SizeExplorer(model, "a red apple", steps=2)
    own = model.config.image_size
    assert explorer.rows[0][1][0].size == (2 * own, own)
    explorer.width.value, explorer.height.value, explorer.seed.value = own, 2 * own, 5
    explorer.passes.value, explorer.strength.value = True, 0.5
    explorer.draw()
    said, images = explorer.rows[0]
    expected = two_pass(model, "a red apple", (own, 2 * own), strength=0.5, num_inference_steps=2, guidance_scale=4.0,
                        batch=2, seed=5)
    assert [one.tobytes() for one in images] == [one.tobytes() for one in expected]
    assert said == f"a red apple, {own} x {2 * own}, two passes of strength 0.5"
    assert len(explorer.shown.children) == 4 and not explorer.button.disabled
    still = explorer.still()
    assert "image/png" in explorer._repr_mimebundle_()[0] and still.width <= WIDTH
    assert_shows(still, expected)                   # the newest row, and not the first
    assert still.title == said


def test_the_explorer_keeps_the_last_rows_and_tells_what_cannot_be(model, monkeypatch):
    explorer = SizeExplorer(model, "a cat", steps=1)
    for _ in range(KEPT + 1):
        explorer.button.click()
    assert len(explorer.rows) == KEPT
    monkeypatch.setattr(model, "text2img", lambda *given, **named: (_ for _ in ()).throw(ValueError("too <much>")))
    explorer.button.click()
    assert explorer.message.value == "too &lt;much&gt;" and not explorer.button.disabled
