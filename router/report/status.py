"""STATUS: the router's report, from its core and from the facts of the loop around it."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from router.report.load import fleet, workers_needed
from superserve.build import build
from superserve.clock import MS
from superserve.roles.version import version
from superserve.status import (
    LONG_S,
    SHORT_S,
    BatchCounts,
    EndCounts,
    GpuStatus,
    QueryCounts,
    QueueStatus,
    Recent,
    RouterInfo,
    RouterStatus,
    RouterSummary,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from router.core import RouterCore
    from router.core.workers import Worker
    from router.report.load import Load
    from superserve.hello import ModelSpec
    from superserve.status import ListedKeys


@dataclass(frozen=True, slots=True)
class LoopFacts:
    """What the loop knows and the core does not.

    Attributes:
        epoch: The router's life.
        policy: As given to `--policy`.
        client_endpoint: Where clients connect.
        worker_endpoint: Where workers connect.
        loop_ns: Time spent in passes so far.
        model: What the workers serve; None before one has joined.
        n_clients: How many are connected.
        counts: Messages, loops and faults, by name.
        load: The recent past.
        settings_error: What is wrong with the settings file; "" if nothing is.
    """

    epoch: int
    policy: str
    client_endpoint: str
    worker_endpoint: str
    loop_ns: int
    model: ModelSpec | None
    n_clients: int
    counts: Mapping[str, int]
    load: Load
    settings_error: str = ""


class Origin(NamedTuple):
    """What a worker process states about itself; "" if it does not."""

    host: str = ""
    version: str = ""


_UNKNOWN = Origin()


def summary_of(core: RouterCore, loop: LoopFacts, now_ns: int) -> RouterSummary:
    """Return the part of STATUS that costs the same for any number of workers."""
    return RouterSummary(**_summary(core, loop, now_ns))


def status_of(
    core: RouterCore,
    loop: LoopFacts,
    now_ns: int,
    *,
    origins: Mapping[Any, Origin],
    keys: ListedKeys | None = None,
) -> RouterStatus:
    """Return STATUS; durations in milliseconds, instants as durations from now.

    Args:
        core: The router's core.
        loop: The loop's facts.
        now_ns: The instant of the report.
        origins: What worker processes state about themselves, by their keys in the core.
        keys: The listed keys; None without keys.
    """
    workers = tuple(
        [gpu_status(one, now_ns, origins.get(one.peer.key, _UNKNOWN)) for one in core.residents()]
    )
    return RouterStatus(**_summary(core, loop, now_ns), workers=workers, keys=keys)


def _summary(core: RouterCore, loop: LoopFacts, now_ns: int) -> dict[str, Any]:
    past = Recent(*(loop.load.recent(core, now_ns, window_s) for window_s in (SHORT_S, LONG_S)))
    gpus = fleet(core)
    head = core.queue.head()
    return {
        "router": _info(loop, core),
        "queries": QueryCounts(
            received=core.received,
            in_flight=core.in_flight,
            answered=EndCounts(*core.answered),
            redispatched=core.n_redispatched,
            ok_accuracy=core.ok_accuracy,
            executed=core.n_executed,
            busy_s=core.busy_ns / 1e9,
            payload_bytes=core.payload_bytes_in,
            output_bytes=core.output_bytes,
        ),
        "queue": QueueStatus(
            length=len(core.queue),
            head_slack_ms=None if head is None else (head[0] - now_ns) / MS,
            held_bytes=core.held_bytes,
        ),
        "batches": BatchCounts(
            dispatched=core.n_batches, in_flight=len(core.ledger.batches), stale=core.n_stale
        ),
        "lost_processes": core.n_lost_peers,
        "model": loop.model,
        "clients": loop.n_clients,
        "counts": dict(loop.counts)
        | {"wrong_choices": core.n_wrong_choices, "borrowed_batches": core.n_borrowed},
        "recent": past,
        "workers_ready": gpus.ready,
        "workers_needed": workers_needed(past.short, gpus),
    }


def _info(loop: LoopFacts, core: RouterCore) -> RouterInfo:
    settings = core.settings
    is_fixed = settings.margin_ns == settings.least_margin_ns
    return RouterInfo(
        draining=core.draining,
        max_queries=settings.max_queries,
        max_bytes=settings.max_bytes,
        margin_ms=settings.margin_ns / MS if is_fixed else None,
        settings_error=loop.settings_error,
        pid=os.getpid(),
        host=socket.gethostname(),
        version=version(),
        build=build(),
        epoch=loop.epoch,
        policy=loop.policy,
        client_endpoint=loop.client_endpoint,
        worker_endpoint=loop.worker_endpoint,
        cpu_s=time.process_time(),
        loop_s=loop.loop_ns / 1e9,
    )


def gpu_status(worker: Worker, now_ns: int, origin: Origin = _UNKNOWN) -> GpuStatus:
    """Return the status of one GPU."""
    row = worker.last_subnet
    return GpuStatus(
        name=worker.peer.name,
        slot=worker.slot,
        state=worker.machine.state.value,
        process=worker.peer.machine.state.value,
        history=worker.machine.history(),
        profile=worker.profile.name,
        device=worker.profile.device,
        credit=worker.credit,
        outstanding=len(worker.outstanding),
        free_in_ms=max(0, worker.free_at_ns - now_ns) / MS,
        transport_ms=worker.transport.median_ns / MS,
        slowdown=round(worker.slowdown, 4),
        batches=worker.n_batches,
        queries=worker.n_queries,
        busy_s=worker.busy_ns / 1e9,
        last_subnet=None if row is None else worker.profile.subnets[row].name,
        gauges=dict(worker.gauges),
        host=origin.host,
        version=origin.version,
    )
