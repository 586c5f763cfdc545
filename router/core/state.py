"""What the router core knows, and the only places where a query ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from router.core.edf import ANSWERED, QUEUED, Cohort, EdfQueue
from router.core.estimates import RecentQuantiles
from router.core.events import Action, Answer, Key
from router.policies import QueueView, WorkerView
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from profiles.table import Profile
    from router.core.workers import Batch, Peer, Worker
    from router.policies import Policy
    from router.policies.demand import Demand

MS = 1_000_000
_SAMPLE_EVERY_NS = 2 * MS
"""A client's way is sampled at most this often."""
_ENOUGH_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """The core's numbers, all with a reason.

    Attributes:
        dispatch_ahead_ns: Decide a worker's next batch at most this long (plus the measured
            transport) before it is free. Long enough to cover a late wake-up on a busy host,
            short enough not to decide on stale queues: a whole batch ahead costs SlackFit a point.
        margin_ns: Slack held back for what the transport estimate has not seen yet.
        max_queries: Queries queued or in flight, at most; more are OVERLOADED.
        max_bytes: Payload bytes held, at most; more are OVERLOADED.
        heartbeat_ns: Workers are heard at least this often.
        suspect_after: Heartbeats missed before a worker gets no more work.
        dead_after: Heartbeats missed before its queries are dispatched again.
        overrun_factor: A batch that takes this many times its profiled p99 overran.
        overrun_grace_ns: Added to that, so that a scheduler hiccup does not condemn short batches.
        give_up_ns: A batch that has still not answered so long after it overran is given up.
    """

    dispatch_ahead_ns: int = 2 * MS
    margin_ns: int = MS
    max_queries: int = 200_000
    max_bytes: int = 2 << 30
    heartbeat_ns: int = 100 * MS
    suspect_after: int = 3
    dead_after: int = 6
    overrun_factor: int = 3
    overrun_grace_ns: int = 10 * MS
    give_up_ns: int = 1000 * MS


class ClientState:
    """A connected application and the cohorts it waits for. `key` is None once it left."""

    __slots__ = ("cohorts", "key", "sampled_ns", "serial", "session", "transits")

    def __init__(self, key: Key, session: int, serial: int) -> None:
        self.key: Key | None = key
        self.serial = serial
        self.session = session
        self.cohorts: dict[int, Cohort] = {}
        self.transits = RecentQuantiles([0] * 8)
        self.sampled_ns = 0

    def sample_transit(self, transit_ns: int, now_ns: int) -> bool:
        """Note how long a message was under way; once a while, lest a drained backlog fill the window."""
        if now_ns - self.sampled_ns < _SAMPLE_EVERY_NS:
            return False
        self.sampled_ns = now_ns
        self.transits.add(max(0, transit_ns))
        return True

    @property
    def return_ns(self) -> int:
        """How long an answer usually takes to reach it: as long as its queries took."""
        return self.transits.median_ns

    def return_bound_ns(self, of_all: RecentQuantiles) -> int:
        """How long an answer may take to reach it, nearly at worst.

        The 99th percentile of a few messages is the slowest of them, and one client of a thousand
        sends few: until it has sent a hundred, its way varies as that of all clients does.
        """
        transits = self.transits
        if len(transits) >= _ENOUGH_SAMPLES:
            return transits.bound_ns()
        return transits.median_ns + of_all.bound_ns() - of_all.median_ns


