"""RouterCore: events in, actions out. No socket, clock, log, thread or hidden randomness.

A host gives it every event with the instant at which it was handled, and, once it has
drained its sockets, calls `advance`, which expires, judges and dispatches, and returns
what to do. The live router, the simulator and the replay of a recorded log are such
hosts. Given the same calls it returns the same actions.

    QUEUED -> DISPATCHED -> OK | LATE | FAILED | ...      (a batch answered)
       |           +------> QUEUED | WORKER_LOST          (its worker was lost or overran)
       +-> EXPIRED | INFEASIBLE | CANCELLED | ...         (refused, expired, cancelled)

Each query gets exactly one terminal answer. Always: received = answered + queued + in flight.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from router.core.edf import DISPATCHED
from router.core.events import (
    Action,
    CancelAsked,
    ClientJoined,
    ClientLeft,
    Dispatch,
    DrainRouter,
    DrainWorker,
    Event,
    Finished,
    Pulled,
    QueriesArrived,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.core.fleet import Fleet
from router.core.lanes import LaneQueue
from router.core.workers import Batch, PeerState, Worker, WorkerState
from router.policies import Choice, Shed, usable_slack_ns
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from profiles.table import Profile
    from router.core.edf import Cohort, Stretch
    from router.core.state import CoreSettings
    from router.policies import Policy

MS = 1_000_000
_MAX_RIVALS = 8
"""Workers asked about one head, at most, after the first was too slow for it."""


class RouterCore(Fleet):
    """Decides: what expires, what is refused, and which batch goes where.

    Args:
        make_policy: Builds the policy for a worker's profile; called once per distinct profile.
        settings: The numbers.
    """

    def __init__(
        self, make_policy: Callable[[Profile], Policy], settings: CoreSettings | None = None
    ) -> None:
        super().__init__(make_policy, settings)
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            ClientJoined: self._client_joined,
            ClientLeft: self._client_left,
            QueriesArrived: self._queries_arrived,
            CancelAsked: self._cancel_asked,
            WorkerJoined: self._worker_joined,
            WorkerHeard: self._worker_heard,
            Pulled: self._pulled,
            Finished: self._finished,
            WorkerLeft: self._worker_left,
            DrainWorker: self._drain_worker,
            DrainRouter: self._drain_router,
        }

    def handle(self, event: Event, now_ns: int) -> None:
        """Take one event into account. Nothing is decided until `advance`."""
        self._handlers[type(event)](event, now_ns)

    def advance(self, now_ns: int) -> list[Action]:
        """Expire, judge and dispatch as of `now_ns`; return everything that is to be done."""
        self._judge_peers(now_ns)
        self._judge_overruns(now_ns)
        self._refuse_doomed(now_ns)
        self._awaited = None
        if self.queue:
            self._dispatch(now_ns)
        actions, self._actions = self._actions, []
        return actions

    def next_wake_ns(self) -> int | None:
        """Return the instant at which `advance` has something to do without any event."""
        wakes = []
        if self.peers and self._checked_ns is not None:
            wakes.append(self._checked_ns + (0 if self._to_judge else self.settings.heartbeat_ns))
        if self._overruns:
            wakes.append(self._overruns[0][0])
        head = self.queue.head()
        if head is not None:
            wakes.append(head[0] - self._min_service_ns + 1)
            if self._awaited is not None:
                wakes.append(self._awaited_until_ns)
            worker = self._awaited or self._first_free()
            if worker is not None and worker.may_take:
                wakes.append(worker.free_at_ns - self._ahead_ns(worker))
        return min(wakes, default=None)

    def _refuse_doomed(self, now_ns: int) -> None:
        """End what no subnet can serve in time any more, even alone, even at once."""
        head = self.queue.head()
        if head is None or head[0] >= now_ns + self._min_service_ns:
            return
        for cohort, lo, hi in self.queue.take_before(now_ns + self._min_service_ns):
            expired = bisect_left(cohort.deadlines_ns, now_ns, lo, hi)
            if cohort.arrived_ns == now_ns:
                expired = lo
            if expired > lo:
                waited = "" if self.peers else "; no worker is connected"
                reason = f"the deadline passed in the queue{waited}"
                self._refuse(cohort, lo, expired, Status.EXPIRED, reason, now_ns)
            if hi > expired:
                slack_ms = (cohort.deadlines_ns[expired] - now_ns) / MS
                reason = (
                    f"slack {slack_ms:.2f} ms; the quickest answer takes {self._min_service_ns / MS:.2f} ms"
                )
                self._refuse(cohort, expired, hi, Status.INFEASIBLE, reason, now_ns)

    # --- dispatch -----------------------------------------------------------------------

    def _first_free(self) -> Worker | None:
        """Return the earliest-free worker that may be given work."""
        free = self._free
        while free:
            _, _, version, worker = free[0]
            if version == worker.version and worker.may_take:
                return worker
            heappop(free)
        return None

    def _ahead_ns(self, worker: Worker) -> int:
        return self.settings.dispatch_ahead_ns + worker.transport.median_ns

    def _dispatch(self, now_ns: int) -> None:
        """Give work to workers that are about to be free, earliest-free first."""
        self._soonest_ns.clear()
        while self.queue and self._awaited is None:
            worker = self._first_free()
            if worker is None or not self._is_due(worker, now_ns):
                break
            head = self.queue.head()
            assert head is not None, "a queue with a length has a head"
            self._serve(head, worker, now_ns)

    def _is_due(self, worker: Worker, now_ns: int) -> bool:
        return worker.free_at_ns - self._ahead_ns(worker) <= now_ns

    def _serve(self, head: tuple[int, Cohort, int], first: Worker, now_ns: int) -> None:
        """Give the head to the first free worker; if that is too slow for it, to another, or wait for one."""
        worker, passed = first, []
        while True:
            choice = self._choose(worker, head, now_ns)
            if isinstance(choice, Shed):
                self._shed(choice, now_ns)
                return
            if choice is not None:
                self._send(worker, choice, now_ns)
                return
            passed.append(worker)
            rival = self._rival(head, passed, now_ns)
            if rival is None:
                self._refuse_head(first, head, now_ns)
                return
            if not (rival.may_take and self._is_due(rival, now_ns)):
                self._awaited = rival
                self._awaited_until_ns = self._limit_ns(head) - self._alone_ns(rival, _floor(head)) + 1
                return
            worker = rival

    def _shed(self, shed: Shed, now_ns: int) -> None:
        """Refuse what the policy gives up for the others."""
        assert isinstance(self.queue, LaneQueue), "only a policy that sees demand may shed"
        stretches = self.queue.shed(shed.before_ns, shed.n)
        assert stretches, "what a policy sheds is in the queue: its head, or of a class below"
        for cohort, lo, hi in stretches:
            slack_ms = (cohort.deadlines_ns[lo] - now_ns) / MS
            reason = f"slack {slack_ms:.2f} ms: more queries wait than the smallest subnet serves in time"
            self._refuse(cohort, lo, hi, Status.OVERLOADED, reason, now_ns)

    def _choose(self, worker: Worker, head: tuple[int, Cohort, int], now_ns: int) -> Choice | Shed | None:
        """Ask the policy, with this worker's own corrections applied to its answer."""
        deadline_ns, cohort, _ = head
        queue, view = self._queue_view, self._worker_view
        queue.head_deadline_ns = deadline_ns
        queue.head_floor = _floor(head)
        queue.length = len(self.queue)
        if self._demand is not None:
            self._demand.settle(now_ns)
            assert isinstance(self.queue, LaneQueue), "with demand comes a queue in lanes"
            queue.outranks = self.queue.outranks()
        view.free_at_ns = max(worker.free_at_ns, now_ns + worker.transport.median_ns // 2)
        view.allowance_ns = self._return_ns(worker, cohort)
        choice = self._corrected_choice(worker, now_ns)
        if choice is None:
            # Nothing leaves room for a bad day on the way: then the usual way must do.
            transport = worker.transport
            view.allowance_ns = transport.median_ns - transport.median_ns // 2 + cohort.client.return_ns
            choice = self._corrected_choice(worker, now_ns)
        return choice

    def _corrected_choice(self, worker: Worker, now_ns: int) -> Choice | Shed | None:
        queue, view = self._queue_view, self._worker_view
        view.slowdown = worker.slowdown if abs(worker.slowdown - 1.0) > 0.05 else 1.0
        for _ in range(3):
            choice = worker.policy.choose(queue, view, now_ns)
            if (
                not isinstance(choice, Choice)
                or (corrected := worker.corrected(choice.subnet)) <= view.slowdown
            ):
                return choice
            slack_ns = usable_slack_ns(queue, view, now_ns) * view.slowdown
            if worker.profile.latency_p99_ns(choice.subnet, choice.batch_size) * corrected <= slack_ns:
                return choice
            view.slowdown = corrected
        return choice

    def _return_ns(self, worker: Worker, cohort: Cohort) -> int:
        """What the way back may take: nearly the worst seen of this worker's transport, and the client's."""
        transport = worker.transport
        client_ns: int = cohort.client.return_bound_ns(self._transits)
        return transport.bound_ns() - transport.median_ns // 2 + client_ns + self.settings.margin_ns

    def _rival(self, head: tuple[int, Cohort, int], passed: list[Worker], now_ns: int) -> Worker | None:
        """Return the earliest-free worker not asked yet that could meet the head's deadline, busy or not."""
        if not self._uneven or len(passed) > _MAX_RIVALS:
            return None  # in an even cluster the rest is free later and no quicker
        floor, limit_ns = _floor(head), self._limit_ns(head)
        if self._soonest_ns.get(floor, limit_ns) > limit_ns:
            return None
        best, soonest_ns = None, limit_ns + 1
        for worker in self.workers():
            if worker.machine.state is WorkerState.READY and worker.peer.machine.state is PeerState.LIVE:
                end_ns = max(now_ns, worker.free_at_ns) + self._alone_ns(worker, floor)
                soonest_ns = min(soonest_ns, end_ns)
                earlier = best is None or worker.free_at_ns < best.free_at_ns
                if end_ns <= limit_ns and earlier and worker not in passed:
                    best = worker
        self._soonest_ns[floor] = soonest_ns
        return best

    def _limit_ns(self, head: tuple[int, Cohort, int]) -> int:
        """When the head's answer must leave the router."""
        deadline_ns, cohort, _ = head
        return_ns: int = cohort.client.return_ns
        return deadline_ns - return_ns

    def _alone_ns(self, worker: Worker, floor: int) -> int:
        """What a batch of one on row `floor` and the way back to the router may take."""
        alone_ns = int(worker.profile.latency_p99_ns(floor, 1) * worker.corrected(floor))
        transport = worker.transport
        return alone_ns + transport.bound_ns() - transport.median_ns // 2 + self.settings.margin_ns

    def _refuse_head(self, worker: Worker, head: tuple[int, Cohort, int], now_ns: int) -> None:
        """Refuse the head, and with it all that not even the smallest subnet alone would answer in time.

        Many at once: under overload a refusal must cost less than an answer.
        """
        view = self._worker_view  # as the policy last saw it
        client_ns: int = head[1].client.return_ns
        alone_ns = worker.profile.latency_p99_ns(0, 1) * worker.corrected(0)
        begin_ns = max(now_ns, view.free_at_ns)
        limit_ns = begin_ns + view.allowance_ns - client_ns + int(alone_ns)
        if head[0] >= limit_ns + client_ns:
            taken, _ = self.queue.take(1, worker.profile.n_subnets)
            self._refuse_infeasible(worker, *taken[0], now_ns)
            return
        for cohort, lo, hi in self.queue.take_before(limit_ns + client_ns):
            cut = bisect_left(cohort.deadlines_ns, limit_ns + cohort.client.return_ns, lo, hi)
            if cut > lo:
                self._refuse_infeasible(worker, cohort, lo, cut, now_ns)
            if cut < hi:  # nearer than the head's client: an answer may still reach it
                self.queue.push(cohort, cut, hi)

    def _refuse_infeasible(self, worker: Worker, cohort: Cohort, lo: int, hi: int, now_ns: int) -> None:
        slack_ms = (cohort.deadlines_ns[lo] - max(now_ns, worker.free_at_ns)) / MS
        floor = 0 if cohort.floors is None else cohort.floors[lo]
        alone_ms = worker.profile.latency_p99_ns(floor, 1) * worker.corrected(floor) / MS
        way_ms = self._return_ns(worker, cohort) / MS
        name = worker.profile.subnets[floor].name
        reason = f"slack {slack_ms:.2f} ms once a worker is free; {name} alone takes {alone_ms:.2f} ms"
        self._refuse(cohort, lo, hi, Status.INFEASIBLE, f"{reason} and the way {way_ms:.2f} ms", now_ns)

    def _send(self, worker: Worker, choice: Choice, now_ns: int) -> None:
        stretches, n = self.queue.take(choice.batch_size, choice.subnet)
        assert n > 0, f"policy {worker.policy.name} chose subnet {choice.subnet} below the head's floor"
        self.n_batches += 1
        batch_id = self.n_batches
        if len(stretches) > 2 and any(s[0].client is not stretches[0][0].client for s in stretches):
            # Side by side in the batch, a client's queries are answered as one group.
            stretches.sort(key=_client_serial)
        for cohort, lo, hi in stretches:
            if hi - lo == 1:
                cohort.states[lo] = DISPATCHED
            else:
                cohort.states[lo:hi] = b"\x01" * (hi - lo)
            if cohort.holders is not None:
                cohort.holders.update(dict.fromkeys(range(lo, hi), batch_id))
        self.in_flight += n
        profile, subnet = worker.profile, choice.subnet
        begin_ns = max(worker.free_at_ns, now_ns + worker.transport.median_ns // 2)
        corrected = worker.corrected(subnet)
        settings = self.settings
        p99_ns = int(profile.latency_p99_ns(subnet, n) * max(1.0, corrected))
        limit_ns = settings.overrun_factor * p99_ns + worker.transport.bound_ns() + settings.overrun_grace_ns
        profiled_ns = profile.latency_ns(subnet, n)
        batch = Batch(batch_id, worker, subnet, n, stretches, now_ns, begin_ns, profiled_ns, limit_ns)
        self.ledger[batch_id] = worker.outstanding[batch_id] = batch
        heappush(self._overruns, (begin_ns + limit_ns, batch_id))
        worker.free_at_ns = begin_ns + worker.expected_ns(batch)
        worker.credit -= 1
        worker.n_batches += 1
        worker.n_queries += n
        worker.last_subnet = subnet
        self._offer(worker)
        peer = worker.peer
        self._actions.append(
            Dispatch(peer.key, peer.epoch, batch_id, worker.slot, subnet, n, stretches, now_ns)
        )


def _client_serial(stretch: Stretch) -> int:
    serial: int = stretch[0].client.serial
    return serial


def _floor(head: tuple[int, Cohort, int]) -> int:
    _, cohort, i = head
    return 0 if cohort.floors is None else cohort.floors[i]
