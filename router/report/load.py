"""The router's recent past: what arrived and how it ended over the last seconds, and the GPUs that it needs.

The loop records the counters once a second; a rate is the difference of two records. Nothing here
decides anything: it is for people, dashboards and autoscalers.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from superserve.status import LONG_S, EndCounts, GpusNeeded, RecentWindow, is_well

if TYPE_CHECKING:
    from router.core import RouterCore

SECOND = 1_000_000_000

TARGET_UTILISATION = 0.8
"""Share of a GPU's time that `workers_needed` plans to use: bursts need the rest."""


class Line(NamedTuple):
    """The counters at one instant."""

    at_ns: int
    received: int
    answered: tuple[int, ...]  # by `Status`
    ok_accuracy: float
    busy_ns: int
    n_executed: int


class Load:
    """The counters of each second, for a little more than a minute."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=LONG_S + 1)

    def note(self, core: RouterCore, now_ns: int) -> None:
        """Record the counters if the last record is a second old."""
        if not self._lines or now_ns - self._lines[-1].at_ns >= SECOND:
            self._lines.append(_line(core, now_ns))

    def recent(self, core: RouterCore, now_ns: int, window_s: int) -> RecentWindow:
        """Return what has happened within the last `window_s` seconds, or since the first record."""
        now = _line(core, now_ns)
        since_ns = now_ns - window_s * SECOND - SECOND // 2
        then = next((line for line in self._lines if line.at_ns >= since_ns), now)
        return RecentWindow(
            seconds=(now_ns - then.at_ns) / SECOND,
            received=now.received - then.received,
            answered=EndCounts(*now.answered).since(EndCounts(*then.answered)),
            ok_accuracy=now.ok_accuracy - then.ok_accuracy,
            busy_s=(now.busy_ns - then.busy_ns) / SECOND,
            executed=now.n_executed - then.n_executed,
        )


def _line(core: RouterCore, now_ns: int) -> Line:
    return Line(now_ns, core.received, tuple(core.answered), core.ok_accuracy, core.busy_ns, core.n_executed)


class FleetSize(NamedTuple):
    """The GPUs that take work.

    Attributes:
        ready: Their number.
        least_s: Least GPU time that a query can take, averaged over them; 0 without any.
    """

    ready: int
    least_s: float


def fleet(core: RouterCore) -> FleetSize:
    """Return the GPUs that take work, and the cost of a query on the smallest subnet in its best batches.

    GPUs that differ are averaged by capacity: a harmonic mean, each cost corrected by slowdown.
    """
    least_ns: dict[int, float] = {}
    ready, capacity = 0, 0.0
    for worker in core.residents():
        if is_well(worker.peer.machine.state.value, worker.machine.state.value):
            profile = worker.profile
            each_ns = least_ns.get(id(profile))
            if each_ns is None:
                sizes = profile.batch_sizes
                each_ns = min([profile.latency_ns(0, size) / size for size in sizes])
                least_ns[id(profile)] = each_ns
            ready += 1
            capacity += SECOND / (each_ns * worker.slowdown)
    return FleetSize(ready, ready / capacity if ready else 0.0)


def workers_needed(past: RecentWindow, of: FleetSize) -> GpusNeeded:
    """Return how many GPUs the arrivals of `past` need.

    `as_served` is arrivals a second x GPU seconds a query as now served / `TARGET_UTILISATION`: it keeps
    the present accuracy for all arrivals, including those that were refused. `at_least` uses the fleet's
    least cost instead: it meets deadlines at the lowest accuracy. Both are fractions of a GPU: round up.
    If nothing has been executed, both are `at_least`.
    """
    rate_qps = past.received / past.seconds if past.seconds > 0 else 0.0
    each_s = past.busy_s / past.executed if past.executed else of.least_s
    return GpusNeeded(
        as_served=rate_qps * each_s / TARGET_UTILISATION, at_least=rate_qps * of.least_s / TARGET_UTILISATION
    )
