"""What the router exports to Prometheus, and how the loop's figures reach the thread of a scrape.

The loop adds to plain integers. A scrape raises a flag. At the end of its pass the loop copies the
values that must agree with each other (counters, queue, histograms: tens of microseconds) and passes
on the copy, so that received = answered + queued + in flight holds in every scrape. The request's
thread makes the text. It reads the values of single workers while the loop runs: each value is
consistent by itself, and none of them are summed. docs/metrics.md explains each name.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from router.core.events import Dispatch
from router.core.workers import PeerState, WorkerState
from router.report.health import attainment, live, ready, slo
from router.report.status import gpu_status
from superserve.roles.exposition import SIZE_BOUNDS, Families, Metric, MetricHistogram, exposition
from superserve.roles.pages import Page, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from router.core import RouterCore
    from router.core.events import Action
    from router.core.workers import Batch
    from router.report.health import Health
    from superserve.roles.exposition import HistogramBuckets
    from superserve.status import GpuStatus, RouterSummary

_PREFIX = "superserve_router_"
_MS = 1e3
_WAIT_S = 1.0
"""A loop that has not answered for this long hangs: an idle one passes every 50 ms."""
SWITCH_S = 0.0005
"""How long a scrape's thread may compute before the loop gets the interpreter back; Python's default
of 5 ms would delay answers by that. Set when metrics are on."""

_NAMES = (
    Metric("build", "info", "Version, Python and policy of this router, as labels."),
    Metric("queries_received", "counter", "Queries that clients sent."),
    Metric("queries_answered", "counter", "Queries that ended, by how.", ("status",)),
    Metric("queries_in_flight", "gauge", "Queries that workers hold."),
    Metric("queries_redispatched", "counter", "Queries queued again after their worker was lost or overran."),
    Metric(
        "attainment_ratio",
        "gauge",
        "Share that ended OK of the queries that ended in the last 10 s, less those cancelled.",
    ),
    Metric("accuracy_ratio", "summary", "Profiled accuracy of the queries that ended OK, 0 to 1."),
    Metric("queue_length", "gauge", "Queries that wait."),
    Metric("queue_head_slack_seconds", "gauge", "Time left to the earliest deadline queued; NaN if none is."),
    Metric("held_bytes", "gauge", "Payload bytes of queries that have not ended."),
    Metric("queue_wait_seconds", "histogram", "Time that dispatched queries were queued, by query."),
    Metric(
        "dispatch_slack_seconds", "histogram", "Time left to the earliest deadline of a dispatched batch."
    ),
    Metric("batch_size_queries", "histogram", "Queries of a dispatched batch."),
    Metric("dispatched_queries", "counter", "Queries dispatched, by subnet.", ("subnet",)),
    Metric("dispatched_batches", "counter", "Batches dispatched."),
    Metric("batches_in_flight", "gauge", "Batches that workers hold."),
    Metric("executed_queries", "counter", "Queries of the batches that workers reported as ended."),
    Metric("execution_seconds", "counter", "GPU time of those batches, as workers report it."),
    Metric("payload_bytes", "counter", "Payload bytes that clients sent."),
    Metric("shared_payloads", "counter", "Payloads that came in memory shared with clients of this host."),
    Metric(
        "copied_payloads", "counter", "Those copied into messages, for workers that do not see the memory."
    ),
    Metric("ignored_traceparents", "counter", "Queries whose trace context was all zeros."),
    Metric("refused_payloads", "counter", "Payloads said to be in memory that the client had not offered."),
    Metric("output_bytes", "counter", "Output bytes that workers sent."),
    Metric("malformed_messages", "counter", "Messages that broke the protocol, from anyone."),
    Metric("stale_messages", "counter", "Reports of batches given up, and messages of an older epoch."),
    Metric("borrowed_batches", "counter", "Batches that ran on GPUs which belong to another router."),
    Metric("wrong_choices", "counter", "Answers of the policy that could not be carried out; see the log."),
    Metric("dropped_results", "counter", "Answers that a client was not there to take, or did not read."),
    Metric("lost_worker_processes", "counter", "Worker processes that fell silent or could not be reached."),
    Metric("clients", "gauge", "Clients connected."),
    Metric("draining", "gauge", "1 while the router takes no new queries."),
    Metric("worker_processes", "gauge", "Worker processes, by state.", ("state",)),
    Metric("workers", "gauge", "GPUs, by state.", ("state",)),
    Metric("workers_ready", "gauge", "GPUs that are given work."),
    Metric("workers_needed", "gauge", "GPUs that the arrivals of the last 10 s ask for, as now served."),
    Metric("workers_needed_at_least", "gauge", "The same, all on the smallest subnet."),
    Metric(
        "worker_slowdown_ratio", "gauge", "Measured over profiled latency: mean of its GPUs.", ("worker",)
    ),
    Metric("worker_credit_batches", "gauge", "Batches that its GPUs can take now.", ("worker",)),
    Metric("worker_transport_seconds", "gauge", "Median time to it and back.", ("worker",)),
    Metric("worker_batches", "counter", "Batches sent to it.", ("worker",)),
    Metric("worker_queries", "counter", "Queries sent to it.", ("worker",)),
    Metric("worker_execution_seconds", "counter", "GPU time that it reported.", ("worker",)),
    Metric("loop_passes", "counter", "Passes of the router's loop."),
    Metric("loop_seconds", "counter", "Time spent in those passes, without the waits between."),
    Metric("loop_pass_seconds", "histogram", "Time that one pass took."),
    Metric("cpu_seconds", "counter", "CPU time of the process, user and system."),
    Metric("scrape_wait_seconds", "gauge", "Time that this scrape waited for the loop's figures."),
)
METRICS = tuple(Metric(_PREFIX + metric.name, metric.kind, metric.help, metric.labels) for metric in _NAMES)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the loop passed on at the end of one pass."""

    summary: RouterSummary
    histograms: Mapping[str, HistogramBuckets]
    subnets: Mapping[str, int]


