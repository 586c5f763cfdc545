"""The fleet: workers join, pull, answer, fall silent, overrun and leave, and what that means for queries."""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from router.core.admission import Admission
from router.core.edf import ANSWERED, DISPATCHED, Cohort
from router.core.events import (
    Answer,
    DrainWorker,
    Fence,
    Finished,
    Key,
    Pulled,
    Ran,
    Released,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.core.lanes import LaneQueue
from router.core.workers import Batch, Peer, PeerEvent, PeerState, Worker, WorkerEvent, WorkerState
from router.policies.demand import Demand
from superserve.errors import ConfigError, WireError
from superserve.wire import Status

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.policies import Policy
    from superserve.wire import DoneRow

MS = 1_000_000
_JUDGED_AT_ONCE = 64
"""GPUs looked at in one pass, about: all of a large cluster at once would take milliseconds."""


class Fleet(Admission):
    """Takes events of workers into account, and judges those that are silent or slow."""

    def _worker_joined(self, event: WorkerJoined, now_ns: int) -> None:
        before = self.peers.get(event.peer)
        if before is not None:
            self._bury(before, PeerEvent.LOST, now_ns)
        first = not self._policies
        peer = Peer(event.peer, event.name, event.epoch, now_ns)
        for slot, profile in enumerate(event.profiles):
            peer.workers.append(Worker(peer, slot, profile, self._policy(profile), now_ns))
        peer.summarise()
        self.peers[event.peer] = peer
        self.payload_bytes = event.payload_bytes
        if self._checked_ns is None:
            self._checked_ns = now_ns
        if first:
            self._floor_waiting()
            self._show_demand(peer.workers[0].policy)
        self._refresh_min_service()

    def _show_demand(self, policy: Policy) -> None:
        """Keep track of demand, and the queue in lanes, from now on if the policy asks for it."""
        if getattr(policy, "sees_demand", False):
            self._demand = self._queue_view.demand = Demand()
            self.queue = LaneQueue(self.queue)

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
            worker.expect_free(now_ns, row)
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
            worker.expect_free(now_ns, row)
            self._offer(worker)
        self._release(peer)

    def _finish(self, batch: Batch, row: DoneRow, now_ns: int) -> None:
        """Answer a batch's queries, and learn from how long it took."""
        worker = batch.worker
        on_the_way_ns = now_ns - batch.dispatched_ns - row.waited_ns - row.executing_ns
        transport_ns = max(0, on_the_way_ns)
        worker.peer.sample_way(transport_ns, now_ns)
        if row.statuses is None:
            worker.measure(batch.subnet, batch.profiled_ns, row.executing_ns)
        worker.busy_ns += row.executing_ns
        self.busy_ns += row.executing_ns
        self.n_executed += batch.n
        self.output_bytes += len(row.output)
        outbound_ns = transport_ns // 2
        ran = Ran(
            row, batch.subnet, batch.n, worker.profile.subnets[batch.subnet].accuracy,
            outbound_ns + row.waited_ns, row.executing_ns, transport_ns - outbound_ns,
        )  # fmt: skip
        at = 0
        for cohort, lo, hi in batch.stretches:
            if cohort.holders is None and cohort.states.count(DISPATCHED, lo, hi) == hi - lo:
                self.in_flight -= hi - lo
                self._answer(batch, ran, cohort, lo, hi, at, now_ns)
            else:
                self._answer_remaining(batch, ran, cohort, lo, hi, at, now_ns)
            at += hi - lo

    def _answer_remaining(
        self, batch: Batch, ran: Ran, cohort: Cohort, lo: int, hi: int, at: int, now_ns: int
    ) -> None:
        """Answer those of lo to hi that nobody has answered: the first answer wins."""
        for i in range(lo, hi):
            if cohort.states[i] != ANSWERED:
                self._leave_state(cohort, i)
                self._answer(batch, ran, cohort, i, i + 1, at + i - lo, now_ns)

    def _answer(self, batch: Batch, ran: Ran, cohort: Cohort, lo: int, hi: int, at: int, now_ns: int) -> None:
        """End queries lo to hi, which stand at `at` in the batch, as it reports."""
        queued_ns = batch.dispatched_ns - cohort.arrived_ns
        arrives_ns = now_ns + cohort.client.return_ns
        statuses = ran.row.statuses
        if statuses is None and cohort.deadlines_ns[lo] >= arrives_ns:
            self._end(ran, cohort, lo, hi, Status.OK, at, queued_ns)
            return
        late = bisect_left(cohort.deadlines_ns, arrives_ns, lo, hi)
        if statuses is None:
            self._end(ran, cohort, lo, late, Status.LATE, at, queued_ns)
            if late < hi:
                self._end(ran, cohort, late, hi, Status.OK, at + late - lo, queued_ns)
            return
        for i, byte in enumerate(statuses[at : at + hi - lo], lo):
            status = _worker_status(byte, late=i < late)
            self._end(ran, cohort, i, i + 1, status, at + i - lo, queued_ns)

    def _end(
        self, ran: Ran, cohort: Cohort, lo: int, hi: int, status: Status, at: int, queued_ns: int
    ) -> None:
        self._close(cohort, lo, hi, status)
        if status is Status.OK:
            self.ok_accuracy += ran.accuracy * (hi - lo)
        key = cohort.client.key
        if key is None:
            return
        last = self._actions[-1] if self._actions else None
        if (
            isinstance(last, Answer)
            and last.ran is ran
            and last.client == key
            and last.status is status
            and last.at + last.n == at
            and ran.row.statuses is None
        ):  # the last answer ends where this begins, and in the same way
            if last.more is None:
                last.more = []
            last.more.append((cohort, lo, hi))
            last.n += hi - lo
            return
        self._actions.append(Answer(key, cohort, lo, hi, hi - lo, status, queued_ns, ran, at))

    def _worker_left(self, event: WorkerLeft, now_ns: int) -> None:
        peer = self.peers.get(event.peer)
        if peer is not None:
            self._bury(peer, PeerEvent.LEFT if event.orderly else PeerEvent.LOST, now_ns)

    def _bury(self, peer: Peer, event: PeerEvent, now_ns: int) -> None:
        """Forget a worker process; dispatch its queries again where slack is left."""
        peer.machine.on(event)
        self.n_lost_peers += event is PeerEvent.LOST
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

    # --- judgement ----------------------------------------------------------------------

    def _judge_peers(self, now_ns: int) -> None:
        """Suspect and bury the silent, a few at a time, each once a heartbeat.

        If this router itself was stalled, nobody is to blame for it.
        """
        settings, checked_ns = self.settings, self._checked_ns
        if checked_ns is None:
            return
        since_ns = now_ns - checked_ns
        if not self._to_judge or since_ns > 2 * settings.heartbeat_ns:  # a stall begins the round anew
            if since_ns < settings.heartbeat_ns:
                return
            self._checked_ns = now_ns
            self._stall_ns = max(0, since_ns - 2 * settings.heartbeat_ns)
            self._to_judge = list(reversed(self.peers.values()))
        n_gpus = 0
        while self._to_judge and n_gpus < _JUDGED_AT_ONCE:
            peer = self._to_judge.pop()
            if self.peers.get(peer.key) is peer:
                n_gpus += len(peer.workers)
                self._judge_peer(peer, now_ns)
        if not self._to_judge:
            self._refresh_min_service()

    def _judge_peer(self, peer: Peer, now_ns: int) -> None:
        settings = self.settings
        peer.heard_ns = min(now_ns, peer.heard_ns + self._stall_ns)
        quiet_ns = now_ns - peer.heard_ns
        if quiet_ns >= settings.dead_after * settings.heartbeat_ns:
            self._bury(peer, PeerEvent.LOST, now_ns)
            return
        if quiet_ns >= settings.suspect_after * settings.heartbeat_ns:
            peer.machine.on(PeerEvent.QUIET)
        peer.ease(now_ns, settings.heartbeat_ns)
        peer.summarise()

    def _refresh_min_service(self) -> None:
        """The quickest answer any live worker can give: its smallest subnet alone, and the way."""
        peers = self.peers.values()
        if self._demand is not None:
            live = [peer for peer in peers if peer.machine.state is PeerState.LIVE]
            self._demand.capacity = sum([peer.capacity for peer in live])
        self._min_service_ns = min([peer.quickest_ns for peer in peers], default=0)
        if not peers:
            self._uneven = False
            return
        slowest = max([peer.slowdowns[1] for peer in peers])
        ways_ns = [peer.way_ns for peer in peers]
        self._uneven = (
            len(self._policies) > 1
            or slowest > 1.05 * min([peer.slowdowns[0] for peer in peers])
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


def _gpu(peer: Peer, slot: int) -> Worker:
    if slot >= len(peer.workers):
        raise WireError(f"slot: {peer.name} has {len(peer.workers)} GPUs, got slot {slot}")
    return peer.workers[slot]


def _names(profile: Profile) -> tuple[str, ...]:
    return tuple(subnet.name for subnet in profile.subnets)


def _holder(cohort: Cohort, i: int, batch: Batch) -> int | None:
    return batch.batch_id if cohort.holders is None else cohort.holders.get(i, batch.batch_id)


def _worker_status(byte: int, *, late: bool) -> Status:
    status = Status(byte)
    return Status.LATE if late and status is Status.OK else status
