"""Where a query's time in the router goes: the core and the wire in this process, without sockets.

Bytes in, bytes out, on a virtual clock: QUERIES of some clients arrive at a steady rate, GPUs that
take their profiled time answer, and each stage of each pass is timed with the real clock. `make bench`
measures live what the operating system and ZeroMQ add.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gpu_worker.core import WorkerCore
from gpu_worker.core.batches import Outcome
from gpu_worker.core.played import PlayedGpu, PlayedGpus
from router.core import RouterCore
from router.core.events import (
    Answer,
    ClientJoined,
    CoreSettings,
    Dispatch,
    Finished,
    Pulled,
    QueriesArrived,
    WorkerJoined,
)
from router.policies.registry import make_policy
from router.serve.directives import directive_of, frames_of, results_of
from superserve import wire
from superserve.clock import MS
from superserve.net.sockets import REST_NS
from superserve.wire import Done, Pull, Queries

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.core.workers import Batch

STAGES = ("decode", "admit", "decide", "direct", "finish", "answer")
"""In the order of a query's life: QUERIES and DONE to messages, queries to the queue, the queue to
batches, batches to DIRECTIVE, reports to ends, ends to RESULTS."""
_TRANSIT_NS = MS // 5  # one way, as on a local network
_FAR_NS = 3_600_000 * MS  # queries that only wait must not expire during the measurement
_PAYLOAD = bytes(64)


@dataclass(frozen=True, slots=True)
class PathShape:
    """The load on the router.

    Attributes:
        n_waiting: Queries that always wait, with deadlines that never come.
        gpus_per_process: GPUs of one worker process.
    """

    profile: Profile
    rate_qps: float = 10_000.0
    queries_per_message: int = 5
    n_clients: int = 1
    n_gpus: int = 16
    n_waiting: int = 0
    gpus_per_process: int = 8
    policy: str = "slackfit"
    slo_ns: int = 36 * MS


@dataclass(frozen=True, slots=True)
class PathCost:
    """The cost.

    Attributes:
        stages_us: Microseconds a query, by stage.
        mean_batch_size: Queries a batch.
        worst_advance_us: The longest single decision pass.
    """

    stages_us: dict[str, float]
    mean_batch_size: float
    worst_advance_us: float

    @property
    def total_us(self) -> float:
        """Sum of all stages."""
        return sum(self.stages_us.values())


class _Path:
    """One run: a router core, its clients and its GPUs, on a virtual clock."""

    def __init__(self, shape: PathShape) -> None:
        self.shape = shape
        self.now_ns = 1_000 * MS
        settings = CoreSettings(max_queries=2_000_000 + shape.n_waiting)
        self.core = RouterCore(partial(make_policy, shape.policy), settings)
        self.taken_ns = dict.fromkeys(STAGES, 0)
        self.worst_advance_ns = 0
        self.n_answered = self.n_batches = 0
        self._query_id = self._n_messages = 0
        each = shape.gpus_per_process
        self._processes = {
            first: WorkerCore(_gpus(shape.profile, min(each, shape.n_gpus - first)), {"name": str(first)}, 0)
            for first in range(0, shape.n_gpus, each)
        }
        self._under_way: deque[tuple[int, Batch]] = deque()
        self._keys = [b"client %d" % i for i in range(shape.n_clients)]
        self._join()

    def _join(self) -> None:
        shape, core, now_ns = self.shape, self.core, self.now_ns
        for peer, process in self._processes.items():
            n = min(shape.gpus_per_process, shape.n_gpus - peer)
            core.handle(WorkerJoined(peer, f"process {peer}", 1, [shape.profile] * n, len(_PAYLOAD)), now_ns)
            process.receive(wire.Control(wire.Kind.WELCOME, {"epoch": 1}), now_ns)
            for message in process.poll(now_ns):
                if isinstance(message, Pull):
                    core.handle(Pulled(peer, message), now_ns)
        for i, key in enumerate(self._keys):
            core.handle(ClientJoined(key, i), now_ns)
        self._refill()

    def _refill(self) -> None:
        """Keep as many queries waiting as the shape requires; free GPUs take some of them."""
        taken_ns = dict(self.taken_ns)
        while (missing := self.shape.n_waiting - len(self.core.queue)) > 0:
            self._receive(self._message(min(missing, 32), _FAR_NS))
        self.taken_ns = taken_ns

    def _message(self, n: int, slack_ns: int) -> list[wire.Buffer]:
        ids = array("Q", range(self._query_id, self._query_id + n)).tobytes()
        slacks = array("q", [slack_ns] * n).tobytes()
        self._query_id += n
        return wire.encode_queries(Queries(1, self.now_ns, n, ids, slacks, len(_PAYLOAD), [_PAYLOAD * n]))

    def run(self, n_queries: int) -> None:
        """Send `n_queries` at the shape's rate, a pass every `REST_NS`, until all have ended."""
        shape = self.shape
        step_ns = int(shape.queries_per_message * 1e9 / shape.rate_qps)
        next_ns, n_sent = self.now_ns, 0
        while self.n_answered < n_queries:
            self.now_ns += REST_NS
            self._refill()
            self._finish()
            while next_ns <= self.now_ns and n_sent < n_queries:
                self._receive(self._message(shape.queries_per_message, shape.slo_ns))
                n_sent += shape.queries_per_message
                next_ns += step_ns
            self._decide()

    def _receive(self, frames: list[wire.Buffer]) -> None:
        key = self._keys[self._n_messages % len(self._keys)]
        self._n_messages += 1
        began = time.perf_counter_ns()
        message = wire.decode(frames)
        decoded = time.perf_counter_ns()
        assert isinstance(message, Queries), "it was encoded as such"
        self.core.handle(QueriesArrived(key, message, _TRANSIT_NS), self.now_ns)
        self.taken_ns["decode"] += decoded - began
        self.taken_ns["admit"] += time.perf_counter_ns() - decoded

    def _finish(self) -> None:
        """End every batch that is due; each process reports all of its batches in one message."""
        while self._under_way and self._under_way[0][0] <= self.now_ns:
            at_ns, batch = self._under_way.popleft()
            self._processes[batch.worker.peer.key].receive(batch, at_ns)
        for peer, process in self._processes.items():
            for told in process.poll(self.now_ns):
                if isinstance(told, Done):
                    self._take(peer, told)

    def _take(self, peer: int, told: Done) -> None:
        frames = wire.encode_done(told)
        began = time.perf_counter_ns()
        message = wire.decode(frames)
        decoded = time.perf_counter_ns()
        assert isinstance(message, Done), "it was encoded as such"
        self.core.handle(Finished(peer, message), self.now_ns)
        self.taken_ns["decode"] += decoded - began
        self.taken_ns["finish"] += time.perf_counter_ns() - decoded

    def _decide(self) -> None:
        began = time.perf_counter_ns()
        actions = self.core.advance(self.now_ns)
        decided = time.perf_counter_ns()
        answers: dict[bytes, list[Answer]] = {}
        dispatches = []
        for action in actions:
            if isinstance(action, Answer):
                answers.setdefault(action.client, []).append(action)
                self.n_answered += action.n
            elif isinstance(action, Dispatch):
                dispatches.append(action)
        for of_client in answers.values():
            if len(of_client) == 1:
                frames_of(1, of_client[0])
            else:
                for results in results_of(1, of_client):
                    wire.encode_results(results)
        answered = time.perf_counter_ns()
        for action in dispatches:
            wire.encode_directive(directive_of(action.batch))
        directed = time.perf_counter_ns()
        taken = self.taken_ns
        taken["decide"] += decided - began
        taken["answer"] += answered - decided
        taken["direct"] += directed - answered
        self.worst_advance_ns = max(self.worst_advance_ns, decided - began)
        self.n_batches += len(dispatches)
        self._under_way += [(self.now_ns + _TRANSIT_NS, action.batch) for action in dispatches]


def _gpus(profile: Profile, n: int) -> PlayedGpus[Batch]:
    """Return a process's GPUs; the outputs of a query are four bytes."""

    def outcome(batch: Batch, _waited_ns: int) -> Outcome:
        return Outcome(batch.n, 4, bytes(4 * batch.n))

    return PlayedGpus([PlayedGpu(profile, outcome) for _ in range(n)])


def path_cost(shape: PathShape, n_queries: int) -> PathCost:
    """Return what a query costs in the router without sockets; `n_queries` a multiple of a message's."""
    path = _Path(shape)
    path.run(n_queries // 4)  # warm up: caches, and the estimates of the core
    path.taken_ns = dict.fromkeys(STAGES, 0)
    path.worst_advance_ns = path.n_answered = path.n_batches = 0
    gc.collect()
    gc.disable()
    try:
        path.run(n_queries)
    finally:
        gc.enable()
    path.core.check()
    return PathCost(
        {stage: taken / path.n_answered / 1e3 for stage, taken in path.taken_ns.items()},
        path.n_answered / max(1, path.n_batches), path.worst_advance_ns / 1e3,
    )  # fmt: skip
