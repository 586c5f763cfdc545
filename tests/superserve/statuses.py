"""STATUSes for tests: of a router that is well, but for what a test says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from superserve.status import (
    BatchCounts,
    EndCounts,
    GpusNeeded,
    GpuStatus,
    QueryCounts,
    QueueStatus,
    Recent,
    RecentWindow,
    RouterInfo,
    RouterStatus,
)

WINDOW = RecentWindow(10.0, 0, EndCounts(), 0.0, 0.0, 0)


def gpu(name: str = "w0", **other: Any) -> GpuStatus:
    """Return a GPU that is well."""
    well = GpuStatus(
        name=name, slot=0, state="ready", process="live", profile="p", device="d", credit=1, outstanding=0,
        free_in_ms=0.0, transport_ms=0.5, slowdown=1.1, batches=0, queries=0, busy_s=0.0, last_subnet=None,
        gauges={}, version="1+a",
    )  # fmt: skip
    return replace(well, **other)


def info(**other: Any) -> RouterInfo:
    """Return the router's process."""
    well = RouterInfo(
        draining=False, pid=1, host="h", version="1+a", epoch=7, policy="slackfit",
        client_endpoint="tcp://h:1", worker_endpoint="tcp://h:2", cpu_s=0.0, loop_s=0.0,
    )  # fmt: skip
    return replace(well, **other)


def queries(**other: Any) -> QueryCounts:
    """Return the counts of queries, all 0."""
    return replace(QueryCounts(0, 0, EndCounts(), 0, 0.0, 0, 0.0, 0, 0), **other)


def status(*gpus: GpuStatus, **other: Any) -> RouterStatus:
    """Return a STATUS of these GPUs."""
    well = RouterStatus(
        router=info(),
        queries=queries(),
        queue=QueueStatus(0, None, 0),
        batches=BatchCounts(0, 0, 0),
        lost_processes=0,
        model=None,
        clients=1,
        counts={},
        recent=Recent(WINDOW, replace(WINDOW, seconds=60.0)),
        workers_ready=len(gpus),
        workers_needed=GpusNeeded(1.0, 0.5),
        workers=gpus,
    )
    return replace(well, **other)


def ended(**answered: int) -> Recent:
    """Return a recent past in which queries ended so."""
    window = replace(WINDOW, answered=EndCounts(**answered))
    return Recent(window, window)
