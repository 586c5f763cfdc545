"""The whole of several routers: one STATUS made of theirs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from superserve.status import (
    BatchCounts,
    EndCounts,
    GpusNeeded,
    QueryCounts,
    QueueStatus,
    Recent,
    RecentWindow,
    RouterShare,
    RouterStatus,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def whole_of(found: Sequence[tuple[str, RouterStatus | None]]) -> RouterStatus:
    """Return the STATUS of a cluster: sums of its routers' counts, and all of their GPUs.

    Args:
        found: Each router's client endpoint and STATUS, None if it does not answer; one at least does.

    What there is one of (policy, model, version, endpoints) is that of the first router that answers, and
    `routers` lists the share of each. A router that has been restarted has counted from 0 since.
    """
    there = [status for _, status in found if status is not None]
    first = there[0]
    heads = [one.queue.head_slack_ms for one in there if one.queue.head_slack_ms is not None]
    counts: Counter[str] = Counter()
    for one in there:
        counts.update(one.counts)
    router = replace(
        first.router,
        draining=all(one.router.draining for one in there),
        # Another one as soon as any of them is: counters start from 0 then.
        epoch=sum(one.router.epoch for one in there) % (1 << 62),
        client_endpoint=",".join(endpoint for endpoint, _ in found),
        cpu_s=sum(one.router.cpu_s for one in there),
        loop_s=sum(one.router.loop_s for one in there),
    )
    return replace(
        first,
        router=router,
        queries=_queries([one.queries for one in there]),
        queue=QueueStatus(
            length=sum(one.queue.length for one in there),
            head_slack_ms=min(heads, default=None),
            held_bytes=sum(one.queue.held_bytes for one in there),
        ),
        batches=BatchCounts(
            *(
                sum(getattr(one.batches, name) for one in there)
                for name in ("dispatched", "in_flight", "stale")
            )
        ),
        lost_processes=sum(one.lost_processes for one in there),
        model=next((one.model for one in there if one.model is not None), None),
        # Each client has a connection to every router.
        clients=max(one.clients for one in there),
        counts=dict(counts),
        recent=Recent(
            _window([one.recent.short for one in there]), _window([one.recent.long for one in there])
        ),
        workers_ready=sum(one.workers_ready for one in there),
        workers_needed=GpusNeeded(
            sum(one.workers_needed.as_served for one in there),
            sum(one.workers_needed.at_least for one in there),
        ),
        workers=tuple(gpu for one in there for gpu in one.workers),
        routers=tuple(_share(endpoint, status) for endpoint, status in found),
    )


def _share(endpoint: str, status: RouterStatus | None) -> RouterShare:
    if status is None:
        return RouterShare(endpoint)
    return RouterShare(
        endpoint, answers=True, draining=status.router.draining, gpus=status.workers_ready,
        queued=status.queue.length, received=status.queries.received,
    )  # fmt: skip


def _ends(parts: Iterable[EndCounts]) -> EndCounts:
    columns = zip(*([n for _, n in one.items()] for one in parts), strict=True)
    return EndCounts(*(sum(column) for column in columns))


def _queries(parts: Sequence[QueryCounts]) -> QueryCounts:
    names = (
        "received", "in_flight", "redispatched", "ok_accuracy", "executed", "busy_s", "payload_bytes",
        "output_bytes",
    )  # fmt: skip
    sums = {name: sum(getattr(one, name) for one in parts) for name in names}
    return QueryCounts(answered=_ends(one.answered for one in parts), **sums)


def _window(parts: Sequence[RecentWindow]) -> RecentWindow:
    names = ("received", "ok_accuracy", "busy_s", "executed")
    sums = {name: sum(getattr(one, name) for one in parts) for name in names}
    seconds = max(one.seconds for one in parts)
    return RecentWindow(seconds=seconds, answered=_ends(one.answered for one in parts), **sums)
