"""Simulated open-loop clients: send what is due, gather the answers, as columns.

A client sends as `loadgen.live.sender` does: the queries due at a wake-up are one message, and it wakes at
most every `every_ns`. Nothing that happens in the run moves a query, so all instants of sending and arrival
are known beforehand; at the router, the queries that arrived between two passes are one cohort.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loadgen.simulator.links import FAR_NS
from router.core.events import QueriesArrived
from superserve.wire import MAX_QUERIES, Queries

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from loadgen.simulator.links import SimLink
    from router.core.events import Answer, Event

UNANSWERED = 255
"""In a column of statuses: no answer came."""

_FLUSH_AT = 1 << 16  # rows: as Python objects they take far more memory than as columns


_NO_PAYLOAD = (b"",)


class _Run(Queries):
    """A message that was never bytes: its slacks are computed from deadlines when the core asks."""

    __slots__ = ("deadlines_ns",)

    deadlines_ns: array[int]

    def slack_ns(self) -> list[int]:
        """Return the slacks, counted from `sent_ns`."""
        base_ns = self.sent_ns
        return [deadline_ns - base_ns for deadline_ns in self.deadlines_ns]


class SimClient(Protocol):
    """A simulated client: sends to the router, and receives its answers."""

    key: int

    @property
    def next_ns(self) -> int:
        """When its next message arrives at the router; `FAR_NS` if none does."""
        ...

    @property
    def has_unread(self) -> bool:
        """Whether a message has arrived and waits to be read: see `may_wait`."""
        ...

    def may_wait(self, now_ns: int, deadline_ns: int, room: int) -> bool:
        """Return whether everything that has arrived is under `room` queries due at `deadline_ns` or later.

        If so, `next_ns` moves past them, and `arrived` brings them later.
        """
        ...

    def arrived(self, now_ns: int) -> Sequence[tuple[int, Event]]:
        """Return the new events that have arrived by now, each with the instant at which it is read."""
        ...

    def answered(self, answer: Answer, arrives_ns: int) -> None:
        """Take an answer that arrives at `arrives_ns`."""
        ...


class Connecting(SimClient, Protocol):
    """A client whose connection may break."""

    number: int

    def connected(self, way_in: SimLink) -> None:
        """Take a new connection's way to the router."""
        ...