class CoreState:
    """The queue, the ledger, the clients and workers known, and the counts that must agree.

    Args:
        make_policy: Builds the policy for a worker's profile; called once per distinct profile.
        settings: The numbers.
    """

    def __init__(
        self, make_policy: Callable[[Profile], Policy], settings: CoreSettings | None = None
    ) -> None:
        self.settings = settings or CoreSettings()
        self.queue = EdfQueue()
        self.ledger: dict[int, Batch] = {}
        self.peers: dict[Key, Peer] = {}
        self.clients: dict[Key, ClientState] = {}
        self.payload_bytes: int | None = None  # what the model takes; unknown until a worker says
        self.draining = False
        self.received = 0
        self.in_flight = 0
        self.held_bytes = 0
        self.answered = [0] * len(Status)
        self.n_batches = 0
        self.n_redispatched = 0
        self.n_stale = 0
        self.n_lost_peers = 0
        self.payload_bytes_in = 0
        self.output_bytes = 0
        self.ok_accuracy = 0.0  # percent, summed over the queries that ended OK
        self.busy_ns = 0  # time that GPUs executed batches, as they report it
        self.n_executed = 0  # queries in those batches
        self._make_policy = make_policy
        self._policies: dict[int, tuple[Profile, Policy]] = {}
        self._sessions: dict[int, ClientState] = {}
        self._actions: list[Action] = []
        self._free: list[tuple[int, int, int, Worker]] = []
        self._overruns: list[tuple[int, int]] = []
        self._transits = RecentQuantiles([0] * 8)
        self._sampled_ns = 0
        self._serial = 0
        self._client_serial = 0
        self._offer_seq = 0
        self._min_service_ns = 0
        self._uneven = False
        self._awaited: Worker | None = None
        self._awaited_until_ns = 0
        self._soonest_ns: dict[int, int] = {}
        self._checked_ns: int | None = None
        self._to_judge: list[Peer] = []
        self._stall_ns = 0
        self._demand: Demand | None = None  # of policies that ask for it
        self._queue_view = QueueView(0, 0, 0)
        self._worker_view = WorkerView(0, 0, 1.0)

    @property
    def n_answered(self) -> int:
        """Queries that got their terminal answer."""
        return sum(self.answered)

    def check(self) -> None:
        """Assert conservation and the bounds of every credit; cheap enough for every step of a test."""
        assert self.received == self.n_answered + len(self.queue) + self.in_flight, (
            f"received {self.received}, answered {self.n_answered}, queued {len(self.queue)}, "
            f"in flight {self.in_flight}"
        )
        assert all(w.credit >= 0 for p in self.peers.values() for w in p.workers)

    def workers(self) -> Iterator[Worker]:
        """Yield every GPU of every known worker process."""
        for peer in self.peers.values():
            yield from peer.workers

    def _close(self, cohort: Cohort, lo: int, hi: int, status: Status) -> None:
        """End queries lo to hi, already out of the queue's and the flight's counts."""
        n = hi - lo
        if n == 1:
            cohort.states[lo] = ANSWERED
        else:
            cohort.states[lo:hi] = b"\x02" * n
        cohort.live -= n
        self.answered[status] += n
        if cohort.live == 0 and cohort.client.cohorts.pop(cohort.serial, None) is not None:
            self.held_bytes -= cohort.n_bytes

    def _refuse(
        self, cohort: Cohort, lo: int, hi: int, status: Status, reason: str, now_ns: int | None = None
    ) -> None:
        """End queries without an output; `now_ns` tells how long they were queued."""
        self._close(cohort, lo, hi, status)
        queued_ns = 0 if now_ns is None else now_ns - cohort.arrived_ns
        if cohort.client.key is not None:
            self._actions.append(
                Answer(cohort.client.key, cohort, lo, hi, hi - lo, status, queued_ns, reason=reason)
            )

    def _leave_state(self, cohort: Cohort, i: int) -> None:
        """Take one unanswered query out of the count that it is in."""
        if cohort.states[i] == QUEUED:
            self.queue.forget(cohort, i, i + 1)
        else:
            self.in_flight -= 1

    def _requeue(self, cohort: Cohort, i: int) -> None:
        holders = cohort.holders = cohort.holders or {}
        holders[i] = None
        cohort.states[i] = QUEUED
        self.in_flight -= 1
        self.n_redispatched += 1
        self.queue.push(cohort, i, i + 1)
