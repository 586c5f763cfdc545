"""Simulations whose flight record is kept: what the tests explain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loadgen.simulator.simulate import SimSettings, Simulation, Workload, summarised, uncollected
from loadgen.study.explain.flight import FlightLog
from loadgen.traces.trace import Trace, load_trace
from profiles.table import load_profile
from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from loadgen.simulator.faults import Fault
    from loadgen.simulator.simulate import Simulated
    from loadgen.study.explain.flight import Flight
    from router.core.events import CoreSettings

PROFILE = "cnn-8gpu-modelled"
SLO_NS = 36 * MS
LARGEST = "fixed:cnn-80.16"


@dataclass(frozen=True, slots=True)
class Flown:
    """A simulation, and the record of its router."""

    flight: Flight
    simulated: Simulated


def fly(
    trace: Trace,
    *,
    gpus: int = 4,
    policy: str = "slackfit",
    slo_ns: int | npt.NDArray[np.int64] = SLO_NS,
    faults: Sequence[Fault] = (),
    each: int = 8,
    core: CoreSettings | None = None,
    factor: float = 1.0,
    rest_ns: int = SimSettings().router_rest_ns,
    n_clients: int = 1,
    slow: Mapping[int, float] | None = None,
    priority: npt.NDArray[np.uint8] | None = None,
    min_accuracy: npt.NDArray[np.float32] | None = None,
) -> Flown:
    """Simulate a trace and keep the record; `factor` slows every GPU, `slow` those of some processes."""
    workload = Workload(trace, slo_ns, min_accuracy, priority)
    settings = SimSettings(gpus_per_process=each, router_rest_ns=rest_ns, n_clients=n_clients)
    cluster = [load_profile(PROFILE)] * gpus
    found = Simulation(cluster, policy=policy, faults=faults, settings=settings, core=core)
    for number in range(len(found.processes)):
        found.slow(number, (slow or {}).get(number, factor))
    clients = found.offer(workload)
    log = FlightLog()
    found.on_pass = lambda now_ns, actions: log.note(found.core, actions, now_ns)
    with uncollected():
        found.run()
    return Flown(log.flight(policy), summarised(workload, found, clients, policy))


def even(rate_qps: float, duration_s: float = 0.5) -> Trace:
    """Return a trace with equal gaps."""
    n = int(rate_qps * duration_s)
    return Trace("even", (np.arange(n) * 1e9 / rate_qps).astype(np.int64), int(duration_s * 1e9), "of a test")


def spike(n: int, at_ms: int = 100, base_qps: float = 200.0) -> Trace:
    """Return an even trace with n queries that are due together."""
    base = even(base_qps)
    due_ns = np.sort(np.concatenate([base.due_ns, np.full(n, at_ms * MS)]))
    return Trace("spike", due_ns, base.duration_ns, "of a test")


def drawn(spec: str, duration_s: float, seed: int = 1) -> Trace:
    """Return a trace of a spec."""
    return load_trace(spec, rate_qps=None, duration_s=duration_s, seed=seed)
