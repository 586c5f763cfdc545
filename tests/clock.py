"""A clock that a test moves, and one that only this process's work moves."""

from __future__ import annotations

import time


class ProcessorClock:
    """A clock of the processor time of this process: what waits for other work takes no longer by it."""

    __slots__ = ()

    def now_ns(self) -> int:
        """Return the processor time used so far."""
        return time.process_time_ns()


class VirtualClock:
    """A clock that moves only by `advance`: nothing sleeps."""

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
