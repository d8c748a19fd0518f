"""In what one result differs from another, in a sentence."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONTAINERS = (list, tuple)


def difference(got: Any, expected: Any, tol: float = 1e-4, what: str = "The result") -> str | None:
    """What is wrong with `got`, as the beginning of a sentence without its full stop; None if nothing is.

    Tensors must have one shape and dtype, and values apart by at most `tol` times the largest of those
    expected. Lists and tuples count as the same, and are compared item by item, as are dictionaries.
    """
    match expected:
        case Tensor():
            return _of_tensors(got, expected, tol, what)
        case bool() | str() | None:
            return None if type(got) is type(expected) and got == expected else _is(what, _word(got), _word(expected))
        case int() | float():
            return _of_numbers(got, expected, tol, what)
        case Mapping():
            if not isinstance(got, Mapping) or set(got) != set(expected):
                keys = sorted(map(str, got)) if isinstance(got, Mapping) else kind(got)
                return _is(what, keys, f"a dictionary of {sorted(map(str, expected))}")
            return _first(difference(got[key], expected[key], tol, f"{what}, at '{key}',") for key in expected)
        case list() | tuple():
            if not isinstance(got, CONTAINERS):
                return _is(what, kind(got), kind(expected))
            if len(got) != len(expected):
                return f"{what} has {len(got)} items where there must be {len(expected)}"
            return _first(difference(g, e, tol, f"{what.removesuffix(',')}, item {place} of {len(expected)},")
                          for place, (g, e) in enumerate(zip(got, expected, strict=True), start=1))
    raise TypeError(f"results of type {type(expected).__name__} cannot be compared: give tensors or numbers")


def resemblance(got: Any, expected: Any, tol: float = 1e-4) -> str | None:
    """What a wrong tensor is to the right one where that is telling: its negative, a multiple, transposed."""
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor) and expected.is_floating_point()
            and got.is_floating_point()) or expected.numel() < 2 or got.numel() != expected.numel():
        return None
    got, expected = got.detach().double(), expected.detach().double()
    if not bool(got.isfinite().all()) or not bool(expected.abs().max() > 0):
        return None
    if got.shape == expected.shape:
        if _near(got, expected, tol):       # of another type alone, which is told already
            return None
        factor = ((got * expected).sum() / (expected * expected).sum()).item()
        if abs(factor) > 1e-3 and _near(got, factor * expected, tol):
            return ("everywhere it is the negative: which way round is the difference?" if abs(factor + 1) < 1e-3
                    else f"everywhere it is {number(factor)} times what it must be: which factor is it?")
    for a in range(expected.ndim):
        for b in range(a):
            turned = expected.transpose(a, b)
            if turned.shape == got.shape and not torch.equal(turned, expected) and _near(got, turned, tol):
                return f"axes {b} and {a} are swapped"
    if _near(got.flatten(), expected.flatten(), tol):
        return "the numbers are right, in their right order, in another shape"
    return None


def number(value: float) -> str:
    """A number as a sentence shows it: three digits."""
    if math.isnan(value):
        return "NaN"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def kind(value: Any) -> str:
    """`a list`, `an int`, `a tensor`, `None`."""
    if value is None:
        return "None"
    name = "tensor" if isinstance(value, Tensor) else type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _of_tensors(got: Any, expected: Tensor, tol: float, what: str) -> str | None:
    if not isinstance(got, Tensor):
        return _is(what, kind(got), "a tensor")
    if got.shape != expected.shape:
        return f"{what} has shape {tuple(got.shape)} where it must be {tuple(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"{what} is {_dtype(got)} where it must be {_dtype(expected)}"
    got, expected = got.detach(), expected.detach()
    if expected.dtype == torch.bool or not expected.numel():
        off = got != expected
    else:
        got, expected = got.double(), expected.double()
        off = (got - expected).abs()
        equal = (got == expected) | got.isnan() & expected.isnan()      # infinities have no difference
        off = off.masked_fill(equal, 0).nan_to_num(nan=math.inf)
        if bool((off <= _room(expected, tol)).all()):
            return None
    if not bool(off.any()):
        return None
    place = tuple(map(int, np.unravel_index(off.flatten().double().argmax().item(), expected.shape)))
    at = f" (at [{', '.join(map(str, place))}])" if place else ""
    return _numbers(what, got[place].item(), expected[place].item(), at)


def _of_numbers(got: Any, expected: float, tol: float, what: str) -> str | None:
    if isinstance(got, Tensor) and got.ndim == 0:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        return _is(what, kind(got), f"a number, {number(expected)}")
    return None if got == expected or abs(got - expected) <= tol * max(abs(expected), 1e-6) \
        else _numbers(what, got, expected, "")


def _numbers(what: str, got: float, expected: float, at: str) -> str:
    got_shown, expected_shown = number(got), number(expected)
    if got_shown == expected_shown:
        got_shown, expected_shown = f"{got:.9g}", f"{expected:.9g}"
    return f"{what} is {got_shown} where it must be {expected_shown}{at}"


def _near(got: Tensor, expected: Tensor, tol: float) -> bool:
    return bool(((got - expected).abs() <= _room(expected, tol)).all())


def _room(expected: Tensor, tol: float) -> float:
    finite = expected[expected.isfinite()]
    return tol * max(finite.abs().max().item() if finite.numel() else 0.0, 1e-6)


def _first(differences) -> str | None:
    return next((one for one in differences if one), None)


def _is(what: str, got: Any, expected: Any) -> str:
    return f"{what} is {got} where it must be {expected}"


def _word(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, (bool, str)) else kind(value)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
