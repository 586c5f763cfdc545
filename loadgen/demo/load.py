"""The demo's load, derived from the measured profile.

It is too much for the largest subnet, and leaves the smallest one headroom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadgen.traces.trace import load_trace
from superserve.clock import MS, SECOND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.traces.trace import Trace
    from profiles.measuring.measure import Measurement

_LOAD = 1.25  # as a multiple of the largest subnet's capacity at its fastest
_BASE_SHARE = 0.35  # of the load, as a constant stream; the rest comes in bursts
_CV2 = (40.0, 20.0, 10.0, 4.0, 1.0)  # of the bursts: the first whose peak leaves the smallest subnet headroom
_PEAK_S = 0.1
_HEADROOM = 0.5  # the peak takes at most this share of the smallest subnet's capacity
# Ten full batches of the largest subnet: a slow machine stalls for as many batches as a fast one.
_LEAST_SLO_MS, _SLO_BATCHES, _SLO_STEP_MS = 150.0, 10, 50.0
_MARGIN = 0.1  # of the SLO, held back by the router, because all processes share this machine's cores


@dataclass(frozen=True, slots=True)
class DemoLoad:
    """The load that every policy gets.

    Attributes:
        trace: When the queries are due.
        slo_ms: From due to deadline.
        largest_qps: The largest subnet's capacity at its fastest.
        smallest_qps: The smallest subnet's capacity with ordinary batches.
    """

    trace: Trace
    slo_ms: float
    largest_qps: float
    smallest_qps: float

    @property
    def slo_ns(self) -> int:
        """The SLO in nanoseconds."""
        return int(self.slo_ms * MS)

    @property
    def margin_ms(self) -> float:
        """Slack that the router holds back."""
        return _MARGIN * self.slo_ms

    def lines(self) -> list[str]:
        """Return the load in words."""
        n, seconds = self.trace.n, self.trace.duration_ns / SECOND
        mean, peak = self.trace.mean_qps, self.trace.peak_qps(_PEAK_S)
        return [
            f"A bursty trace: {n:,} queries in {seconds:g} s, SLO {self.slo_ms:g} ms.",
            f"Mean {mean:,.0f} q/s, {mean / self.largest_qps:.2f} of what the largest subnet can do at best;",
            f"peak {peak:,.0f} q/s in {_PEAK_S:g} s, {peak / self.smallest_qps:.2f} of the smallest's.",
        ]


def capacity_qps(batch_sizes: Sequence[int], latency_ns: Sequence[float]) -> float:
    """Return the most queries a second of one subnet, at its best batch size."""
    return max(size * SECOND / ns for size, ns in zip(batch_sizes, latency_ns, strict=True))


def burst_spec(qps: float, cv2: float = _CV2[0]) -> str:
    """Return the spec of a bursty trace that overloads a subnet with a capacity of `qps` queries a second."""
    mean_qps = _LOAD * qps
    base = round(_BASE_SHARE * mean_qps)
    return f"bursty:base={base},variant={round(mean_qps) - base},cv2={cv2:g}"


def sized_load(
    measurement: Measurement, *, seconds: float, slo_ms: float | None = None, seed: int = 0
) -> DemoLoad:
    """Return the load for a measurement.

    Args:
        measurement: Of the subnets that will serve, on the machine that will serve them.
        seconds: Length of the trace.
        slo_ms: None for 150, or ten full batches of the largest subnet if that is longer.
        seed: Of the arrivals.
    """
    sizes, subnets = measurement.profile.batch_sizes, measurement.profile.subnets
    # Other work may have slowed down the medians, and be gone by the time the largest subnet serves.
    least_ns = [ms * MS for ms in measurement.raw[subnets[-1].name]["min_ms"]]
    largest_qps, smallest_qps = capacity_qps(sizes, least_ns), capacity_qps(sizes, subnets[0].latency_ns)
    if slo_ms is None:
        batches_ms = _SLO_BATCHES * subnets[-1].latency_ns[-1] / MS
        slo_ms = max(_LEAST_SLO_MS, _SLO_STEP_MS * math.ceil(batches_ms / _SLO_STEP_MS))
    # Queries that wait when the last one is due may still be served in time.
    served_qps = largest_qps * (1 + slo_ms * MS / SECOND / seconds)
    for cv2 in _CV2:
        trace = load_trace(burst_spec(served_qps, cv2), duration_s=seconds, seed=seed)
        if trace.peak_qps(_PEAK_S) <= _HEADROOM * smallest_qps:
            break
    return DemoLoad(trace, slo_ms, largest_qps, smallest_qps)
