"""How fast the simulator is: seconds of a cluster's time for each second of one processor's."""

from __future__ import annotations

import time
from dataclasses import dataclass

from loadgen.simulator.simulate import simulate
from loadgen.traces.trace import load_trace
from profiles.table import load_profile

RATE_QPS = 7_000.0
N_GPUS = 8
MUST_X = 20.0
"""What the simulator must reach at this rate and this number of GPUs."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The cost of a simulation.

    Attributes:
        x_realtime: Seconds simulated for each second of CPU time.
        attainment: Of the run, because refusing everything would be fast.
        us_per_query: CPU time.
    """

    x_realtime: float
    n_queries: int
    n_batches: int
    attainment: float
    us_per_query: float


def speed(
    *, rate_qps: float = RATE_QPS, n_gpus: int = N_GPUS, seconds: float = 20.0, policy: str = "slackfit"
) -> Speed:
    """Simulate Poisson arrivals on the modelled CNN profile, and return how fast that was.

    In CPU time, not wall-clock time: on a shared machine that is what a dedicated processor would take.
    """
    trace = load_trace(f"poisson:rate={rate_qps:g}", duration_s=seconds)
    cluster = [load_profile("cnn-8gpu-modelled")] * n_gpus
    began_s = time.process_time()
    found = simulate(trace, cluster, policy=policy)
    took_s = time.process_time() - began_s
    return Speed(
        seconds / took_s, trace.n, found.n_batches, found.result.slo_attainment or 0.0, 1e6 * took_s / trace.n
    )


def fastest(*, seconds: float, n_times: int = 3) -> Speed:
    """Return the fastest of a few simulations, because other load on the machine only slows them down."""
    return max((speed(seconds=seconds) for _ in range(n_times)), key=lambda found: found.x_realtime)
