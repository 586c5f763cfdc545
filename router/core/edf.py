"""The global queue: earliest deadline first, over runs of queries that arrived together.

A *cohort* is what one QUERIES message brought: columns of ids, deadlines and payloads,
and a state byte for each query. The heap does not hold queries but *runs*: stretches of
a cohort whose deadlines ascend. Taking the earliest k queries bisects the first run at
the head of the next one. So the order is exactly earliest deadline first, and the usual
cost is one heap operation for a stretch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.wire import Buffer

QUEUED = 0
DISPATCHED = 1
ANSWERED = 2

Stretch = tuple["Cohort", int, int]
"""Queries lo to hi (exclusive) of a cohort."""


class Cohort:
    """The queries of one QUERIES message. Not a frozen dataclass: this is the hot path.

    Attributes:
        serial: Number of this cohort on this router, ascending.
        client: The client that sent it and gets its answers.
        deadlines_ns: Instants on the router's clock, as the client ordered them, length n.
        base_ns: Deadline minus the slack that the client sent: the instant of sending.
        floors: Smallest profile row allowed for each query; None if any row will do.
        classes: Priority class of each query, as on the wire; None if all are of class 0.
        states: One byte a query: QUEUED, DISPATCHED or ANSWERED.
        live: Queries not answered yet.
        n_bytes: Payload bytes, released when `live` reaches 0.
        message: What the server needs to forward it (ids, slacks, payloads); opaque here.
        holders: Once any query was dispatched a second time: index -> the batch that
            holds it now, None while it is queued; no entry means its first batch.
        losses: index -> batches lost with it.
    """

    __slots__ = (
        "arrived_ns", "base_ns", "classes", "client", "deadlines_ns", "floors", "holders", "live", "losses",
        "message", "n_bytes", "serial", "states",
    )  # fmt: skip

    def __init__(
        self,
        serial: int,
        client: Any,
        deadlines_ns: list[int],
        base_ns: int,
        arrived_ns: int,
        *,
        floors: list[int] | None = None,
        classes: Buffer | None = None,
        message: Any = None,
        n_bytes: int = 0,
    ) -> None:
        self.serial = serial
        self.client = client
        self.deadlines_ns = deadlines_ns
        self.base_ns = base_ns
        self.arrived_ns = arrived_ns
        self.floors = floors
        self.classes = None if classes is None else bytes(classes)
        self.message = message
        self.n_bytes = n_bytes
        self.live = len(deadlines_ns)
        self.states = bytearray(len(deadlines_ns))
        self.holders: dict[int, int | None] | None = None
        self.losses: dict[int, int] | None = None


def ascending_stretches(values: list[int], lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Yield (lo, hi) of the maximal non-descending stretches of values[lo:hi]."""
    start = lo
    for i in range(lo + 1, hi):
        if values[i] < values[i - 1]:
            yield start, i
            start = i
    if start < hi:
        yield start, hi


