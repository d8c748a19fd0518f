"""The drawing pad: strokes become the image that a model reads, with a browser's events or without any."""

import numpy as np
import pytest
from PIL import Image

from sdlearn.explore import DrawingPad, Stroke
from sdlearn.explore.pad import drawn_from

WIDGET = "application/vnd.jupyter.widget-view+json"
ACROSS = Stroke(((10, 20), (50, 20)), 4)


def test_a_line_covers_what_it_passes_and_nothing_else():
    drawn = drawn_from([ACROSS], (32, 64))
    assert drawn.shape == (32, 64) and drawn.dtype == np.uint8 and set(np.unique(drawn)) == {0, 255}
    rows, columns = np.nonzero(drawn)
    assert 18 <= rows.min() <= 20 <= rows.max() <= 22 and 7 <= columns.min() <= 10 and 50 <= columns.max() <= 53
    assert drawn[20, 10:51].all()


def test_a_click_alone_is_a_dot_of_the_pens_width():
    assert drawn_from([Stroke(((5, 5),), 1)], (16, 16)).sum() == 255
    dot = drawn_from([Stroke(((8, 8),), 7)], (16, 16)) > 0
    assert 7 <= dot[8].sum() <= 8 and dot.sum() < 64, "round, not square"


def test_a_rubber_takes_away_what_was_there_before_it_and_not_what_comes_later():
    rubber = Stroke(((0, 20), (64, 20)), 8, erases=True)
    assert drawn_from([ACROSS, rubber], (32, 64)).sum() == 0
    assert drawn_from([rubber, ACROSS], (32, 64)).any()


def test_events_of_the_canvas_become_strokes_in_the_images_pixels():
    pad = DrawingPad(size=(64, 64), width=3)
    assert pad.canvas.width == 64 * pad.scale and pad.scale > 1
    pad.move(5, 5)
    assert not pad.strokes, "the pen was up"
    pad.start(10 * pad.scale, 20 * pad.scale)
    pad.move(30 * pad.scale, 20 * pad.scale)
    pad.end()
    pad.end()
    assert pad.strokes == [Stroke(((10.0, 20.0), (30.0, 20.0)), 3)]
    assert pad.drawn[20, 10:31].all()
    pad.pen.value, pad.width.value = "erase", 8
    pad.start(0, 20 * pad.scale)
    pad.move(64 * pad.scale, 20 * pad.scale)
    pad.end(1, 2)
    assert not pad.drawn.any()
    pad.undo()
    assert pad.drawn.any()
    pad.clear()
    pad.undo()
    assert not pad.drawn.any()


def test_what_is_made_follows_what_is_drawn_and_what_is_refused_is_told():
    asked = []

    def make(drawn, prompt):
        asked.append((drawn, prompt))
        if not drawn.any():
            raise ValueError("nothing is drawn <yet>")
        return Image.fromarray(drawn).convert("RGB")

    pad = DrawingPad(size=(32, 32), make=make, prompt="a ball")
    assert asked == [] and pad.made is None
    pad.run()
    assert "nothing is drawn &lt;yet&gt;" in pad.message.value
    pad.start(5, 5)
    pad.move(50, 50)
    pad.end()
    pad.run()
    assert pad.message.value == "" and np.array_equal(asked[-1][0], pad.drawn) and asked[-1][1] == "a ball"
    assert np.array_equal(np.array(pad.made)[..., 0], pad.drawn) and bytes(pad.result.value).startswith(b"\x89PNG")


def test_strokes_that_are_there_at_the_start_are_made_into_an_image_at_once():
    pad = DrawingPad(size=(32, 64), strokes=[ACROSS], make=lambda drawn, prompt: Image.fromarray(drawn).convert("RGB"))
    assert pad.made is not None and np.array_equal(np.array(pad.made)[..., 0], pad.drawn)


@pytest.mark.parametrize("image", [None, np.full((48, 96, 3), 200, np.uint8), Image.new("RGB", (96, 48), "green")])
def test_a_still_image_stands_where_no_widget_runs(image):
    pad = DrawingPad(image, size=(48, 96), strokes=[Stroke(((20, 24), (70, 24)), 10)])
    assert pad.size == (48, 96)
    bundle, _ = pad._repr_mimebundle_()
    assert {WIDGET, "image/png"} <= bundle.keys() and "DrawingPad" in bundle["text/plain"]
    seen = pad._seen()
    ground = 0 if image is None else np.asarray(image)
    assert (seen[pad.drawn == 0] == (ground if image is None else ground[pad.drawn == 0])).all()
    covered = seen[pad.drawn == 255]
    if image is None:
        assert (covered == 255).all()
    else:       # a veil: redder than the ground, which is still told through it
        assert (covered[:, 0] > np.asarray(image)[0, 0, 0]).all() and not (covered == covered[0, ::-1]).all()
