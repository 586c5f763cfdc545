"""How much of the queue is due by when: work in buckets of deadlines, counted as queries come and go.

A heap knows its head, and a policy that plans must know what is behind it. These counts cost one or two
dictionary entries a message, however long the queue is:

    fine      buckets of 2.1 ms, read for the first 17 to 50 ms from the head's deadline on
    coarse    buckets of 33.6 ms, read after those, for 1.3 s

What is due later counts as due at the end of that. Work is counted in queries that any subnet may serve:
one with an accuracy floor weighs as much more as its subnet takes longer.
"""

from __future__ import annotations

from typing import Protocol

UNIT = 16
"""What a query without a floor weighs. Weights are integers, so that a bucket that empties is exactly 0."""

_FINE, _COARSE = 21, 25
"""Widths as powers of two of nanoseconds. Buckets of 1 ms change no figure, and take twice as long to read;
one of 34 ms in the far part is on average half as wide as what is due there can still wait."""

_HALF_FINE, _HALF_COARSE = 1 << (_FINE - 1), 1 << (_COARSE - 1)

_NEAR = 8
"""Fine buckets read at least."""

_FAR = 40
"""Coarse buckets read at most: a decision must not cost more because a client set an SLO of an hour."""


class Message(Protocol):
    """The queries of one message, as far as they are counted here: `router.core.edf.Cohort` in the router.

    Attributes:
        deadlines_ns: Instants, length n.
        floors: The smallest row allowed for each; None if any row will do.
    """

    deadlines_ns: list[int]
    floors: list[int] | None


class Due:
    """The work queued, by deadline.

    Args:
        weights: What a query weighs whose floor is each row, in `UNIT`; see `weights_of`. A row beyond the
            last weighs as much as that.

    Attributes:
        total: All work, in `UNIT`.
        floors: How many queries have each row as their floor; row 0 is left out.
    """

    __slots__ = ("_coarse", "_fine", "_weights", "floors", "total")

    def __init__(self, weights: tuple[int, ...] = (UNIT,)) -> None:
        self._weights = weights
        self._fine: dict[int, int] = {}
        self._coarse: dict[int, int] = {}
        self.total = 0
        self.floors: dict[int, int] = {}

    def add(self, cohort: Message, lo: int, hi: int) -> None:
        """Count queries lo to hi of `cohort`."""
        self._count(cohort, lo, hi, 1)

    def remove(self, cohort: Message, lo: int, hi: int) -> None:
        """Deduct queries lo to hi of `cohort`, which were counted."""
        self._count(cohort, lo, hi, -1)

    def steps(self, head_ns: int) -> list[tuple[int, int]]:
        """Return (instant, work due by then in `UNIT`), ascending, until all is counted.

        Args:
            head_ns: The earliest deadline queued.
        """
        found: list[tuple[int, int]] = []
        total = left = self.total
        bucket = head_ns >> _FINE
        # Up to where a coarse bucket begins, so that none is counted twice.
        end = (((bucket + _NEAR) >> (_COARSE - _FINE)) + 1) << (_COARSE - _FINE)
        get = self._fine.get
        while left and bucket < end:
            work = get(bucket)
            if work is not None:
                left -= work
                # On average what is in a bucket is due in its middle; in the first one the head is known.
                # With the middle there too, 1 in 100 queues of one message had a query that came too late.
                found.append(((bucket << _FINE) + _HALF_FINE if found else head_ns, total - left))
            bucket += 1
        if left:
            self._add_far(found, end >> (_COARSE - _FINE), left)
        return found

    def _add_far(self, found: list[tuple[int, int]], bucket: int, left: int) -> None:
        """Add the steps from a coarse bucket on; what lies beyond `_FAR` of them counts as due then."""
        get, total, end = self._coarse.get, self.total, bucket + _FAR
        while left and bucket < end:
            work = get(bucket)
            if work is not None:
                left -= work
                found.append(((bucket << _COARSE) + _HALF_COARSE, total - left))
            bucket += 1
        if left:
            found.append((end << _COARSE, total))

    def _count(self, cohort: Message, lo: int, hi: int, sign: int) -> None:
        deadlines_ns, floors = cohort.deadlines_ns, cohort.floors
        if floors is None:
            if hi - lo == 1:
                self._note(deadlines_ns[lo], sign * UNIT)
                return
            stretch = deadlines_ns[lo:hi]
            # A message's queries are usually due within the same millisecond: min and max run in C.
            first_ns = min(stretch)
            if first_ns >> _FINE == max(stretch) >> _FINE:
                self._note(first_ns, sign * UNIT * (hi - lo))
            else:
                for due_ns in stretch:
                    self._note(due_ns, sign * UNIT)
            return
        weights, of_floor = self._weights, self.floors
        for i in range(lo, hi):
            floor = floors[i]
            self._note(deadlines_ns[i], sign * weights[floor if floor < len(weights) else -1])
            if floor:
                of_floor[floor] = of_floor.get(floor, 0) + sign

    def floored(self, above: int, up_to: int) -> int:
        """Return how many queries have a floor above one row and up to another."""
        return sum([n for floor, n in self.floors.items() if above < floor <= up_to])

    def _note(self, due_ns: int, work: int) -> None:
        self.total += work
        for buckets, bucket in ((self._fine, due_ns >> _FINE), (self._coarse, due_ns >> _COARSE)):
            left = buckets.get(bucket, 0) + work
            if left:
                buckets[bucket] = left
            else:
                del buckets[bucket]


def weights_of(costs_ns: list[float]) -> tuple[int, ...]:
    """Return what a query weighs whose floor is each row.

    Args:
        costs_ns: What a query costs at least on each row, ascending.
    """
    return tuple(max(UNIT, round(UNIT * cost_ns / costs_ns[0])) for cost_ns in costs_ns)
