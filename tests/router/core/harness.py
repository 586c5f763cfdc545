"""A world of integers around RouterCore: fake clients and GPUs, and what must always hold."""

from __future__ import annotations

import struct
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from gpu_worker.core import WorkerCore
from gpu_worker.core.batches import Outcome
from gpu_worker.core.played import PlayedGpu, PlayedGpus
from gpu_worker.core.queue import CAPACITY
from profiles.table import load_profile
from router.core import RouterCore
from router.core.events import (
    Action,
    Answer,
    CancelAsked,
    ClientJoined,
    ClientLeft,
    Complaint,
    Dispatch,
    Event,
    Fence,
    Finished,
    Pulled,
    QueriesArrived,
    Released,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.core.lanes import LaneQueue
from router.core.workers import Batch, PeerState, WorkerState
from router.policies.planfit import PlanFit
from router.policies.slackfit import SlackFit
from superserve.clock import MS
from superserve.wire import VARIED, Cancel, Control, Done, DoneRow, Kind, Ping, Pong, Pull, Queries, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from profiles.table import Profile
    from router.core.edf import Cohort
    from router.core.events import CoreSettings
    from router.core.workers import Worker
    from router.policies import Policy
    from superserve.wire import Message

CNN = load_profile("cnn-8gpu-modelled")
TRANSFORMER = load_profile("transformer-8gpu-modelled")

START_NS = 1_000 * MS
HANGS = 1e9
"""A batch on a GPU that hangs takes its profiled time this many times: weeks."""


def pack_u64(ids: Sequence[int]) -> bytes:
    """Return ids as the wire has them."""
    return struct.pack(f"<{len(ids)}Q", *ids)


def make_queries(
    ids: Sequence[int],
    slacks_ns: Sequence[int],
    *,
    payload: bytes = b"\x00" * 8,
    min_accuracy: Sequence[float] | None = None,
    priority: Sequence[int] | None = None,
    resubmitted: bool = False,
) -> Queries:
    """Return a QUERIES message of these ids, with one slack each and equal payloads, packed."""
    n = len(ids)
    return Queries(
        epoch=1,
        sent_ns=0,
        n=n,
        ids=pack_u64(ids),
        slacks=struct.pack(f"<{n}q", *slacks_ns),
        payload_bytes=len(payload),
        payloads=[payload * n],
        min_accuracy=None if min_accuracy is None else struct.pack(f"<{n}f", *min_accuracy),
        priority=None if priority is None else bytes(priority),
        resubmitted=resubmitted,
    )


def ids_of(action: Answer) -> list[int]:
    """Return the ids that an answer is about."""
    ids = b"".join(cohort.message.ids[8 * lo : 8 * hi] for cohort, lo, hi in action.stretches)
    return list(struct.unpack(f"<{len(ids) // 8}Q", ids))


class Gpu(PlayedGpu[Batch]):
    """A fake GPU: the one that is emulated and simulated, which a test may spoil.

    Attributes:
        statuses: The status of every query in its reports; None is OK.
        coming: Directives on their way to it.
    """

    __slots__ = ("coming", "statuses")

    def __init__(self, profile: Profile, speed: float = 1.0) -> None:
        super().__init__(profile, self._ends)
        self.factor = speed
        self.statuses: Status | None = None
        self.coming: list[Batch] = []

    def hang(self) -> None:
        """Never end what starts from now on."""
        self.factor = HANGS

    def free_at_ns(self, now_ns: int, way_ns: int) -> int:
        """Return when it will have run all that was sent to it."""
        at_ns = self.ends_ns if self.queue.running is not None else now_ns
        for batch in self.queue.waiting:
            at_ns += self._takes_ns(batch.order)
        for order in self.coming:
            at_ns = max(at_ns, order.dispatched_ns + way_ns) + self._takes_ns(order)
        return at_ns

    def _takes_ns(self, order: Batch) -> int:
        return int(self.profile.latency_ns(order.subnet, order.n) * self.factor)

    def _ends(self, order: Batch, _waited_ns: int) -> Outcome:
        if self.statuses is None:
            return Outcome(order.n, 4, b"\x00" * 4 * order.n)
        return Outcome(order.n, VARIED, b"", bytes([self.statuses]) * order.n, bytes(4 * order.n))


class Process:
    """A fake worker process: the core that a real one has; a dead one neither hears nor speaks."""

    def __init__(self, key: str, epoch: int, gpus: list[Gpu], now_ns: int) -> None:
        self.key = key
        self.epoch = epoch
        self.gpus = gpus
        self.alive = True
        self.core: WorkerCore[Batch] = WorkerCore(PlayedGpus(gpus), {"name": key}, now_ns)


class World:
    """Runs a core against fake peers, and asserts after every step what must hold.

    Conservation, bounded credits, one answer a query, nothing expired in a directive,
    earliest deadline first, nothing sent to a worker that did not ask, and nothing to do
    one nanosecond before `next_wake_ns`.
    """

    def __init__(
        self,
        settings: CoreSettings | None = None,
        *,
        make_policy: Callable[[Profile], Policy] = SlackFit,
        way_ns: int = 200_000,
    ) -> None:
        self.core = RouterCore(make_policy, settings)
        self.now_ns = START_NS
        self.way_ns = way_ns
        self.stall_ns = 0  # what a DONE takes beside that
        self.late_ns = 0  # how late the router comes to what no event brings it to
        self.actions: list[tuple[int, Action]] = []
        self.answers: dict[tuple[Any, int], Answer] = {}
        self.answered_ns: dict[tuple[Any, int], int] = {}
        self.sent: dict[tuple[Any, int], int] = {}
        self.processes: dict[str, Process] = {}
        self.on_dispatch: Callable[[Dispatch, Gpu], None] | None = None
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._seq = 0
        self._epoch = 0
        self._next_id = 0

    # --- what tests do -------------------------------------------------------------------

    def join(self, key: str, *profiles: Profile, speed: float = 1.0) -> Process:
        """Let a worker process say HELLO and pull for each of its GPUs, at once."""
        self._epoch += 1
        process = Process(key, self._epoch, [Gpu(profile, speed) for profile in profiles], self.now_ns)
        self.processes[key] = process
        self.do(WorkerJoined(key, key, process.epoch, profiles))
        process.core.receive(Control(Kind.WELCOME, {"epoch": process.epoch}), self.now_ns)
        self._poll(process, at_once=True)
        self._advance()
        return process

    def revive(self, process: Process, slot: int = 0) -> None:
        """End what a GPU hangs on, now; it runs as profiled from now on."""
        gpu = process.gpus[slot]
        gpu.factor = 1.0
        while gpu.queue.running is not None:
            ended = gpu.finish_due(gpu.ends_ns)
            for batch in ended:
                batch.row.executing_ns = self.now_ns - batch.started_ns
                self._later(self.way_ns, partial(self._said, process, Done(process.epoch, [batch.row])))

    def client(self, key: str = "client", session: int = 1) -> None:
        """Let a client say HELLO."""
        self.do(ClientJoined(key, session))

    def submit(
        self,
        *slacks_ms: float,
        client: str = "client",
        ids: Sequence[int] | None = None,
        min_accuracy: Sequence[float] | None = None,
        priority: Sequence[int] | None = None,
        payload: bytes = b"\x00" * 8,
        resubmitted: bool = False,
    ) -> list[int]:
        """Send one message of queries with these slacks; return their ids."""
        if client not in self.core.clients:
            self.client(client, session=hash_of(client))
        if ids is None:
            ids = range(self._next_id, self._next_id + len(slacks_ms))
            self._next_id += len(slacks_ms)
        slacks_ns = [round(slack * MS) for slack in slacks_ms]
        queries = make_queries(
            ids, slacks_ns, payload=payload, min_accuracy=min_accuracy, priority=priority,
            resubmitted=resubmitted,
        )  # fmt: skip
        for i, slack_ns in zip(ids, slacks_ns, strict=True):
            self.sent.setdefault((client, i), self.now_ns + slack_ns)
        self.do(QueriesArrived(client, queries, transit_ns=0))
        return list(ids)

    def submit_spaced(self, slack_ms: float, *, n: int, gap_ms: float) -> list[int]:
        """Send n queries of this slack, each some time after the one before; return their ids."""
        ids = []
        for _ in range(n):
            ids += self.submit(slack_ms)
            self.run(gap_ms)
        return ids

    def cancel(self, *ids: int, client: str = "client") -> None:
        """Cancel these queries."""
        self.do(CancelAsked(client, Cancel(1, len(ids), pack_u64(ids))))

    def leave(self, client: str = "client") -> None:
        """Disconnect a client."""
        self.do(ClientLeft(client))

    def kill(self, key: str, *, seen: bool) -> None:
        """Kill a worker process; `seen` if its connection breaks, otherwise only its silence shows it."""
        self.processes[key].alive = False
        if seen:
            self.do(WorkerLeft(key, orderly=False))

    def do(self, *events: Event) -> list[Action]:
        """Handle events now, advance, check, and carry the actions out."""
        for event in events:
            self.core.handle(event, self.now_ns)
        return self._advance()

    def run(self, duration_ms: float) -> None:
        """Advance the clock: every event and every wake of the core in its turn."""
        end_ns = self.now_ns + round(duration_ms * MS)
        while True:
            wake_ns = self.core.next_wake_ns()
            assert wake_ns is None or wake_ns > self.now_ns, "a wake that is not ahead is a busy loop"
            due_ns = min(
                end_ns if wake_ns is None else wake_ns + self.late_ns,
                self._events[0][0] if self._events else end_ns,
            )
            if due_ns >= end_ns:
                break
            # Where the queue waits for a better worker, a policy that sheds may change its mind meanwhile.
            is_early = self.late_ns == 0 and due_ns > self.now_ns + 1
            if is_early and self.core.dispatcher._awaited is None:
                early = self.core.advance(due_ns - 1)
                assert not early, f"due before next_wake_ns: {early}"
            self.now_ns = due_ns
            while self._events and self._events[0][0] <= due_ns:
                heappop(self._events)[2]()
            self._advance()
        self.now_ns = end_ns
        self._advance()

    def status(self, query: int, client: str = "client") -> Status | None:
        """Return how a query ended; None if it has not."""
        answer = self.answers.get((client, query))
        return None if answer is None else answer.status

    def statuses(self, ids: Sequence[int]) -> list[Status | None]:
        """Return how these queries ended."""
        return [self.status(i) for i in ids]

    def dispatches(self) -> list[Dispatch]:
        """Return every directive so far."""
        return [action for _, action in self.actions if isinstance(action, Dispatch)]

    def worker(self, key: str, slot: int = 0) -> Worker:
        """Return what the core knows of a GPU."""
        return self.core.peers[key].workers[slot]

    # --- the machinery -------------------------------------------------------------------

    def _later(self, delay_ns: int, call: Callable[[], None]) -> None:
        self._seq += 1
        heappush(self._events, (self.now_ns + delay_ns, self._seq, call))

    def _poll(self, process: Process, *, at_once: bool = False) -> None:
        """Send a process's messages that are due, now and whenever it has more."""
        if not process.alive or self.processes.get(process.key) is not process:
            return
        if process.core.next_due_ns() <= self.now_ns:
            for message in process.core.poll(self.now_ns):
                if at_once:
                    self._said(process, message)
                else:
                    stall_ns = self.stall_ns if isinstance(message, Done) else 0
                    self._later(self.way_ns + stall_ns, partial(self._said, process, message))
        self._later(process.core.next_due_ns() - self.now_ns, partial(self._poll, process))

    def _said(self, process: Process, message: Message) -> None:
        """Deliver a process's messages to the router."""
        if not process.alive:
            return
        key = process.key
        if isinstance(message, Ping):
            self.core.handle(WorkerHeard(key), self.now_ns)
            self._later(self.way_ns, partial(self._hear, process, Pong(0, 0)))
        elif isinstance(message, Pull):
            self.core.handle(Pulled(key, message), self.now_ns)
        elif isinstance(message, Done):
            self.core.handle(Finished(key, message), self.now_ns)

    def _hear(self, process: Process, message: Batch | Pong) -> None:
        """Deliver the router's messages to a process."""
        if isinstance(message, Batch):
            gpu = process.gpus[message.slot]
            gpu.coming.remove(message)
        if process.alive:
            process.core.receive(message, self.now_ns)
            if isinstance(message, Batch):
                assert gpu.queue.n_outstanding <= CAPACITY, "a batch was sent without credit"
                self._later(process.core.next_due_ns() - self.now_ns, partial(self._poll, process))

    def _advance(self) -> list[Action]:
        actions = self.core.advance(self.now_ns)
        self.core.check()
        for action in actions:
            self.actions.append((self.now_ns, action))
            match action:
                case Dispatch():
                    self._check_dispatch(action)
                    self._receive(action)
                case Answer():
                    self._record(action)
                case Fence() | Released() | Complaint():
                    pass
        self._check_order([action.batch for action in actions if isinstance(action, Dispatch)])
        return actions

    def _check_order(self, batches: Sequence[Batch]) -> None:
        """Assert earliest deadline first; in lanes a batch may pass over floors above its subnet."""
        queue = self.core.queue
        if isinstance(queue, LaneQueue):
            left = [(head[0], lane[1]) for head, lane in queue.heads()]
        else:
            left = [(head[0], 0)] if (head := queue.head()) is not None else []
        for batch in reversed(batches):
            mine = [_terms(cohort, i) for cohort, lo, hi in batch.stretches for i in range(lo, hi)]
            if not isinstance(queue, LaneQueue):
                pairs = [(mine, left)]
            elif isinstance(batch.worker.policy, PlanFit):  # packs floors: the order is that within each
                pairs = [(_of(mine, floor), _of(left, floor)) for floor in {floor for _, floor in mine}]
            else:
                pairs = [(mine, [term for term in left if term[1] <= batch.subnet])]
            for ours, others in pairs:
                assert max(ours)[0] <= min(others, default=max(ours))[0], (
                    "an earlier deadline was left behind"
                )
            left += mine

    def _record(self, answer: Answer) -> None:
        for i in ids_of(answer):
            assert (answer.client, i) not in self.answers, f"query {i} was answered twice"
            self.answers[answer.client, i] = answer
            self.answered_ns[answer.client, i] = self.now_ns

    def _check_dispatch(self, action: Dispatch) -> None:
        batch = action.batch
        terms = [_terms(cohort, i) for cohort, lo, hi in batch.stretches for i in range(lo, hi)]
        assert len(terms) == batch.n
        assert min(terms)[0] >= self.now_ns, "an expired query was dispatched"
        assert all(floor <= batch.subnet for _, floor in terms), "a floor was not honoured"
        peer = self.core.peers[action.peer]
        assert peer.machine.state is PeerState.LIVE
        assert peer.workers[batch.slot].machine.state is WorkerState.READY

    def _receive(self, action: Dispatch) -> None:
        process = self.processes[action.peer]
        batch = action.batch
        gpu = process.gpus[batch.slot]
        if not process.alive or process.epoch != batch.epoch:
            return
        if self.on_dispatch is not None:
            self.on_dispatch(action, gpu)
        gpu.coming.append(batch)
        self._later(self.way_ns, partial(self._hear, process, batch))

    def done_row(self, action: Dispatch) -> DoneRow:
        """Return what a GPU says that has run a directive in a millisecond, and holds nothing else."""
        batch = action.batch
        return DoneRow(
            batch.batch_id, batch.slot, CAPACITY, 0, batch.n, 0, MS, batch.batch_id, 0, 0, 4,
            b"\x00" * 4 * batch.n,
        )  # fmt: skip


def _terms(cohort: Cohort, i: int) -> tuple[int, int]:
    """Return a query's deadline and floor."""
    return cohort.deadlines_ns[i], 0 if cohort.floors is None else cohort.floors[i]


def _of(terms: Sequence[tuple[int, int]], floor: int) -> list[tuple[int, int]]:
    """Return those of one floor."""
    return [term for term in terms if term[1] == floor]


def hash_of(key: str) -> int:
    """Return a session number for a client's name, the same in every run."""
    return int.from_bytes(key.encode()[-8:], "little")
