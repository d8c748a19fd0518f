"""Figures and widget of notebook 11: bars are as long as what they show, what is not known is said."""

import numpy as np
import pytest
from matplotlib.text import Text

from sdlearn.explore.bench_figures import (
    Estimate,
    EstimateExplorer,
    Point,
    optimization_figure,
    roofline_figure,
    stacked,
)
from sdlearn.explore.figures import WIDTH

ROWS = {"one": {"a": 1.0, "b": 2.0}, "two": {"b": 5.0}}


def texts(drawing):
    return [text.get_text().strip() for text in drawing.findobj(Text) if text.get_text().strip()]


def bars(drawing):
    """(row, left, length, colour, opacity) of each."""
    return [(round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width(), bar.get_facecolor()[:3],
             bar.get_alpha()) for bar in drawing.axes[0].patches]


def test_parts_of_a_row_follow_each_other_in_the_same_colours():
    drawing = stacked(ROWS, "seconds", title="Bars", beneath=["a line", "another"])
    (first, second, third) = bars(drawing)
    assert first[:3] == (0, 0, 1) and second[:3] == (0, 1, 2) and third[:3] == (1, 0, 5)
    assert second[3] == third[3] != first[3]
    assert {"one", "two", "a", "b", "3", "5", "seconds", "Bars", "a line", "another"} <= set(texts(drawing))
    assert drawing.width <= WIDTH and drawing.png().startswith(b"\x89PNG")


def test_a_single_part_needs_no_legend():
    assert stacked({"one": {"a": 1.0}}, "x", title="t").axes[0].get_legend() is None


def test_optimization_steps_that_are_not_measured_or_not_exact_are_marked():
    steps = [("plain", 4.0, True), ("half", None, True), ("fused", 3.0, True), ("fewer", 1.5, False)]
    drawing = optimization_figure(steps, title="Steps")
    assert [bar[2] for bar in bars(drawing)] == [4.0, 3.0, 1.5]
    assert [bar[4] for bar in bars(drawing)][:2] == [1, 1] and bars(drawing)[2][4] < 1
    said = texts(drawing)
    assert "not measured here" in said and "fewer (approximate)" in said
    assert "3   0.75 of the previous" in said and "1.5   0.50 of the previous" in said


def test_a_roofline_bends_where_both_peaks_meet():
    drawing = roofline_figure({"matmul": Point(50, 60, 0.7), "norms": Point(0, 0, 0.3)}, {"chip": (100.0, 10.0)},
                              title="Roof")
    axes = drawing.axes[0]
    xs, ys = axes.lines[0].get_data()
    assert np.allclose(ys, np.minimum(100, 10 * xs)) and xs[-1] > 10
    assert any("norms, 30% of the time" in one for one in texts(drawing))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chip", "matmul, 70% of the time"]


@pytest.mark.parametrize("make", [lambda: stacked({}, "x", title="t"), lambda: stacked({"a": {}}, "x", title="t"),
                                  lambda: optimization_figure([], title="t"),
                                  lambda: roofline_figure({}, {}, title="t")])
def test_nothing_to_draw_is_told(make):
    with pytest.raises(ValueError, match="give"):
        make()


def test_the_explorer_shows_what_is_chosen():
    def estimate(chip, steps):
        if steps == 0:
            raise ValueError("no <steps>")
        return Estimate({"an image": {"network": steps * chip}}, [f"{steps} steps"])
    explorer = EstimateExplorer(estimate, {"chip": [2, 3], "steps": [10, 0, 20]}, title="Estimate", x="seconds")
    assert explorer.last.bars == {"an image": {"network": 20}} and explorer.told.value == "10 steps"
    before = explorer.image.value
    explorer.chosen["chip"].value = 3
    assert explorer.last.bars == {"an image": {"network": 30}} and explorer.image.value != before
    explorer.chosen["steps"].value = 0
    assert explorer.told.value == "no &lt;steps&gt;" and explorer.last.bars["an image"] == {"network": 30}
    explorer.chosen["steps"].value = 20
    assert {"chip 3; steps 20", "20 steps"} <= set(texts(explorer.still()))
    assert "image/png" in explorer._repr_mimebundle_()[0]
