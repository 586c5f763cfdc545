"""What the core knows of arrivals: the rate and the patience, smoothed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policies.demand import Demand
from superserve.clock import MS


def fed(*arrivals: tuple[float, int, float], demand: Demand | None = None, from_ms: float = 0) -> Demand:
    """Return the demand after each (milliseconds passed, queries, slack in ms each)."""
    demand = demand or Demand()
    now_ns = round(from_ms * MS)
    demand.settle(now_ns)
    for passed_ms, n, slack_ms in arrivals:
        now_ns += round(passed_ms * MS)
        if n:
            demand.arrived([round(slack_ms * MS)] * n)
        demand.settle(now_ns)
    return demand


def test_a_steady_rate_is_found_within_some_patiences() -> None:
    """6 queries a millisecond of 36 ms: after five times that long, both are known within 1 %."""
    demand = fed((1, 6, 36), *[(1.0, 6, 36.0)] * 180)
    assert demand.rate * MS == pytest.approx(6, rel=0.01)
    assert demand.slack_ns == pytest.approx(36 * MS, rel=0.01)


def test_the_patience_is_a_harmonic_mean_over_queries() -> None:
    """It weighs queries, not messages, and hardly sees that one in ten could wait for an hour."""
    demand = fed((1, 4, 20), *[(1.0, 3, 18.0), (1.0, 1, 100.0)] * 300)
    assert demand.slack_ns == pytest.approx(4 / (3 / 18 + 1 / 100) * MS, rel=0.05)
    demand = fed((1, 9, 36), *[(1.0, 9, 36.0), (1.0, 1, 3.6e6)] * 300)
    assert demand.slack_ns == pytest.approx(40 * MS, rel=0.05)


def test_queries_of_one_message_may_differ() -> None:
    """Together they are what they are one by one."""
    one, other = Demand(), Demand()
    one.arrived([36 * MS, 18 * MS, 36 * MS, -5])
    for slack_ns in (36 * MS, 18 * MS, 36 * MS, -5):
        other.arrived([slack_ns])
    for demand in (one, other):
        demand.settle(0)
    assert one.slack_ns == pytest.approx(other.slack_ns)


def test_the_rate_fades_when_nothing_comes() -> None:
    """After a patience without arrivals a third of the rate is left; the patience itself is still known."""
    demand = fed((1, 6, 36), *[(1.0, 6, 36.0)] * 400)
    before = demand.rate
    fed((36, 0, 0), demand=demand, from_ms=401)
    assert demand.rate == pytest.approx(before * 0.368, rel=0.02)
    assert demand.slack_ns == pytest.approx(36 * MS, rel=0.01)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e5), st.integers(0, 1_000), st.floats(-1e4, 1e6)), min_size=1, max_size=30
    )
)
def test_whatever_arrives_the_figures_stay_sane(arrivals: list[tuple[float, int, float]]) -> None:
    """Bursts, silences and queries that come too late: never a negative, an infinite or no number."""
    demand = fed(*arrivals)
    assert 0 <= demand.rate < float("inf")
    assert 0 <= demand.slack_ns < float("inf")


def test_a_rate_that_has_just_begun_is_no_small_rate() -> None:
    """After a fifth of a patience, 24 queries a millisecond count as at least 15 of them, not as 5."""
    demand = fed((1, 24, 36), *[(1.0, 24, 36.0)] * 8)
    (kind,) = demand.classes.values()
    assert 15 < kind.rate * MS < 24
    assert demand.calm_rate == kind.rate
    # After some patiences it is what comes.
    fed(*[(1.0, 24, 36.0)] * 300, demand=demand, from_ms=9)
    assert demand.calm_rate * MS == pytest.approx(24, rel=0.01)
    # A hundred at once are not yet a rate of a hundred a millisecond, and three are no rate at all.
    assert fed((1, 100, 36), (1.0, 0, 0)).calm_rate * MS < 20
    assert fed((1, 3, 36), (1.0, 0, 0)).calm_rate * MS < 0.1
