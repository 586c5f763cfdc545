"""DemandFit in the simulator: where it must be ahead, what overload costs, and what bounds it."""

from __future__ import annotations

import numpy as np
import pytest

from loadgen.bound.fluid import fluid_bound, uniform
from loadgen.simulator.simulate import simulate, slowed
from loadgen.simulator.workloads import Workload, mixed_workload, parse_floor, parse_slos
from loadgen.traces.trace import Trace, load_trace
from profiles.table import Profile, SubnetProfile, load_profile
from superserve.clock import MS
from superserve.wire import Status
from tests.loadgen.bound.exact import exact_bound

CNN = load_profile("cnn-8gpu-modelled")
EVEN = [CNN] * 8
UNEQUAL = [CNN] * 4 + [slowed(CNN, 2.5)] * 4
FULL_QPS = 8 * 16 / 7.35e-3
"""What eight GPUs do at most: full batches on the smallest subnet."""


@pytest.mark.parametrize(
    ("rate_qps", "cluster", "slos", "floor"),
    [(6_400, EVEN, "18,36,100", None), (4_480, UNEQUAL, "36", None), (6_400, EVEN, "36", "78:0.333")],
    ids=["mixed SLOs", "unequal GPUs", "floors"],
)
def test_it_is_well_ahead_where_queries_or_gpus_differ(
    rate_qps: float, cluster: list[Profile], slos: str, floor: str | None
) -> None:
    """By more than 0.3 points of summed accuracy a query, and never above the bound."""
    trace = load_trace(f"maf-like:rate={rate_qps}", duration_s=3, seed=1)
    terms = None if floor is None else parse_floor(floor)
    workload = mixed_workload(trace, parse_slos(slos), terms, seed=1)
    ours, theirs = (simulate(workload, cluster, policy=name) for name in ("demandfit", "slackfit"))

    assert ours.accuracy_per_query > theirs.accuracy_per_query + 0.3
    assert (ours.result.slo_attainment or 0) > 0.9999
    if floor is None and slos == "36":
        bound = fluid_bound(uniform(trace.due_ns, slo_ns=36 * MS), cluster)
        assert ours.accuracy_per_query < bound.accuracy


def test_it_is_not_behind_where_all_are_alike() -> None:
    """One SLO, even GPUs, bursts: at least as accurate as SlackFit, and everything in time."""
    trace = load_trace("bursty:base=1500,variant=5550,cv2=8", duration_s=4, seed=2)
    ours, theirs = (simulate(trace, EVEN, policy=name) for name in ("demandfit", "slackfit"))
    assert ours.accuracy_per_query > theirs.accuracy_per_query - 0.02
    assert (ours.result.slo_attainment or 0) >= (theirs.result.slo_attainment or 0) - 0.0005


@pytest.mark.parametrize("factor", [1.2, 2.0])
def test_overload_costs_no_more_than_what_is_too_much(factor: float) -> None:
    """Beyond what the smallest subnet can do, at least 0.95 of that is done: no batches of one."""
    trace = load_trace(f"poisson:rate={factor * FULL_QPS}", duration_s=2, seed=1)
    found = simulate(trace, EVEN, policy="demandfit")
    assert found.result.goodput_qps > 0.95 * FULL_QPS
    assert found.result.queries["overloaded"] > 0


def test_in_overload_the_lowest_class_gives_way() -> None:
    """With a third of the queries in a higher class and twice the load, that third is served."""
    trace = load_trace(f"poisson:rate={2 * FULL_QPS}", duration_s=1, seed=1)
    priority = np.where(np.arange(trace.n) % 3 == 0, 5, 0).astype(np.uint8)
    found = simulate(Workload(trace, priority=priority), EVEN, policy="demandfit")
    is_ok = found.columns["status"] == Status.OK
    assert is_ok[priority == 5].mean() > 0.97
    assert 0.1 < is_ok[priority == 0].mean() < 0.5
    assert is_ok.mean() > 0.9 / 2


def test_the_bounds_stand_in_order_above_what_is_served() -> None:
    """On a small workload: fluid bound, best schedule, and what the simulated policies attain."""
    latencies_ns = tuple(MS * ms for ms in (2, 3))
    rows = [
        SubnetProfile("small", None, 50.0, None, latencies_ns, latencies_ns),
        SubnetProfile("large", None, 80.0, None, (4 * MS, 7 * MS), (4 * MS, 7 * MS)),
    ]
    tiny = Profile("tiny", "n", "d", "modelled", "", {}, "2026-01-02", (1, 2), tuple(rows))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        due_ns = np.sort(rng.integers(0, 12, size=7)).astype(np.int64) * MS
        work = uniform(due_ns, slo_ns=14 * MS)
        fluid, exact = fluid_bound(work, [tiny] * 2, bin_ns=MS), exact_bound(work, [tiny] * 2)
        assert exact.is_optimal
        assert fluid.accuracy >= exact.accuracy - 1e-3
        for policy in ("slackfit", "demandfit"):
            trace = Trace("small", due_ns, int(due_ns[-1]) + 1, "made by a test")
            served = simulate(trace, [tiny] * 2, policy=policy, slo_ns=14 * MS)
            assert served.accuracy_per_query <= exact.accuracy + 1e-6
