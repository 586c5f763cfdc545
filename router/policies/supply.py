"""Supply: what the GPUs can serve on the smallest subnet, and how much of their time is taken.

For policies that plan. It holds for all GPUs together and costs the same for two of them as for a thousand:
the core sets each GPU's pace once a heartbeat, or when its slowdown changes, and the sums follow as batches
begin and end.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from profiles.table import Profile

_SCALE = 1 << 40
"""Paces as integers: sums that change millions of times must not drift, as those of floats do."""

FULL = 0.5
"""A full batch takes at most this share of a patience. Longer ones need a head that has hardly waited, which
under load no head is: with 0.75 a third of the GPUs of docs/policies.md's unequal cell count for what they
never do."""

_NOISE = 0.05
"""A change of slowdown below this is the timer's noise, and not worth another pace."""

_GAPS, _FIRST_GAPS = 256, 16
"""Gaps are averaged over so many batches; the first as if so many without a gap had been before them, since
a single one may be off by a whole way."""

_FEW_ENDS = 64
"""So many entries are kept, and two for each GPU, before those that count no more are removed."""


class GpuPace:
    """What one GPU can serve at best.

    Attributes:
        per_ns: Queries a nanosecond in full batches of the smallest subnet, times 2^40; 0 if it is no help.
        place: Queries that a full batch on it holds.
        work: What the supply counts of the batches on it: the number of its entry, the pace, and the pace
            times the instant at which it is free.
    """

    __slots__ = ("_slowdown", "per_ns", "place", "work")

    def __init__(self) -> None:
        self.per_ns = 0
        self.place = 0
        self._slowdown = 0.0
        self.work = (0, 0, 0)

    def set(self, profile: Profile, slowdown: float, limit_ns: float) -> None:
        """Reckon it.

        Args:
            profile: The GPU's.
            slowdown: Measured over profiled latency.
            limit_ns: How long a full batch may take. A GPU on which none is so short counts for nothing: what
                it can serve, it serves only of what has just come.
        """
        self._slowdown = slowdown
        size = profile.largest_batch(0, int(limit_ns / slowdown))
        if size is None:
            self.per_ns = self.place = 0
            return
        self.place = size
        self.per_ns = int(_SCALE * size / (profile.latency_p99_ns(0, size) * slowdown))

    def stop(self) -> None:
        """Count for nothing until it is set again."""
        self.per_ns = self.place = 0
        self._slowdown = 0.0

    def is_stale(self, slowdown: float) -> bool:
        """Return whether it was reckoned for another slowdown than this."""
        return abs(slowdown - self._slowdown) > _NOISE * slowdown


class Supply:
    """What the GPUs that take work can serve at best.

    Attributes:
        rate: Queries a nanosecond, on the smallest subnet in full batches.
        places: Queries that one full batch on each GPU holds, summed.
        limit_ns: How long a full batch may take.
    """

    __slots__ = (
        "_busy_paces", "_busy_until", "_ends", "_ends_at_most", "_gap_ns", "_n_entries", "_n_gaps",
        "limit_ns", "places", "rate",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rate = 0.0
        self.places = 0
        self.limit_ns = 0.0
        self._gap_ns = 0.0
        self._n_gaps = 0
        # The sum of (end - now) * pace over busy GPUs is kept as two sums, and each GPU leaves both at its
        # end: one that hangs would otherwise count as more and more time that it does not have.
        self._busy_paces = 0
        self._busy_until = 0
        self._ends: list[tuple[int, int, GpuPace]] = []
        self._ends_at_most = _FEW_ENDS
        self._n_entries = 0

    @property
    def gap_ns(self) -> float:
        """Return how long a GPU idles, on average, before a batch that was sent while the one before it ran.

        Messages that jitter come too late for a batch sent just in time. At 80 % load and 4.5 ms of jitter
        that takes 7 % of the GPUs' time, and a plan must count it. `rate` and `busy` do not.
        """
        return max(0.0, self._gap_ns)

    def idled(self, gap_ns: int, executing_ns: int) -> None:
        """Note the time between the reports of two batches, less what the second took.

        Either report may have been under way for longer, so that a single gap is off by as much, and may be
        negative. Their mean is right. A stall counts as no more than the batch.
        """
        if gap_ns > executing_ns:
            gap_ns = executing_ns
        elif gap_ns < -executing_ns:
            gap_ns = -executing_ns
        self._n_gaps += 1
        self._gap_ns += (gap_ns - self._gap_ns) / min(_GAPS, _FIRST_GAPS + self._n_gaps)

    def busy(self, now_ns: int) -> float:
        """Return how many queries could be served in the time that batches already sent still take."""
        ends = self._ends
        while ends and ends[0][0] <= now_ns:
            _, entry, pace = heappop(ends)
            counted, per_ns, until = pace.work
            if counted == entry:
                pace.work = (0, 0, 0)
                self._busy_paces -= per_ns
                self._busy_until -= until
        return max(0, self._busy_until - self._busy_paces * now_ns) / _SCALE

    def note(self, pace: GpuPace, until_ns: int | None) -> None:
        """Count what a GPU runs from now on in place of what it ran.

        Args:
            pace: The GPU's.
            until_ns: The instant at which it is expected to have nothing left to run; None if it has nothing.
        """
        _, per_ns, until = pace.work
        self._busy_paces -= per_ns
        self._busy_until -= until
        if until_ns is None or not pace.per_ns:
            pace.work = (0, 0, 0)
            return
        self._n_entries += 1
        per_ns, until = pace.per_ns, pace.per_ns * until_ns
        pace.work = (self._n_entries, per_ns, until)
        self._busy_paces += per_ns
        self._busy_until += until
        heappush(self._ends, (until_ns, self._n_entries, pace))
        if len(self._ends) > self._ends_at_most:
            self._drop_stale()

    def _drop_stale(self) -> None:
        """Remove the entries that count no more: `busy` does it too, but not every policy asks for that."""
        self._ends = [end for end in self._ends if end[2].work[0] == end[1]]
        heapify(self._ends)
        self._ends_at_most = _FEW_ENDS + 2 * len(self._ends)

    def reset(self, pace: GpuPace, profile: Profile, slowdown: float) -> None:
        """Set a GPU's pace again, and count it so: a GPU found to be slow must not wait for a heartbeat."""
        before, place = pace.per_ns, pace.place
        pace.set(profile, slowdown, self.limit_ns)
        self.rate += (pace.per_ns - before) / _SCALE
        self.places += pace.place - place

    def restate(self, paces: Iterable[GpuPace]) -> None:
        """Sum up what the GPUs can serve."""
        rate = places = 0
        for pace in paces:
            rate += pace.per_ns
            places += pace.place
        self.rate, self.places = rate / _SCALE, places
