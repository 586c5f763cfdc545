"""Surges against a count of every query in a sliding window."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.policies.surge import SLOTS, WINDOWS, Surge
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
    for window in WINDOWS:
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


def test_a_pause_bounds_what_comes_next() -> None:
    """Four empty slots of 1 ms leave at most 12 queries in 4 ms, to three and a half standard deviations."""
    surge = Surge()
    for i in range(2_000):
        now_ns = START_NS + i * MS // 2
        surge.arrived(4, now_ns, PATIENCE_NS)
        surge.foresee(now_ns)
    assert surge.by_pause >= 8 / MS, "a steady rate is expected to go on"
    surge.foresee(START_NS + 1_005 * MS)
    assert surge.by_pause == pytest.approx(3.5**2 / (4 * MS))
