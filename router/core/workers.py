"""What the router knows about workers: processes can fall silent, GPUs can overrun.

A *peer* is a worker process: one connection, one heartbeat. A *worker* is one of its GPUs.
Their states are tables; a pair that is not in the table raises with the recent history.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from router.core.edf import Stretch
from router.core.estimates import Correction, RecentQuantiles, WindowedMin
from router.policies.supply import GpuPace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from profiles.table import Profile
    from router.policies import Policy
    from superserve.wire import DoneRow, PullRow

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)


class PeerState(enum.Enum):
    """Whether the process is there."""

    LIVE = "live"
    SUSPECT = "suspect"
    DEAD = "dead"


class PeerEvent(enum.Enum):
    """What changes a peer's state."""

    HEARD = "heard"
    QUIET = "quiet"  # 3 heartbeats missed
    LOST = "lost"  # 6 missed, or its connection is gone
    LEFT = "left"  # it sent BYE


class WorkerState(enum.Enum):
    """Whether the GPU may get work."""

    READY = "ready"
    OVERRUN = "overrun"
    DRAINING = "draining"
    GONE = "gone"


class WorkerEvent(enum.Enum):
    """What changes a worker's state."""

    ANSWERED = "answered"
    OVERRAN = "overran"  # its batch took 3 times its profiled p99
    DRAIN = "drain"
    LOST = "lost"


PEER_TRANSITIONS: dict[tuple[PeerState, PeerEvent], PeerState] = {
    (PeerState.LIVE, PeerEvent.HEARD): PeerState.LIVE,
    (PeerState.LIVE, PeerEvent.QUIET): PeerState.SUSPECT,
    (PeerState.LIVE, PeerEvent.LOST): PeerState.DEAD,
    (PeerState.LIVE, PeerEvent.LEFT): PeerState.DEAD,
    (PeerState.SUSPECT, PeerEvent.HEARD): PeerState.LIVE,
    (PeerState.SUSPECT, PeerEvent.QUIET): PeerState.SUSPECT,
    (PeerState.SUSPECT, PeerEvent.LOST): PeerState.DEAD,
    (PeerState.SUSPECT, PeerEvent.LEFT): PeerState.DEAD,
}

WORKER_TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (WorkerState.READY, WorkerEvent.ANSWERED): WorkerState.READY,
    (WorkerState.READY, WorkerEvent.OVERRAN): WorkerState.OVERRUN,
    (WorkerState.READY, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.READY, WorkerEvent.LOST): WorkerState.GONE,
    (WorkerState.OVERRUN, WorkerEvent.ANSWERED): WorkerState.READY,
    (WorkerState.OVERRUN, WorkerEvent.OVERRAN): WorkerState.OVERRUN,
    (WorkerState.OVERRUN, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.OVERRUN, WorkerEvent.LOST): WorkerState.GONE,
    (WorkerState.DRAINING, WorkerEvent.ANSWERED): WorkerState.DRAINING,
    (WorkerState.DRAINING, WorkerEvent.OVERRAN): WorkerState.DRAINING,
    (WorkerState.DRAINING, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.DRAINING, WorkerEvent.LOST): WorkerState.GONE,
}


# Before the first measurement: what loopback TCP and two Python loops usually take. With fifteen of the
# former a second spike is still planned with them: where messages jitter, three times as many are lost.
_FIRST_TRANSPORT_NS = [400_000] * 7 + [1_000_000]


_ENOUGH = 64
"""Batches of a process's GPUs that are counted; by then none of them is in doubt."""

_WORST_OF_NS = 10_000_000_000
"""The worst way is that of this time: thousands of ways, where their 99th percentile is of 256."""
_MANY_WAYS = 128
"""Until this many are measured the worst counts as unknown. The window starts with 8 assumed ones."""
_UNKNOWN_NS = 1 << 62

_SAMPLE_EVERY_NS = 1_000_000
"""The transport of a process is sampled at most this often, so that one stall does not fill the window."""
# Read several times a pass, and an enum member costs three times as much as a global.
_READY, _LIVE = WorkerState.READY, PeerState.LIVE
NOISE = 0.05
"""A ratio this near to 1 counts as 1 in choices: the difference is the timer's noise, not the GPU."""


class TransitionError(Exception):
    """An event that the state's table does not have; the message includes the history."""


class StateMachine(Generic[S, E]):
    """A state, its table, and its last few changes."""

    __slots__ = ("_history", "_table", "_what", "state")

    def __init__(self, what: str, state: S, table: Mapping[tuple[S, E], S]) -> None:
        self.state = state
        self._what = what
        self._table = table
        self._history: deque[str] = deque(maxlen=16)

    def on(self, event: E) -> S:
        """Move as the table demands and return the new state.

        Raises:
            TransitionError: The table has no such pair.
        """
        new = self._table.get((self.state, event))
        if new is None:
            before = ", ".join(self._history) or "nothing"
            raise TransitionError(
                f"{self._what}: {event.value} while {self.state.value}; before that: {before}"
            )
        if new is not self.state:
            self._history.append(f"{self.state.value} -{event.value}-> {new.value}")
            self.state = new
        return new

    def history(self) -> tuple[str, ...]:
        """Return the last changes of state, oldest first."""
        return tuple(self._history)


