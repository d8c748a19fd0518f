"""The panel of the ablation `steps`: what is drawn is what was measured."""

import pytest

from sdlearn.ablations import load_ablation
from sdlearn.explore.curves import apart
from sdlearn.explore.step_figures import judged_by_steps


def test_lines_are_the_readings_over_calls_of_the_network():
    variants = load_ablation("steps")["variants"]
    panel = judged_by_steps(["heun", "ddim"])
    assert list(panel.lines) == ["heun", "ddim"]
    for name, calls in (("heun", 2), ("ddim", 1)):
        xs, ys = panel.lines[name]
        assert xs == [calls * one["step"] for one in variants[name]["measurements"]] and len(xs) > 3
        assert ys == [one["right"] for one in variants[name]["measurements"]] and all(0 <= y <= 1 for y in ys)


def test_a_sampler_that_was_not_measured_is_an_error():
    with pytest.raises(KeyError):
        judged_by_steps(["lms"])


def test_ticks_of_many_points_do_not_touch():
    assert apart([10, 20, 40, 80, 160, 320]) == [10, 20, 40, 80, 160, 320], "few are all named"
    some = apart([50, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 30, 40, 60, 100])
    assert some == [1, 2, 3, 5, 8, 12, 20, 30, 50, 100]
    assert apart([7.0]) == [7.0]
