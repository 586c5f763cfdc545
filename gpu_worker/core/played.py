"""GPUs that follow a profile: emulated, simulated, benchmarked and tested ones alike.

A real GPU starts the next batch that it holds at once, without waiting for Python. So a played
one computes with ideal instants: a batch starts when it was received or when the one before it
ended, whichever is later, and ends the profiled time after that, at the GPU's pace. It is
reported when the caller next looks, never earlier; the caller's lateness counts as transport.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Generic

from gpu_worker.core.batches import FULL, EndedBatch, Outcome, Refusal, end_of, fault_of
from gpu_worker.core.queue import OWN, B, GpuQueue, Running, running_of
from superserve.build import mypyc_attr
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_worker.core.queue import QueueReport
    from profiles.table import Profile

MINUTE_NS = 60_000_000_000
MOST_DRIFT = 4.0
"""However long it drifts, a GPU stays between a quarter and four times the speed that it began with."""
SPEEDS = (0.01, 100.0)
"""Least and greatest speed of a GPU: a bound against mistyped options."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a device is compared with its profile, and how that changes.

    Attributes:
        speed: As a multiple of the profile's speed; with 0.67 batches take 1.5 times as long.
        drift: Share of `speed` added each minute; negative for a device that throttles.
        began_ns: The instant at which it had `speed`.

    Raises:
        ConfigError: A number is out of its range.
    """

    speed: float = 1.0
    drift: float = 0.0
    began_ns: int = 0

    def __post_init__(self) -> None:
        least, most = SPEEDS
        if not least <= self.speed <= most:
            raise ConfigError(f"speed: expected {least:g} to {most:g}, got {self.speed}")
        if not -1.0 <= self.drift <= 1.0:
            raise ConfigError(f"drift: expected a share a minute of -1 to 1, got {self.drift}")

    def slowness(self, at_ns: int) -> float:
        """Return measured over profiled latency of a batch that starts at `at_ns`."""
        if self.drift == 0.0:
            return 1.0 / self.speed
        share = 1.0 + self.drift * ((at_ns - self.began_ns) / MINUTE_NS)
        return 1.0 / (self.speed * min(MOST_DRIFT, max(1.0 / MOST_DRIFT, share)))


AS_PROFILED = Pace()


@mypyc_attr(allow_interpreted_subclasses=True)
class PlayedGpu(Generic[B]):
    """One GPU that follows a profile.

    Args:
        profile: How long each subnet takes at each batch size.
        outcome: How a batch ends that starts after `waited_ns` here: which queries run, and their outputs.
        pace: How fast it is compared with the profile.
        actuation_ns: How long it takes to change subnet, before a batch begins.

    Attributes:
        queue: Its batches.
        factor: How many times longer batches take that start from now on, in addition to the pace.
        ends_ns: When the running batch ends; meaningless if idle.
        busy_ns: Time that its batches took so far, including the running one.
        n_run: Queries that it has run.
    """

    __slots__ = (
        "_ending", "_outcome", "_sizes", "_slowness", "_subnet", "actuation_ns", "busy_ns", "ends_ns",
        "factor", "n_run", "pace", "profile", "queue",
    )  # fmt: skip

    def __init__(
        self,
        profile: Profile,
        outcome: Callable[[B, int], Outcome],
        *,
        pace: Pace = AS_PROFILED,
        actuation_ns: int = 0,
    ) -> None:
        self.profile = profile
        self.queue: GpuQueue[B] = GpuQueue()
        self.pace = pace
        self.factor = 1.0
        self.actuation_ns = actuation_ns
        self.ends_ns = 0
        self.busy_ns = 0
        self.n_run = 0
        # Needed for each batch, so computed once: a steady pace, and the profile's sizes.
        self._slowness = pace.slowness(0) if pace.drift == 0.0 else None
        self._sizes = (profile.n_subnets, profile.max_batch_size)
        self._outcome = outcome
        self._ending: Outcome | None = None
        self._subnet: int | None = None

    @property
    def next_event_ns(self) -> int | None:
        """The instant at which the running batch ends; None if idle."""
        return None if self.queue.running is None else self.ends_ns

    def submit(self, order: B, received_ns: int, source: int = OWN) -> Refusal | None:
        """Take a batch at the instant when it arrived and return None, or why it is not taken."""
        n_subnets, most = self._sizes
        if order.subnet >= n_subnets or order.n > most:
            return fault_of(self.profile, order)
        queue = self.queue
        if queue.running is None:
            queue.take(order, received_ns, source)
            self._begin()
        elif queue.take(order, received_ns, source) is None:
            return FULL
        return None

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that have ended by `now_ns`, in order, and start the next ones."""
        found: list[EndedBatch] = []
        queue = self.queue
        while (batch := queue.running) is not None and self.ends_ns <= now_ns:
            ends_ns, outcome = self.ends_ns, self._ending
            assert outcome is not None, "a batch that runs has an outcome"
            if queue.end(ends_ns) is not None:
                self._begin()
            report = queue.report(now_ns, batch.source)
            found.append(end_of(batch, outcome, report, batch.started_ns, ends_ns))
        return found

    def report(self, now_ns: int) -> QueueReport:
        """Return its report to the router as of `now_ns`."""
        return self.queue.report(now_ns)

    def forget_held(self, source: int = OWN) -> int:
        """Drop a source's batches that have not started, restart its count; return how many were dropped."""
        return len(self.queue.forget_held(source))

    def _begin(self) -> None:
        """Compute how the batch that has just started will end."""
        batch = self.queue.running
        assert batch is not None, "something has started"
        order, started_ns = batch.order, batch.started_ns
        self._ending = outcome = self._outcome(order, started_ns - batch.received_ns)
        executing_ns = 0
        if outcome.n_run:
            slowness = self._slowness
            if slowness is None:
                slowness = self.pace.slowness(started_ns)
            slowness *= self.factor
            executing_ns = int(self.profile.latency_ns(order.subnet, outcome.n_run) * slowness)
            if order.subnet != self._subnet:
                self._subnet = order.subnet
                executing_ns += self.actuation_ns
        self.busy_ns += executing_ns
        self.n_run += outcome.n_run
        self.ends_ns = started_ns + executing_ns


