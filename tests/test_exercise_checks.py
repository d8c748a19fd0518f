"""Checks of exercises are strict: an answer that is right but for one result, by a little or in its shape, is rejected.

The package's own answer is run through a test again and again; each time one number of one of its results is changed.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401
from torch import Tensor, nn

from sdlearn.exercises.exercise import Exercise, exercises, find
from sdlearn.exercises.testing import run_test

NAMES = [one.name for one in exercises() if one.module.startswith("sdlearn.")]
ERROR = 1.5e-3          # relative to the largest number: more than any tolerance of a check
MOST = 4                # items of a long list that are changed, from each of its ends

# Tests of which only some results are compared, by value: the others are counted, or looked at for another property.
PARTLY = {
    "make_timesteps": ["each_pair_starts_where_the_last_ended"],
    "ddpm": ["one_step_of_the_posterior", "ddpm_calls_denoise_once_per_step"],
    "heun": ["heun_at_the_end"],
    "dpmpp_2m": ["dpmpp_at_the_end"],
    "resample": ["up_to_a_size"],
    "predict_uncond_cond": ["one_network_call"],
    "zero_conv_gradients": ["of_the_weight", "of_the_bias", "of_the_input"],
    "merge_weight": ["in_half_precision"],
    "conv_cost": ["flops_of_one_layer", "bytes_of_one_layer"],
    "ddim_coefficients": ["at_inner_steps", "the_last", "from_zero_signal"],
}
# Tests of gradients, of noise, of how often something is run, of what stays unchanged: of no value.
OTHERWISE = {
    "reparameterise": ["gradients_reach_mean_and_logvar", "without_a_generator_each_call_is_another",
                       "the_posterior_is_unchanged"],
    "CrossAttention": ["gradients_reach_every_layer"],
    "predict_x0": ["no_superfluous_network_call"],
    "blended_denoise": ["inputs_of_denoise", "x_is_unchanged"],
    "replace_token_embedding": ["gradients_reach_the_vector"],
    "zero_conv": ["gradients_are_not_zero"],
    "widen_unet": ["gradients_are_not_zero"],
    "decode_tiled": ["tiles_of_the_size", "overlapping_tiles_are_blended"],
    "ConditioningCache": ["each_computed_once"],
}
# Tests of step "shape" that ask for a type, or compare in a way that broadcasts: later ones see another shape.
ANY_SHAPE = {"encode_word": ["a_list_of_ids"], "skip_channels": ["is_a_list"], "zero_conv": ["one_cell_at_a_time"],
             "level_sizes": ["one_pair_for_each_level"], "two_pass": ["images_of_the_size"]}
# Tests of step "shape" that count the tensors of a result, and leave the shape of each to later ones.
AS_MANY = {"predict_uncond_cond": ["two_outputs"]}
# Tests of step "shape" that count calls and steps.
COUNTED = {"repaint": ["a_step_for_each_pair", "as_many_calls"], "dreambooth_loss": ["one_network_call"]}


class Spoiler:
    """Counts an answer's results, and changes number `call` of them by `change`."""

    def __init__(self, call: int | None = None, change: Callable = lambda value: value):
        self.call, self.change, self.results = call, change, []

    def answer(self, solution: Callable) -> Callable:
        """A function or class that answers as the solution does, but for that result."""
        @functools.wraps(solution, updated=())
        def answer(*args, **kwargs):
            return self.pass_on(solution(*args, **kwargs))
        return answer

    def pass_on(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            value.register_forward_hook(lambda module, given, output: self.pass_on(output))
            return value
        if callable(value):
            return self.answer(value)
        number = len(self.results)
        self.results.append(value)
        if isinstance(value, Iterator):
            return self.items(value, number)
        return self.change(value) if number == self.call else value

    def items(self, values: Iterator, number: int) -> Iterator:
        for value in values:
            self.results[number] = value
            yield self.change(value) if number == self.call else value


def leaves(value: Any) -> int:
    """How many tensors, numbers and words a result holds."""
    match value:
        case dict():
            return sum(map(leaves, value.values()))
        case list() | tuple():
            return sum(map(leaves, value))
        case Tensor():
            return int(value.numel() > 0)
        case np.ndarray():
            return int(value.size > 0)
    return isinstance(value, (bool, int, float, str))


def shifted(value: Any, place: int) -> Any:
    """The result with an error in leaf number `place`."""
    match value:
        case Tensor() if value.is_floating_point():
            largest = value.detach().abs().nan_to_num(0, 0, 0).max().item()
            return value.nan_to_num(posinf=100.0, neginf=-100.0) + ERROR * max(largest, 1e-2)
        case Tensor():
            return ~value if value.dtype == torch.bool else value + 1
        case np.ndarray():
            return shifted(torch.from_numpy(value), place).numpy()
        case bool():
            return not value
        case int():
            return value + 1 + math.ceil(ERROR * abs(value))
        case float():
            return value + ERROR * max(abs(value), 1e-2) if math.isfinite(value) else 100.0
        case str():
            return f"{value}x"
    items = list(value.values() if isinstance(value, dict) else value)
    for i, item in enumerate(items):
        if place < leaves(item):
            items[i] = shifted(item, place)
            break
        place -= leaves(item)
    return like(value, items)


def reshaped(value: Any) -> Any:
    """The result with an axis more; a list with an item more; a list in place of a number or a word.

    Of a step that a sampler yields, the tensors have an axis more.
    """
    match value:
        case Tensor() | np.ndarray():
            return value[None]
        case dict():
            return {**value, "another": 0}
        case tuple() if hasattr(value, "_fields"):
            return like(value, [reshaped(item) if isinstance(item, Tensor) else item for item in value])
        case list():
            return [*value, *(value[-1:] or [0])]
        case tuple():
            return (*value, *(value[-1:] or (0,)))
    return [value]


def like(value: Any, items: list) -> Any:
    if isinstance(value, dict):
        return dict(zip(value, items, strict=True))
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def passes(exercise: Exercise, index: int, name: str, spoiler: Spoiler) -> bool:
    """Whether the solutions pass that test where the one of that name is spoiled."""
    answers = tuple(spoiler.answer(solution) if one == name else solution
                    for one, solution in zip(exercise.names, exercise.solutions, strict=True))
    return run_test(exercise, answers, index)["passed"]


def results(exercise: Exercise, index: int, name: str) -> list:
    spoiler = Spoiler()
    assert passes(exercise, index, name, spoiler)
    return spoiler.results


@pytest.mark.parametrize("name", NAMES)
def test_a_small_error_in_a_single_result_is_rejected(name):
    exercise = find(name)
    for index, test in enumerate(exercise.tests):
        if test.step == "shape" or test.run.__name__ in OTHERWISE.get(name, []):
            continue
        rejected = []
        for of in exercise.names:
            for call, value in enumerate(results(exercise, index, of)):
                count = leaves(value)
                found = [not passes(exercise, index, of, Spoiler(call, functools.partial(shifted, place=place)))
                         for place in sorted({*range(min(MOST, count)), *range(max(0, count - MOST), count)})]
                stepping = hasattr(value, "_fields")            # of a step that is yielded, one part
                rejected += [any(found)] if stepping else found
        part = test.run.__name__ in PARTLY.get(name, [])
        assert (any(rejected) and not all(rejected)) if part else all(rejected), (test.run.__name__, rejected)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_result_of_another_shape_or_type_is_rejected(name):
    exercise = find(name)
    for index, test in enumerate(exercise.tests):
        if test.step != "shape" or test.run.__name__ in COUNTED.get(name, []):
            continue
        changes = [repr] if test.run.__name__ in ANY_SHAPE.get(name, []) else [repr, reshaped]
        for of in exercise.names:
            for call, value in enumerate(results(exercise, index, of)):
                tensors = type(value) in (list, tuple) and all(isinstance(one, Tensor) for one in value)
                each = tensors and reshaped in changes and test.run.__name__ not in AS_MANY.get(name, [])
                more = [lambda value: type(value)(map(reshaped, value))] if each else []
                rejected = [not passes(exercise, index, of, Spoiler(call, change)) for change in [*changes, *more]]
                assert all(rejected), (test.run.__name__, of, call, rejected)


def test_the_exceptions_are_tests_that_exist():
    for table in (PARTLY, OTHERWISE, ANY_SHAPE, AS_MANY, COUNTED):
        for name, tests in table.items():
            assert set(tests) <= {test.run.__name__ for test in find(name).tests}, name
