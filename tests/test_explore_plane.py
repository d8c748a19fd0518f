"""Curves and planes: they draw what they are given; distances of distributions; the explorer walks what is chosen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.config import NoiseConfig
from sdlearn.explore.curves import Panel, curves, density, over, running_mean
from sdlearn.explore.plane import Plane, SamplerExplorer, lattice, planes, sliced_distance
from sdlearn.samplers import SAMPLERS, make_timesteps_for
from sdlearn.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(NoiseConfig())
POINTS = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def towards_one(x, t):
    return torch.ones_like(x)


def test_curves_hold_the_lines_of_each_panel():
    drawing = curves(Panel("one", "steps", "error", {"a": ([1, 2, 4], [4.0, 2.0, 1.0]), "b": ([1, 4], [1.0, 1.0])},
                           log="xy", dashed=["b"]),
                     Panel("two", "t", "alpha", {"c": (range(100), torch.linspace(1, 0, 100))}), title="Both")
    first, second = drawing.axes
    assert [line.get_label() for line in first.lines] == ["a", "b"] and len(second.lines) == 1
    assert np.allclose(first.lines[0].get_xydata(), [[1, 4], [2, 2], [4, 1]])
    assert (first.get_xlabel(), first.get_ylabel(), second.get_title(loc="left")) == ("steps", "error", "two")
    assert first.get_xscale() == first.get_yscale() == "log" and second.get_xscale() == "linear"
    assert first.lines[0].get_marker() == "o" and second.lines[0].get_marker() == "None"
    assert first.lines[1].get_linestyle() == "--" and first.get_legend() and not second.get_legend()
    assert drawing.png().startswith(b"\x89PNG") and drawing.title == "Both"


def test_lines_over_the_same_places_share_their_xs():
    assert over((1, 2), {"a": [3, 4], "b": [5, 6]}) == {"a": ((1, 2), [3, 4]), "b": ((1, 2), [5, 6])}


def test_a_running_mean_is_of_as_many_values_as_it_says():
    assert running_mean([1, 2, 6, 0], 2) == pytest.approx([1.5, 4, 3])


def test_a_log_axis_of_few_points_names_them():
    [axes] = curves(Panel("", "steps", "error", {"a": ([5, 10, 40], [3, 2, 1])}, log="x"), title="").axes
    assert list(axes.get_xticks()) == [5, 10, 40]


def test_lines_that_cannot_be_drawn_are_told():
    with pytest.raises(ValueError, match="no panels"):
        curves(title="none")
    with pytest.raises(ValueError, match="'a' has 3 xs and 2 ys"):
        curves(Panel("", "", "", {"a": ([1, 2, 3], [1, 2])}), title="uneven")


@given(st.lists(st.floats(-0.99, 0.99), min_size=1, max_size=50), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_a_density_has_area_one(values, bins):
    middles, heights = density(values, -1, 1, bins)
    assert len(middles) == len(heights) == bins and -1 < middles[0] <= middles[-1] < 1
    assert heights.sum() * 2 / bins == pytest.approx(1)


def test_planes_hold_their_parts():
    arrows = torch.from_numpy(lattice(side=3))
    paths = torch.stack([POINTS[:5], POINTS[:5] + 1, POINTS[:5] + 2])
    drawing = planes(Plane("points", POINTS, behind=POINTS + 1), Plane("field", arrows=(arrows, -arrows)),
                     Plane("paths", paths=paths), title="Three", columns=2)
    points, field, walked, empty = drawing.axes
    assert np.allclose(points.collections[1].get_offsets(), POINTS)
    assert np.allclose(points.collections[0].get_offsets(), POINTS + 1)
    assert np.allclose(np.stack([field.collections[0].U, field.collections[0].V], 1), -arrows)
    assert len(walked.lines) == 5 and np.allclose(walked.lines[2].get_xydata(), paths[:, 2])
    assert not empty.axison and points.get_title(loc="left") == "points"
    with pytest.raises(ValueError, match="nothing to draw"):
        planes(title="none")


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_planes_are_squares_within_the_page(columns):
    drawing = planes(*[Plane("", POINTS)] * 4, title="", columns=columns)
    assert drawing.width <= 1020
    for axes in drawing.axes:
        box = axes.get_position()
        assert box.width * drawing.width == pytest.approx(box.height * drawing.height)
        assert box.y0 * drawing.height >= 40 and box.x1 <= 1 and box.y1 * drawing.height <= drawing.height - 30


def test_a_few_points_keep_a_colour_each():
    few, many = planes(Plane("", POINTS[:4]), Plane("", POINTS), title="").axes
    assert len({tuple(colour) for colour in few.collections[0].get_facecolors()}) == 4
    assert len(many.collections[0].get_facecolors()) == 1


def test_a_lattice_covers_the_square_evenly():
    places = lattice(2.0, 5)
    assert places.shape == (25, 2) and np.allclose(places.min(0), -2) and np.allclose(places.max(0), 2)
    assert len({tuple(place) for place in places.tolist()}) == 25


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_distance_of_a_shift_is_its_length_seen_from_all_sides(x, y, seed):
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = points[torch.randperm(20, generator=torch.Generator().manual_seed(seed))] + torch.tensor([x, y])
    length = float(np.hypot(x, y))
    assert sliced_distance(points, moved, 400) == pytest.approx(2 / np.pi * length, rel=0.01, abs=1e-9)
    assert sliced_distance(moved, points) == pytest.approx(sliced_distance(points, moved))


@pytest.fixture
def explorer():
    chosen = {name: SAMPLERS[name] for name in ("ddim", "euler", "heun")}
    return SamplerExplorer(towards_one, POINTS, SCHEDULE, chosen, POINTS, steps=6)


def test_the_explorer_walks_what_is_chosen(explorer):
    assert [step.t for step in explorer.run] == [t for t, _ in make_timesteps_for("ddim", SCHEDULE, 6)]
    explorer.step.value = 5
    explorer.sampler.value = "euler"
    assert [step.t for step in explorer.run] == [t for t, _ in make_timesteps_for("euler", SCHEDULE, 6)]
    assert torch.allclose(explorer.run[-1].x, torch.ones_like(POINTS))
    explorer.count.value = 3
    assert len(explorer.run) == 3 and explorer.step.max == explorer.play.max == 2 and explorer.step.value == 2


def test_the_explorer_shows_the_step(explorer):
    first = bytes(explorer.image.value)
    explorer.step.value = 3
    assert first.startswith(b"\x89PNG") and bytes(explorer.image.value) != first
    after, predicted, grid = explorer.frame([3]).axes
    assert np.allclose(after.collections[-1].get_offsets(), explorer.run[3].x)
    assert np.allclose(predicted.collections[-1].get_offsets(), 1)
    t, t_prev = explorer.grid[3]
    assert list(grid.lines[-1].get_xdata()) == [t, t_prev]


def test_the_explorer_has_a_still_image_and_a_widget(explorer):
    data, _ = explorer._repr_mimebundle_()
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= data.keys()
    assert len(explorer.still().axes) == 9


def test_a_histogram_gives_the_density_at_the_centre_of_each_bin():
    centres, heights = density([0.1, 0.2, 0.3, 2.9, 5.0], 0.0, 4.0, bins=2)     # the last one lies outside
    assert centres.tolist() == [1.0, 3.0] and heights.tolist() == pytest.approx([3 / 4 / 2, 1 / 4 / 2])
    centres, heights = density(torch.full((3, 2), -0.5), -1.0, 1.0)
    assert len(centres) == len(heights) == 60 and centres.tolist() == pytest.approx((-centres[::-1]).tolist())
    assert (heights * 2 / 60).sum() == pytest.approx(1) and centres[heights.argmax()] == pytest.approx(-0.5, abs=1 / 60)