class PlayedGpus(Generic[B]):
    """All played GPUs of one process; looks only at those with something to report.

    Args:
        gpus: By slot.
        on_ended: Called with the batches that have ended, whenever there are any.

    Attributes:
        n_slots: Number of GPUs.
    """

    def __init__(
        self, gpus: Sequence[PlayedGpu[B]], on_ended: Callable[[list[EndedBatch]], None] | None = None
    ) -> None:
        self.gpus = tuple(gpus)
        self.n_slots = len(self.gpus)
        self._on_ended = on_ended
        # One entry, (end of the running batch, slot), for each GPU that is not idle.
        self._due: list[tuple[int, int]] = []

    def submit(self, order: B, received_ns: int, source: int = OWN) -> Refusal | None:
        """Take a batch and return None, or why its GPU does not take it."""
        gpu = self.gpus[order.slot]
        was_idle = gpu.queue.running is None
        refusal = gpu.submit(order, received_ns, source)
        if was_idle and refusal is None:
            heappush(self._due, (gpu.ends_ns, order.slot))
        return refusal

    def next_event_ns(self) -> int | None:
        """Return the instant at which the next batch ends; None if all are idle."""
        return self._due[0][0] if self._due else None

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that have ended by `now_ns`, each GPU's in order."""
        found: list[EndedBatch] = []
        due = self._due
        while due and due[0][0] <= now_ns:
            _, slot = heappop(due)
            gpu = self.gpus[slot]
            found += gpu.finish_due(now_ns)
            if gpu.queue.running is not None:
                heappush(due, (gpu.ends_ns, slot))
        if found and self._on_ended is not None:
            self._on_ended(found)
        return found

    def report(self, slot: int, now_ns: int, source: int = OWN) -> QueueReport:
        """Return one GPU's report to the router of a source."""
        return self.gpus[slot].queue.report(now_ns, source)

    def running(self, slot: int) -> Running | None:
        """Return what runs on a GPU; None if it is idle."""
        gpu = self.gpus[slot]
        return running_of(gpu.queue.running, gpu.profile)

    def forget_held(self, source: int = OWN) -> int:
        """Drop a source's batches that have not started on any GPU; return how many."""
        return sum(gpu.forget_held(source) for gpu in self.gpus)

    def is_idle(self) -> bool:
        """Return whether all GPUs are idle."""
        return not self._due
