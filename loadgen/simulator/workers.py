"""Simulated worker processes: profiles in place of GPUs, and a worker's side of the protocol.

The GPUs reckon as `gpu_worker.serve.emulated` does, in ideal instants, and a test holds the two against
each other; a process joins, pulls, reports and begins anew as `gpu_worker.serve.server` does. What is
left out is bytes: a DIRECTIVE is the core's own `Batch`, and reports carry no outputs.
"""

from __future__ import annotations

import enum
from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from loadgen.simulator.links import FAR_NS
from superserve.wire import DoneRow, PullRow, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadgen.simulator.links import SimLink
    from profiles.table import Profile
    from router.core.workers import Batch

CAPACITY = 2
"""Batches that a GPU takes at a time, as `gpu_worker.serve.batches.CAPACITY`; a test keeps them equal."""


class _Running(NamedTuple):
    batch: Batch
    waited_ns: int
    ended_ns: int
    executing_ns: int
    statuses: bytes | None


class SimGpu:
    """One GPU that is a profile; `factor` times slower than it says.

    Args:
        profile: How long each subnet takes at each batch size.
        actuation_ns: What going over to another subnet takes, before a batch begins.

    Attributes:
        factor: Measured over profiled latency of the batches that start from now on.
        running: The batch that runs, None if idle.
        last_batch: Highest batch id received in this epoch.
        busy_ns: Time that its batches took so far, those that run included.
        n_run: Queries that it ran so far.
    """

    __slots__ = (
        "_held", "_subnet", "actuation_ns", "busy_ns", "factor", "last_batch", "n_run", "profile", "running",
    )  # fmt: skip

    def __init__(self, profile: Profile, actuation_ns: int = 0) -> None:
        self.profile = profile
        self.actuation_ns = actuation_ns
        self.factor = 1.0
        self.running: _Running | None = None
        self.last_batch = 0
        self.busy_ns = 0
        self.n_run = 0
        self._held: deque[tuple[Batch, int]] = deque()
        self._subnet: int | None = None

    @property
    def n_outstanding(self) -> int:
        """Batches that run or wait."""
        return len(self._held) + (self.running is not None)

    def submit(self, batch: Batch, received_ns: int) -> None:
        """Take a batch that was received now; start it if idle."""
        if batch.batch_id > self.last_batch:
            self.last_batch = batch.batch_id
        self._held.append((batch, received_ns))
        if self.running is None:
            self._start_next(received_ns)

    def finish(self, now_ns: int) -> DoneRow:
        """End the running batch, which is over by now, start the next, and return the report."""
        ran = self.running
        assert ran is not None, "a batch that ends was running"
        assert ran.ended_ns <= now_ns, "a GPU never answers early"
        self.running = None
        if self._held:
            self._start_next(ran.ended_ns)
        credit, held, free_in_ns = self.state(now_ns)
        batch = ran.batch
        return DoneRow(
            batch.batch_id, batch.worker.slot, credit, held, batch.n, ran.waited_ns, ran.executing_ns,
            self.last_batch, free_in_ns, 0, b"", ran.statuses,
        )  # fmt: skip

    def state(self, now_ns: int) -> tuple[int, int, int]:
        """Return credit, batches held, and the time until nothing is left to run, by the profile."""
        running = self.running
        if running is None:
            return CAPACITY, 0, 0
        free_in_ns = max(0, running.ended_ns - now_ns)
        for batch, _ in self._held:
            free_in_ns += self.profile.latency_ns(batch.subnet, batch.n)
        n_held = len(self._held)
        return max(0, CAPACITY - 1 - n_held), n_held, free_in_ns

    def forget_held(self) -> None:
        """Drop what has not started, and count batches anew."""
        self._held.clear()
        self.last_batch = 0

    def _start_next(self, free_ns: int) -> None:
        batch, received_ns = self._held.popleft()
        started_ns = max(received_ns, free_ns)
        waited_ns = started_ns - received_ns
        statuses, n_run = None, batch.n
        slacks_end_ns = batch.dispatched_ns + waited_ns
        if min([cohort.deadlines_ns[lo] for cohort, lo, _ in batch.stretches]) <= slacks_end_ns:
            statuses = _statuses(batch, slacks_end_ns)
            n_run = statuses.count(Status.OK)
        executing_ns = 0
        if n_run:
            executing_ns = int(self.profile.latency_ns(batch.subnet, n_run) * self.factor)
            if batch.subnet != self._subnet:
                self._subnet = batch.subnet
                executing_ns += self.actuation_ns
        self.busy_ns += executing_ns
        self.n_run += n_run
        self.running = _Running(batch, waited_ns, started_ns + executing_ns, executing_ns, statuses)


def _statuses(batch: Batch, slacks_end_ns: int) -> bytes:
    """Return OK or EXPIRED for each query: whether its slack, counted from dispatch, is left."""
    return bytes(
        Status.OK if deadline_ns > slacks_end_ns else Status.EXPIRED
        for cohort, lo, hi in batch.stretches
        for deadline_ns in cohort.deadlines_ns[lo:hi]
    )