class RouterMetrics:
    """Figures that the loop adds to, and their way to the thread of a scrape.

    Attributes:
        is_wanted: Whether a scrape waits for a snapshot: the loop checks it once a pass.
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self._queue_wait = MetricHistogram.of_latencies_ns()
        self._slack = MetricHistogram.of_latencies_ns()
        self._batch_size = MetricHistogram(SIZE_BOUNDS)
        self._loop = MetricHistogram.of_latencies_ns()
        self._rows: Counter[int] = Counter()
        self._asking = threading.Lock()
        self._given = threading.Event()
        self._snapshot: Snapshot | None = None

    # --- the loop's side ------------------------------------------------------------------

    def _dispatched(self, batch: Batch) -> None:
        now_ns = batch.dispatched_ns
        self._batch_size.add(batch.n)
        self._rows[batch.subnet] += batch.n
        wait = self._queue_wait
        for cohort, lo, hi in batch.stretches:
            wait.add(now_ns - cohort.arrived_ns, hi - lo)
        self._slack.add(min([cohort.deadlines_ns[lo] for cohort, lo, _ in batch.stretches]) - now_ns)

    def passed(self, actions: list[Action], took_ns: int) -> None:
        """Count a pass of the loop and its dispatches. Call `give` after it if `is_wanted`."""
        for action in actions:
            if type(action) is Dispatch:
                self._dispatched(action.batch)
        self._loop.add(took_ns)

    def give(self, summary: RouterSummary, subnets: Sequence[str]) -> None:
        """Pass on a snapshot: `summary` as of this pass, and the names of the profile's rows."""
        self.is_wanted = False
        self._snapshot = self._take(summary, subnets)
        self._given.set()

    def _take(self, summary: RouterSummary, subnets: Sequence[str]) -> Snapshot:
        return Snapshot(
            summary,
            {
                "queue_wait_seconds": self._queue_wait.copy(),
                "dispatch_slack_seconds": self._slack.copy(),
                "batch_size_queries": self._batch_size.copy(),
                "loop_pass_seconds": self._loop.copy(),
            },
            {subnets[row]: n for row, n in sorted(self._rows.items())},
        )

    # --- the side of the scrape -----------------------------------------------------------

    def ask(self) -> Snapshot:
        """Return the loop's snapshot; from any thread except the loop's.

        Raises:
            UnavailableError: The loop did not answer within a second.
        """
        with self._asking:
            self._given.clear()
            self.is_wanted = True
            if not self._given.wait(_WAIT_S):
                self.is_wanted = False
                raise UnavailableError(f"the router's loop has not answered for {_WAIT_S:g} s")
            assert self._snapshot is not None, "it was given"
            return self._snapshot


def pages(core: RouterCore, metrics: RouterMetrics) -> dict[str, Callable[[], Page]]:
    """Return the router's pages, by path; they are made in other threads than the loop's."""

    def health(judge: Callable[[RouterSummary], Health]) -> Page:
        said = judge(metrics.ask().summary)
        return Page(200 if said.is_well else 503, f"{said.why}\n".encode())

    return {
        "/metrics": lambda: _metrics_page(core, metrics),
        "/live": lambda: health(live),
        "/ready": lambda: health(ready),
        "/slo": lambda: health(slo),
    }


