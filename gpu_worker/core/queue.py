"""One GPU's batches: first in, first out, one at a time; and what is reported to the router."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from gpu_worker.core.batches import BatchOrder

if TYPE_CHECKING:
    from gpu_worker.core.batches import EndedBatch, Refusal
    from profiles.table import Profile

B = TypeVar("B", bound=BatchOrder)
B_contra = TypeVar("B_contra", bound=BatchOrder, contravariant=True)

CAPACITY = 2
"""Batches that a GPU takes at a time: one runs and one waits, so that the GPU never waits for the network."""

OWN = 0
"""The source of batches of the router that the process belongs to."""

MAX_OUTSTANDING = 16
"""A router that keeps to its credit never exceeds `CAPACITY`. From this many on, batches are refused."""


class QueueReport(NamedTuple):
    """One GPU's report to the router.

    It contains since when a batch runs, not when it will end: only the router knows how much this
    device differs from its profile.

    Attributes:
        credit: Batches that it can take.
        held: Batches that wait.
        running: Batches that run: 0 or 1.
        last_batch: Highest batch id received in this epoch; 0 before the first.
        running_batch: The batch that runs; 0 if none of this epoch does.
        running_for_ns: How long it has been running; 0 without one.
    """

    credit: int
    held: int
    running: int
    last_batch: int
    running_batch: int
    running_for_ns: int


class TakenBatch(Generic[B]):
    """A batch that has been taken.

    Attributes:
        source: Which router sent it: `OWN`, or the number of a visit to another (`gpu_worker.core.lending`).
        received_ns: When it arrived.
        started_ns: When it began; meaningless while it waits.
        is_given_up: Whether its epoch is over; another router may use the same numbers.
    """

    __slots__ = ("is_given_up", "order", "received_ns", "source", "started_ns")

    def __init__(self, order: B, received_ns: int, source: int = 0) -> None:
        self.order = order
        self.source = source
        self.received_ns = received_ns
        self.started_ns = received_ns
        self.is_given_up = False


class Running(NamedTuple):
    """The batch that runs on a GPU.

    Attributes:
        source: Which router sent it.
        ends_ns: When it ends if it takes as long as profiled.
    """

    source: int
    ends_ns: int


def running_of(batch: TakenBatch[B] | None, profile: Profile) -> Running | None:
    """Return what runs on a GPU of a profile, given its queue's running batch."""
    if batch is None:
        return None
    order = batch.order
    return Running(batch.source, batch.started_ns + profile.latency_ns(order.subnet, order.n))


class GpuQueue(Generic[B]):
    """The batches of one GPU. The next one starts once it is here and the one before has ended.

    A device starts the next batch that it holds by itself, so that is not an event but a rule: a batch
    starts at the later of its arrival and the end of the one before.

    Attributes:
        running: The batch that runs; None if idle.
        last_batch: Highest batch id received in this epoch of the own router.
    """

    __slots__ = ("_waiting", "last_batch", "last_visiting", "running")

    def __init__(self) -> None:
        self.running: TakenBatch[B] | None = None
        self.last_batch = 0
        self.last_visiting: dict[int, int] = {}  # highest batch id of each visit
        self._waiting: deque[TakenBatch[B]] = deque()

    @property
    def n_outstanding(self) -> int:
        """Batches that run or wait."""
        return len(self._waiting) + (self.running is not None)

    @property
    def waiting(self) -> tuple[TakenBatch[B], ...]:
        """The batches that wait, in order."""
        return tuple(self._waiting)

    def take(self, order: B, received_ns: int, source: int = OWN) -> TakenBatch[B] | None:
        """Take a batch that arrived at `received_ns`, or return None if `MAX_OUTSTANDING` are here."""
        if source != OWN:
            self.last_visiting[source] = max(order.batch_id, self.last_visiting.get(source, 0))
        elif order.batch_id > self.last_batch:
            self.last_batch = order.batch_id
        if len(self._waiting) + 1 >= MAX_OUTSTANDING:
            return None
        batch = TakenBatch(order, received_ns, source)
        if self.running is None:
            self.running = batch
        else:
            self._waiting.append(batch)
        return batch

    def end(self, ended_ns: int) -> TakenBatch[B] | None:
        """End the running batch at `ended_ns`; return the one that runs now."""
        assert self.running is not None, "a batch that ends was running"
        if not self._waiting:
            self.running = None
            return None
        batch = self.running = self._waiting.popleft()
        # A batch that arrived after the last one ended started on arrival, as `take` has set.
        if ended_ns > batch.received_ns:
            batch.started_ns = ended_ns
        return batch

    def report(self, now_ns: int, source: int = OWN) -> QueueReport:
        """Return the GPU's report to the router of a source as of `now_ns`."""
        running = self.running
        last_batch = self.last_batch if source == OWN else self.last_visiting.get(source, 0)
        if running is None:
            return QueueReport(CAPACITY, 0, 0, last_batch, 0, 0)
        n_held = len(self._waiting)
        credit = max(0, CAPACITY - 1 - n_held)
        if running.is_given_up or running.source != source:
            return QueueReport(credit, n_held, 1, last_batch, 0, 0)
        # Two threads read the clock: the batch may have started after `now_ns`.
        running_for_ns = max(0, now_ns - running.started_ns)
        return QueueReport(credit, n_held, 1, last_batch, running.order.batch_id, running_for_ns)

    def forget_held(self, source: int = OWN) -> list[TakenBatch[B]]:
        """Drop a source's waiting batches, give up its running one, restart its count; return the dropped."""
        dropped = [batch for batch in self._waiting if batch.source == source]
        if dropped:
            kept = [batch for batch in self._waiting if batch.source != source]
            self._waiting = deque(kept)
        if source == OWN:
            self.last_batch = 0
        else:
            self.last_visiting.pop(source, None)
        if self.running is not None and self.running.source == source:
            self.running.is_given_up = True
        return dropped


class Gpus(Protocol[B_contra]):
    """The GPUs of one process: for each a `GpuQueue`, and what runs its batches."""

    @property
    def n_slots(self) -> int:
        """Number of GPUs."""
        ...

    def submit(self, order: B_contra, received_ns: int, source: int = OWN) -> Refusal | None:
        """Take a batch of a source and return None, or why not: its GPU cannot run it, or holds too many."""
        ...

    def next_event_ns(self) -> int | None:
        """Return when `finish_due` will next have something to report; None if unknown."""
        ...

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that have ended since the last call, each GPU's in order."""
        ...

    def report(self, slot: int, now_ns: int, source: int = OWN) -> QueueReport:
        """Return one GPU's report to the router of a source."""
        ...

    def running(self, slot: int) -> Running | None:
        """Return what runs on a GPU; None if it is idle."""
        ...

    def forget_held(self, source: int = OWN) -> int:
        """Drop a source's batches that have not started, restart its count; return how many were dropped."""
        ...

    def is_idle(self) -> bool:
        """Return whether all GPUs are idle."""
        ...
