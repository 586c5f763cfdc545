"""STATUS: what the core knows, as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from superserve.wire import Status

if TYPE_CHECKING:
    from router.core import RouterCore
    from router.workers import Worker

MS = 1_000_000


def status_of(core: RouterCore, now_ns: int) -> dict[str, Any]:
    """Return counters, queue, and workers; durations in milliseconds, instants as durations from now."""
    head = core.queue.head()
    return {
        "router": {"draining": core.draining},
        "queries": {
            "received": core.received,
            "in_flight": core.in_flight,
            "answered": {status.name.lower(): core.answered[status] for status in Status},
            "redispatched": core.n_redispatched,
        },
        "queue": {
            "length": len(core.queue),
            "head_slack_ms": None if head is None else (head[0] - now_ns) / MS,
            "held_bytes": core.held_bytes,
        },
        "batches": {"dispatched": core.n_batches, "in_flight": len(core.ledger), "stale": core.n_stale},
        "workers": [_worker(worker, now_ns) for worker in core.workers()],
    }


def _worker(worker: Worker, now_ns: int) -> dict[str, Any]:
    return {
        "name": worker.peer.name,
        "slot": worker.slot,
        "state": worker.machine.state.value,
        "process": worker.peer.machine.state.value,
        "history": worker.machine.history(),
        "profile": worker.profile.name,
        "device": worker.profile.device,
        "credit": worker.credit,
        "outstanding": len(worker.outstanding),
        "free_in_ms": max(0, worker.free_at_ns - now_ns) / MS,
        "transport_ms": worker.transport.median_ns / MS,
        "slowdown": round(worker.slowdown, 4),
        "batches": worker.n_batches,
        "queries": worker.n_queries,
        "gauges": worker.gauges,
    }
