"""What applications may pass as options: any real number, however it is typed.

Python's, NumPy's and PyTorch's numbers, `Decimal`, `Fraction` and arrays without dimensions all become a
plain int or float here, before any arithmetic: `np.int32(3000) * 1_000_000` wraps around without an error. A
bool counts as 0 or 1, as everywhere in Python; strings, complex numbers and time deltas are refused.
"""

from __future__ import annotations

import math
import sys
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np

from superserve.errors import InvalidQueryError, UsageError
from superserve.wire import MAX_SLACK_NS

_MS = 1_000_000

_LONGEST_WAIT_S = 1e9
"""Longer waits, infinity among them, are this long, 32 years: more than locks and event loops take."""


def real(value: Any) -> int | float | None:
    """Return a real number as a plain int or float, of the same value; None for anything else."""
    if type(value) is int or type(value) is float:
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biuf":
        return None  # a timedelta64 counts as an integer to Python, of whatever unit it is in
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # of NumPy's and PyTorch's scalars and arrays; a long double stays what it is
    try:
        if isinstance(value, Integral):
            return int(value)
        return float(value) if isinstance(value, Real | Decimal | Fraction) else None
    except (OverflowError, ValueError):  # a Fraction beyond floats; a Decimal that is a signalling NaN
        return None


def checked_slo(slo_ms: Any) -> int:
    """Return an SLO in ns; InvalidQueryError if it is none."""
    number = real(slo_ms)
    if number is not None and 0 < number <= MAX_SLACK_NS / _MS:
        return int(number * _MS)
    raise InvalidQueryError(f"slo_ms: expected milliseconds above 0 and up to a day, got {slo_ms!r:.200}")


def checked_accuracy(min_accuracy: Any) -> float:
    """Return an accuracy floor, percent; InvalidQueryError if it is none."""
    number = real(min_accuracy)
    if number is not None and 0 <= number <= 100:
        return float(number)
    raise InvalidQueryError(f"min_accuracy: expected 0 to 100 percent, got {min_accuracy!r:.200}")


def checked_priority(priority: Any) -> int:
    """Return a priority class; InvalidQueryError if it is none."""
    number = real(priority)
    if number is not None and 0 <= number <= 255 and number == int(number):
        return int(number)
    raise InvalidQueryError(f"priority: expected a class from 0 to 255, got {priority!r:.200}")


def checked_bound(name: str, value: Any) -> int:
    """Return how many there may be at most, rounded down; infinity is no bound. UsageError if it is none."""
    number = real(value)
    if number is not None and number >= 0:
        return int(min(number, sys.maxsize))
    raise UsageError(f"{name}: expected a number of at least 0, got {value!r:.200}")


def checked_wait(name: str, value: Any) -> float:
    """Return how long to wait, seconds; UsageError if it is no duration."""
    number = real(value)
    if number is not None and not math.isnan(number):
        return float(min(max(number, 0), _LONGEST_WAIT_S))
    raise UsageError(f"{name}: expected seconds, got {value!r:.200}")
