"""Checks of options: each raises with what came and what was expected."""

import math
from numbers import Integral, Real
from typing import Any


def check_at_least_one(name: str, value: Any) -> None:
    """Raise unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}, expected a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def check_tol(tol: Any) -> None:
    """Raise unless `tol` is None or a finite number that is not negative."""
    if tol is None:
        return
    if isinstance(tol, bool) or not isinstance(tol, Real):
        raise TypeError(f"tol is {tol!r}, expected a number or None")
    if not (0 <= float(tol) < math.inf):
        raise ValueError(f"tol is {tol}, expected a finite number >= 0 (0 asks for exact equality)")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, expected {expected}")
