"""The offline bounds: the integer program against trying everything, and the fluid relaxation above both."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.bound.fluid import BoundWorkload, fluid_bound, options, uniform
from loadgen.bound.highs import Program
from loadgen.traces.trace import load_trace
from profiles.table import Profile, SubnetProfile, load_profile
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.loadgen.bound.exact import exact_bound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CNN = load_profile("cnn-8gpu-modelled")


def tiny(*rows: tuple[float, tuple[int, ...]], sizes: tuple[int, ...] = (1, 2)) -> Profile:
    """Return a profile of these accuracies and latencies in whole milliseconds."""
    as_ns = [tuple(ms * MS for ms in latency) for _, latency in rows]
    subnets = tuple(
        SubnetProfile(f"s{i}", None, accuracy, None, as_ns[i], as_ns[i])
        for i, (accuracy, _) in enumerate(rows)
    )
    return Profile("tiny", "n", "d", "modelled", "", {}, "2026-01-02", sizes, subnets)


QUICK = tiny((50.0, (2, 3)), (80.0, (3, 5)))
SLOW = tiny((50.0, (4, 6)), (80.0, (7, 11)))


def workload(*queries: tuple[int, int, int]) -> BoundWorkload:
    """Return a workload of (due, SLO, floor), in milliseconds."""
    due, slo, floor = zip(*sorted(queries), strict=True)
    as_ns = [np.array(column, dtype=np.int64) * MS for column in (due, slo)]
    return BoundWorkload(as_ns[0], as_ns[1], np.array(floor, dtype=np.int64))


# --- trying everything ------------------------------------------------------------------------


def partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """Yield every way to put some of the items into groups, and leave the others out."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for groups in partitions(rest):
        yield groups
        yield [(first,), *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], (first, *group), *groups[i + 1 :]]


def best_by_trying(work: BoundWorkload, gpus: Sequence[Profile]) -> float:
    """Return the best summed accuracy per query: every grouping, subnet, GPU and order."""
    due, end = work.due_ns.tolist(), (work.due_ns + work.slo_ns).tolist()
    best = 0.0
    for groups in partitions(tuple(range(work.n))):
        if any(len(group) > gpus[0].max_batch_size for group in groups):
            continue
        for order in itertools.permutations(groups):
            best = max(best, _best_placing(work, gpus, order, due, end, [0] * len(gpus)))
    return best / work.n


def _best_placing(
    work: BoundWorkload,
    gpus: Sequence[Profile],
    order: tuple[tuple[int, ...], ...],
    due: list[int],
    end: list[int],
    free_ns: list[int],
) -> float:
    """Return the best worth of running these batches in this order, each on any subnet of any GPU."""
    if not order:
        return 0.0
    group, best = order[0], 0.0
    for i, profile in enumerate(gpus):
        for row, subnet in enumerate(profile.subnets):
            done_ns = max(free_ns[i], *(due[q] for q in group)) + profile.latency_ns(row, len(group))
            if done_ns <= min(end[q] for q in group) and row >= max(int(work.floor[q]) for q in group):
                then = [done_ns if j == i else ns for j, ns in enumerate(free_ns)]
                rest = _best_placing(work, gpus, order[1:], due, end, then)
                best = max(best, len(group) * subnet.accuracy + rest)
    return best


QUERIES = st.tuples(st.integers(0, 8), st.integers(2, 12), st.integers(0, 1))


@settings(max_examples=40, deadline=None)
@given(
    queries=st.lists(QUERIES, min_size=1, max_size=4),
    gpus=st.sampled_from([(QUICK,), (QUICK, QUICK), (QUICK, SLOW), (SLOW,)]),
)
def test_the_integer_program_finds_what_trying_everything_finds(
    queries: list[tuple[int, int, int]], gpus: tuple[Profile, ...]
) -> None:
    """Whatever the arrivals, SLOs, floors and GPUs; and the fluid bound is never below it."""
    work = workload(*queries)
    exact = exact_bound(work, gpus)
    assert exact.is_optimal
    assert exact.found == pytest.approx(best_by_trying(work, gpus), abs=0.01)
    assert exact.accuracy >= best_by_trying(work, gpus) - 1e-6
    for bin_ns in (MS, 3 * MS, 1_700_000):
        fluid = fluid_bound(work, gpus, bin_ns=bin_ns)
        assert fluid.is_tight
        assert fluid.accuracy >= best_by_trying(work, gpus) - 1e-6


