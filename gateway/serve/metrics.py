"""What a gateway exports to Prometheus: the sums of its processes' counts, by protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.calls.board import STATUSES
from superserve.roles.exposition import LATENCY_BOUNDS_S, Families, HistogramBuckets, Metric, exposition
from superserve.roles.pages import Page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.calls.board import Board

_PREFIX = "superserve_gateway_"
_PROTOCOL = ("protocol",)
METRICS = tuple(
    Metric(_PREFIX + name, kind, text, labels)
    for name, kind, text, labels in (
        ("requests", "counter", "Answers, by protocol and HTTP status; gRPC's codes count as theirs.",
         ("protocol", "status")),
        ("inferences", "counter", "Rows answered with an output.", _PROTOCOL),
        ("cancelled", "counter", "Requests whose caller left before the answer.", _PROTOCOL),
        ("request_seconds", "histogram", "Time from a request's arrival to its answer.", ()),
        ("in_flight", "gauge", "Requests that wait for the router's answer.", _PROTOCOL),
        ("connections", "gauge", "Connections that are open.", _PROTOCOL),
        ("connections_accepted", "counter", "Connections accepted.", _PROTOCOL),
        ("ignored_traceparents", "counter", "Requests whose traceparent was malformed.", _PROTOCOL),
        ("received_bytes", "counter", "Bytes received.", _PROTOCOL),
        ("sent_bytes", "counter", "Bytes sent.", _PROTOCOL),
        ("connected_processes", "gauge", "Processes that have found a router.", _PROTOCOL),
        ("workers_ready", "gauge", "GPUs that are ready, as the router last said; NaN if unknown.", ()),
        ("restarts", "counter", "Serving processes started again after they ended.", ()),
    )
)  # fmt: skip
"""Every metric, as scraped."""

_SUMS = {
    "inferences": "inferences", "cancelled": "cancelled_n", "in_flight": "in_flight",
    "connections": "connections", "connections_accepted": "connections_total",
    "ignored_traceparents": "ignored_traceparents", "received_bytes": "bytes_in", "sent_bytes": "bytes_out",
    "connected_processes": "is_connected",
}  # fmt: skip


def page(board: Board, rows: Mapping[str, Sequence[int]], restarts: int) -> Page:
    """Return the page of metrics.

    Args:
        board: The shared counters.
        rows: Each protocol's rows of it.
        restarts: How often a serving process was started again.
    """
    families = Families(METRICS)
    for protocol, own in rows.items():
        for status in STATUSES:
            families.add(f"{_PREFIX}requests", board.sum(f"status_{status}", own), protocol, str(status))
        for name, field in _SUMS.items():
            families.add(_PREFIX + name, board.sum(field, own), protocol)
    counts, total_ns = board.latencies(range(board.n_rows))
    bounds = tuple(bound * 1e9 for bound in LATENCY_BOUNDS_S)
    families.buckets(f"{_PREFIX}request_seconds", HistogramBuckets(bounds, counts, total_ns), 1e9)
    ready = board.workers_ready
    families.add(f"{_PREFIX}workers_ready", float("nan") if ready is None else ready)
    families.add(f"{_PREFIX}restarts", restarts)
    return exposition(families.all())


def pages(make: Callable[[], Page]) -> dict[str, Callable[[], Page]]:
    """Return the pages that the watcher serves."""
    return {"/metrics": make, "/live": lambda: Page(200, b"the gateway runs\n")}