class EdfQueue:
    """Queries by ascending deadline; ties by arrival. `len()` counts queries."""

    __slots__ = ("_heap", "_length", "_seq")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Cohort, int, int]] = []
        self._length = 0
        self._seq = 0

    def __len__(self) -> int:
        return self._length

    def push(self, cohort: Cohort, lo: int, hi: int) -> None:
        """Add queries lo to hi of `cohort`, whose states must be QUEUED."""
        deadlines = cohort.deadlines_ns
        self._length += hi - lo
        if hi - lo == 1:
            self._seq += 1
            heappush(self._heap, (deadlines[lo], self._seq, cohort, lo, hi))
            return
        # A C sort of a sorted list is one pass, and most messages have one SLO: quicker than a loop to check.
        stretch = deadlines if hi - lo == len(deadlines) else deadlines[lo:hi]
        if stretch == sorted(stretch):
            self._seq += 1
            heappush(self._heap, (deadlines[lo], self._seq, cohort, lo, hi))
            return
        for start, end in ascending_stretches(deadlines, lo, hi):
            self._seq += 1
            heappush(self._heap, (deadlines[start], self._seq, cohort, start, end))

    def forget(self, cohort: Cohort, lo: int, hi: int) -> None:  # noqa: ARG002 - lanes look at it
        """Deduct queries lo to hi, which leave QUEUED from outside; their heap entries go when reached."""
        self._length -= hi - lo

    def head(self) -> tuple[int, Cohort, int] | None:
        """Return (deadline, cohort, index) of the earliest query, or None if there is none."""
        heap = self._heap
        while heap:
            # Cancelled and refused queries leave the heap only here: searching for them would cost more.
            deadline, seq, cohort, lo, hi = heap[0]
            if cohort.states[lo] == QUEUED:
                return deadline, cohort, lo
            lo = cohort.states.find(QUEUED, lo, hi)
            if lo < 0:
                heappop(heap)
            else:
                heapreplace(heap, (cohort.deadlines_ns[lo], seq, cohort, lo, hi))
        return None

    def take(self, k: int, subnet: int, until_ns: int | None = None) -> tuple[list[Stretch], int]:
        """Remove at most `k` earliest queries; stop before one whose floor lies above `subnet`.

        Args:
            k: How many at most.
            subnet: The row that will serve them.
            until_ns: Take none that is due later; None for no limit.

        Returns:
            The stretches in order of deadline, and the number of their queries.
            Their states are still QUEUED: the caller changes them.
        """
        taken: list[Stretch] = []
        n = 0
        heap = self._heap
        while n < k and (head := self.head()) is not None:
            if until_ns is not None and head[0] > until_ns:
                break
            _, seq, cohort, lo, hi = heap[0]
            if hi - lo == 1:  # a single query: nothing to cut
                if cohort.floors is not None and cohort.floors[lo] > subnet:
                    break
                heappop(heap)
                taken.append((cohort, lo, hi))
                n += 1
                continue
            # Up to the next run's head, which comes first from there on; of equal deadlines, the older run.
            end = min(hi, lo + k - n)
            if len(heap) > 1:
                # The second smallest entry of a heap is one of the first one's two children.
                rival, rival_seq, *_ = heap[1] if len(heap) == 2 else min(heap[1], heap[2])
                cut = bisect_right if seq < rival_seq else bisect_left
                end = cut(cohort.deadlines_ns, rival, lo + 1, end) if end > lo + 1 else end
            if until_ns is not None:
                end = bisect_right(cohort.deadlines_ns, until_ns, lo, end)
            # Stop before a query that has left QUEUED meanwhile, such as a cancelled one; `head` skips it.
            end = cohort.states.find(DISPATCHED, lo, end) if DISPATCHED in cohort.states[lo:end] else end
            end = cohort.states.find(ANSWERED, lo, end) if ANSWERED in cohort.states[lo:end] else end
            stop = _floor_stop(cohort.floors, lo, end, subnet)
            if stop > lo:
                taken.append((cohort, lo, stop))
                n += stop - lo
                self._replace(seq, cohort, stop, hi)
            if stop < end:
                break
        self._length -= n
        return taken, n

    def take_before(self, limit_ns: int) -> list[Stretch]:
        """Remove every query whose deadline lies before `limit_ns`; states stay QUEUED."""
        taken: list[Stretch] = []
        heap = self._heap
        while (head := self.head()) is not None and head[0] < limit_ns:
            _, seq, cohort, lo, hi = heap[0]
            end = bisect_left(cohort.deadlines_ns, limit_ns, lo, hi)
            for start, stop in queued_stretches(cohort, lo, end):
                taken.append((cohort, start, stop))
                self._length -= stop - start
            self._replace(seq, cohort, end, hi)
        return taken

    def _replace(self, seq: int, cohort: Cohort, lo: int, hi: int) -> None:
        if lo == hi:
            heappop(self._heap)
        else:
            heapreplace(self._heap, (cohort.deadlines_ns[lo], seq, cohort, lo, hi))


def _floor_stop(floors: list[int] | None, lo: int, hi: int, subnet: int) -> int:
    if floors is not None:
        for i in range(lo, hi):
            if floors[i] > subnet:
                return i
    return hi


def state_stretches(cohort: Cohort, lo: int, hi: int, state: int) -> Iterator[tuple[int, int]]:
    """Yield the maximal (lo, hi) stretches within which every query is in `state`."""
    states = cohort.states
    start = lo
    while start < hi:
        if states[start] != state:
            start = states.find(state, start, hi)
            if start < 0:
                return
        end = start + 1
        while end < hi and states[end] == state:
            end += 1
        yield start, end
        start = end


def queued_stretches(cohort: Cohort, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of lo to hi that are still QUEUED."""
    return state_stretches(cohort, lo, hi, QUEUED)
