"""Emulated GPUs: a profile in place of a device. No socket, clock or torch.

A real GPU starts the next batch it holds at once, without waiting for Python; so an
emulated one reckons in ideal instants. A batch starts when it was received or when the
one before it ended, whichever is later, and ends the profiled time after that. It is
reported when the caller next looks, never earlier; the caller's lateness counts as
transport. The output of a query is the subnet's row, so that a client sees what ran.
"""

from __future__ import annotations

import struct
from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from gpu_worker.serve.batches import (
    CAPACITY,
    MAX_OUTSTANDING,
    EndedBatch,
    Outcome,
    QueueState,
    expired_reason,
    finished,
    free_in_ns,
    mixed,
    unexpired,
)
from superserve.subnet import TensorSpec
from superserve.wire import Status

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gpu_worker.serve.eventlog import EventLogWriter
    from profiles.table import Profile
    from superserve.wire import Directive

OUTPUT = TensorSpec("int32", ())
"""One query's output: the row of the subnet that ran."""

_ROW = struct.Struct("<i")


class _Held(NamedTuple):
    directive: Directive
    received_ns: int


class _Running(NamedTuple):
    directive: Directive
    received_ns: int
    started_ns: int
    ended_ns: int
    outcome: Outcome


class EmulatedGpu:
    """One GPU that is a profile: runs one batch at a time, in the order they came.

    Args:
        profile: How long each subnet takes at each batch size.

    Attributes:
        last_batch: Highest batch id received in this epoch.
    """

    __slots__ = ("_held", "_profile", "_running", "last_batch")

    def __init__(self, profile: Profile) -> None:
        self.last_batch = 0
        self._profile = profile
        self._held: deque[_Held] = deque()
        self._running: _Running | None = None

    @property
    def next_event_ns(self) -> int | None:
        """The instant at which the running batch ends; None if idle."""
        return None if self._running is None else self._running.ended_ns

    def submit(self, directive: Directive, received_ns: int) -> bool:
        """Take a batch; start it if the GPU is idle.

        Args:
            directive: A batch with a subnet and a size that the profile has.
            received_ns: The present instant.

        Returns:
            False if `MAX_OUTSTANDING` batches are here already; then it was not taken.
        """
        self.last_batch = max(self.last_batch, directive.batch_id)
        if len(self._held) + 1 >= MAX_OUTSTANDING:
            return False
        self._held.append(_Held(directive, received_ns))
        if self._running is None:
            self._start_next(received_ns)
        return True

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that have ended by `now_ns`, in order, and start those that follow."""
        reports = []
        while (batch := self._running) is not None and batch.ended_ns <= now_ns:
            self._running = None
            self._start_next(batch.ended_ns)
            reports.append(
                finished(
                    batch.directive,
                    batch.outcome,
                    self.state(now_ns),
                    received_ns=batch.received_ns,
                    started_ns=batch.started_ns,
                    ended_ns=batch.ended_ns,
                )
            )
        return reports

    def state(self, now_ns: int) -> QueueState:
        """Return what it tells the router as of `now_ns`."""
        running, n_held = self._running, len(self._held)
        if running is None:
            return QueueState(CAPACITY, 0, 0, self.last_batch, 0)
        held = (batch.directive for batch in self._held)
        free_ns = free_in_ns(self._profile, running.ended_ns, held, now_ns)
        return QueueState(max(0, CAPACITY - 1 - n_held), n_held, 1, self.last_batch, free_ns)

    def forget_held(self) -> int:
        """Drop what has not started, and count batches anew; return how many were dropped."""
        n_dropped = len(self._held)
        self._held.clear()
        self.last_batch = 0
        return n_dropped

    def _start_next(self, free_ns: int) -> None:
        """Start the next held batch, on a GPU that is free since `free_ns`."""
        if not self._held:
            return
        directive, received_ns = self._held.popleft()
        started_ns = max(received_ns, free_ns)
        outcome = _outcome(directive, started_ns - received_ns)
        n_run = outcome.n_run
        profiled_ns = self._profile.latency_ns(directive.subnet, n_run) if n_run else 0
        self._running = _Running(directive, received_ns, started_ns, started_ns + profiled_ns, outcome)


def _outcome(directive: Directive, waited_ns: int) -> Outcome:
    alive = unexpired(directive, waited_ns)
    output = _ROW.pack(directive.subnet)
    if alive is None:
        return Outcome(directive.n, _ROW.size, output * directive.n)
    return _partly_expired(alive, output, expired_reason(waited_ns))


def _partly_expired(alive: npt.NDArray[np.bool_], output: bytes, reason: bytes) -> Outcome:
    statuses = [Status.OK if is_alive else Status.EXPIRED for is_alive in alive]
    outputs = [output if is_alive else reason for is_alive in alive]
    return mixed(statuses, outputs, int(alive.sum()))


class EmulatedGpus:
    """All emulated GPUs of one process; looks only at those that have something to report.

    Args:
        profile: The profile that each of them plays.
        n_gpus: How many.
        log: Where to note what they ran; opened and closed by the caller.
    """

    def __init__(self, profile: Profile, n_gpus: int, log: EventLogWriter | None = None) -> None:
        self._gpus = tuple(EmulatedGpu(profile) for _ in range(n_gpus))
        self._log = log
        # One entry, (end of the running batch, slot), for each GPU that is not idle.
        self._due: list[tuple[int, int]] = []

    @property
    def n_slots(self) -> int:
        """Number of GPUs."""
        return len(self._gpus)

    def submit(self, directive: Directive, received_ns: int) -> bool:
        """Take a batch; False if its GPU has too many already."""
        gpu = self._gpus[directive.slot]
        was_idle = gpu.next_event_ns is None
        is_taken = gpu.submit(directive, received_ns)
        if was_idle and (due_ns := gpu.next_event_ns) is not None:
            heappush(self._due, (due_ns, directive.slot))
        return is_taken

    def next_event_ns(self) -> int | None:
        """Return the instant at which the next batch ends; None if all are idle."""
        return self._due[0][0] if self._due else None

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that have ended by `now_ns`, each GPU's in order."""
        reports: list[EndedBatch] = []
        while self._due and self._due[0][0] <= now_ns:
            _, slot = heappop(self._due)
            gpu = self._gpus[slot]
            reports += gpu.finish_due(now_ns)
            if (due_ns := gpu.next_event_ns) is not None:
                heappush(self._due, (due_ns, slot))
        if self._log is not None:
            _note(self._log, reports)
        return reports

    def state(self, slot: int, now_ns: int) -> QueueState:
        """Return what one GPU tells the router."""
        return self._gpus[slot].state(now_ns)

    def forget_held(self) -> int:
        """Drop what has not started on any GPU; return how many batches were dropped."""
        return sum(gpu.forget_held() for gpu in self._gpus)

    def is_idle(self) -> bool:
        """Tell whether no GPU holds anything."""
        return not self._due


def _note(log: EventLogWriter, reports: list[EndedBatch]) -> None:
    for report in reports:
        if report.n_run:  # a batch refused whole took no time of the GPU
            row = report.row
            log.add(row.slot, row.batch_id, report.subnet, report.n_run, report.started_ns, report.ended_ns)