@dataclass(slots=True)
class Batch:
    """A directive in flight: the ledger's entry, and what is sent.

    Attributes:
        batch_id: Its number on this router, ascending from 1.
        worker: The GPU that runs it.
        subnet: Row of the profile.
        n: Queries in all its stretches.
        stretches: Its queries, in order of deadline or client by client.
        dispatched_ns: The instant of dispatch; remaining slacks count from it.
        begin_ns: When the router expects it to start; when it did, once its worker has reported.
        profiled_ns: Its profiled median latency.
        limit_ns: How long it may run before its worker counts as overrun.
        overran: Whether it did.
        slot: Which GPU of its worker process.
        epoch: The epoch of that process.
    """

    batch_id: int
    worker: Worker
    subnet: int
    n: int
    stretches: list[Stretch]
    dispatched_ns: int
    begin_ns: int
    profiled_ns: int
    limit_ns: int
    overran: bool = False
    # Fields, not properties: a simulated worker reads them seven times a batch.
    slot: int = field(init=False)
    epoch: int = field(init=False)

    def __post_init__(self) -> None:
        worker = self.worker
        self.slot, self.epoch = worker.slot, worker.peer.epoch


class Peer:
    """A worker process: its key at the server, its heartbeat, its GPUs.

    Attributes:
        is_guest: Whether it belongs to another router, and lends this one single credits.
        quickest_ns: The quickest answer of any of its GPUs, as the fleet last computed it.
        slowdowns: Least and greatest slowdown of its GPUs, as of the last `summarise`.
        way_ns: 99th percentile of the transport to it and back, as of then.
        worst_way_ns: The longest transport of about ten seconds; more than any until enough are measured.
        capacity: Queries a nanosecond that its GPUs serve at their unit costs, as of then.
    """

    __slots__ = (
        "_negated_ways", "capacity", "epoch", "heard_ns", "is_guest", "key", "machine", "n_measured", "name",
        "quickest_ns", "sampled_ns", "slowdowns", "transport", "way_ns", "workers", "worst_way_ns",
    )  # fmt: skip

    def __init__(self, key: Any, name: str, epoch: int, heard_ns: int, *, is_guest: bool = False) -> None:
        self.is_guest = is_guest
        self.key = key
        self.name = name
        self.epoch = epoch
        self.heard_ns = heard_ns
        self.machine = StateMachine[PeerState, PeerEvent](
            f"worker process {name}", PeerState.LIVE, PEER_TRANSITIONS
        )
        # One estimate for all its GPUs: they share a socket and a loop, and together learn it sooner.
        self.transport = RecentQuantiles(_FIRST_TRANSPORT_NS)
        self.workers: list[Worker] = []
        self.sampled_ns = 0
        self.quickest_ns = 0
        self.slowdowns = (1.0, 1.0)
        self.way_ns = 0
        self.worst_way_ns = _UNKNOWN_NS
        self._negated_ways = WindowedMin(_WORST_OF_NS)
        self.capacity = 0.0
        self.n_measured = 0

    def sample_way(self, way_ns: int, now_ns: int) -> None:
        """Record how long a batch was under way, unless the last sample is recent."""
        if now_ns - self.sampled_ns >= _SAMPLE_EVERY_NS:
            self.sampled_ns = now_ns
            self.transport.add(way_ns)
            worst_ns = -self._negated_ways.add(-way_ns, now_ns)
            self.worst_way_ns = worst_ns if len(self.transport) >= _MANY_WAYS else _UNKNOWN_NS

    def summarise(self) -> None:
        """Summarise its GPUs, so that no query has to ask a thousand of them."""
        workers = self.workers
        slowdowns = [w.slowdown for w in workers]
        self.slowdowns = (min(slowdowns), max(slowdowns))
        self.way_ns = self.transport.bound_ns()
        takers = [w for w in workers if w.machine.state is WorkerState.READY]
        self.capacity = sum([1 / (w.profile.unit_cost_ns * w.slowdown) for w in takers])

    def ease(self, now_ns: int, idle_ns: int) -> None:
        """Make GPUs that have been idle for `idle_ns` forget part of what slowed them down."""
        n_idle = 0
        for worker in self.workers:
            if not worker.outstanding and now_ns - worker.answered_ns >= idle_ns:
                worker.ease()
                n_idle += 1
        if n_idle == len(self.workers):
            # With all GPUs idle nothing measures the way to this process; a bad measurement must not stay.
            self.transport.fade(_FIRST_TRANSPORT_NS[0])


