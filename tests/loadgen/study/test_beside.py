"""Live figures beside simulated ones: medians, and what counts as apart."""

from __future__ import annotations

import pytest

from loadgen.simulator.simulate import SimSettings
from loadgen.study.beside import HEAD, beside, simulated_beside
from loadgen.study.compare import Cell, CellResult, Comparison, Figures

CELL = Cell("small", "poisson:rate=100", "cnn-8gpu-modelled:2", slo_ms="500")


def result(**attainments: tuple[float, ...]) -> CellResult:
    """Return a cell's figures: an attainment for each seed, all answers 80 % accurate."""
    runs = {name: tuple(Figures(one, 80.0, 80.0 * one) for one in ones) for name, ones in attainments.items()}
    return CellResult(CELL, tuple(range(len(next(iter(runs.values()))))), runs, None)


def test_one_spoilt_run_of_three_does_not_count() -> None:
    """The median leaves it out; a mean would be 0.1 lower."""
    (row,) = beside([result(planfit=(1.0, 0.7, 1.0))], [result(planfit=(1.0, 1.0, 1.0))])

    assert row.live == (1.0, 80.0)
    assert row.wrong == ()
    assert row.line().endswith("| holds |")


@pytest.mark.parametrize(("live", "is_apart"), [(0.9949, True), (0.9951, False), (1.0, False)])
def test_a_live_median_too_far_from_its_simulation_is_named(live: float, is_apart: bool) -> None:
    """Half a percent is the limit, on either side."""
    (row,) = beside([result(planfit=(live,))], [result(planfit=(1.0,))])
    (other,) = beside([result(planfit=(1.0,))], [result(planfit=(live,))])

    assert bool(row.wrong) is bool(other.wrong) is is_apart


@pytest.mark.parametrize(("ours", "is_below"), [(0.9969, True), (0.9971, False)])
def test_a_policy_below_mincost_live_is_named(ours: float, is_below: bool) -> None:
    """By more than 0.002 of attainment, whatever the simulation says."""
    live = result(planfit=(ours,), mincost=(0.999,))

    rows = beside([live], [live])

    assert [bool(row.wrong) for row in rows] == [is_below, False]


def test_what_ran_live_is_simulated_with_the_same_queries() -> None:
    """A row for each policy; the table has as many columns as its head."""
    comparison = Comparison(("planfit", "mincost"), (0, 1), 1.0, True, SimSettings())

    found = simulated_beside(comparison, [CELL], 1, lambda _: None)

    assert [len(found[0].policies[policy]) for policy in comparison.policies] == [2, 2]
    assert found[0].bounds is None
    rows = beside(found, found)
    assert [row.policy for row in rows] == ["planfit", "mincost"]
    assert {line.count("|") for line in (*HEAD, *(row.line() for row in rows))} == {9}
