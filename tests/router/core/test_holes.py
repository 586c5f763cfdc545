"""Runs with holes: queries of one message that were cancelled or dispatched between others that wait."""

from __future__ import annotations

import pytest

from router.core.edf import ANSWERED, DISPATCHED, Cohort, EdfQueue
from router.core.lanes import LaneQueue
from tests.router.core.test_edf import flat, make_cohort


def with_hole(queue: EdfQueue, at: int, state: int) -> Cohort:
    """Return a message of six queries, queued, of which one has left from outside."""
    cohort = make_cohort(1, [1, 2, 3, 4, 5, 6])
    queue.push(cohort, 0, 6)
    queue.forget(cohort, at, at + 1)
    cohort.states[at] = state
    return cohort


@pytest.mark.parametrize("state", [ANSWERED, DISPATCHED])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("make", [EdfQueue, LaneQueue])
def test_a_batch_passes_over_holes(make: type[EdfQueue], at: int, state: int) -> None:
    """What has left is in no batch, whichever end of the run it was at; the rest comes in order."""
    queue = make()
    with_hole(queue, at, state)
    first, n = queue.take(3, 0)
    second, more = queue.take(9, 0)

    left = [i for i in range(6) if i != at]
    assert (n, more) == (3, 2)
    assert [i for _, i in flat(first)] == left[:3]
    assert [i for _, i in flat(second)] == left[3:]
    assert len(queue) == 0
    assert queue.head() is None


@pytest.mark.parametrize("state", [ANSWERED, DISPATCHED])
@pytest.mark.parametrize("at", range(6))
def test_the_doomed_are_counted_without_holes(at: int, state: int) -> None:
    """Five of six are due before the limit, and one of them may be gone."""
    queue = EdfQueue()
    with_hole(queue, at, state)
    doomed = flat(queue.take_before(6))

    assert [i for _, i in doomed] == [i for i in range(5) if i != at]
    assert len(queue) == (0 if at == 5 else 1)


def test_a_batch_ends_at_the_instant_it_is_told() -> None:
    """What is due at that instant is still taken, what is due later is not."""
    queue = EdfQueue()
    queue.push(make_cohort(1, [1, 2, 2, 3]), 0, 4)
    queue.push(make_cohort(2, [2]), 0, 1)

    assert sorted(flat(queue.take(9, 0, until_ns=2)[0])) == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert queue.take(9, 0, until_ns=2) == ([], 0)
    assert len(queue) == 1