class Worker:
    """One GPU.

    Attributes:
        credit: Batches that it may be sent now; never negative.
        outstanding: Batches sent and not answered, by ascending batch id.
        free_at_ns: When it is expected to have nothing left to run.
        is_away: Whether another router has its credit, or its time.
        is_counted: Whether it counts as a GPU of this router: see `Fleet.n_present`.
        correction: Measured over profiled latency, smoothed: of each subnet, and of the whole GPU.
        busy_ns: How long it has executed batches, as it reports.
        last_subnet: Profile row of its latest batch; None before the first.
        version: Changes whenever older entries in the heap of free workers become stale.
        pace: What it serves at best, for policies that see demand.
    """

    __slots__ = (
        "answered_ns", "busy_ns", "correction", "credit", "free_at_ns", "gauges", "is_away",
        "is_counted", "last_subnet",
        "machine", "n_batches", "n_queries", "outstanding", "pace", "peer", "policy",
        "profile", "slot", "transport", "version",
    )  # fmt: skip

    def __init__(self, peer: Peer, slot: int, profile: Profile, policy: Policy, now_ns: int) -> None:
        self.peer = peer
        self.slot = slot
        self.profile = profile
        self.policy = policy
        self.machine = StateMachine[WorkerState, WorkerEvent](
            f"worker {peer.name}:{slot}", WorkerState.READY, WORKER_TRANSITIONS
        )
        self.credit = 0
        self.is_away = False
        self.is_counted = False
        self.outstanding: dict[int, Batch] = {}
        self.free_at_ns = now_ns
        self.answered_ns = now_ns
        self.version = 0
        self.transport = peer.transport
        self.correction = Correction(profile.n_subnets)
        self.n_batches = 0
        self.n_queries = 0
        self.busy_ns = 0
        self.last_subnet: int | None = None
        self.gauges: dict[str, float] = {}
        self.pace = GpuPace()

    @property
    def may_take(self) -> bool:
        """Whether it may be sent a batch now."""
        return self.credit > 0 and self.machine.state is _READY and self.peer.machine.state is _LIVE

    def grant(self, credit: int, last_batch: int) -> None:
        """Set the credit to the offered one, less what was sent after the worker wrote its report."""
        unseen = sum(1 for batch_id in self.outstanding if batch_id > last_batch)
        self.credit = max(0, credit - unseen)

    def expect_free(self, now_ns: int, row: PullRow | DoneRow) -> None:
        """Compute `free_at_ns` from a report: which batch runs, and since when.

        The report is half a round trip old. The router computes the end of that batch, because only it knows
        how much this GPU differs from its profile. Then come the batches that the worker held, and those
        still on the way to it. An overdue batch ends now at the earliest. If a batch of another router runs,
        the report says for how long it will.
        """
        others_ns = -row.running_for_ns if not row.running_batch and row.running_for_ns < 0 else 0
        self.is_away = not self.peer.is_guest and (row.credit == 0 or others_ns > 0)
        if not self.outstanding and not others_ns:
            self.free_at_ns = now_ns
            return
        way_ns = self.transport.median_ns // 2  # one way: the report's, and that of a directive under way
        running, at_ns = row.running_batch, now_ns - way_ns + others_ns
        for batch_id, batch in self.outstanding.items():
            if batch_id > running:
                if batch_id > row.last_batch and at_ns < batch.dispatched_ns + way_ns:
                    at_ns = batch.dispatched_ns + way_ns
                at_ns += self.expected_ns(batch)
            elif batch_id == running:
                batch.begin_ns = at_ns - max(0, row.running_for_ns)
                at_ns = batch.begin_ns + self.expected_ns(batch)
                if at_ns < now_ns:
                    at_ns = now_ns
            # Otherwise it has ended, and its report is on the way or lost.
        self.free_at_ns = max(now_ns, at_ns)

    def expected_ns(self, batch: Batch) -> int:
        """Return how long a batch takes here, as far as known: the profiled median, corrected."""
        return int(batch.profiled_ns * self.correction.of_subnet(batch.subnet))

    def measure(self, subnet: int, profiled_ns: int, measured_ns: int) -> None:
        """Add one batch's measured latency to this worker's correction."""
        self.correction.measure(subnet, measured_ns / profiled_ns)
        if self.correction.n == 0:
            self.peer.n_measured = 0
        elif self.peer.n_measured < _ENOUGH:
            self.peer.n_measured += 1

    def doubt(self) -> float:
        """Return how many times longer than estimated a batch may take, because few have been measured."""
        return self.correction.doubt(self.peer.n_measured)

    def ease(self) -> None:
        """Move the slowdown part of the way back to where it began: see `Correction.ease`.

        For an idle worker: if its estimates refused every query, it would never be measured
        again.
        """
        self.correction.ease()

    @property
    def slowdown(self) -> float:
        """Measured over profiled latency of the whole GPU, smoothed."""
        return self.correction.overall

    def corrected(self, subnet: int) -> float:
        """Return the smoothed slowdown of `subnet`; 1.0 within the noise."""
        ratio = self.correction.of_subnet(subnet)
        return ratio if abs(ratio - 1.0) > NOISE else 1.0
