"""Surges against a count of every query in a sliding window."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.policies.surge import N_RESERVED, SLOTS, WINDOWS, Surge
from superserve.clock import MS

PATIENCE_NS = 32.0 * MS
"""One slot is 1 ms."""

START_NS = 5_000 * MS
ARRIVALS = st.lists(
    st.tuples(st.sampled_from([0, 100_000, MS // 2, MS, 3 * MS, 40 * MS]), st.integers(1, 300)),
    min_size=1,
    max_size=40,
)
"""Nanoseconds since the ones before, and how many come."""


def seen(arrivals: list[tuple[int, int]]) -> tuple[Surge, list[tuple[int, int]]]:
    """Return a surge that has counted these, and (instant, how many) of each."""
    surge, now_ns, found = Surge(), START_NS, []
    for gap_ns, n in arrivals:
        now_ns += gap_ns
        surge.arrived(n, now_ns, PATIENCE_NS)
        found.append((now_ns, n))
    return surge, found


def most_within(found: list[tuple[int, int]], window_ns: int) -> int:
    """Return the most that came within any window of this length."""
    return max(sum(n for at_ns, n in found if end_ns - window_ns < at_ns <= end_ns) for end_ns, _ in found)


@given(arrivals=ARRIVALS, after_ns=st.sampled_from([0, MS, 20 * MS]))
def test_what_is_expected_is_the_most_of_a_window_less_what_it_has(
    arrivals: list[tuple[int, int]], after_ns: int
) -> None:
    """Within the error of one slot, and of what was forgotten in the time that passed."""
    surge, found = seen(arrivals)
    now_ns = found[-1][0] + after_ns
    surge.advance(now_ns)
    kept = 1.0 - (now_ns - START_NS + 2 * MS) / 9e9
    least, most = [], []
    for window in (*WINDOWS[:N_RESERVED], WINDOWS[-1]):
        # A window is between its own length and one slot more, wherever slots begin.
        long_ns, short_ns = (window + 1) * MS, window * MS
        has = [sum(n for at_ns, n in found if at_ns > now_ns - ns) for ns in (short_ns, long_ns)]
        least.append(kept * most_within(found, short_ns) - has[1])
        most.append(most_within(found, long_ns) - has[0])

    expected = surge.expected()

    assert list(expected) == sorted(expected)
    for i, n in enumerate(expected):
        assert max(0.0, min(least[i:])) - 1e-6 <= n <= max(0.0, min(most[i:])) + 1e-6


def test_a_window_that_had_its_most_expects_no_more_until_it_has_moved_on() -> None:
    """200 at once: none is expected within a millisecond of them, all 200 again two patiences later."""
    surge = Surge()
    surge.arrived(200, START_NS, PATIENCE_NS)
    assert surge.expected() == (0.0, 0.0, 0.0)

    surge.advance(START_NS + 20 * MS)  # past the first three windows, not past that of 64 slots
    assert surge.expected() == (0.0, 0.0, 0.0)

    surge.advance(START_NS + 70 * MS)
    assert surge.expected() == pytest.approx((200, 200, 200), rel=0.01)


def test_a_spike_on_the_edge_of_two_slots_counts_whole() -> None:
    """Half of it in one slot, half in the next: the shortest window has had all of it."""
    surge = Surge()
    surge.arrived(1, START_NS, PATIENCE_NS)
    surge.arrived(100, START_NS + 900_000, PATIENCE_NS)
    surge.arrived(100, START_NS + 1_100_000, PATIENCE_NS)
    surge.advance(START_NS + 80 * MS)
    assert min(surge.expected()) >= 198


@pytest.mark.parametrize("step_ms", [1, 90, 900])
def test_what_has_not_come_for_ten_seconds_counts_for_a_third(step_ms: int) -> None:
    """However often the windows are moved on in between."""
    surge = Surge()
    surge.arrived(1_000, START_NS, PATIENCE_NS)
    for passed_ms in range(0, 10_000 + step_ms, step_ms):
        surge.advance(START_NS + passed_ms * MS)
    assert 300 <= surge.expected()[2] <= 380


def test_a_long_gap_forgets_everything() -> None:
    """An hour later nothing is reserved, and the next query counts as the first."""
    surge = Surge()
    surge.arrived(1_000, START_NS, PATIENCE_NS)
    surge.advance(START_NS + 3_600_000 * MS)
    assert surge.expected() == (0.0, 0.0, 0.0)
    surge.arrived(3, START_NS + 3_600_001 * MS, PATIENCE_NS)
    surge.advance(START_NS + 3_600_100 * MS)
    assert surge.expected() == pytest.approx((3, 3, 3), rel=0.02)


def test_an_instant_before_the_last_changes_nothing() -> None:
    """A message that was handled a little out of order is counted; the windows stay where they are."""
    surge = Surge()
    surge.arrived(5, START_NS, PATIENCE_NS)
    surge.arrived(5, START_NS - 3 * MS, PATIENCE_NS)
    surge.advance(START_NS + 70 * MS)
    assert min(surge.expected()) == pytest.approx(10, rel=0.01)


@settings(max_examples=30)
@given(patience_ns=st.floats(0, 1e12), n=st.integers(1, 100))
def test_a_slot_is_a_part_of_the_patience_and_never_too_short(patience_ns: float, n: int) -> None:
    """What came in one slot is expected again when 66 of them have passed, if that was not for ever ago."""
    surge = Surge()
    surge.arrived(n, START_NS, patience_ns)
    slot_ns = max(250_000.0, patience_ns / SLOTS)
    surge.advance(round(START_NS + 60 * slot_ns))
    assert surge.expected() == (0.0, 0.0, 0.0)
    surge.advance(round(START_NS + 67 * slot_ns))
    kept = max(0.0, 1.0 - 68 * slot_ns / 10e9)
    assert min(surge.expected()) >= 0.98 * kept * n - 1e-6 or slot_ns > 10e6


# --- what comes within a patience -------------------------------------------------------------


def every(step_ms: float, n: int, until_ms: float, surge: Surge | None = None, from_ms: float = 0.0) -> Surge:
    """Return a surge that has counted `n` queries every so often, and looks ahead at the last of them."""
    surge = surge or Surge()
    for i in range(round((until_ms - from_ms) / step_ms) + 1):
        now_ns = START_NS + round((from_ms + i * step_ms) * MS)
        surge.arrived(n, now_ns, PATIENCE_NS)
        surge.foresee(now_ns)
    return surge


def test_after_a_spike_of_a_kind_that_is_known_nothing_comes_within_a_patience() -> None:
    """16 at once each 50 ms, with a patience of 32: the next come when these have been served."""
    assert every(50, 16, 1_000).by_curve == 0.0
    # Each 20 ms, one or two more come within the patience, and the curve leaves room for them.
    assert 16 / (20 * MS) * 0.7 <= every(20, 16, 3_000).by_curve <= 16 / (20 * MS) * 2.1


def test_a_steady_rate_is_expected_to_go_on() -> None:
    """4 queries a millisecond: neither the curve nor the last slots bound less than that."""
    surge = every(0.5, 2, 3_000)
    rate = 4 / MS
    assert rate * 0.95 <= surge.by_curve <= rate * 1.15
    assert surge.by_pause >= rate
    assert surge.peak == pytest.approx(rate, rel=0.05)


def test_a_pause_says_that_the_rate_has_fallen() -> None:
    """Four empty slots of 1 ms leave at most 9 queries in 4 ms, to three standard deviations."""
    surge = every(0.5, 4, 1_000)
    assert surge.by_pause >= 8 / MS
    surge.foresee(START_NS + 1_005 * MS)
    assert surge.by_pause == pytest.approx(9 / (4 * MS))


def test_a_curve_that_still_grows_bounds_nothing_and_may_grow_on() -> None:
    """Twice the rate, which is not chance: the peak counts by half more, and less so with time."""
    surge = every(0.5, 2, 3_000)
    every(0.5, 4, 3_100, surge, 3_000)
    assert math.isinf(surge.by_curve)
    assert surge.peak == pytest.approx(8 / MS * 1.48, rel=0.04)
    every(0.5, 4, 3_700, surge, 3_100)
    assert surge.peak == pytest.approx(8 / MS * 1.25, rel=0.06)
    every(0.5, 4, 4_500, surge, 3_700)
    assert surge.peak == pytest.approx(8 / MS, rel=0.03)
    assert surge.by_curve < 10 / MS


def test_a_peak_that_is_over_is_known() -> None:
    """40 ms after the rate has fallen to nothing the curve counts as learned, whatever its age."""
    surge = every(0.5, 4, 100)
    assert math.isinf(surge.by_curve)
    surge.foresee(START_NS + 140 * MS)
    assert not math.isinf(surge.by_curve)
    assert surge.peak == pytest.approx(8 / MS, rel=0.03)


@pytest.mark.parametrize(("extra", "is_new"), [(12, False), (60, True)])
def test_chance_makes_no_new_peak(extra: int, is_new: bool) -> None:
    """A patience has 130 queries, with a standard deviation of 11: 12 more are chance, and 60 are not."""
    surge = every(0.5, 2, 3_000)
    surge.arrived(extra, START_NS + 3_000 * MS, PATIENCE_NS)
    surge.foresee(START_NS + 3_000 * MS)
    assert math.isinf(surge.by_curve) == is_new
