"""The fleet: workers join, pull, answer, fall silent, overrun and leave; what that means for queries."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from router.core.events import (
    DrainWorker,
    Fence,
    Finished,
    Key,
    Pulled,
    Released,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.core.workers import Batch, Peer, PeerEvent, PeerState, Worker, WorkerEvent, WorkerState
from router.policies.supply import FULL, Supply
from superserve.clock import MS
from superserve.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from router.core.events import CoreSettings
    from router.core.ledger import Ledger
    from router.core.slack import Slack
    from superserve.wire import DoneRow

_FIT_EVERY_NS = 100_000
"""For each GPU, how long what all can serve stays as reckoned: at 3 us a GPU that is 3 % of the time."""

_PACE_UNIT = 1 << 40
"""The unit of `GpuPace.per_ns`."""

_JUDGED_AT_ONCE = 64
"""About how many GPUs are judged in one pass: judging all of a large cluster would take milliseconds."""


class Fleet:
    """Handles events of workers, and judges those that are silent or slow.

    Args:
        ledger: Where a batch's queries are requeued or end.
        slack: The formulas.
        settings: Heartbeats and bounds.

    Attributes:
        peers: The worker processes, by connection.
        quickest_ns: The quickest answer of any GPU: with less slack a query cannot be served. 0 without GPUs.
        is_uneven: Whether the GPUs differ, so that a head too tight for one may suit another.
        n_present: GPUs that this router has the time of now: its own that take work, less those whose credit
            another router has, and those of others that lend it theirs.
        usual_slowdown: Measured over profiled latency, averaged over the worker processes.
        n_borrowed: Batches that ran on GPUs of other routers so far.
        n_stale: Ignored reports: of an epoch that is over, or a batch given up.
        n_lost_peers: Processes that were lost; those that sent BYE do not count.
    """

    __slots__ = (
        "_checked_ns", "_fit_at_ns", "_free", "_free_at_most", "_ledger", "_limit_ns", "_model", "_n_gpus",
        "_offer_seq", "_overruns", "_settings", "_slack", "_stall_ns", "_to_judge", "_wanted_ns", "is_uneven",
        "n_borrowed", "n_lost_peers", "n_present", "n_stale", "peers", "quickest_ns", "supply",
        "usual_slowdown",
    )  # fmt: skip

    def __init__(self, ledger: Ledger, slack: Slack, settings: CoreSettings) -> None:
        self.peers: dict[Key, Peer] = {}
        self.quickest_ns = 0
        self.is_uneven = False
        self.n_stale = 0
        self.n_present = 0
        self.n_borrowed = 0
        self.usual_slowdown = 1.0
        self.n_lost_peers = 0
        self.supply = Supply()
        self._ledger = ledger
        self._model = ledger.model
        self._slack = slack
        self._settings = settings
        self._free: list[tuple[int, int, int, Worker]] = []
        self._free_at_most = 0
        self._offer_seq = 0
        self._overruns: list[tuple[int, int]] = []
        self._checked_ns: int | None = None
        self._to_judge: list[Peer] = []
        self._stall_ns = 0
        self._n_gpus = 0
        # How long a full batch may take: as the GPUs are reckoned, and as they should be.
        self._limit_ns = self._wanted_ns = 0.0
        self._fit_at_ns = 0

    def workers(self) -> Iterator[Worker]:
        """Yield every GPU of every known worker process."""
        for peer in self.peers.values():
            yield from peer.workers

    def check(self) -> None:
        """Assert that no credit is negative, and that the GPUs that are here are counted."""
        assert all(worker.credit >= 0 for worker in self.workers())
        n_counted = sum(worker.is_counted for worker in self.workers())
        assert self.n_present == n_counted, f"{self.n_present} GPUs are present, of which {n_counted} count"

    def next_wake_ns(self) -> int | None:
        """Return the instant at which `judge` has something to do."""
        wake_ns = None
        if self.peers and self._checked_ns is not None:
            # A round is judged in parts; one that is not finished goes on at once.
            wake_ns = self._checked_ns + (0 if self._to_judge else self._settings.heartbeat_ns)
        if self._overruns and (wake_ns is None or self._overruns[0][0] < wake_ns):
            wake_ns = self._overruns[0][0]
        return wake_ns

    # --- workers' events --------------------------------------------------------------------

    def joined(self, event: WorkerJoined, now_ns: int) -> None:
        """Register a worker process; an older one on the same connection is lost.

        Raises:
            ConfigError: Its subnets differ from those of the others.
        """
        before = self.peers.get(event.peer)
        if before is not None:
            self._bury(before, PeerEvent.LOST, now_ns)
        peer = Peer(event.peer, event.name, event.epoch, now_ns, is_guest=event.is_guest)
        for slot, profile in enumerate(event.profiles):
            peer.workers.append(Worker(peer, slot, profile, self._model.policy_of(profile), now_ns))
            self._count(peer.workers[-1])
        self._summarise(peer)
        self.peers[event.peer] = peer
        self._model.payload_bytes = event.payload_bytes
        if self._checked_ns is None:
            self._checked_ns = now_ns
        self.refresh()

    def heard(self, event: WorkerHeard, now_ns: int) -> None:
        """Record a sign of life."""
        peer = self.peers.get(event.peer)
        if peer is not None:
            self._hear(peer, now_ns)

    def _hear(self, peer: Peer, now_ns: int) -> None:
        peer.heard_ns = now_ns
        if peer.machine.state is not PeerState.LIVE:
            # `first_free` has dropped the entries of a suspect's GPUs: offer them again.
            peer.machine.on(PeerEvent.HEARD)
            for worker in peer.workers:
                self._offer(worker)

    def _speaker(self, key: Key, epoch: int, now_ns: int) -> Peer | None:
        """Return the peer that sent a message; None, with a fence, if its epoch is over."""
        peer = self.peers.get(key)
        if peer is None or peer.epoch != epoch:
            self.n_stale += 1
            self._ledger.actions.append(Fence(key, f"epoch {epoch} is over: send HELLO again"))
            return None
        self._hear(peer, now_ns)
        return peer

    def pulled(self, event: Pulled, now_ns: int) -> None:
        """Record what GPUs hold and can take."""
        pull = event.message
        peer = self._speaker(event.peer, pull.epoch, now_ns)
        if peer is None:
            return
        for row in pull.rows:
            worker = _gpu(peer, row.slot)
            worker.grant(row.credit, row.last_batch)
            worker.expect_free(now_ns, row)
            worker.gauges = {
                "memory_bytes": row.memory_bytes,
                "utilisation": row.utilisation,
                "temperature_c": row.temperature_c,
            }
            self._offer(worker)

    def finished(self, event: Finished, now_ns: int) -> None:
        """Answer the batches that a process has run, learn from them, and record what it can take."""
        done = event.message
        peer = self._speaker(event.peer, done.epoch, now_ns)
        if peer is None:
            return
        for row in done.rows:
            worker = _gpu(peer, row.slot)
            batch = worker.outstanding.get(row.batch_id)
            if batch is not None and batch.n != row.n:
                raise WireError(f"done: batch {row.batch_id}: expected {batch.n} queries, got {row.n}")
            # Even the report of a batch that was given up shows that the GPU works again.
            worker.machine.on(WorkerEvent.ANSWERED)
            before_ns, worker.answered_ns = worker.answered_ns, now_ns
            if batch is None:
                self.n_stale += 1  # given up before it answered
            else:
                del worker.outstanding[row.batch_id]
                if batch.dispatched_ns < before_ns:  # sent while the one before it ran
                    self.supply.idled(now_ns - before_ns - row.executing_ns, row.executing_ns)
                self._ledger.finish(batch, row, self._learn(batch, row, now_ns), now_ns)
            worker.grant(row.credit, row.last_batch)
            worker.expect_free(now_ns, row)
            self._offer(worker)
        self._release(peer)

    def _learn(self, batch: Batch, row: DoneRow, now_ns: int) -> int:
        """Learn from how long a batch took; return how long it and its report were under way."""
        worker = batch.worker
        # Both ways at once: the router's clock sees dispatch and report, the worker's only durations.
        on_the_way_ns = now_ns - batch.dispatched_ns - row.waited_ns - row.executing_ns
        transport_ns = max(0, on_the_way_ns)
        worker.peer.sample_way(transport_ns, now_ns)
        if row.statuses is None:  # otherwise a part was not run, and the time means nothing
            worker.measure(batch.subnet, batch.profiled_ns, row.executing_ns)
            if (
                self._model.demand is not None
                and worker.is_counted  # one that drains or is lent counts for nothing
                and worker.pace.is_stale(worker.slowdown)
            ):
                self.supply.reset(worker.pace, worker.profile, worker.slowdown)
        worker.busy_ns += row.executing_ns
        return transport_ns

    def left(self, event: WorkerLeft, now_ns: int) -> None:
        """Forget a worker process that sent BYE or cannot be reached."""
        peer = self.peers.get(event.peer)
        if peer is not None:
            self._bury(peer, PeerEvent.LEFT if event.orderly else PeerEvent.LOST, now_ns)

    def _bury(self, peer: Peer, event: PeerEvent, now_ns: int) -> None:
        """Forget a worker process; queue its queries again if slack is left."""
        peer.machine.on(event)
        self.n_lost_peers += event is PeerEvent.LOST
        for worker in peer.workers:
            worker.machine.on(WorkerEvent.LOST)
            worker.credit = 0
            worker.version += 1
            self._count(worker)
        del self.peers[peer.key]
        self.refresh()  # first, because the remaining workers decide whether its queries have slack left
        for worker in peer.workers:
            self.supply.note(worker.pace, None)
            self._lose_all(worker, now_ns)

    def _lose_all(self, worker: Worker, now_ns: int) -> None:
        for batch in worker.outstanding.values():
            self._ledger.lose(batch, self.quickest_ns, now_ns)
        worker.outstanding.clear()

    def drain(self, event: DrainWorker, _now_ns: int) -> None:
        """Give no more work to GPUs of a process."""
        peer = self.peers.get(event.peer)
        if peer is None:
            return
        for worker in peer.workers:
            if event.slot is None or worker.slot == event.slot:
                worker.machine.on(WorkerEvent.DRAIN)
                worker.version += 1
                self._count(worker)
        self._release(peer)

    def _release(self, peer: Peer) -> None:
        """Release a peer once all its GPUs drain and hold no batch."""
        if all(w.machine.state is WorkerState.DRAINING and not w.outstanding for w in peer.workers):
            self._ledger.actions.append(Released(peer.key))

    # --- judgement --------------------------------------------------------------------------

    def judge(self, now_ns: int) -> None:
        """Suspect and bury silent peers; requeue overrun batches that others can still serve."""
        self._judge_peers(now_ns)
        overruns = self._overruns
        while overruns and overruns[0][0] <= now_ns:
            _, batch_id = heappop(overruns)
            batch = self._ledger.batches.get(batch_id)
            if batch is not None:
                self._judge_batch(batch, now_ns)

    def _judge_peers(self, now_ns: int) -> None:
        """Judge a few processes at a time, each once a heartbeat.

        If this router itself was stalled, its peers get that time back: they could not be heard.
        """
        settings, checked_ns = self._settings, self._checked_ns
        if checked_ns is None:
            return
        since_ns = now_ns - checked_ns
        if not self._to_judge or since_ns > 2 * settings.heartbeat_ns:  # after a stall, start the round again
            if since_ns < settings.heartbeat_ns:
                return
            self._checked_ns = now_ns
            self._stall_ns = max(0, since_ns - 2 * settings.heartbeat_ns)
            self._to_judge = list(reversed(self.peers.values()))
            if self._n_gpus > _JUDGED_AT_ONCE:
                self._limit_ns = self._wanted_ns
        n_gpus = 0
        while self._to_judge and n_gpus < _JUDGED_AT_ONCE:
            peer = self._to_judge.pop()
            if self.peers.get(peer.key) is peer:
                n_gpus += len(peer.workers)
                self._judge_peer(peer, now_ns)
        if not self._to_judge:
            self.supply.limit_ns = self._limit_ns  # that of all GPUs by now
            self.refresh()

    def _judge_peer(self, peer: Peer, now_ns: int) -> None:
        settings = self._settings
        peer.heard_ns = min(now_ns, peer.heard_ns + self._stall_ns)
        quiet_ns = now_ns - peer.heard_ns
        if quiet_ns >= settings.dead_after * settings.heartbeat_ns:
            self._bury(peer, PeerEvent.LOST, now_ns)
            return
        if quiet_ns >= settings.suspect_after * settings.heartbeat_ns:
            peer.machine.on(PeerEvent.QUIET)
        peer.ease(now_ns, settings.heartbeat_ns)
        self._summarise(peer)

    def _summarise(self, peer: Peer) -> None:
        peer.quickest_ns = self._slack.quickest_ns(peer)
        peer.summarise()
        if self._model.demand is not None:
            self._set_paces(peer)

    def fit_supply(self, patience_ns: float, now_ns: int) -> None:
        """Reckon again what the GPUs can serve, if the patience differs much from that of the last time.

        With clients whose SLOs or ways differ it changes from head to head, and each time all GPUs would be
        reckoned: so few GPUs are only now and then, and many with their heartbeats.

        Args:
            patience_ns: How long a query may wait and run.
            now_ns: The instant.
        """
        supply, limit_ns = self.supply, FULL * patience_ns
        if 0.8 * supply.limit_ns <= limit_ns <= 1.25 * supply.limit_ns:
            return
        self._wanted_ns = limit_ns
        if supply.limit_ns > 0.0 and (self._n_gpus > _JUDGED_AT_ONCE or now_ns < self._fit_at_ns):
            return
        self._fit_at_ns = now_ns + _FIT_EVERY_NS * self._n_gpus
        supply.limit_ns = self._limit_ns = limit_ns
        for peer in self.peers.values():
            self._set_paces(peer)
        self.refresh()

    def _set_paces(self, peer: Peer) -> None:
        for worker in peer.workers:
            if worker.is_counted:
                worker.pace.set(worker.profile, worker.slowdown, self._limit_ns)
            else:
                worker.pace.stop()

    def retuned(self) -> None:
        """Give each GPU the policy of its profile, which is another one now."""
        for worker in self.workers():
            worker.policy = self._model.policy_of(worker.profile)
        self.refresh()

    def refresh(self) -> None:
        """Update the values that summarise all GPUs."""
        peers = self.peers.values()
        demand = self._model.demand
        if demand is not None:
            live = [peer for peer in peers if peer.machine.state is PeerState.LIVE]
            demand.capacity = sum([peer.capacity for peer in live if not peer.is_guest])
            self.supply.restate([worker.pace for peer in live for worker in peer.workers])
        self.quickest_ns = min([peer.quickest_ns for peer in peers], default=0)
        # Stale entries stay in the heap until they reach its top. A few for each GPU are allowed:
        # removing them at every offer would mean scanning all GPUs.
        self._n_gpus = sum([len(peer.workers) for peer in peers])
        self._free_at_most = 64 + 8 * len(peers) + 4 * self._n_gpus
        if not peers:
            self.is_uneven = False
            return
        # Guests come and go: what differs about them does not make heads wait.
        residents = [peer for peer in peers if not peer.is_guest] or peers
        self.usual_slowdown = sum([sum(peer.slowdowns) for peer in residents]) / (2 * len(residents))
        slowest = max([peer.slowdowns[1] for peer in residents])
        ways_ns = [peer.way_ns for peer in residents]
        # 5 % is the noise of the slowdowns (`NOISE`), 1 ms that of the transport estimates.
        self.is_uneven = (
            self._model.n_profiles > 1
            or slowest > 1.05 * min([peer.slowdowns[0] for peer in residents])
            or max(ways_ns) > min(ways_ns) + MS
        )

    def _judge_batch(self, batch: Batch, now_ns: int) -> None:
        """Judge a batch that may have run for too long."""
        worker = batch.worker
        # It cannot have begun before the batch ahead of it was answered, whatever was expected at dispatch.
        due_ns = max(batch.begin_ns, worker.answered_ns) + batch.limit_ns
        first = next(iter(worker.outstanding))
        if not batch.overran and (due_ns > now_ns or first != batch.batch_id):
            # Not started yet, or behind another batch: check again when it can be due.
            at_ns = due_ns if due_ns > now_ns else now_ns + batch.limit_ns
            heappush(self._overruns, (at_ns, batch.batch_id))
            return
        worker.machine.on(WorkerEvent.OVERRAN)
        worker.version += 1
        self._count(worker)
        self.supply.note(worker.pace, None)
        if batch.overran:
            # The process lives, but the GPU hangs: its queries must end too.
            self._lose_all(worker, now_ns)
            self._release(worker.peer)
            return
        batch.overran = True
        again_ns = now_ns + max(self._settings.give_up_ns, batch.limit_ns)
        heappush(self._overruns, (again_ns, batch.batch_id))
        for held in worker.outstanding.values():
            self._ledger.rescue(held, self.quickest_ns, now_ns)

    # --- who is free ------------------------------------------------------------------------

    def first_free(self) -> Worker | None:
        """Return the earliest-free worker that may get work."""
        free = self._free
        while free:
            _, _, version, worker = free[0]
            if version == worker.version and worker.may_take:
                return worker
            heappop(free)
        return None

    def assign(self, batch: Batch) -> None:
        """Record that a batch was sent to its worker."""
        worker = batch.worker
        worker.outstanding[batch.batch_id] = batch
        heappush(self._overruns, (batch.begin_ns + batch.limit_ns, batch.batch_id))
        # Until the worker reports, the batch under way counts too, or the next decision would come too early.
        worker.free_at_ns = batch.begin_ns + worker.expected_ns(batch)
        worker.credit -= 1
        worker.n_batches += 1
        worker.n_queries += batch.n
        worker.last_subnet = batch.subnet
        self.n_borrowed += worker.peer.is_guest
        self._offer(worker)

    def _count(self, worker: Worker) -> None:
        """Count a GPU if its time is this router's now, and the supply with it."""
        is_here = worker.machine.state is WorkerState.READY and (
            worker.credit > 0 or bool(worker.outstanding) if worker.peer.is_guest else not worker.is_away
        )
        if is_here == worker.is_counted:
            return
        worker.is_counted = is_here
        self.n_present += 1 if is_here else -1
        if self._model.demand is None:
            return
        if is_here:
            self.supply.reset(worker.pace, worker.profile, worker.slowdown)
        else:
            pace, supply = worker.pace, self.supply
            supply.rate = max(0.0, supply.rate - pace.per_ns / _PACE_UNIT)
            supply.places -= pace.place
            pace.stop()

    def _offer(self, worker: Worker) -> None:
        """Add a worker to the heap of free ones, by the instant it is free; older entries become stale."""
        worker.version += 1
        self._count(worker)
        if self._model.demand is not None:
            self.supply.note(worker.pace, worker.free_at_ns if worker.outstanding else None)
        if worker.may_take:
            self._offer_seq += 1
            heappush(self._free, (worker.free_at_ns, self._offer_seq, worker.version, worker))
            if len(self._free) > self._free_at_most:
                self._free = [entry for entry in self._free if entry[2] == entry[3].version]
                heapify(self._free)


def _gpu(peer: Peer, slot: int) -> Worker:
    if slot >= len(peer.workers):
        raise WireError(f"slot: {peer.name} has {len(peer.workers)} GPUs, got slot {slot}")
    return peer.workers[slot]
