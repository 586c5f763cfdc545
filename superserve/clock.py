"""Clocks: integer nanoseconds, from the system's monotonic clock."""

from __future__ import annotations

import time
from typing import Protocol

MS = 1_000_000
"""Nanoseconds in a millisecond."""

SECOND = 1_000_000_000
"""Nanoseconds in a second."""


class Clock(Protocol):
    """A source of integer nanoseconds that never runs backwards."""

    def now_ns(self) -> int:
        """Return the present instant; only differences mean anything."""
        ...


class MonotonicClock:
    """The operating system's monotonic clock."""

    __slots__ = ()

    def now_ns(self) -> int:
        """Return the present instant; only differences mean anything."""
        return time.monotonic_ns()