def _metrics_page(core: RouterCore, metrics: RouterMetrics) -> Page:
    began_s = time.perf_counter()
    snapshot = metrics.ask()
    waited_s = time.perf_counter() - began_s
    families = Families(METRICS)
    fill(families, snapshot, waited_s)
    now_ns = time.monotonic_ns()
    # `residents` copies the lists: the loop may add and remove while this thread reads.
    workers = [gpu_status(worker, now_ns) for worker in core.residents()]
    fill_workers(families, workers)
    return exposition(families.all())


def fill(families: Families, snapshot: Snapshot, waited_s: float) -> None:
    """Add every sample that does not belong to one worker."""
    now = snapshot.summary
    router, queries, queue, batches = now.router, now.queries, now.queue, now.batches
    python = ".".join(map(str, sys.version_info[:3]))
    families.add(_PREFIX + "build", {"version": router.version, "python": python, "policy": router.policy})
    for status, n in queries.answered.items():
        families.add(_PREFIX + "queries_answered", n, status)
    families.summary(_PREFIX + "accuracy_ratio", queries.answered.ok, queries.ok_accuracy / 100)
    for subnet, n in snapshot.subnets.items():
        families.add(_PREFIX + "dispatched_queries", n, subnet)
    for name, held in snapshot.histograms.items():
        families.buckets(_PREFIX + name, held, 1.0 if name == "batch_size_queries" else 1e9)
    head_ms = queue.head_slack_ms
    plain = {
        "queries_received": queries.received,
        "queries_in_flight": queries.in_flight,
        "queries_redispatched": queries.redispatched,
        "attainment_ratio": attainment(now.recent.short.answered),
        "queue_length": queue.length,
        "queue_head_slack_seconds": float("nan") if head_ms is None else head_ms / _MS,
        "held_bytes": queue.held_bytes,
        "dispatched_batches": batches.dispatched,
        "batches_in_flight": batches.in_flight,
        "executed_queries": queries.executed,
        "execution_seconds": queries.busy_s,
        "payload_bytes": queries.payload_bytes,
        "shared_payloads": now.counts.get("shared_payloads", 0),
        "copied_payloads": now.counts.get("copied_payloads", 0),
        "ignored_traceparents": now.counts.get("ignored_traceparents", 0),
        "refused_payloads": now.counts.get("refused_payloads", 0),
        "output_bytes": queries.output_bytes,
        "malformed_messages": now.counts.get("malformed", 0),
        "stale_messages": batches.stale,
        "borrowed_batches": now.counts.get("borrowed_batches", 0),
        "wrong_choices": now.counts.get("wrong_choices", 0),
        "dropped_results": now.counts.get("results_dropped", 0),
        "lost_worker_processes": now.lost_processes,
        "clients": now.clients,
        "draining": int(router.draining),
        "workers_ready": now.workers_ready,
        "workers_needed": now.workers_needed.as_served,
        "workers_needed_at_least": now.workers_needed.at_least,
        "loop_passes": now.counts.get("loops", 0),
        "loop_seconds": router.loop_s,
        "cpu_seconds": router.cpu_s,
        "scrape_wait_seconds": waited_s,
    }
    for name, value in plain.items():
        families.add(_PREFIX + name, value)


def fill_workers(families: Families, gpus: Sequence[GpuStatus]) -> None:
    """Add the samples of workers: a line for each process, summed over its GPUs."""
    processes: dict[str, list[GpuStatus]] = {}
    for gpu in gpus:
        processes.setdefault(gpu.name, []).append(gpu)
    live = Counter(of[0].process for of in processes.values())
    states = Counter(gpu.state for gpu in gpus)
    for peer_state in (PeerState.LIVE, PeerState.SUSPECT):
        families.add(_PREFIX + "worker_processes", live[peer_state.value], peer_state.value)
    for state in (WorkerState.READY, WorkerState.OVERRUN, WorkerState.DRAINING):
        families.add(_PREFIX + "workers", states[state.value], state.value)
    for name, of in processes.items():
        for metric, value in {
            "slowdown_ratio": sum(gpu.slowdown for gpu in of) / len(of),
            "credit_batches": sum(gpu.credit for gpu in of),
            "transport_seconds": of[0].transport_ms / _MS,
            "batches": sum(gpu.batches for gpu in of),
            "queries": sum(gpu.queries for gpu in of),
            "execution_seconds": sum(gpu.busy_s for gpu in of),
        }.items():
            families.add(f"{_PREFIX}worker_{metric}", value, name)
