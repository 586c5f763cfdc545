"""Surges: how many more queries may come at once, by what has come before.

Arrivals are counted in slots of a 32nd of a patience, and over windows of 1, 4, 16, 32 and 64 slots the most
that has ever come is kept. A window that has had its most brings no more until it has moved on:

    expected within a window = least over this and longer windows of (the most it has had - what it has now)

That is the arrival curve of network calculus, learned instead of agreed on. It forgets: what was not seen
again for ten seconds counts for a third.

Two further bounds are on the rate of what comes within a patience, for the price:

    by the curve = (the most that two patiences have had - what the last one had) / a patience
    by a pause   = (what came in the last few slots, and three standard deviations) / those slots

The first holds once the curve has been learned: no peak has outgrown it for a while, or the last that did is
over. How far it has been learned, and how high its peaks were, also tells whether an overload is near.
"""

from __future__ import annotations

from math import inf, sqrt

WINDOWS = (1, 4, 16, 32, 64)
"""In slots. A policy reserves for the first three; the last tells that a spike has just been."""

N_RESERVED = 3
"""Windows that a policy reserves for."""

SLOTS = 32
"""Slots to a patience: one is 1 ms at 36 ms, about as long as a spike takes to come in over the network."""

_FORGET_NS = 10e9
"""A spike every few seconds is kept in mind. Between 5 s and 20 s nothing changed in any cell."""

_KEEP_PEAKS_NS = 60e9
"""How high peaks were is kept in mind for longer than that they may come again: loads change slowly."""

_SIGMAS = 3.0
"""A pause says that the rate has fallen if so few queries are beyond chance. At 2 ordinary gaps count too."""

_GROWN = 2.5
"""Standard deviations by which a window must outgrow its peak to be a new one. Without them each second peak
of a steady rate is one: rates of 90 % that jump lose 0.05 points."""

_LEARNED = 40.0
"""Patiences without a new peak after which the curve is learned. At 12 two recorded traces at 95 % load enter
their overload with a longer queue, and lose 0.2 points."""

_GROWTH = 0.5
"""A peak of which the curve has learned nothing may yet grow by that. At 0.3 a recorded trace at 95 % load
loses 0.15 points."""

_PASSED = 0.5
"""Share of the most that a patience has had below which a peak is over, and known."""

_SHORTEST_NS = 250_000
"""A slot is at least as long: the loop handles messages together that came within a pass."""

_KEPT = WINDOWS[-1] + 1


class Surge:
    """Counts of arrivals in a few windows, and the most that each has had.

    Attributes:
        by_curve: Queries a nanosecond that may come within a patience, by the curve; no bound until it is
            learned. Set by `foresee`, like the others.
        by_pause: The same, by the latest slots.
        at_once: The most queries a nanosecond that one patience has had.
        peak: The most queries a nanosecond that two patiences may have, by those that have been: the less
            the curve is learned, the more.
    """

    __slots__ = (
        "_counts", "_ends_ns", "_grown_ns", "_is_over", "_mosts", "_peaks", "_slot_ns", "_sums", "at_once",
        "by_curve", "by_pause", "peak",
    )  # fmt: skip

    def __init__(self) -> None:
        # One slot more than a window is long: a spike that falls on the edge of two slots counts whole.
        self._counts = [0] * _KEPT
        self._sums = [0] * len(WINDOWS)
        self._mosts = [0.0] * len(WINDOWS)
        self._peaks = [0.0] * len(WINDOWS)
        self._grown_ns = 0
        self._is_over = True
        self.by_curve = self.by_pause = inf
        self.at_once = self.peak = 0.0
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
                if i >= N_RESERVED and count > self._peaks[i] + _GROWN * sqrt(self._peaks[i]):
                    self._peaks[i] = count
                    self._grown_ns = now_ns
                    self._is_over = False

    def advance(self, now_ns: int) -> None:
        """Move the windows on to `now_ns`."""
        if now_ns < self._ends_ns:
            return
        slot_ns, counts, sums = self._slot_ns, self._counts, self._sums
        n_slots = int((now_ns - self._ends_ns) / slot_ns) + 1
        keep = max(0.0, 1.0 - n_slots * slot_ns / _FORGET_NS)
        self._mosts = [most * keep for most in self._mosts]
        keep = max(0.0, 1.0 - n_slots * slot_ns / _KEEP_PEAKS_NS)
        self._peaks = [peak * keep for peak in self._peaks]
        if n_slots >= _KEPT:
            self._counts = [0] * _KEPT
            self._sums = [0] * len(WINDOWS)
            self._is_over = True
            self._ends_ns = now_ns + slot_ns
            return
        for _ in range(n_slots):
            counts.append(0)
            for i, window in enumerate(WINDOWS):
                sums[i] -= counts[-2 - window]
            del counts[0]
        self._ends_ns += n_slots * slot_ns
        if sums[3] < _PASSED * self._mosts[3]:
            self._is_over = True

    def foresee(self, now_ns: int) -> None:
        """Set what may come within a patience."""
        self.advance(now_ns)
        sums, mosts, slot_ns = self._sums, self._mosts, self._slot_ns
        self.by_pause = min(
            (sums[i] + _SIGMAS * (sqrt(sums[i]) + _SIGMAS)) / (WINDOWS[i] * slot_ns) for i in (1, 2)
        )
        age_ns, learned_ns = now_ns - self._grown_ns, _LEARNED * SLOTS * slot_ns
        self.by_curve = inf
        self.at_once = mosts[3] / ((WINDOWS[3] + 1) * slot_ns)
        self.peak = max(mosts[4], self._peaks[4]) / ((WINDOWS[4] + 1) * slot_ns)
        if not self._is_over and age_ns < learned_ns:
            self.peak *= 1.0 + _GROWTH * (1.0 - age_ns / learned_ns)
            return
        # What comes within the second half of a window is what the whole may have, less what the first had.
        in_half = (mosts[3] - sums[2]) / (WINDOWS[2] * slot_ns)
        in_whole = (mosts[4] - sums[3]) / (WINDOWS[3] * slot_ns)
        self.by_curve = max(0.0, min(in_half, in_whole))

    def expected(self) -> tuple[float, float, float]:
        """Return how many more may come within each of the windows reserved for; at least 0, ascending."""
        mosts, sums = self._mosts, self._sums
        # Unrolled: a decision asks, and has 10 us.
        least = mosts[4] - sums[4]
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
