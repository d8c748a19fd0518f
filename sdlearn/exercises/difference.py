"""How a result differs from the expected one, as a sentence."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONTAINERS = (list, tuple)


def describe_difference(got: Any, expected: Any, tol: float = 1e-4, what: str = "The result") -> str | None:
    """A sentence, without its full stop, on the first difference between `got` and `expected`; None if they agree.

    Tensors must agree in shape and dtype, and their values within `tol` times the largest finite expected one.
    Lists and tuples are interchangeable and compared item by item; dictionaries key by key.
    Raises TypeError for an expected value of another type.
    """
    match expected:
        case Tensor():
            return _compare_tensors(got, expected, tol, what)
        case bool() | str() | None:
            same = type(got) is type(expected) and got == expected
            return None if same else _must_be(what, _describe(got), _describe(expected))
        case int() | float():
            return _compare_numbers(got, expected, tol, what)
        case Mapping():
            if not isinstance(got, Mapping) or set(got) != set(expected):
                keys = sorted(map(str, got)) if isinstance(got, Mapping) else describe_type(got)
                return _must_be(what, keys, f"a dictionary of {sorted(map(str, expected))}")
            return _first(describe_difference(got[key], expected[key], tol, f"{what}, at '{key}',") for key in expected)
        case list() | tuple():
            if not isinstance(got, CONTAINERS):
                return _must_be(what, describe_type(got), describe_type(expected))
            if len(got) != len(expected):
                return f"{what} has {len(got)} items where there must be {len(expected)}"
            return _first(describe_difference(g, e, tol, f"{what.removesuffix(',')}, item {place} of {len(expected)},")
                          for place, (g, e) in enumerate(zip(got, expected, strict=True), start=1))
    raise TypeError(f"results of type {type(expected).__name__} cannot be compared: give tensors or numbers")


def describe_resemblance(got: Any, expected: Any, tol: float = 1e-4) -> str | None:
    """The simple transformation that turns the expected tensor into `got`: negative, multiple, transposed; or None."""
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor) and expected.is_floating_point()
            and got.is_floating_point()) or expected.numel() < 2 or got.numel() != expected.numel():
        return None
    got, expected = got.detach().double(), expected.detach().double()
    if not bool(got.isfinite().all()) or not bool(expected.abs().max() > 0):
        return None
    if got.shape == expected.shape:
        if _close(got, expected, tol):       # only the dtype differs, which is reported already
            return None
        factor = ((got * expected).sum() / (expected * expected).sum()).item()
        if abs(factor) > 1e-3 and _close(got, factor * expected, tol):
            return ("everywhere it is the negative: which way round is the difference?" if abs(factor + 1) < 1e-3
                    else f"everywhere it is {format_number(factor)} times what it must be: which factor is it?")
    for a in range(expected.ndim):
        for b in range(a):
            swapped = expected.transpose(a, b)
            if swapped.shape == got.shape and not torch.equal(swapped, expected) and _close(got, swapped, tol):
                return f"axes {b} and {a} are swapped"
    if _close(got.flatten(), expected.flatten(), tol):
        return "the numbers are right, in their right order, in another shape"
    return None


def format_number(value: float) -> str:
    """A number with three significant digits."""
    if math.isnan(value):
        return "NaN"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def describe_type(value: Any) -> str:
    """The type with its article: `a list`, `an int`, `a tensor`, `None`."""
    if value is None:
        return "None"
    name = "tensor" if isinstance(value, Tensor) else type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _compare_tensors(got: Any, expected: Tensor, tol: float, what: str) -> str | None:
    if not isinstance(got, Tensor):
        return _must_be(what, describe_type(got), "a tensor")
    if got.shape != expected.shape:
        return f"{what} has shape {tuple(got.shape)} where it must be {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"{what} is {_dtype_name(got)} where it must be {_dtype_name(expected)}"
    got, expected = got.detach(), expected.detach()
    if expected.dtype == torch.bool or not expected.numel():
        off = got != expected
    else:
        got, expected = got.double(), expected.double()
        off = (got - expected).abs()
        equal = (got == expected) | got.isnan() & expected.isnan()      # inf - inf is nan
        off = off.masked_fill(equal, 0).nan_to_num(nan=math.inf)
        if bool((off <= _tolerance(expected, tol)).all()):
            return None
    if not bool(off.any()):
        return None
    place = tuple(map(int, np.unravel_index(off.flatten().double().argmax().item(), expected.shape)))
    at = f" (at [{', '.join(map(str, place))}])" if place else ""
    return _values_differ(what, got[place].item(), expected[place].item(), at)


def _compare_numbers(got: Any, expected: float, tol: float, what: str) -> str | None:
    if isinstance(got, Tensor) and got.ndim == 0:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return _must_be(what, describe_type(got), f"a number, {format_number(expected)}")
    return None if got == expected or abs(got - expected) <= tol * max(abs(expected), 1e-6) \
        else _values_differ(what, got, expected, "")


def _values_differ(what: str, got: float, expected: float, at: str) -> str:
    got_shown, expected_shown = format_number(got), format_number(expected)
    if got_shown == expected_shown:
        got_shown, expected_shown = f"{got:.9g}", f"{expected:.9g}"
    return f"{what} is {got_shown} where it must be {expected_shown}{at}"


def _close(got: Tensor, expected: Tensor, tol: float) -> bool:
    return bool(((got - expected).abs() <= _tolerance(expected, tol)).all())


def _tolerance(expected: Tensor, tol: float) -> float:
    finite = expected[expected.isfinite()]
    return tol * max(finite.abs().max().item() if finite.numel() else 0.0, 1e-6)


def _first(differences) -> str | None:
    return next((one for one in differences if one), None)


def _must_be(what: str, got: Any, expected: Any) -> str:
    return f"{what} is {got} where it must be {expected}"


def _describe(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, (bool, str)) else describe_type(value)


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