def test_a_worked_example_of_the_integer_program() -> None:
    """Two at once with 5 ms: both at 80 %. One more, due at 1 ms: two at 50 %, and then that one at 80 %."""
    work = workload((0, 5, 0), (0, 5, 0))
    assert exact_bound(work, [QUICK]).accuracy == pytest.approx(80.0)
    work = workload((0, 5, 0), (0, 5, 0), (1, 5, 0))
    # Both at 80 % end at 5 ms and leave no time for the third.
    assert exact_bound(work, [QUICK]).accuracy == pytest.approx(180 / 3)


def test_an_instance_that_was_not_solved_reports_a_bound_not_a_find() -> None:
    """With little time the integer program proves little, and claims no more than that."""
    work = workload(*[(i, 9, 0) for i in range(8)])
    hurried = exact_bound(work, [QUICK, SLOW], time_limit_s=1e-9)
    solved = exact_bound(work, [QUICK, SLOW])
    assert not hurried.is_optimal
    assert hurried.accuracy <= max(subnet.accuracy for profile in (QUICK, SLOW) for subnet in profile.subnets)
    assert hurried.accuracy >= solved.accuracy - 1e-6
    assert hurried.found is None or hurried.found <= solved.accuracy + 1e-6


def test_large_instances_are_refused() -> None:
    """The integer program is for small ones, and says which bound is for large ones' size."""
    trace = load_trace("poisson:rate=2000", duration_s=1, seed=1)
    with pytest.raises(ConfigError, match="small workload"):
        exact_bound(uniform(trace.due_ns, slo_ns=36 * MS), [CNN])


# --- the fluid relaxation -----------------------------------------------------------------------


def test_light_load_is_bounded_by_the_most_accurate_subnet() -> None:
    """With time for everything, the bound is that every query gets the best subnet."""
    trace = load_trace("constant:rate=500", duration_s=2, seed=1)
    bound = fluid_bound(uniform(trace.due_ns, slo_ns=36 * MS), [CNN] * 8)
    assert bound.accuracy == pytest.approx(80.16, abs=1e-4)
    assert bound.attainment == 1.0


def test_steady_load_is_bounded_by_the_mix_that_it_leaves_time_for() -> None:
    """At 6,400 q/s 8 GPUs have 1.25 ms a query: between 78.25 % (1.025 ms) and 79.44 % (1.46875 ms)."""
    trace = load_trace("constant:rate=6400", duration_s=8, seed=1)
    bound = fluid_bound(uniform(trace.due_ns, slo_ns=36 * MS), [CNN] * 8, bin_ns=4 * MS)
    expected = 78.25 + (1.25 - 1.025) / (1.46875 - 1.025) * (79.44 - 78.25)
    # A little above: the last queries have their SLO beyond the trace's end.
    assert expected - 1e-3 <= bound.accuracy <= expected + 0.02


def test_overload_bounds_attainment_by_the_cheapest_subnet() -> None:
    """At twice what 8 GPUs do on the smallest subnet about half of the queries can be answered."""
    most_qps = 8 * 16 / 7.35e-3
    trace = load_trace(f"constant:rate={2 * most_qps}", duration_s=2, seed=1)
    bound = fluid_bound(uniform(trace.due_ns, slo_ns=36 * MS), [CNN] * 8, bin_ns=4 * MS)
    assert 0.5 <= bound.attainment <= 0.5 * (2 + 0.045) / 2
    assert bound.accuracy == pytest.approx(bound.attainment * 73.82, rel=1e-3)


def test_wider_bins_bound_from_further_above() -> None:
    """Bins twice as wide relax more: the bound never falls, and rises little."""
    trace = load_trace("bursty:base=1500,variant=5550,cv2=8", duration_s=2, seed=3)
    work = uniform(trace.due_ns, slo_ns=36 * MS)
    fine, coarse, rough = (fluid_bound(work, [CNN] * 8, bin_ns=ms * MS).accuracy for ms in (2, 4, 8))
    assert fine - 1e-5 <= coarse <= rough + 1e-5
    assert coarse - fine < 0.02