class Word(enum.Enum):
    """What a router says to a worker process, beside directives."""

    WELCOME = "welcome"
    SAY_HELLO = "say hello"


class SimProcess:
    """One worker process: GPUs, a mailbox, and how it stands with the router.

    It is given instants and what has arrived, and returns what it says; its host carries that to
    the router. `epoch` is None while it joins.

    Args:
        name: What the router calls it.
        gpus: Its GPUs, by slot.
        rest_ns: Time between two passes of its loop, if it has more than one GPU.

    Attributes:
        key: This life's connection; given by the host, with the next three.
        way_in: From the router.
        way_out: To the router.
        act: Has it step.
        at_ns: When the host will have it step.
    """

    __slots__ = (
        "_due", "act", "at_ns", "epoch", "frozen_until_ns", "gpus", "hello_due_ns", "inbox", "is_alive",
        "key", "name", "rest_ns", "rest_until_ns", "way_in", "way_out",
    )  # fmt: skip

    key: int
    way_in: SimLink
    way_out: SimLink
    act: Callable[[int], None]

    def __init__(self, name: str, gpus: Sequence[SimGpu], rest_ns: int) -> None:
        self.name = name
        self.gpus = gpus
        self.epoch: int | None = None
        self.is_alive = True
        self.at_ns = FAR_NS
        self.hello_due_ns = 0
        self.frozen_until_ns = 0
        self.rest_ns = rest_ns if len(gpus) > 1 else 0
        self.rest_until_ns = 0
        self.inbox: deque[tuple[int, Batch | tuple[Word, int]]] = deque()
        self._due: list[tuple[int, int]] = []

    def next_pass_ns(self) -> int:
        """Return when it next looks: something has arrived or ended, and it neither rests nor is frozen."""
        at_ns = self.inbox[0][0] if self.inbox else FAR_NS
        if self._due and self._due[0][0] < at_ns:
            at_ns = self._due[0][0]
        return max(at_ns, self.rest_until_ns, self.frozen_until_ns)

    def step(self, now_ns: int) -> tuple[list[DoneRow], bool]:
        """Read what has arrived, and report what has ended.

        Returns:
            Reports for the router of this epoch, and whether it is to be told the queue state too.
        """
        self.rest_until_ns = now_ns + self.rest_ns
        must_pull = False
        inbox, due = self.inbox, self._due
        while inbox and inbox[0][0] <= now_ns:
            message = inbox.popleft()[1]
            if isinstance(message, tuple):
                must_pull = self._told(*message, now_ns) or must_pull
            elif message.worker.peer.epoch == self.epoch:
                slot = message.worker.slot
                gpu = self.gpus[slot]
                was_idle = gpu.running is None
                gpu.submit(message, now_ns)
                if was_idle and gpu.running is not None:
                    heappush(due, (gpu.running.ended_ns, slot))
        rows: list[DoneRow] = []
        while due and due[0][0] <= now_ns:
            gpu = self.gpus[heappop(due)[1]]
            while gpu.running is not None and gpu.running.ended_ns <= now_ns:
                is_mine = gpu.running.batch.worker.peer.epoch == self.epoch
                row = gpu.finish(now_ns)
                if is_mine:
                    rows.append(row)
                else:
                    must_pull = True  # it is free, and no report will say so
            if gpu.running is not None:
                heappush(due, (gpu.running.ended_ns, row.slot))
        return rows, must_pull and self.epoch is not None

    def _told(self, word: Word, epoch: int, now_ns: int) -> bool:
        """Take a WELCOME or a refusal; True if the router is to be told the queue state."""
        if word is Word.WELCOME:
            if epoch != self.epoch:
                self._forget_held()
                self.epoch = epoch
            return True
        if self.epoch is not None:
            self._forget_held()
            self.epoch = None
            self.hello_due_ns = now_ns
        return False

    def _forget_held(self) -> None:
        for gpu in self.gpus:
            gpu.forget_held()

    def pull_rows(self, now_ns: int) -> list[PullRow]:
        """Return every GPU's queue state."""
        rows = []
        for slot, gpu in enumerate(self.gpus):
            credit, held, free_in_ns = gpu.state(now_ns)
            running = int(gpu.running is not None)
            rows.append(PullRow(slot, credit, held, running, gpu.last_batch, free_in_ns))
        return rows

    def die(self) -> None:
        """End at once: what it held and had not read is gone."""
        self.is_alive = False
        self.epoch = None
        self.inbox.clear()
        self._due.clear()
        self.at_ns = FAR_NS

    def revive(self, now_ns: int) -> None:
        """Begin a new life, with idle GPUs of the same profiles; it is as fast as it was."""
        self.is_alive = True
        self.frozen_until_ns = self.rest_until_ns = 0
        self.hello_due_ns = now_ns
        gpus = []
        for gpu in self.gpus:
            fresh = SimGpu(gpu.profile, gpu.actuation_ns)
            fresh.factor, fresh.busy_ns, fresh.n_run = gpu.factor, gpu.busy_ns, gpu.n_run
            gpus.append(fresh)
        self.gpus = gpus
