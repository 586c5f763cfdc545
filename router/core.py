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
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import isnan
from typing import TYPE_CHECKING, Any

import numpy as np

from router.edf import ANSWERED, DISPATCHED, QUEUED, Cohort, EdfQueue, state_stretches
from router.estimates import RecentQuantiles
from router.events import (
    Action,
    Answer,
    CancelAsked,
    ClientJoined,
    ClientLeft,
    Dispatch,
    DrainRouter,
    DrainWorker,
    Event,
    Fence,
    Finished,
    Key,
    Pulled,
    QueriesArrived,
    Released,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.policy import Choice, QueueView, WorkerView, usable_slack_ns
from router.workers import Batch, Peer, PeerEvent, PeerState, Worker, WorkerEvent, WorkerState
from superserve.errors import ConfigError, WireError
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from profiles.table import Profile
    from router.edf import Stretch
    from router.policy import Policy
    from superserve.wire import DoneRow, Queries

MS = 1_000_000
_F32_ERROR = 2.0**-18
"""How far above what was meant a percentage sent as f32 may lie: half of its spacing from 64 to 128."""
_SAMPLE_EVERY_NS = 2 * MS
"""A client's way is sampled at most this often."""
_MAX_RIVALS = 8
"""Workers asked about one head, at most, after the first was too slow for it."""


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
    margin_ns: int = MS // 2
    max_queries: int = 200_000
    max_bytes: int = 2 << 30
    heartbeat_ns: int = 100 * MS
    suspect_after: int = 3
    dead_after: int = 6
    overrun_factor: int = 3
    overrun_grace_ns: int = 10 * MS
    give_up_ns: int = 1000 * MS


class Client:
    """A connected application and the cohorts it waits for. `key` is None once it left."""

    __slots__ = ("cohorts", "key", "sampled_ns", "serial", "session", "transits")

    def __init__(self, key: Key, session: int, serial: int) -> None:
        self.key: Key | None = key
        self.serial = serial
        self.session = session
        self.cohorts: dict[int, Cohort] = {}
        self.transits = RecentQuantiles([0] * 8)
        self.sampled_ns = 0

    def sample_transit(self, transit_ns: int, now_ns: int) -> None:
        """Note how long a message was under way; once a while, lest a drained backlog fill the window."""
        if now_ns - self.sampled_ns >= _SAMPLE_EVERY_NS:
            self.sampled_ns = now_ns
            self.transits.add(max(0, transit_ns))

    @property
    def return_ns(self) -> int:
        """How long an answer usually takes to reach it: as long as its queries took."""
        return self.transits.mean_ns


class RouterCore:
    """The global queue, the ledger of batches in flight, and the decisions.

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
        self.clients: dict[Key, Client] = {}
        self.payload_bytes: int | None = None  # what the model takes; unknown until a worker says
        self.draining = False
        self.received = 0
        self.in_flight = 0
        self.held_bytes = 0
        self.answered = [0] * len(Status)
        self.n_batches = 0
        self.n_redispatched = 0
        self.n_stale = 0
        self._make_policy = make_policy
        self._policies: dict[int, tuple[Profile, Policy]] = {}
        self._sessions: dict[int, Client] = {}
        self._actions: list[Action] = []
        self._free: list[tuple[int, int, int, Worker]] = []
        self._overruns: list[tuple[int, int]] = []
        self._serial = 0
        self._client_serial = 0
        self._offer_seq = 0
        self._min_service_ns = 0
        self._uneven = False
        self._awaited: Worker | None = None
        self._awaited_until_ns = 0
        self._soonest_ns: dict[int, int] = {}
        self._checked_ns: int | None = None
        self._queue_view = QueueView(0, 0, 0)
        self._worker_view = WorkerView(0, 0, 1.0)
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

    # --- the interface ------------------------------------------------------------------

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
            wakes.append(self._checked_ns + self.settings.heartbeat_ns)
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

    # --- clients ------------------------------------------------------------------------

    def _client_joined(self, event: ClientJoined, now_ns: int) -> None:
        before = self.clients.get(event.client)
        if before is not None and before.session != event.session:
            self._client_left(ClientLeft(event.client), now_ns)
        client = self._sessions.get(event.session)
        if client is None:
            self._client_serial += 1
            client = Client(event.client, event.session, self._client_serial)
            self._sessions[event.session] = client
        elif client.key is not None:
            self.clients.pop(client.key, None)
        client.key = event.client
        self.clients[event.client] = client

    def _client_left(self, event: ClientLeft, _now_ns: int) -> None:
        client = self.clients.pop(event.client, None)
        if client is None:
            return
        client.key = None
        del self._sessions[client.session]
        for cohort in tuple(client.cohorts.values()):
            for lo, hi in tuple(state_stretches(cohort, 0, len(cohort.states), QUEUED)):
                self.queue.forget(hi - lo)
                self._close(cohort, lo, hi, Status.CANCELLED)

    def _queries_arrived(self, event: QueriesArrived, now_ns: int) -> None:
        client, queries = self.clients[event.client], event.queries
        n = queries.n
        base_ns = now_ns - event.transit_ns
        client.sample_transit(event.transit_ns, now_ns)
        self._serial += 1
        cohort = Cohort(
            self._serial,
            client,
            [slack_ns + base_ns for slack_ns in queries.slack_ns()],
            base_ns,
            now_ns,
            message=queries,
        )
        if queries.resubmitted and client.cohorts:
            self._admit_unknown(client, cohort)
            return
        self.received += n
        self._admit(client, cohort, [(0, n)])

    def _admit_unknown(self, client: Client, cohort: Cohort) -> None:
        """Admit what the client sends again, except what is still on its way to an answer."""
        ids = _ids(cohort.message)
        known = np.zeros(len(ids), dtype=bool)
        for other in client.cohorts.values():
            waiting = np.frombuffer(other.states, np.uint8) != ANSWERED
            known |= np.isin(ids, _ids(other.message)[waiting])
        cohort.live = int((~known).sum())
        self.received += cohort.live
        for i in np.flatnonzero(known).tolist():
            cohort.states[i] = ANSWERED
        self._admit(client, cohort, list(state_stretches(cohort, 0, len(cohort.states), QUEUED)))

    def _admit(self, client: Client, cohort: Cohort, stretches: list[tuple[int, int]]) -> None:
        n_bytes = sum(len(payload) for payload in cohort.message.payloads)
        refusal = self._refusal(cohort.message, n_bytes)
        if refusal is not None:
            for lo, hi in stretches:
                self._refuse(cohort, lo, hi, *refusal)
            return
        if stretches:
            # Before any of its queries can end: the last to end gives the bytes back.
            client.cohorts[cohort.serial] = cohort
            cohort.n_bytes = n_bytes
            self.held_bytes += n_bytes
        for lo, hi in stretches:
            self._admit_stretch(cohort, lo, hi)

    def _admit_stretch(self, cohort: Cohort, lo: int, hi: int) -> None:
        end = min(hi, lo + max(0, self.settings.max_queries - len(self.queue) - self.in_flight))
        if end > lo:
            cohort.floors = self._floors(cohort, lo, end)
            self._push_open(cohort, lo, end)
        if end < hi:
            bound = self.settings.max_queries
            reason = f"the router holds {bound} queries of at most {bound} (--max-queries): try again later"
            self._refuse(cohort, end, hi, Status.OVERLOADED, reason)

    def _push_open(self, cohort: Cohort, lo: int, hi: int) -> None:
        """Queue what `_floors` left open; a floor that no subnet reaches was refused there."""
        if cohort.message.min_accuracy is None:
            self.queue.push(cohort, lo, hi)
            return
        for start, end in tuple(state_stretches(cohort, lo, hi, QUEUED)):
            self.queue.push(cohort, start, end)

    def _refusal(self, queries: Queries, n_bytes: int) -> tuple[Status, str] | None:
        settings = self.settings
        if self.draining:
            return Status.DRAINING, "the router is draining: send to another, or try again later"
        expected, got = self.payload_bytes, queries.payload_bytes
        if expected is not None and expected != got:
            sizes = "payloads of differing lengths" if queries.lengths is not None else f"{got} bytes"
            return Status.INVALID, f"payload: the model takes {expected} bytes a query, got {sizes}"
        if self.held_bytes + n_bytes > settings.max_bytes:
            reason = f"the router holds {self.held_bytes} payload bytes of at most {settings.max_bytes}"
            return Status.OVERLOADED, f"{reason} (--max-bytes): try again later"
        return None

    def _floors(self, cohort: Cohort, lo: int, hi: int) -> list[int] | None:
        """Turn accuracies asked for into profile rows; refuse those that no subnet reaches."""
        column = cohort.message.min_accuracy
        profile = self._reference_profile()
        if column is None or profile is None:
            return cohort.floors
        floors = cohort.floors or [0] * len(cohort.deadlines_ns)
        for i, accuracy in enumerate(np.frombuffer(column, "<f4")[lo:hi].tolist(), lo):
            if cohort.states[i] != QUEUED:
                continue
            row = None if isnan(accuracy) else profile.floor_row(accuracy - _F32_ERROR)
            if row is None:
                best = profile.subnets[-1].accuracy
                reason = f"min_accuracy: the most accurate subnet has {best} %, asked for {accuracy:.2f}"
                self._refuse(cohort, i, i + 1, Status.INVALID, reason)
            else:
                floors[i] = row
        return floors if any(floors) else cohort.floors

    def _floor_waiting(self) -> None:
        """Give queries that came before the first profile the floors that they asked for."""
        for client in self._sessions.values():
            for cohort in tuple(client.cohorts.values()):
                live = cohort.live
                cohort.floors = self._floors(cohort, 0, len(cohort.states))
                self.queue.forget(live - cohort.live)

    def _reference_profile(self) -> Profile | None:
        return next(iter(self._policies.values()))[0] if self._policies else None

    def _cancel_asked(self, event: CancelAsked, now_ns: int) -> None:
        client = self.clients.get(event.client)
        if client is None:
            return
        wanted = np.frombuffer(event.ids, "<u8")
        for cohort in tuple(client.cohorts.values()):
            for i in np.flatnonzero(np.isin(_ids(cohort.message), wanted)).tolist():
                self._cancel_one(cohort, i, now_ns)

    def _cancel_one(self, cohort: Cohort, i: int, now_ns: int) -> None:
        if cohort.states[i] == ANSWERED:
            return
        self._leave_state(cohort, i)
        self._refuse(cohort, i, i + 1, Status.CANCELLED, "cancelled by the client", now_ns)

    # --- answers: the only places where a query ends -------------------------------------

    def _close(self, cohort: Cohort, lo: int, hi: int, status: Status) -> None:
        """End queries lo to hi, already out of the queue's and the flight's counts."""
        n = hi - lo
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
                Answer(cohort.client.key, cohort, lo, hi, status, queued_ns=queued_ns, reason=reason)
            )

    def _leave_state(self, cohort: Cohort, i: int) -> None:
        """Take one unanswered query out of the count that it is in."""
        if cohort.states[i] == QUEUED:
            self.queue.forget(1)
        else:
            self.in_flight -= 1

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

    # --- workers ------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined, now_ns: int) -> None:
        before = self.peers.get(event.peer)
        if before is not None:
            self._bury(before, PeerEvent.LOST, now_ns)
        first = not self._policies
        peer = Peer(event.peer, event.name, event.epoch, now_ns)
        for slot, profile in enumerate(event.profiles):
            peer.workers.append(Worker(peer, slot, profile, self._policy(profile), now_ns))
        self.peers[event.peer] = peer
        self.payload_bytes = event.payload_bytes
        if self._checked_ns is None:
            self._checked_ns = now_ns
        self._refresh_min_service()
        if first:
            self._floor_waiting()

    def _policy(self, profile: Profile) -> Policy:
        known = self._policies.get(id(profile))
        if known is None:
            reference = self._reference_profile()
            if reference is not None and _names(reference) != _names(profile):
                raise ConfigError(
                    f"profile {profile.name}: expected the subnets of {reference.name}, "
                    "which the cluster's other workers host"
                )
            for other, policy in self._policies.values():
                if other == profile:
                    return policy
            known = self._policies[id(profile)] = (profile, self._make_policy(profile))
        return known[1]

    def _worker_heard(self, event: WorkerHeard, now_ns: int) -> None:
        peer = self.peers.get(event.peer)
        if peer is not None:
            self._hear(peer, now_ns)

    def _hear(self, peer: Peer, now_ns: int) -> None:
        peer.heard_ns = now_ns
        if peer.machine.state is not PeerState.LIVE:
            peer.machine.on(PeerEvent.HEARD)
            for worker in peer.workers:
                self._offer(worker)

    def _speaker(self, key: Key, epoch: int, now_ns: int) -> Peer | None:
        """Return the peer, or fence whoever speaks under an epoch that is over."""
        peer = self.peers.get(key)
        if peer is None or peer.epoch != epoch:
            self.n_stale += 1
            self._actions.append(Fence(key, f"epoch {epoch} is over: say HELLO again"))
            return None
        self._hear(peer, now_ns)
        return peer

    def _pulled(self, event: Pulled, now_ns: int) -> None:
        peer = self._speaker(event.peer, event.epoch, now_ns)
        if peer is None:
            return
        for row in event.rows:
            worker = _gpu(peer, row.slot)
            worker.grant(row.credit, row.last_batch)
            worker.expect_free(now_ns, row.free_in_ns, row.last_batch)
            worker.gauges = {
                "memory_bytes": row.memory_bytes,
                "utilisation": row.utilisation,
                "temperature_c": row.temperature_c,
            }
            self._offer(worker)

    def _finished(self, event: Finished, now_ns: int) -> None:
        peer = self._speaker(event.peer, event.epoch, now_ns)
        if peer is None:
            return
        for row in event.rows:
            worker = _gpu(peer, row.slot)
            batch = worker.outstanding.get(row.batch_id)
            if batch is not None and batch.n != row.n:
                raise WireError(f"done: batch {row.batch_id}: expected {batch.n} queries, got {row.n}")
            worker.machine.on(WorkerEvent.ANSWERED)
            worker.answered_ns = now_ns
            if batch is None:
                self.n_stale += 1  # given up before it answered
            else:
                del self.ledger[row.batch_id], worker.outstanding[row.batch_id]
                self._finish(batch, row, now_ns)
            worker.grant(row.credit, row.last_batch)
            worker.expect_free(now_ns, row.free_in_ns, row.last_batch)
            self._offer(worker)
        self._release(peer)

    def _finish(self, batch: Batch, row: DoneRow, now_ns: int) -> None:
        """Answer a batch's queries, and learn from how long it took."""
        worker = batch.worker
        on_the_way_ns = now_ns - batch.dispatched_ns - row.waited_ns - row.executing_ns
        transport_ns = max(0, on_the_way_ns)
        worker.transport.add(transport_ns)
        if row.statuses is None:
            profiled_ns = worker.profile.latency_ns(batch.subnet, batch.n)
            worker.measure(batch.subnet, profiled_ns, row.executing_ns)
        outbound_ns = transport_ns // 2
        timeline = (outbound_ns + row.waited_ns, row.executing_ns, transport_ns - outbound_ns)
        at = 0
        for cohort, lo, hi in batch.stretches:
            states = cohort.states
            if cohort.holders is None and states.count(DISPATCHED, lo, hi) == hi - lo:
                self.in_flight -= hi - lo
                self._answer(batch, row, cohort, lo, hi, at, now_ns, timeline)
            else:
                self._answer_remaining(batch, row, cohort, lo, hi, at, now_ns, timeline)
            at += hi - lo

    def _answer_remaining(
        self,
        batch: Batch,
        row: DoneRow,
        cohort: Cohort,
        lo: int,
        hi: int,
        at: int,
        now_ns: int,
        timeline: tuple[int, int, int],
    ) -> None:
        """Answer those of lo to hi that nobody has answered: the first answer wins."""
        for i in range(lo, hi):
            if cohort.states[i] != ANSWERED:
                self._leave_state(cohort, i)
                self._answer(batch, row, cohort, i, i + 1, at + i - lo, now_ns, timeline)

    def _answer(
        self,
        batch: Batch,
        row: DoneRow,
        cohort: Cohort,
        lo: int,
        hi: int,
        at: int,
        now_ns: int,
        timeline: tuple[int, int, int],
    ) -> None:
        late = bisect_left(cohort.deadlines_ns, now_ns + cohort.client.return_ns, lo, hi)
        if row.statuses is None:
            ends = [(lo, late, Status.LATE), (late, hi, Status.OK)]
        else:
            statuses = row.statuses[at : at + hi - lo]
            ends = [(i, i + 1, _worker_status(byte, late=i < late)) for i, byte in enumerate(statuses, lo)]
        accuracy = batch.worker.profile.subnets[batch.subnet].accuracy
        queued_ns = batch.dispatched_ns - cohort.arrived_ns
        for start, end, status in ends:
            if start == end:
                continue
            self._close(cohort, start, end, status)
            key = cohort.client.key
            if key is None or self._joins_last(row, key, status, at + start - lo, (cohort, start, end)):
                continue
            self._actions.append(
                Answer(
                    key, cohort, start, end, status, batch.subnet, batch.n, accuracy,
                    queued_ns, *timeline, row, at + start - lo,
                )
            )  # fmt: skip

    def _joins_last(self, row: DoneRow, key: Key, status: Status, at: int, stretch: Stretch) -> bool:
        """Add a stretch to the last answer if that one ends where this begins, and in the same way."""
        last = self._actions[-1] if self._actions else None
        if (
            not isinstance(last, Answer)
            or last.row is not row
            or last.client != key
            or last.status is not status
            or last.at + last.n != at
            or row.statuses is not None
        ):
            return False
        if last.more is None:
            last.more = []
        last.more.append(stretch)
        last.n += stretch[2] - stretch[1]
        return True

    def _worker_left(self, event: WorkerLeft, now_ns: int) -> None:
        peer = self.peers.get(event.peer)
        if peer is not None:
            self._bury(peer, PeerEvent.LEFT if event.orderly else PeerEvent.LOST, now_ns)

    def _bury(self, peer: Peer, event: PeerEvent, now_ns: int) -> None:
        """Forget a worker process; dispatch its queries again where slack is left."""
        peer.machine.on(event)
        del self.peers[peer.key]
        self._refresh_min_service()
        for worker in peer.workers:
            worker.machine.on(WorkerEvent.LOST)
            worker.credit = 0
            worker.version += 1
            for batch in worker.outstanding.values():
                del self.ledger[batch.batch_id]
                self._lose(batch, now_ns)
            worker.outstanding.clear()

    def _lose(self, batch: Batch, now_ns: int) -> None:
        """Requeue a lost batch's queries once, if slack is left; else they end WORKER_LOST."""
        name = f"{batch.worker.peer.name}:{batch.worker.slot}"
        for cohort, lo, hi in batch.stretches:
            for i in range(lo, hi):
                if cohort.states[i] != DISPATCHED or _holder(cohort, i, batch) != batch.batch_id:
                    continue
                losses = cohort.losses = cohort.losses or {}
                losses[i] = losses.get(i, 0) + 1
                has_slack = cohort.deadlines_ns[i] >= now_ns + self._min_service_ns
                if losses[i] == 1 and has_slack and cohort.client.key is not None:
                    self._requeue(cohort, i)
                    continue
                self.in_flight -= 1
                why = "no slack was left" if not has_slack else "so did the one before it"
                self._refuse(
                    cohort, i, i + 1, Status.WORKER_LOST, f"worker {name} was lost and {why}", now_ns
                )

    def _requeue(self, cohort: Cohort, i: int) -> None:
        holders = cohort.holders = cohort.holders or {}
        holders[i] = None
        cohort.states[i] = QUEUED
        self.in_flight -= 1
        self.n_redispatched += 1
        self.queue.push(cohort, i, i + 1)

    def _drain_worker(self, event: DrainWorker, _now_ns: int) -> None:
        peer = self.peers.get(event.peer)
        if peer is None:
            return
        for worker in peer.workers:
            if event.slot is None or worker.slot == event.slot:
                worker.machine.on(WorkerEvent.DRAIN)
                worker.version += 1
        self._release(peer)

    def _release(self, peer: Peer) -> None:
        """Let a peer go when all its GPUs drain and hold nothing of ours."""
        if all(w.machine.state is WorkerState.DRAINING and not w.outstanding for w in peer.workers):
            self._actions.append(Released(peer.key))

    def _drain_router(self, _event: DrainRouter, _now_ns: int) -> None:
        self.draining = True

    # --- judgement ----------------------------------------------------------------------

    def _judge_peers(self, now_ns: int) -> None:
        """Suspect and bury the silent. If this router itself was stalled, nobody is to blame for it."""
        settings, checked_ns = self.settings, self._checked_ns
        if checked_ns is None or now_ns < checked_ns + settings.heartbeat_ns:
            return
        self._checked_ns = now_ns
        stall_ns = max(0, now_ns - checked_ns - 2 * settings.heartbeat_ns)
        for peer in tuple(self.peers.values()):
            peer.heard_ns = min(now_ns, peer.heard_ns + stall_ns)
            quiet_ns = now_ns - peer.heard_ns
            if quiet_ns >= settings.dead_after * settings.heartbeat_ns:
                self._bury(peer, PeerEvent.LOST, now_ns)
            elif quiet_ns >= settings.suspect_after * settings.heartbeat_ns:
                peer.machine.on(PeerEvent.QUIET)
            for worker in peer.workers:
                if not worker.outstanding and now_ns - worker.answered_ns >= settings.heartbeat_ns:
                    worker.ease()
        self._refresh_min_service()

    def _refresh_min_service(self) -> None:
        """The quickest answer any live worker can give: its smallest subnet alone, and the way."""
        quickest = min(
            (
                int(w.profile.latency_p99_ns(0, 1) * w.corrected(0)) + w.transport.mean_ns
                for w in self.workers()
            ),
            default=0,
        )
        self._min_service_ns = quickest
        quickness = [(w.slowdown, w.transport.bound_ns()) for w in self.workers()]
        slowdowns, ways_ns = zip(*quickness, strict=True) if quickness else ((1.0,), (0,))
        self._uneven = (
            len(self._policies) > 1
            or max(slowdowns) > 1.05 * min(slowdowns)
            or max(ways_ns) > min(ways_ns) + MS
        )

    def _judge_overruns(self, now_ns: int) -> None:
        overruns = self._overruns
        while overruns and overruns[0][0] <= now_ns:
            _, batch_id = heappop(overruns)
            batch = self.ledger.get(batch_id)
            if batch is None:
                continue
            worker = batch.worker
            due_ns = max(batch.begin_ns, worker.answered_ns) + batch.limit_ns
            first = next(iter(worker.outstanding))
            if not batch.overran and (due_ns > now_ns or first != batch_id):
                # Not started yet, or waiting behind another: judged again in its own time.
                heappush(overruns, (due_ns if due_ns > now_ns else now_ns + batch.limit_ns, batch_id))
                continue
            worker.machine.on(WorkerEvent.OVERRAN)
            worker.version += 1
            if batch.overran:
                self._give_up(worker, now_ns)
                continue
            batch.overran = True
            heappush(overruns, (now_ns + max(self.settings.give_up_ns, batch.limit_ns), batch_id))
            for held in worker.outstanding.values():
                self._rescue(held, now_ns)

    def _give_up(self, worker: Worker, now_ns: int) -> None:
        """Stop waiting for a GPU that hangs while its process lives: its queries must end too."""
        for batch in worker.outstanding.values():
            del self.ledger[batch.batch_id]
            self._lose(batch, now_ns)
        worker.outstanding.clear()
        self._release(worker.peer)

    def _rescue(self, batch: Batch, now_ns: int) -> None:
        """Queue an overrun batch's queries again where slack is left; whoever answers first wins."""
        for cohort, lo, hi in batch.stretches:
            if cohort.client.key is None:
                continue
            for i in range(lo, hi):
                if (
                    cohort.states[i] == DISPATCHED
                    and _holder(cohort, i, batch) == batch.batch_id
                    and cohort.deadlines_ns[i] >= now_ns + self._min_service_ns
                ):
                    self._requeue(cohort, i)

    # --- dispatch -----------------------------------------------------------------------

    def _offer(self, worker: Worker) -> None:
        """Put a worker among the free ones, by the instant it is free; older entries go stale."""
        worker.version += 1
        if worker.may_take:
            self._offer_seq += 1
            heappush(self._free, (worker.free_at_ns, self._offer_seq, worker.version, worker))
            if len(self._free) > 64 + 8 * len(self.peers) + 4 * sum(
                len(p.workers) for p in self.peers.values()
            ):
                self._free = [entry for entry in self._free if entry[2] == entry[3].version]
                heapify(self._free)

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
        return self.settings.dispatch_ahead_ns + worker.transport.mean_ns

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

    def _choose(self, worker: Worker, head: tuple[int, Cohort, int], now_ns: int) -> Choice | None:
        """Ask the policy, with this worker's own corrections applied to its answer."""
        deadline_ns, cohort, _ = head
        queue, view = self._queue_view, self._worker_view
        queue.head_deadline_ns = deadline_ns
        queue.head_floor = _floor(head)
        queue.length = len(self.queue)
        view.free_at_ns = max(worker.free_at_ns, now_ns + worker.transport.mean_ns // 2)
        view.allowance_ns = self._return_ns(worker, cohort)
        choice = self._corrected_choice(worker, now_ns)
        if choice is None:
            # Nothing leaves room for a bad day on the way: then the usual way must do.
            transport = worker.transport
            view.allowance_ns = transport.mean_ns - transport.mean_ns // 2 + cohort.client.return_ns
            choice = self._corrected_choice(worker, now_ns)
        return choice

    def _corrected_choice(self, worker: Worker, now_ns: int) -> Choice | None:
        queue, view = self._queue_view, self._worker_view
        view.slowdown = worker.slowdown if abs(worker.slowdown - 1.0) > 0.05 else 1.0
        for _ in range(3):
            choice = worker.policy.choose(queue, view, now_ns)
            if choice is None or (corrected := worker.corrected(choice.subnet)) <= view.slowdown:
                return choice
            slack_ns = usable_slack_ns(queue, view, now_ns) * view.slowdown
            if worker.profile.latency_p99_ns(choice.subnet, choice.batch_size) * corrected <= slack_ns:
                return choice
            view.slowdown = corrected
        return choice

    def _return_ns(self, worker: Worker, cohort: Cohort) -> int:
        """What the way back may take: nearly the worst seen of this worker's transport, and the client's."""
        transport = worker.transport
        client_ns: int = cohort.client.transits.bound_ns()
        return transport.bound_ns() - transport.mean_ns // 2 + client_ns + self.settings.margin_ns

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
        return alone_ns + transport.bound_ns() - transport.mean_ns // 2 + self.settings.margin_ns

    def _refuse_head(self, worker: Worker, head: tuple[int, Cohort, int], now_ns: int) -> None:
        taken, _ = self.queue.take(1, worker.profile.n_subnets)
        cohort, lo, hi = taken[0]
        slack_ms = (head[0] - max(now_ns, worker.free_at_ns)) / MS
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
            cohort.states[lo:hi] = b"\x01" * (hi - lo)
            if cohort.holders is not None:
                cohort.holders.update(dict.fromkeys(range(lo, hi), batch_id))
        self.in_flight += n
        profile, subnet = worker.profile, choice.subnet
        begin_ns = max(worker.free_at_ns, now_ns + worker.transport.mean_ns // 2)
        corrected = worker.corrected(subnet)
        expected_ns = int(profile.latency_ns(subnet, n) * corrected)
        settings = self.settings
        p99_ns = int(profile.latency_p99_ns(subnet, n) * max(1.0, corrected))
        limit_ns = settings.overrun_factor * p99_ns + worker.transport.bound_ns() + settings.overrun_grace_ns
        batch = Batch(batch_id, worker, subnet, n, stretches, now_ns, begin_ns, expected_ns, limit_ns)
        self.ledger[batch_id] = worker.outstanding[batch_id] = batch
        heappush(self._overruns, (begin_ns + limit_ns, batch_id))
        worker.free_at_ns = begin_ns + expected_ns
        worker.credit -= 1
        worker.n_batches += 1
        worker.n_queries += n
        self._offer(worker)
        peer = worker.peer
        self._actions.append(
            Dispatch(peer.key, peer.epoch, batch_id, worker.slot, subnet, n, stretches, now_ns)
        )


def _gpu(peer: Peer, slot: int) -> Worker:
    if slot >= len(peer.workers):
        raise WireError(f"slot: {peer.name} has {len(peer.workers)} GPUs, got slot {slot}")
    return peer.workers[slot]


def _client_serial(stretch: Stretch) -> int:
    serial: int = stretch[0].client.serial
    return serial


def _floor(head: tuple[int, Cohort, int]) -> int:
    _, cohort, i = head
    return 0 if cohort.floors is None else cohort.floors[i]


def _ids(queries: Queries) -> npt.NDArray[np.uint64]:
    return np.frombuffer(queries.ids, "<u8")


def _names(profile: Profile) -> tuple[str, ...]:
    return tuple(subnet.name for subnet in profile.subnets)


def _holder(cohort: Cohort, i: int, batch: Batch) -> int | None:
    return batch.batch_id if cohort.holders is None else cohort.holders.get(i, batch.batch_id)


def _worker_status(byte: int, *, late: bool) -> Status:
    status = Status(byte)
    return Status.LATE if late and status is Status.OK else status
