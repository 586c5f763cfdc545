"""PlanFit in the simulator: what it keeps where others lose queries, and what that costs elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from gpu_worker.core.played import Pace
from loadgen.simulator.links import Way
from loadgen.simulator.simulate import SimSettings, simulate, slowed
from loadgen.simulator.workloads import mixed_workload
from loadgen.traces.trace import Trace, load_trace
from profiles.table import load_profile
from superserve.clock import MS

if TYPE_CHECKING:
    from loadgen.simulator.simulate import Simulated

CNN = load_profile("cnn-8gpu-modelled")
EVEN = [CNN] * 8


def attainment(found: Simulated) -> float:
    """Return the share of all queries answered in time."""
    assert found.result.slo_attainment is not None
    return found.result.slo_attainment


def spikes(n: int, *, every_ms: int = 400, duration_ms: int = 2_300) -> Trace:
    """Return a query every 5 ms, and n of them at once from time to time."""
    calm = np.arange(0, duration_ms, 5)
    spike = np.repeat(np.arange(300, duration_ms, every_ms), n)
    due_ns = np.sort(np.concatenate([calm, spike])).astype(np.int64) * MS
    return Trace("spikes", due_ns, duration_ms * MS, "made by a test")


def test_spikes_are_served_without_giving_up_accuracy_between_them() -> None:
    """200 at once on eight idle GPUs: as many in time as on the smallest subnet, at 78 % and more."""
    ours, cheapest = (simulate(spikes(200), EVEN, policy=name) for name in ("planfit", "mincost"))
    assert attainment(ours) >= attainment(cheapest) - 0.0005
    assert (ours.result.mean_accuracy or 0) > 78


def test_spikes_near_what_the_cluster_can_do_are_served_on_small_subnets() -> None:
    """500 at once: the plan leaves just the time that they take."""
    ours, cheapest = (simulate(spikes(500), EVEN, policy=name) for name in ("planfit", "mincost"))
    assert attainment(ours) >= attainment(cheapest) - 0.0005
    assert (ours.result.mean_accuracy or 0) > (cheapest.result.mean_accuracy or 0) + 0.5


def test_floors_are_packed() -> None:
    """A third of 4,500 q/s at the largest subnet is in time; batches that draw others in lose a tenth."""
    trace = load_trace("poisson:rate=4500", duration_s=0.6, seed=1)
    workload = mixed_workload(trace, [(36 * MS, 1.0)], (80.0, 1 / 3), seed=1)
    ours, theirs = (simulate(workload, EVEN, policy=name) for name in ("planfit", "demandfit"))
    assert attainment(ours) >= 0.999
    assert attainment(theirs) < 0.95


@pytest.mark.parametrize(
    "surroundings",
    [
        SimSettings(way=Way(200_000, 4 * MS)),
        SimSettings(pace=Pace(speed=1 / 1.6)),
        SimSettings(pace=Pace(speed=0.5)),
    ],
    ids=["jitter of 4 ms", "1.6 times slower", "half speed"],
)
def test_a_network_or_gpus_unlike_the_profile_cost_no_query(surroundings: SimSettings) -> None:
    """At 3,000 q/s on eight GPUs, from the first batch on."""
    trace = load_trace("poisson:rate=3000", duration_s=0.8, seed=1)
    assert attainment(simulate(trace, EVEN, policy="planfit", settings=surroundings)) >= 0.999


def test_unequal_gpus_serve_nearly_what_the_cheapest_subnet_would() -> None:
    """Four at 1.86 and twelve at 4.65 times the profile, near what they can do within 14.4 ms.

    And all that it would on GPUs a quarter slower, which is the promise.
    """
    trace = load_trace("poisson:rate=4700", duration_s=0.7, seed=1)
    cluster = [slowed(CNN, 1.86)] * 4 + [slowed(CNN, 4.65)] * 12
    slower = [slowed(profile, 1.25) for profile in cluster]
    ours, cheapest, promised = (
        attainment(simulate(trace, gpus, policy=name, slo_ns=round(14.4 * MS)))
        for gpus, name in ((cluster, "planfit"), (cluster, "mincost"), (slower, "mincost"))
    )
    assert ours >= cheapest - 0.001
    assert ours >= promised


def test_in_ordinary_traffic_it_is_as_accurate_as_demandfit() -> None:
    """MAF-like at 6,400 q/s: all in time, and within two hundredths of a point."""
    trace = load_trace("maf-like:rate=6400", duration_s=1.5, seed=1)
    ours, theirs = (simulate(trace, EVEN, policy=name) for name in ("planfit", "demandfit"))
    assert attainment(ours) == 1.0
    assert (ours.result.mean_accuracy or 0) >= (theirs.result.mean_accuracy or 0) - 0.02


@pytest.mark.parametrize("factor", [1.2, 2.0])
def test_overload_costs_no_more_than_what_is_too_much(factor: float) -> None:
    """Beyond what the smallest subnet can do, at least 0.97 of that is done."""
    full_qps = 8 * 16 / 7.35e-3
    trace = load_trace(f"poisson:rate={factor * full_qps}", duration_s=0.6, seed=1)
    found = simulate(trace, EVEN, policy="planfit")
    assert found.result.goodput_qps > 0.97 * full_qps
    assert found.result.queries["overloaded"] > 0
