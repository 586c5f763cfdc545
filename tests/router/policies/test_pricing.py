"""Prices of GPU time, and the look-ups that policies of demand share."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import load_profile
from router.policies.pricing import limits_of, make_prices, make_size, sizes_of
from superserve.clock import MS
from tests.router.core.random_profiles import many_subnets, profiles

if TYPE_CHECKING:
    from profiles.table import Profile

CNN = load_profile("cnn-8gpu-modelled")
TRANSFORMER = load_profile("transformer-8gpu-modelled")


@given(
    price=st.floats(0, 1e-4),
    floor=st.integers(0, 5),
    slack_ns=st.integers(MS, 40 * MS),
    column=st.integers(0, 4),
    profile=st.sampled_from([CNN, TRANSFORMER]),
)
def test_the_row_of_a_size_is_worth_as_much_as_any_that_fits(
    price: float, floor: int, slack_ns: int, column: int, profile: Profile
) -> None:
    """On the shipped profiles the look-up equals trying every row."""
    size = make_size(profile, column)
    accuracies = tuple(subnet.accuracy for subnet in profile.subnets)
    rows = [row for row in range(floor, profile.n_subnets) if size.p99_ns[row] <= slack_ns]
    worth = {row: accuracies[row] - price * size.latency_ns[row] for row in rows}

    row = size.best(price, floor, slack_ns, accuracies)

    assert (row is None) == (not rows)
    if row is not None:
        assert worth[row] >= max(worth.values()) - 0.05


@given(profile=profiles(), budgets=st.lists(st.floats(0, 1e6), min_size=2, max_size=2))
def test_more_time_for_a_query_never_raises_the_price_of_time(profile: Profile, budgets: list[float]) -> None:
    """Prices fall with the budget, from something to nothing."""
    prices = make_prices(profile, profile.subnets[-1].latency_ns[-1])
    less, more = sorted(budgets)
    assert prices.at(less) >= prices.at(more) >= 0
    assert prices.at(0) > 0 == prices.at(1e12)


def test_a_price_halfway_between_two_subnets_is_their_slope() -> None:
    """Halfway between the costs of two of them a nanosecond costs what the step gains a nanosecond."""
    prices = make_prices(CNN, CNN.subnets[-1].latency_ns[-1])
    frontier = CNN.frontier()
    for (row, cost_ns), (above, more_ns) in itertools.pairwise(frontier):
        gain = CNN.subnets[above].accuracy - CNN.subnets[row].accuracy
        assert prices.at((cost_ns + more_ns) / 2) == pytest.approx(gain / (more_ns - cost_ns))


@given(profile=profiles())
def test_limits_cover_the_profile(profile: Profile) -> None:
    """From the quickest batch to the longest, ascending; prices can be made for each of them."""
    limits_ns = limits_of(profile)
    assert limits_ns[0] == profile.subnets[0].latency_ns[0]
    assert limits_ns[-1] == profile.subnets[-1].latency_ns[-1]
    assert list(limits_ns) == sorted(set(limits_ns))
    assert all(make_prices(profile, limit_ns).prices[0] > 0 for limit_ns in limits_ns)


@given(profile=profiles())
def test_the_smallest_and_the_largest_size_are_always_compared(profile: Profile) -> None:
    """However many sizes a profile has, some of them are looked at: no more than six, ends included."""
    sizes = [size.size for size in sizes_of(profile)]
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (profile.batch_sizes[0], profile.batch_sizes[-1])
    assert len(sizes) == min(6, len(profile.batch_sizes))


def test_of_many_subnets_the_hull_is_ascending() -> None:
    """The look-up bisects it: rows and slopes ascend."""
    size = make_size(many_subnets(100), 2)
    assert list(size.hull) == sorted(set(size.hull))
    assert list(size.slopes) == sorted(size.slopes)
