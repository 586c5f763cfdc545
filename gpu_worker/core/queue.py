"""One GPU's batches: first in, first out, one at a time; and what the router learns of them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from gpu_worker.core.batches import BatchOrder

if TYPE_CHECKING:
    from gpu_worker.core.batches import EndedBatch, Refusal

B = TypeVar("B", bound=BatchOrder)
B_contra = TypeVar("B_contra", bound=BatchOrder, contravariant=True)

CAPACITY = 2
"""Batches a GPU takes at a time: one that runs, one that waits so that it need not wait for the network."""

MAX_OUTSTANDING = 16
"""A router keeps to its credit, so more than `CAPACITY` is its fault; from here on batches are refused."""


class QueueReport(NamedTuple):
    """What one GPU tells the router.

    It says since when a batch runs, not when it will end: the router alone knows by how much this
    device differs from its profile.

    Attributes:
        credit: Batches it can take.
        held: Batches that wait.
        running: Batches that run: 0 or 1.
        last_batch: Highest batch id received in this epoch; 0 before the first.
        running_batch: The batch that runs; 0 if none of this epoch does.
        running_for_ns: How long it has been running; 0 if there is none.
    """

    credit: int
    held: int
    running: int
    last_batch: int
    running_batch: int
    running_for_ns: int


class TakenBatch(Generic[B]):
    """A batch that is here.

    Attributes:
        received_ns: When it came.
        started_ns: When it began; meaningless while it waits.
        is_given_up: Whether its epoch is over; another router may use the same numbers.
    """

    __slots__ = ("is_given_up", "order", "received_ns", "started_ns")

    def __init__(self, order: B, received_ns: int) -> None:
        self.order = order
        self.received_ns = received_ns
        self.started_ns = received_ns
        self.is_given_up = False


class GpuQueue(Generic[B]):
    """The batches of one GPU. The next one starts when it is here and the one before has ended.

    A device starts the next batch that it holds without asking anybody, so that is not an event
    but a rule: a batch starts at the later of its receipt and the end of the one before.

    Attributes:
        running: The batch that runs; None if idle.
        last_batch: Highest batch id received in this epoch.
    """

    __slots__ = ("_waiting", "last_batch", "running")

    def __init__(self) -> None:
        self.running: TakenBatch[B] | None = None
        self.last_batch = 0
        self._waiting: deque[TakenBatch[B]] = deque()

    @property
    def n_outstanding(self) -> int:
        """Batches that run or wait."""
        return len(self._waiting) + (self.running is not None)

    @property
    def waiting(self) -> tuple[TakenBatch[B], ...]:
        """The batches that wait, in their order."""
        return tuple(self._waiting)

    def take(self, order: B, received_ns: int) -> TakenBatch[B] | None:
        """Take a batch that was received now; None if `MAX_OUTSTANDING` are here, then it is not taken."""
        if order.batch_id > self.last_batch:
            self.last_batch = order.batch_id
        if len(self._waiting) + 1 >= MAX_OUTSTANDING:
            return None
        batch = TakenBatch(order, received_ns)
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
        if ended_ns > batch.received_ns:
            batch.started_ns = ended_ns
        return batch

    def report(self, now_ns: int) -> QueueReport:
        """Return what the GPU tells the router as of `now_ns`."""
        running, last_batch = self.running, self.last_batch
        if running is None:
            return QueueReport(CAPACITY, 0, 0, last_batch, 0, 0)
        n_held = len(self._waiting)
        credit = max(0, CAPACITY - 1 - n_held)
        if running.is_given_up:
            return QueueReport(credit, n_held, 1, last_batch, 0, 0)
        # A clock that two threads read may be behind by a little.
        running_for_ns = max(0, now_ns - running.started_ns)
        return QueueReport(credit, n_held, 1, last_batch, running.order.batch_id, running_for_ns)

    def forget_held(self) -> list[TakenBatch[B]]:
        """Drop what has not started, give up what runs, and count from the start; return what was dropped."""
        dropped = list(self._waiting)
        self._waiting.clear()
        self.last_batch = 0
        if self.running is not None:
            self.running.is_given_up = True
        return dropped


class Gpus(Protocol[B_contra]):
    """The GPUs of one process: each a `GpuQueue`, and what runs its batches."""

    @property
    def n_slots(self) -> int:
        """Number of GPUs."""
        ...

    def submit(self, order: B_contra, received_ns: int) -> Refusal | None:
        """Take a batch and return None, or why its GPU does not: it cannot run it, or has too many."""
        ...

    def next_event_ns(self) -> int | None:
        """Return when `finish_due` will next have something to report; None if that is not known."""
        ...

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that have ended since the last call, each GPU's in order."""
        ...

    def report(self, slot: int, now_ns: int) -> QueueReport:
        """Return what one GPU tells the router."""
        ...

    def forget_held(self) -> int:
        """Drop the batches that have not started, count them from the start again; return how many."""
        ...

    def is_idle(self) -> bool:
        """Tell whether no GPU holds anything."""
        ...
