"""The whole of several routers: one frame made of theirs. No clock, no socket.

Each router has its own clock; in the whole, instants are shifted to the page's.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from cluster.web.feed import figures_of
from cluster.web.frames import attainment_of, worker_of
from superserve.whole import whole_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.web.watch import RouterLook
    from superserve.status import RouterStatus

_A_SECOND = 4  # frames
_NEW = ("batches", "misses")
"""What a frame has since the one before: a router that was not asked in time has none."""


class WholeFeed:
    """Makes frames of the whole.

    Args:
        name: The cluster's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._past: deque[RouterStatus] = deque(maxlen=_A_SECOND)

    def frame(self, looks: Sequence[RouterLook], now_ms: float) -> dict[str, Any]:
        """Return the next frame; its `parts` are the routers' own, None for one that does not answer.

        Args:
            looks: One for each router, in their order; one of them at least has answered.
            now_ms: The page's clock.
        """
        whole = whole_of([(look.endpoint, look.status) for look in looks])
        if self._past and self._past[-1].router.epoch != whole.router.epoch:
            self._past.clear()
        frames = [(at, look.frame) for at, look in enumerate(looks, 1) if look.frame is not None]
        figures = figures_of(self._name, whole, self._past[0] if self._past else None)
        self._past.append(whole)
        gone = [
            {"verdict": "wrong", "text": f"router {at} does not answer: {look.why}", "fix": ""}
            for at, look in enumerate(looks, 1) if look.frame is None
        ]  # fmt: skip
        return {
            **figures,
            "findings": [*gone, *figures["findings"]],
            **_sums([frame for _, frame in frames]),
            **_joined(frames, now_ms),
            "t": now_ms,
            "workers": [worker_of(gpu) for gpu in whole.workers],
            "routers": [_router_of(at, look) for at, look in enumerate(looks, 1)],
            "parts": [look.frame for look in looks],
        }


def idle(frame: dict[str, Any]) -> dict[str, Any]:
    """Return a frame of a router that has not answered yet again: as it was, and nothing new."""
    return {**frame, **{key: [] for key in _NEW}, "subnets": {}, "served_accuracy": None}


def _router_of(at: int, look: RouterLook) -> dict[str, Any]:
    row: dict[str, Any] = {"router": at, "endpoint": look.endpoint, "answers": look.frame is not None}
    if look.status is None or look.frame is None:
        return row
    recent = look.status.recent.short.answered
    return row | {
        "draining": look.status.router.draining, "gpus": look.status.workers_ready,
        "queue": look.status.queue.length, "in": look.frame["in"], "att": attainment_of(recent),
    }  # fmt: skip


def _sums(frames: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what adds up: rates, and who served."""
    missed: Counter[str] = Counter()
    served: Counter[str] = Counter()
    accuracy, n = 0.0, 0
    for frame in frames:
        missed.update(frame["missed"])
        served.update(frame["subnets"])
        own = sum(frame["subnets"].values())
        if frame["served_accuracy"] is not None:
            accuracy, n = accuracy + own * frame["served_accuracy"], n + own
    named = next((frame for frame in frames if frame["subnet_names"]), frames[0])
    return {
        "in": sum(frame["in"] for frame in frames),
        "ok": sum(frame["ok"] for frame in frames),
        "missed": dict(missed),
        "subnets": dict(served),
        "subnet_names": named["subnet_names"],
        "accuracies": named["accuracies"],
        "served_accuracy": accuracy / n if n else None,
        "river": river_of([frame["river"] for frame in frames if frame["river"]]),
    }


def river_of(rivers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the histogram of all queues: bins as wide as the widest, which are multiples of the others'."""
    if not rivers:
        return None
    width_ms = max(river["width_ms"] for river in rivers)
    counts = [0] * max(len(river["counts"]) for river in rivers)
    for river in rivers:
        for i, n in enumerate(river["counts"]):
            counts[i * river["width_ms"] // width_ms] += n
    return {
        "width_ms": width_ms, "counts": counts,
        "quickest_ms": min(river["quickest_ms"] for river in rivers),
    }  # fmt: skip


def _joined(frames: list[tuple[int, dict[str, Any]]], now_ms: float) -> dict[str, Any]:
    """Return what stands side by side: GPUs, batches, misses and clients, each with its router's number."""
    gpus: list[str] = []
    batches: list[list[float]] = []
    misses: list[dict[str, Any]] = []
    clients: list[dict[str, Any]] = []
    for at, frame in frames:
        shift_ms, first = now_ms - frame["t"], len(gpus)
        gpus += frame["gpus"]
        batches += [[first + gpu, start + shift_ms, *more] for gpu, start, *more in frame["batches"]]
        misses += [
            {**one, "name": f"{one['name']} at {at}", "at": one["at"] + shift_ms} for one in frame["misses"]
        ]
        clients += [{**one, "client": f"{one['client']} at {at}"} for one in frame["clients"]]
    clients.sort(key=lambda row: (-row["rate"], -row["total"]))
    return {"gpus": gpus, "batches": batches, "misses": misses, "clients": clients}
