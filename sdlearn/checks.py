"""Checks of numbers that a caller gives. Each raises ValueError in one sentence that says what to give."""

import math
from numbers import Integral, Real


def check_whole(name: str, value: int, low: int, high: int | None = None):
    """Raises ValueError unless `value` is a whole number, no bool, from `low` to `high` (None: unbounded)."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value}: give a whole number {bounds}")


def check_positive(name: str, value: float, advice: str = ""):
    """Raises ValueError unless `value` is a finite number above 0. `advice` ends the sentence."""
    if not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}: give a number above 0{advice}")
