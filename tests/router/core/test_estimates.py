"""Estimates of transport and transit: bounded by what was seen, in memory and in value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.estimates import Punctuality, RecentQuantiles, TransitClock, WindowedMin
from superserve.clock import MS, SECOND

STEPS = st.lists(st.tuples(st.integers(0, 400), st.integers(-100, 100)), min_size=1, max_size=80)


@given(steps=STEPS)
def test_the_windowed_minimum_is_that_of_the_window(steps: list[tuple[int, int]]) -> None:
    """It is at least the least of the window, at most that of the window less a 64th."""
    window = WindowedMin(window_ns=640)
    now, seen = 0, []
    for step, value in steps:
        now += step
        seen.append((now, value))
        least = window.add(value, now)

        assert least >= min(v for t, v in seen if t >= now - 640)
        assert least <= min(v for t, v in seen if t > now - 630)


def test_no_peer_can_make_the_window_grow() -> None:
    """Stamps that fall behind steadily keep 66 values, not one a message."""
    window = WindowedMin(window_ns=6_400)
    for now in range(20_000):
        window.add(now, now)

    assert len(window._minima) <= 66


@given(values=st.lists(st.integers(MS, 3 * MS), min_size=1, max_size=60), window=st.integers(4, 16))
def test_quantiles_are_those_of_the_last_values(values: list[int], window: int) -> None:
    """Median and bound are the sorted window's, whatever has left it."""
    first = [MS] * 4
    recent = RecentQuantiles(first, window)
    for value in values:
        recent.add(value)

    kept = sorted((first + values)[-window:])
    assert recent.bound_ns() == kept[len(kept) * 99 // 100]  # takes the last few into account
    assert recent.median_ns == kept[len(kept) // 2]


def test_one_stall_does_not_own_the_estimate() -> None:
    """After one sample of a second the bound of a new loopback transport is still below 5 ms."""
    recent = RecentQuantiles([400_000] * 15 + [MS])
    recent.add(SECOND)

    assert recent.bound_ns() < 5 * MS


def test_a_lasting_change_is_followed() -> None:
    """Ten samples of a second make the bound a second."""
    recent = RecentQuantiles([400_000] * 15 + [MS])
    for _ in range(10):
        recent.add(SECOND)

    assert recent.bound_ns() == SECOND


@given(offset=st.integers(-(2**62), 2**62), delays=st.lists(st.integers(0, MS), min_size=1, max_size=30))
def test_transit_is_the_excess_over_the_quickest(offset: int, delays: list[int]) -> None:
    """Whatever the peer's clock says, a message's excess is its delay less the least so far."""
    clock = TransitClock()
    now = 0
    for i, delay in enumerate(delays):
        now += 10 * MS
        excess = clock.excess_ns(now - delay + offset, now)

        assert excess >= 0
        assert excess <= delay
        assert excess == delay - min(delays[: i + 1]) or i > 0


def test_a_clock_that_drifts_away_is_forgiven() -> None:
    """A base older than the window is forgotten: drift does not add up for ever."""
    clock = TransitClock(window_ns=SECOND)
    clock.excess_ns(0, 0)

    assert clock.excess_ns(SECOND, 2 * SECOND) == 0


def late(punctuality: Punctuality, *late_ns: int) -> int:
    """Have decisions that were due come late by these; return how far ahead the next ones are due."""
    for one_ns in late_ns:
        punctuality.expect(1_000)
        punctuality.came(999)  # before it is due: an event brought the loop here
        punctuality.came(1_000 + one_ns)
        punctuality.came(9_999_999)  # nothing was due any more
    return punctuality.ahead_ns


def test_a_lead_is_the_longest_until_lateness_is_known() -> None:
    """Sixteen assumed ones are in the window of 256 at first; 240 measured ones do not outvote them."""
    assert late(Punctuality(200_000, 2_000_000)) == 2_000_000
    assert late(Punctuality(200_000, 2_000_000), *[0] * 240) == 2_000_000


@pytest.mark.parametrize(
    ("late_ns", "expected_ns"),
    [
        ([0] * 272, 200_000),
        ([150_000] * 272, 250_000),
        ([50_000] * 253 + [700_000] * 3, 800_000),  # the 99th percentile of the last 256
        ([50_000] * 254 + [700_000] * 2, 200_000),
        ([9_000_000] * 272, 2_000_000),
    ],
)
def test_a_lead_follows_how_late_the_loop_comes(late_ns: list[int], expected_ns: int) -> None:
    """Nearly the latest of the last 256 times and a little, within bounds."""
    punctuality = Punctuality(200_000, 2_000_000)
    late(punctuality, *[0] * 16)

    assert late(punctuality, *late_ns) == expected_ns


def test_a_lead_that_is_the_same_at_least_and_at_most_is_fixed() -> None:
    """Nothing is learnt where nothing may change."""
    assert late(Punctuality(2_000_000, 1_000_000), *[0] * 300) == 1_000_000
