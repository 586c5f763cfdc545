"""Numbers that applications may pass as options: any real number, of any type.

Numbers of Python, NumPy and PyTorch, `Decimal`, `Fraction` and arrays without dimensions become a plain
int or float here, before any arithmetic: `np.int32(3000) * 1_000_000` overflows without an error. A bool
counts as 0 or 1, as always in Python; strings, complex numbers and time deltas are refused.
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
from superserve.wire import traceparent as traces

_MS = 1_000_000

_LONGEST_WAIT_S = 1e9
"""Longer waits, including infinity, become this, 32 years: locks and event loops accept no more."""


def real(value: Any) -> int | float | None:
    """Return a real number as a plain int or float with the same value; None for anything else."""
    if type(value) is int or type(value) is float:
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biuf":
        return None  # Python treats a timedelta64 as an integer, in whatever unit it has
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a scalar or array of NumPy or PyTorch; a long double stays one
    try:
        if isinstance(value, Integral):
            return int(value)
        return float(value) if isinstance(value, Real | Decimal | Fraction) else None
    except (OverflowError, ValueError):  # a Fraction too large for a float; a signalling NaN as Decimal
        return None


def checked_slo(slo_ms: Any) -> int:
    """Return an SLO in ns; raise InvalidQueryError if it is invalid."""
    number = real(slo_ms)
    if number is not None and 0 < number <= MAX_SLACK_NS / _MS:
        return int(number * _MS)
    raise InvalidQueryError(f"slo_ms: expected milliseconds above 0 and up to a day, got {slo_ms!r:.200}")


def checked_accuracy(min_accuracy: Any) -> float:
    """Return an accuracy floor, percent; raise InvalidQueryError if it is invalid."""
    number = real(min_accuracy)
    if number is not None and 0 <= number <= 100:
        return float(number)
    raise InvalidQueryError(f"min_accuracy: expected 0 to 100 percent, got {min_accuracy!r:.200}")


def checked_priority(priority: Any) -> int:
    """Return a priority class; raise InvalidQueryError if it is invalid."""
    number = real(priority)
    if number is not None and 0 <= number <= 255 and number == int(number):
        return int(number)
    raise InvalidQueryError(f"priority: expected a class from 0 to 255, got {priority!r:.200}")


def packed_trace(traceparent: Any) -> bytes:
    """Return a caller's trace context as the wire has it; b"" for a malformed one, which is ignored."""
    context = traces.parsed(traceparent)
    return b"" if context is None else traces.packed(context)


def checked_bound(name: str, value: Any) -> int:
    """Return a bound, rounded down; infinity means no bound. Raise UsageError if it is invalid."""
    number = real(value)
    if number is not None and number >= 0:
        return int(min(number, sys.maxsize))
    raise UsageError(f"{name}: expected a number of at least 0, got {value!r:.200}")


def checked_wait(name: str, value: Any) -> float:
    """Return how long to wait, seconds; raise UsageError if it is no duration."""
    number = real(value)
    if number is not None and not math.isnan(number):
        return float(min(max(number, 0), _LONGEST_WAIT_S))
    raise UsageError(f"{name}: expected seconds, got {value!r:.200}")
