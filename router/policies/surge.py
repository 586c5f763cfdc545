"""Surges: how many more queries may come at once, by what has come before.

Arrivals are counted in slots of a 32nd of a patience, and over windows of 1, 4, 16 and 64 slots the most
that has ever come is kept. A window that has had its most brings no more until it has moved on:

    expected within a window = least over this and longer windows of (the most it has had - what it has now)

That is the arrival curve of network calculus, learned instead of agreed on. It forgets: what was not seen
again for ten seconds counts for a third.

A pause bounds the rate of what comes next: what came in the last few slots, and three and a half standard
deviations.
"""

from __future__ import annotations

from math import inf, sqrt

WINDOWS = (1, 4, 16, 64)
"""In slots. A policy reserves for the first three; the last tells that a spike has just been."""

SLOTS = 32
"""Slots to a patience: one is 1 ms at 36 ms, about as long as a spike takes to come in over the network."""

FORGET_NS = 10e9
"""A spike every few seconds is kept in mind. Between 5 s and 20 s nothing changed in any cell."""

_SIGMAS = 3.5
"""A pause says that the rate has fallen if so few queries are beyond chance. At 3 the LLM code trace at 75 %
load loses 7 queries in 1,000; without it loads that jump to 50 % lose 0.07 points."""

_SHORTEST_NS = 250_000
"""A slot is at least as long: the loop handles messages together that came within a pass."""

_KEPT = WINDOWS[-1] + 1


class Surge:
    """Counts of arrivals in a few windows, and the most that each has had.

    Attributes:
        by_pause: Queries a nanosecond that may come, by the latest slots; no bound before `foresee` sets it.
    """

    __slots__ = ("_counts", "_ends_ns", "_mosts", "_slot_ns", "_sums", "by_pause")

    def __init__(self) -> None:
        # One slot more than a window is long: a spike that falls on the edge of two slots counts whole.
        self._counts = [0] * _KEPT
        self._sums = [0] * len(WINDOWS)
        self._mosts = [0.0] * len(WINDOWS)
        self.by_pause = inf
        self._slot_ns = float(_SHORTEST_NS)
        self._ends_ns = 0.0

    def arrived(self, n: int, now_ns: int, patience_ns: float) -> None:
        """Count `n` queries that came now, of which each may wait for about `patience_ns`."""
        self._slot_ns = max(_SHORTEST_NS, patience_ns / SLOTS)
        self.advance(now_ns)
        self._counts[-1] += n
        sums, mosts = self._sums, self._mosts
        for i in range(len(WINDOWS)):
            count = sums[i] = sums[i] + n
            if count > mosts[i]:
                mosts[i] = count

    def advance(self, now_ns: int) -> None:
        """Move the windows on to `now_ns`."""
        if now_ns < self._ends_ns:
            return
        slot_ns, counts, sums = self._slot_ns, self._counts, self._sums
        n_slots = int((now_ns - self._ends_ns) / slot_ns) + 1
        keep = max(0.0, 1.0 - n_slots * slot_ns / FORGET_NS)
        self._mosts = [most * keep for most in self._mosts]
        if n_slots >= _KEPT:
            self._counts = [0] * _KEPT
            self._sums = [0] * len(WINDOWS)
            self._ends_ns = now_ns + slot_ns
            return
        for _ in range(n_slots):
            counts.append(0)
            for i, window in enumerate(WINDOWS):
                sums[i] -= counts[-2 - window]
            del counts[0]
        self._ends_ns += n_slots * slot_ns

    def foresee(self, now_ns: int) -> None:
        """Set what may come by what has just not come."""
        self.advance(now_ns)
        sums, slot_ns = self._sums, self._slot_ns
        by_pause = inf
        for i in (1, 2):
            n = sums[i]
            rate = (n + _SIGMAS * (sqrt(n) + _SIGMAS)) / (WINDOWS[i] * slot_ns)
            by_pause = min(by_pause, rate)
        self.by_pause = by_pause

    @property
    def most(self) -> float:
        """Return the most that have come within the longest window."""
        return self._mosts[3]

    def expected(self) -> tuple[float, float, float]:
        """Return how many more may come within each window but the longest; at least 0, ascending."""
        mosts, sums = self._mosts, self._sums
        # Unrolled: a decision asks, and has 10 us.
        least = mosts[3] - sums[3]
        third = mosts[2] - sums[2]
        if least < third:
            third = least
        second = mosts[1] - sums[1]
        if third < second:
            second = third
        first = mosts[0] - sums[0]
        if second < first:
            first = second
        return (first, second, third) if first >= 0.0 else (0.0, max(0.0, second), max(0.0, third))