def test_a_slow_kind_of_gpu_counts_for_its_speed() -> None:
    """GPUs that take 2.5 times as long give the bound of four tenths as many."""
    slow = tiny(*((s.accuracy, tuple(ns * 5 // MS for ns in s.latency_ns)) for s in QUICK.subnets))
    quick = tiny(*((s.accuracy, tuple(ns * 2 // MS for ns in s.latency_ns)) for s in QUICK.subnets))
    work = uniform(np.arange(0, 400, 2, dtype=np.int64) * MS, slo_ns=60 * MS)
    mixed = fluid_bound(work, [slow] * 5 + [quick]).accuracy
    assert mixed == pytest.approx(fluid_bound(work, [quick] * 3).accuracy, abs=1e-4)


def test_floors_and_short_slos_cost_accuracy_elsewhere() -> None:
    """Under load a floor for some costs the others; a short SLO forbids the batches that are cheapest."""
    trace = load_trace("constant:rate=9000", duration_s=2, seed=1)
    free = uniform(trace.due_ns, slo_ns=36 * MS)
    floored = BoundWorkload(free.due_ns, free.slo_ns, np.where(np.arange(free.n) % 3 == 0, 4, 0))
    short = uniform(trace.due_ns, slo_ns=6 * MS)
    unbound = fluid_bound(free, [CNN] * 8, bin_ns=4 * MS)
    assert fluid_bound(floored, [CNN] * 8, bin_ns=4 * MS).accuracy < unbound.accuracy - 0.1
    assert fluid_bound(short, [CNN] * 8, bin_ns=MS).accuracy < unbound.accuracy - 0.1


def test_what_a_query_may_cost_follows_its_slo_and_floor() -> None:
    """The best batch that ends within the SLO; rows below the hull left out, rows below the floor too."""
    costs = [(round(cost_ns / MS, 5), worth) for worth, cost_ns in options(CNN, 36 * MS, 0)]
    assert costs == [(0.45937, 73.82), (0.84375, 77.64), (1.025, 78.25), (1.46875, 79.44), (1.91875, 80.16)]
    short = [(round(cost_ns / MS, 5), worth) for worth, cost_ns in options(CNN, 18 * MS, 4)]
    assert short == [(round(12.743 / 8, 5), 79.44), (round(16.801 / 8, 5), 80.16)]
    assert options(CNN, 36 * MS, 2, count_only=True) == ((1.0, 13.5 * MS / 16),)
    assert options(CNN, MS, 0) == ()


def test_a_query_that_no_batch_serves_in_time_is_lost() -> None:
    """An SLO shorter than the quickest batch bounds attainment and accuracy by nothing."""
    bound = fluid_bound(uniform(np.array([0, 5]) * MS, slo_ns=MS), [CNN])
    assert bound.accuracy == pytest.approx(0.0, abs=1e-9)
    assert bound.attainment == pytest.approx(0.0, abs=1e-9)


def test_any_prices_prove_a_bound() -> None:
    """Weak duality: what is reported lies above the optimum whatever the duals, and at it with the best."""
    program = Program()
    x = program.columns(2, worth=[3.0, 2.0], upper=4.0)
    row = program.rows(1, upper=5.0)
    program.add(np.repeat(row, 2), x, 1.0)
    optimum = 3.0 * 4 + 2.0 * 1
    assert program.maximise(time_limit_s=10).upper == pytest.approx(optimum, rel=1e-6)
    for price in (-2.0, -1.0, 0.0, 0.5, 3.0):
        assert program._proved(np.array([-price])) >= optimum


@pytest.mark.parametrize(
    ("due", "slo", "floor", "message"),
    [
        ([], [], [], "at least one"),
        ([1, 2], [3], [0, 0], "as many SLOs"),
        ([2, 1], [3, 3], [0, 0], "ascending"),
        ([1, 2], [3, 0], [0, 0], "slo_ns above 0"),
    ],
)
def test_malformed_workloads_are_refused(
    due: list[int], slo: list[int], floor: list[int], message: str
) -> None:
    """Columns must agree, ascend and be positive, and the message says which is not."""
    columns = [np.array(column, dtype=np.int64) for column in (due, slo, floor)]
    with pytest.raises(ConfigError, match=message):
        BoundWorkload(*columns)


def test_a_floor_that_no_profile_has_is_refused() -> None:
    """So are no GPUs, and bins without a width."""
    work = uniform(np.array([0]), slo_ns=MS, floor=6)
    with pytest.raises(ConfigError, match="no profile row is 6"):
        fluid_bound(work, [CNN])
    with pytest.raises(ConfigError, match="expected GPUs"):
        fluid_bound(work, [])
