"""The router's recent past: what came and how it ended over the last seconds, and the GPUs that asks for.

The loop notes a line of counters once a second; a rate is the difference of two lines. Nothing
here decides anything: it is for people, dashboards and autoscalers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from router.core.workers import PeerState, WorkerState
from superserve.wire import Status

if TYPE_CHECKING:
    from router.core import RouterCore

SECOND = 1_000_000_000
SHORT_S, LONG_S = 10, 60
"""Windows over which the recent past is summed up, seconds."""

TARGET_UTILISATION = 0.8
"""Share of a GPU's time that `workers_needed` plans to fill: bursts need the rest."""


class Line(NamedTuple):
    """The counters of one instant."""

    at_ns: int
    received: int
    answered: tuple[int, ...]  # by `Status`
    ok_accuracy: float
    busy_ns: int
    n_executed: int


class Load:
    """A line a second, for a little more than a minute."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=LONG_S + 1)

    def note(self, core: RouterCore, now_ns: int) -> None:
        """Keep a line if the last one is a second old."""
        if not self._lines or now_ns - self._lines[-1].at_ns >= SECOND:
            self._lines.append(_line(core, now_ns))

    def recent(self, core: RouterCore, now_ns: int, window_s: int) -> dict[str, Any]:
        """Return what has happened within the last `window_s` seconds, or since the first line.

        `seconds` is how long that really was; everything else is a difference of counters.
        """
        now = _line(core, now_ns)
        since_ns = now_ns - window_s * SECOND - SECOND // 2
        then = next((line for line in self._lines if line.at_ns >= since_ns), now)
        return {
            "seconds": (now_ns - then.at_ns) / SECOND,
            "received": now.received - then.received,
            "answered": {
                status.name.lower(): now.answered[status] - then.answered[status] for status in Status
            },
            "ok_accuracy": now.ok_accuracy - then.ok_accuracy,
            "busy_s": (now.busy_ns - then.busy_ns) / SECOND,
            "executed": now.n_executed - then.n_executed,
        }


def _line(core: RouterCore, now_ns: int) -> Line:
    return Line(now_ns, core.received, tuple(core.answered), core.ok_accuracy, core.busy_ns, core.n_executed)


class FleetSize(NamedTuple):
    """The GPUs that take work.

    Attributes:
        ready: How many.
        least_s: Least GPU time that a query can take, averaged over them; 0 without any.
    """

    ready: int
    least_s: float


def fleet(core: RouterCore) -> FleetSize:
    """Return the GPUs that take work, and what a query costs on the smallest subnet in its best batches.

    GPUs that differ are averaged by what they can do: the mean is harmonic, each cost corrected by slowdown.
    """
    least_ns: dict[int, float] = {}
    ready, capacity = 0, 0.0
    for peer in core.peers.values():
        if peer.machine.state is not PeerState.LIVE:
            continue
        for worker in peer.workers:
            if worker.machine.state is WorkerState.READY:
                profile = worker.profile
                each_ns = least_ns.get(id(profile))
                if each_ns is None:
                    sizes = profile.batch_sizes
                    each_ns = min([profile.latency_ns(0, size) / size for size in sizes])
                    least_ns[id(profile)] = each_ns
                ready += 1
                capacity += SECOND / (each_ns * worker.slowdown)
    return FleetSize(ready, ready / capacity if ready else 0.0)


def workers_needed(recent: dict[str, Any], of: FleetSize) -> dict[str, float]:
    """Return how many GPUs the arrivals of `recent` ask for.

    `as_served` is arrivals a second x GPU seconds a query as now served / `TARGET_UTILISATION`: what
    keeps the present accuracy for everybody who asks, those refused included. `at_least` takes
    the fleet's least cost instead, which is what deadlines need at the lowest accuracy. Both
    are fractions of a GPU: round up. Where nothing has been executed, both are `at_least`.
    """
    rate_qps = recent["received"] / recent["seconds"] if recent["seconds"] > 0 else 0.0
    each_s = recent["busy_s"] / recent["executed"] if recent["executed"] else of.least_s
    return {
        "as_served": rate_qps * each_s / TARGET_UTILISATION,
        "at_least": rate_qps * of.least_s / TARGET_UTILISATION,
    }
