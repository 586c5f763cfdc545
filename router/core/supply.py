"""Supply: what the GPUs can serve on the smallest subnet, and how much of their time is spoken for.

For policies that plan. It holds for all GPUs together and costs the same for two of them as for a thousand:
each GPU's pace is reckoned once a heartbeat, and the sums follow as batches begin and end.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from router.core.workers import NOISE, WorkerState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from router.core.workers import Peer, Worker

_SCALE = 1 << 40
"""Paces as integers: sums that change millions of times must not drift, as those of floats do."""

FULL = 0.5
"""A full batch takes at most this share of a patience. Longer ones need a head that has hardly waited, which
under load no head is; see docs/policies.md for the sweep."""


class Supply:
    """What the GPUs that take work can serve at best.

    Attributes:
        rate: Queries a nanosecond, on the smallest subnet in full batches.
        places: Queries that one full batch on each GPU holds, summed.
        limit_ns: How long a full batch may take.
    """

    __slots__ = ("_busy_paces", "_busy_until", "_ends", "_seq", "limit_ns", "places", "rate")

    def __init__(self) -> None:
        self.rate = 0.0
        self.places = 0
        self.limit_ns = 0.0
        # The sum of (end - now) * pace over busy GPUs is kept as two sums, and each GPU leaves both at its
        # end: one that hangs would otherwise count as more and more time that it does not have.
        self._busy_paces = 0
        self._busy_until = 0
        self._ends: list[tuple[int, int, Worker]] = []
        self._seq = 0

    def busy(self, now_ns: int) -> float:
        """Return how many queries could be served in the time that batches already sent still take."""
        ends = self._ends
        while ends and ends[0][0] <= now_ns:
            _, seq, worker = heappop(ends)
            counted, pace, until = worker.counted
            if counted == seq:
                worker.counted = (0, 0, 0)
                self._busy_paces -= pace
                self._busy_until -= until
        return max(0, self._busy_until - self._busy_paces * now_ns) / _SCALE

    def note(self, worker: Worker) -> None:
        """Count what a GPU runs from now on in place of what it ran."""
        _, pace, until = worker.counted
        self._busy_paces -= pace
        self._busy_until -= until
        if not worker.outstanding or worker.machine.state is not WorkerState.READY:
            worker.counted = (0, 0, 0)
            return
        self._seq += 1
        pace, until = worker.pace, worker.pace * worker.free_at_ns
        worker.counted = (self._seq, pace, until)
        self._busy_paces += pace
        self._busy_until += until
        heappush(self._ends, (worker.free_at_ns, self._seq, worker))

    def corrected(self, worker: Worker) -> None:
        """Count a GPU by its new slowdown, if that has changed by more than the noise."""
        if abs(worker.slowdown - worker.paced_as) <= NOISE * worker.paced_as:
            return
        peer, before = worker.peer, worker.pace
        size = set_pace(worker, self.limit_ns)
        if worker.machine.state is WorkerState.READY:
            change = worker.pace - before
            peer.pace += change
            self.rate += change / _SCALE
            self.places += size - worker.place
            peer.places += size - worker.place
        worker.place = size

    def restate(self, peers: Iterable[Peer]) -> None:
        """Sum up what the processes can serve, as each was last reckoned."""
        rate, places = 0, 0
        for peer in peers:
            rate += peer.pace
            places += peer.places
        self.rate, self.places = rate / _SCALE, places


def reckon(peer: Peer, limit_ns: float) -> None:
    """Reckon what a process's GPUs serve at best on the smallest subnet, and what a full batch on each holds.

    Args:
        peer: The process.
        limit_ns: How long a full batch may take. A GPU on which none is so short counts for nothing: what it
            can serve, it serves only of what has just come.
    """
    peer.pace = peer.places = 0
    for worker in peer.workers:
        worker.place = set_pace(worker, limit_ns)
        if worker.machine.state is WorkerState.READY:
            peer.pace += worker.pace
            peer.places += worker.place


def set_pace(worker: Worker, limit_ns: float) -> int:
    """Set a GPU's pace, and return how many queries its full batch holds."""
    profile, slowdown = worker.profile, worker.slowdown
    worker.paced_as = slowdown
    size = profile.largest_batch(0, int(limit_ns / slowdown))
    if size is None:
        worker.pace = 0
        return 0
    worker.pace = int(_SCALE * size / (profile.latency_p99_ns(0, size) * slowdown))
    return size
