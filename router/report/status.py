"""STATUS: what the router knows, as JSON."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any

from router.report.load import LONG_S, SHORT_S, fleet, workers_needed
from superserve.roles.version import version
from superserve.wire import Status

if TYPE_CHECKING:
    from router.core import RouterCore
    from router.core.workers import Worker
    from router.serve.server import RouterServer

MS = 1_000_000


def status_of(core: RouterCore, now_ns: int) -> dict[str, Any]:
    """Return counters, queue, and workers; durations in milliseconds, instants as durations from now."""
    return {**summary_of(core, now_ns), "workers": [worker_status(w, now_ns) for w in core.workers()]}


def summary_of(core: RouterCore, now_ns: int) -> dict[str, Any]:
    """Return what costs the same however many workers there are."""
    head, n_out = core.queue.head(), len(core.ledger.batches)
    return {
        "router": {"draining": core.draining},
        "queries": {
            "received": core.received,
            "in_flight": core.in_flight,
            "answered": {status.name.lower(): core.answered[status] for status in Status},
            "redispatched": core.n_redispatched,
            "ok_accuracy": core.ok_accuracy,
            "executed": core.n_executed,
            "busy_s": core.busy_ns / 1e9,
            "payload_bytes": core.payload_bytes_in,
            "output_bytes": core.output_bytes,
        },
        "queue": {
            "length": len(core.queue),
            "head_slack_ms": None if head is None else (head[0] - now_ns) / MS,
            "held_bytes": core.held_bytes,
        },
        "batches": {"dispatched": core.n_batches, "in_flight": n_out, "stale": core.n_stale},
        "lost_processes": core.n_lost_peers,
    }


def summary_of_server(server: RouterServer, now_ns: int) -> dict[str, Any]:
    """Return `summary_of` with what the sockets and the process add, and the recent past."""
    body = summary_of(server.core, now_ns)
    body["router"] |= {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "version": version(),
        "epoch": server.epoch,
        "policy": server.settings.policy,
        "client_endpoint": server.client_endpoint,
        "worker_endpoint": server.worker_endpoint,
        "cpu_s": time.process_time(),
        "loop_s": server.loop_ns / 1e9,
    }
    body["model"] = server.model
    body["clients"] = server.n_clients
    body["counts"] = dict(server.counts)
    recent = {f"{s}s": server.load.recent(server.core, now_ns, s) for s in (SHORT_S, LONG_S)}
    gpus = fleet(server.core)
    body["recent"] = recent
    body["workers_ready"] = gpus.ready
    body["workers_needed"] = workers_needed(recent[f"{SHORT_S}s"], gpus)
    return body


def status_of_server(server: RouterServer, now_ns: int) -> dict[str, Any]:
    """Return the body of STATUS."""
    workers = [
        {
            **worker_status(worker, now_ns),
            "host": server.host_of(worker.peer.key),
            "version": server.version_of(worker.peer.key),
        }
        for worker in server.core.workers()
    ]
    return {**summary_of_server(server, now_ns), "workers": workers}


def worker_status(worker: Worker, now_ns: int) -> dict[str, Any]:
    """Return what is known of one GPU."""
    row = worker.last_subnet
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
        "busy_s": worker.busy_ns / 1e9,
        "last_subnet": None if row is None else worker.profile.subnets[row].name,
        "gauges": worker.gauges,
    }
