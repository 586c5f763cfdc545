"""Simulated worker processes: hosts of `gpu_worker.core` on a virtual clock, with profiles instead of GPUs.

The core, which also serves live, decides what a worker says and when. Here are only the loop around it,
which rests and freezes, and lives that end. There are no bytes: a DIRECTIVE is the router core's own `Batch`,
and reports carry no outputs.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from gpu_worker.core import WorkerCore
from gpu_worker.core.batches import Outcome
from gpu_worker.core.played import PlayedGpu, PlayedGpus
from loadgen.simulator.links import FAR_NS
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadgen.simulator.links import SimLink
    from router.core.workers import Batch
    from superserve.wire import Control, Message, Pong

    SimGpu = PlayedGpu[Batch]
    Inbound = Batch | Control | Pong


def outcome_of(batch: Batch, waited_ns: int) -> Outcome:
    """Return the outcome of a batch that starts after `waited_ns` at the worker, without outputs.

    A query runs if it has slack left, counted from dispatch.
    """
    slacks_end_ns = batch.dispatched_ns + waited_ns
    if min([cohort.deadlines_ns[lo] for cohort, lo, _ in batch.stretches]) > slacks_end_ns:
        return Outcome(batch.n, 0, b"")
    statuses = bytes(
        Status.OK if deadline_ns > slacks_end_ns else Status.EXPIRED
        for cohort, lo, hi in batch.stretches
        for deadline_ns in cohort.deadlines_ns[lo:hi]
    )
    return Outcome(statuses.count(Status.OK), 0, b"", statuses)


class SimProcess:
    """One worker process: a core, GPUs, a mailbox, and the loop around them.

    It receives instants and messages, and returns the messages to send; its host carries those to the
    router.

    Args:
        name: Its name at the router.
        gpus: Its GPUs, by slot.
        rest_ns: Time between two passes of its loop, if it has more than one GPU.
        jitter: As the core takes it.

    Attributes:
        core: Decides what to say and do in this life.
        key: This life's connection; set by the host, like the next three.
        way_in: From the router.
        way_out: To the router.
        act: Makes it step.
        at_ns: When the host will make it step.
    """

    __slots__ = (
        "_jitter", "act", "at_ns", "core", "frozen_until_ns", "gpus", "inbox", "is_alive", "key", "name",
        "rest_ns", "rest_until_ns", "way_in", "way_out",
    )  # fmt: skip

    core: WorkerCore[Batch]
    key: int
    way_in: SimLink
    way_out: SimLink
    act: Callable[[int], None]

    def __init__(
        self, name: str, gpus: Sequence[SimGpu], rest_ns: int, jitter: Callable[[], float] = lambda: 1.0
    ) -> None:
        self.name = name
        self.gpus = gpus
        self.is_alive = False
        self.at_ns = FAR_NS
        self.frozen_until_ns = 0
        self.rest_ns = rest_ns if len(gpus) > 1 else 0
        self.rest_until_ns = 0
        self.inbox: deque[tuple[int, Inbound]] = deque()
        self._jitter = jitter

    def begin(self, now_ns: int) -> None:
        """Begin a life; after an earlier one with idle GPUs of the same profiles, at the same speed."""
        self.is_alive = True
        self.frozen_until_ns = self.rest_until_ns = 0
        self.gpus = [_successor(gpu) for gpu in self.gpus]
        self.core = WorkerCore(PlayedGpus(self.gpus), {"name": self.name}, now_ns, jitter=self._jitter)

    def next_pass_ns(self) -> int:
        """Return when it next looks: something is due or has arrived, and it neither rests nor is frozen."""
        if not self.is_alive:
            return FAR_NS
        at_ns = self.core.next_due_ns()
        if self.inbox and self.inbox[0][0] < at_ns:
            at_ns = self.inbox[0][0]
        return max(at_ns, self.rest_until_ns, self.frozen_until_ns)

    def step(self, now_ns: int) -> list[Message]:
        """Read what has arrived, and return the messages to send."""
        self.rest_until_ns = now_ns + self.rest_ns
        inbox, core = self.inbox, self.core
        while inbox and inbox[0][0] <= now_ns:
            core.receive(inbox.popleft()[1], now_ns)
        return core.poll(now_ns)

    def die(self) -> None:
        """End at once: what it held or had not read is lost."""
        self.is_alive = False
        self.inbox.clear()
        self.at_ns = FAR_NS


def _successor(gpu: SimGpu) -> SimGpu:
    fresh: SimGpu = PlayedGpu(gpu.profile, outcome_of, pace=gpu.pace, actuation_ns=gpu.actuation_ns)
    fresh.factor, fresh.busy_ns, fresh.n_run = gpu.factor, gpu.busy_ns, gpu.n_run
    return fresh