class OpenLoopClient:
    """One client: its share of a workload, in the order of due instants.

    Args:
        key: Its connection, as the router knows it.
        due_ns: Instants, ascending, shape (n,).
        deadlines_ns: Instants, shape (n,).
        link: Its way to the router.
        every_ns: Least time between two messages.
        played: When each query was sent and read in a live run, -1 if it was not; None sends as due.
        min_accuracy: Floors, percent, shape (n,); None without floors.
        priority: Classes, shape (n,); None without classes.

    Attributes:
        sent_ns: When each query was sent, shape (n,).
        next_ns: When the next of its queries arrives at the router; `FAR_NS` after the last.
    """

    def __init__(
        self,
        key: int,
        due_ns: npt.NDArray[np.int64],
        deadlines_ns: npt.NDArray[np.int64],
        link: SimLink,
        *,
        every_ns: int,
        played: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None,
        min_accuracy: npt.NDArray[np.float32] | None = None,
        priority: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.key = key
        self.n = len(due_ns)
        self._due_ns = due_ns
        self._deadlines_ns = deadlines_ns
        self._deadlines = array("q", deadlines_ns.tobytes())  # reading one is faster than from NumPy
        self._is_ascending = bool((deadlines_ns[1:] >= deadlines_ns[:-1]).all())
        self.sent_ns, arrives_ns = _sent(due_ns, link, every_ns) if played is None else played
        self._sent = array("q", self.sent_ns.tobytes())
        # A lost query is unanswered; one that arrives twice is read once, as with TCP.
        self._places = np.flatnonzero(arrives_ns >= 0)
        self._arrives_ns: list[int] = arrives_ns[self._places].tolist()
        self._is_whole = len(self._places) == self.n
        self._floors = None if min_accuracy is None else min_accuracy.astype("<f4")
        self._classes = priority
        self._ids = np.arange(self.n, dtype="<u8").tobytes()
        self._lo = 0
        self._read_ns: int | None = None  # when a live router would have read what waits here
        self.next_ns = self._arrives_ns[0] if self._arrives_ns else FAR_NS
        self._answers = _Answers(self.n)

    @property
    def has_unread(self) -> bool:
        """Whether a message has arrived and waits to be read: see `may_wait`."""
        return self._read_ns is not None

    def may_wait(self, now_ns: int, deadline_ns: int, room: int) -> bool:
        """Return whether the queries that have arrived by now, and were not read, can be read later."""
        if self.next_ns > now_ns:
            return True
        if self._floors is not None:
            return False  # a floor that no subnet reaches is refused on arrival
        lo, arrives = self._lo, self._arrives_ns
        hi = bisect_right(arrives, now_ns, lo)
        if hi - lo >= room or self._least_deadline_ns(lo, hi) < deadline_ns:
            return False
        self.next_ns = arrives[hi] if hi < len(arrives) else FAR_NS
        if self._read_ns is None:
            self._read_ns = now_ns
        return True

    def _least_deadline_ns(self, lo: int, hi: int) -> int:
        if self._is_ascending and self._is_whole:
            return self._deadlines[lo]
        return int(self._deadlines_ns[self._places[lo:hi]].min())

    def arrived(self, now_ns: int) -> list[tuple[int, QueriesArrived]]:
        """Return what has arrived by now and was not read, as one message, with its read instant.

        One message replaces several: it is sent and read at the mean of their instants, so that the sums
        of slacks on arrival and of waits in the queue stay the same.
        """
        lo = self._lo
        arrives = self._arrives_ns
        self._lo = hi = bisect_right(arrives, now_ns, lo)
        self.next_ns = arrives[hi] if hi < len(arrives) else FAR_NS
        read_ns = now_ns if self._read_ns is None else self._read_ns
        self._read_ns = None
        n = hi - lo
        if self._is_whole:
            ids, sent_ns, deadlines_ns = self._ids[8 * lo : 8 * hi], self._sent[lo:hi], self._deadlines[lo:hi]
            picked: Any = slice(lo, hi)
        else:
            picked = self._places[lo:hi]
            ids = picked.astype("<u8").tobytes()
            sent_ns = array("q", self.sent_ns[picked].tobytes())
            deadlines_ns = array("q", self._deadlines_ns[picked].tobytes())
        transit_ns = read_ns - sent_ns[0]
        base_ns = sum(sent_ns) // n
        floors = None if self._floors is None else self._floors[picked].tobytes()
        classes = None if self._classes is None else self._classes[picked].tobytes()
        queries = _Run(1, base_ns, n, ids, b"", 0, _NO_PAYLOAD, False, None, floors, classes)
        queries.deadlines_ns = deadlines_ns
        return [(base_ns + transit_ns, QueriesArrived(self.key, queries, transit_ns))]

    def answered(self, answer: Answer, arrives_ns: int) -> None:
        """Record an answer that arrives at this client at `arrives_ns`."""
        self._answers.add(answer, arrives_ns, is_whole=self._is_whole)

    def columns(self) -> tuple[dict[str, npt.NDArray[Any]], int]:
        """Return a column for each field of the queries' outcomes, and the number of duplicates."""
        columns, n_duplicates = self._answers.columns()
        return {"due_ns": self._due_ns, "sent_ns": self.sent_ns, **columns}, n_duplicates

    @property
    def reasons(self) -> dict[str, str]:
        """Return, for each status without an output, one of the router's reasons."""
        return self._answers.reasons


def _sent(
    due_ns: npt.NDArray[np.int64], link: SimLink, every_ns: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return when each query is sent and when it arrives, -1 if it is lost."""
    due = due_ns.tolist()
    n, lo, at_ns = len(due), 0, -every_ns
    sizes: list[int] = []
    sent: list[int] = []
    while lo < n:
        at_ns = max(due[lo], at_ns + every_ns)
        hi = bisect_right(due, at_ns, lo, min(n, lo + MAX_QUERIES))
        sizes.append(hi - lo)
        sent.append(at_ns)
        lo = hi
    sent_ns = np.array(sent, np.int64)
    return np.repeat(sent_ns, sizes), np.repeat(link.arrivals_of(sent_ns), sizes)


class _Answers:
    """Answers by stretch, as they come; by query, as columns, at the end. A query's first answer counts."""

    def __init__(self, n: int) -> None:
        self.reasons: dict[str, str] = {}
        self._rows: list[tuple[int, int, int, int, int, int, float, int, int]] = []
        self._blocks: list[npt.NDArray[np.float64]] = []
        self._answered_ns = np.full(n, -1, np.int64)
        self._status = np.full(n, UNANSWERED, np.uint8)
        self._subnet = np.zeros(n, np.uint16)
        self._batch_size = np.zeros(n, np.uint16)
        self._accuracy = np.zeros(n, np.float32)
        self._queued_ns = np.zeros(n, np.int64)
        self._executing_ns = np.zeros(n, np.int64)
        self._n_duplicates = 0

    def add(self, answer: Answer, arrives_ns: int, *, is_whole: bool) -> None:
        ran = answer.ran
        subnet, size, accuracy, executing_ns = 0, 0, 0.0, 0
        if ran is not None:
            subnet, size, accuracy = ran.subnet, ran.batch_size, ran.accuracy
            executing_ns = ran.executing_ns
        if answer.reason and answer.status.name not in self.reasons:
            self.reasons[answer.status.name] = answer.reason
        ends_ns = answer.cohort.arrived_ns + answer.queued_ns  # the instant that all stretches share
        add = self._rows.append
        for cohort, lo, hi in answer.stretches:
            ids, queued_ns = cohort.message.ids, ends_ns - cohort.arrived_ns
            if is_whole:
                first = int.from_bytes(ids[8 * lo : 8 * lo + 8], "little")
                row = (
                    first,
                    hi - lo,
                    arrives_ns,
                    answer.status,
                    subnet,
                    size,
                    accuracy,
                    queued_ns,
                    executing_ns,
                )
                add(row)
                continue
            for place in memoryview(ids).cast("Q")[lo:hi]:
                add((place, 1, arrives_ns, answer.status, subnet, size, accuracy, queued_ns, executing_ns))
        if len(self._rows) >= _FLUSH_AT:
            self._flush()

    def columns(self) -> tuple[dict[str, npt.NDArray[Any]], int]:
        self._flush()
        columns: dict[str, npt.NDArray[Any]] = {
            "answered_ns": self._answered_ns,
            "status": self._status,
            "subnet": self._subnet,
            "batch_size": self._batch_size,
            "accuracy": self._accuracy,
            "queued_ns": self._queued_ns,
            "executing_ns": self._executing_ns,
        }
        return columns, self._n_duplicates

    def _flush(self) -> None:
        """Enter what was gathered, all at once: one by one, NumPy's calls would cost more than the rest."""
        if not self._rows:
            return
        # Integer nanoseconds are exact in a float64 up to 2^53, which is 104 days.
        table = np.array(self._rows, np.float64)
        self._rows.clear()
        counts = table[:, 1].astype(np.int64)
        ends = np.cumsum(counts)
        index = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        index += np.repeat(table[:, 0].astype(np.int64), counts)
        rows = np.repeat(np.arange(len(counts)), counts)
        is_new = self._status[index] == UNANSWERED
        _, firsts = np.unique(index, return_index=True)
        is_first = np.zeros(len(index), bool)
        is_first[firsts] = True
        is_new &= is_first
        self._n_duplicates += int((~is_new).sum())
        index, rows = index[is_new], rows[is_new]
        self._answered_ns[index] = table[rows, 2]
        self._status[index] = table[rows, 3]
        self._subnet[index] = table[rows, 4]
        self._batch_size[index] = table[rows, 5]
        self._accuracy[index] = table[rows, 6]
        self._queued_ns[index] = table[rows, 7]
        self._executing_ns[index] = table[rows, 8]
