"""What a worker process exports to Prometheus.

The server's thread adds to plain integers. A scrape reads them in its own thread while the server
runs on, so two of them may be a batch apart. docs/metrics.md explains each name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from superserve.clock import MS
from superserve.roles.exposition import SIZE_BOUNDS, Families, Metric, MetricHistogram, exposition
from superserve.roles.pages import Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gpu_worker.core.batches import EndedBatch
    from gpu_worker.serve.server import WorkerServer
    from profiles.table import Profile

_PREFIX = "superserve_worker_"
_LIVE_NS = 2_000 * MS
"""A loop that has not passed for this long hangs: heartbeats wake it ten times a second."""

METRICS = tuple(
    Metric(_PREFIX + name, kind, text, labels)
    for name, kind, text, labels in (
        ("build", "info", "Name of this worker process, its profile and its device, as labels.", ()),
        ("gpus", "gauge", "GPUs of this process.", ()),
        ("link", "gauge", "1 for the state of the link to the router, 0 for the others.", ("state",)),
        ("batches", "counter", "Batches that took time of a GPU.", ()),
        ("queries", "counter", "Queries that took time of a GPU, by subnet.", ("subnet",)),
        ("refused_queries", "counter", "Queries that no GPU ran: expired on the way, or at fault.", ()),
        ("execution_seconds", "counter", "Time that GPUs executed batches, summed over them.", ()),
        ("batch_seconds", "histogram", "Time that a batch was executed.", ()),
        ("batch_size_queries", "histogram", "Queries of a batch that took time of a GPU.", ()),
        ("actuations", "counter", "Batches on another subnet than that GPU ran before.", ()),
        ("dropped_messages", "counter", "Messages and reports dropped, by reason.", ("reason",)),
        ("memory_bytes", "gauge", "Memory held: of the device on CUDA, else of the process.", ()),
        ("utilisation_ratio", "gauge", "Utilisation of the device, 0 to 1; absent where unknown.", ()),
        ("temperature_celsius", "gauge", "Temperature of the device; absent where unknown.", ()),
    )
)  # fmt: skip


class WorkerMetrics:
    """Figures that the server's thread adds to.

    Args:
        name: Of the worker process.
        profile: Names the subnets and the device.
        n_slots: GPUs of the process.
    """

    def __init__(self, name: str, profile: Profile, n_slots: int) -> None:
        self._labels = {"worker": name, "profile": profile.name, "device": profile.device}
        self._names = [subnet.name for subnet in profile.subnets]
        self._n_slots = n_slots
        self._n_batches = 0
        self._n_refused = 0
        self._n_actuations = 0
        self._busy_ns = 0
        self._queries = [0] * len(self._names)
        self._rows: list[int | None] = [None] * n_slots  # the row that each GPU ran last
        self._times = MetricHistogram.of_latencies_ns()
        self._sizes = MetricHistogram(SIZE_BOUNDS)

    def ended(self, reports: Iterable[EndedBatch]) -> None:
        """Count batches that have ended."""
        for report in reports:
            self._n_refused += report.row.n - report.n_run
            if not report.n_run:
                continue
            slot, row, took_ns = report.row.slot, report.subnet, report.ended_ns - report.started_ns
            self._n_batches += 1
            self._queries[row] += report.n_run
            self._busy_ns += took_ns
            self._times.add(took_ns)
            self._sizes.add(report.n_run)
            self._n_actuations += self._rows[slot] != row
            self._rows[slot] = row

    def families(self, server: WorkerServer) -> Families:
        """Return every sample as of now."""
        families = Families(METRICS)
        gauges = server.gauges
        families.add(_PREFIX + "build", self._labels)
        for state in type(server.link):
            families.add(_PREFIX + "link", int(server.link is state), state.value)
        for name, n in zip(self._names, self._queries, strict=True):
            if n:
                families.add(_PREFIX + "queries", n, name)
        for reason, n in dict(server.counts).items():
            families.add(_PREFIX + "dropped_messages", n, reason)
        families.buckets(_PREFIX + "batch_seconds", self._times.copy(), 1e9)
        families.buckets(_PREFIX + "batch_size_queries", self._sizes.copy())
        plain = {
            "gpus": self._n_slots,
            "batches": self._n_batches,
            "refused_queries": self._n_refused,
            "execution_seconds": self._busy_ns / 1e9,
            "actuations": self._n_actuations,
            "memory_bytes": gauges.memory_bytes,
            "utilisation_ratio": gauges.utilisation,
            "temperature_celsius": gauges.temperature_c,
        }
        for name, value in plain.items():
            if not math.isnan(value):
                families.add(_PREFIX + name, value)
        return families


def pages(server: WorkerServer, metrics: WorkerMetrics) -> dict[str, Callable[[], Page]]:
    """Return a worker's pages, by path; they are made in other threads than the server's."""

    def ready() -> Page:
        link = server.link
        words = f"the link to the router is {link.value}\n".encode()
        return Page(200 if link.value == "serving" else 503, words)

    def live() -> Page:
        since_ns = server.since_pass_ns()
        return Page(
            200 if since_ns < _LIVE_NS else 503, f"the loop passed {since_ns // MS} ms ago\n".encode()
        )

    return {"/metrics": lambda: exposition(metrics.families(server).all()), "/live": live, "/ready": ready}
