"""Clocks: integer nanoseconds, from the system's monotonic clock or set by a test."""

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


class VirtualClock:
    """A clock that moves only by `advance`: for tests and the simulator."""

    __slots__ = ("_now_ns",)

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """Return the instant last set."""
        return self._now_ns

    def advance(self, duration_ns: int) -> int:
        """Move forward by `duration_ns` (at least 0) and return the new instant."""
        if duration_ns < 0:
            raise ValueError(f"duration_ns: expected at least 0, got {duration_ns}")
        self._now_ns += duration_ns
        return self._now_ns
