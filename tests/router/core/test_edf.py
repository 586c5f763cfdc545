"""The EDF queue against a sorted list."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.core.edf import ANSWERED, DISPATCHED, QUEUED, Cohort, EdfQueue, Stretch, ascending_stretches
from tests.effort import examples

DEADLINES = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def make_cohort(serial: int, deadlines_ns: list[int], floors: list[int] | None = None) -> Cohort:
    """Return a cohort of these deadlines."""
    return Cohort(serial, None, deadlines_ns, 0, 0, floors=floors)


def flat(stretches: list[Stretch]) -> list[tuple[int, int]]:
    """Return (serial, index) of each query, in order."""
    return [(cohort.serial, i) for cohort, lo, hi in stretches for i in range(lo, hi)]


class Model(RuleBasedStateMachine):
    """EdfQueue beside a sorted list of (deadline, number of the push, index)."""

    @initialize()
    def start(self) -> None:
        """Begin empty."""
        self.queue = EdfQueue()
        self.cohorts: dict[int, Cohort] = {}
        self.queued: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.dispatched: list[tuple[int, int]] = []
        self.pushes = 0

    def order(self) -> list[tuple[int, int]]:
        """Return what is queued: earliest deadline first, ties by arrival."""
        return sorted(self.queued, key=self.queued.__getitem__)

    @rule(deadlines=DEADLINES, floors=st.none() | st.lists(st.integers(0, 2), min_size=8, max_size=8))
    def push(self, deadlines: list[int], floors: list[int] | None) -> None:
        """A message arrives."""
        self.pushes += 1
        serial = self.pushes
        cohort = make_cohort(serial, deadlines, floors)
        self.cohorts[serial] = cohort
        self.queue.push(cohort, 0, len(deadlines))
        self.queued.update({(serial, i): (d, serial, i) for i, d in enumerate(deadlines)})

    @rule(k=st.integers(1, 10), subnet=st.integers(0, 2))
    def take(self, k: int, subnet: int) -> None:
        """A batch is taken: exactly the k earliest, up to the first whose floor is too high."""
        expected = []
        for serial, i in self.order()[:k]:
            floors = self.cohorts[serial].floors
            if floors is not None and floors[i] > subnet:
                break
            expected.append((serial, i))

        stretches, n = self.queue.take(k, subnet)

        assert flat(stretches) == expected
        assert n == len(expected)
        for cohort, lo, hi in stretches:
            cohort.states[lo:hi] = bytes([DISPATCHED]) * (hi - lo)
        for query in expected:
            del self.queued[query]
        self.dispatched += expected

    @rule(limit=st.integers(0, 13))
    def take_before(self, limit: int) -> None:
        """The doomed are taken: all whose deadline lies before the limit."""
        expected = [query for query in self.order() if self.queued[query][0] < limit]

        stretches = self.queue.take_before(limit)

        assert sorted(flat(stretches)) == sorted(expected)
        for cohort, lo, hi in stretches:
            assert cohort.deadlines_ns[lo:hi] == sorted(cohort.deadlines_ns[lo:hi])
            cohort.states[lo:hi] = bytes([ANSWERED]) * (hi - lo)
        for query in expected:
            del self.queued[query]

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A query anywhere in the queue ends from outside."""
        query = data.draw(st.sampled_from(sorted(self.queued)))
        del self.queued[query]
        self.cohorts[query[0]].states[query[1]] = ANSWERED
        self.queue.forget(self.cohorts[query[0]], query[1], query[1] + 1)

    @precondition(lambda self: self.dispatched)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        """A query whose worker was lost comes back, behind those of the same deadline."""
        query = data.draw(st.sampled_from(self.dispatched))
        self.dispatched.remove(query)
        serial, i = query
        cohort = self.cohorts[serial]
        cohort.states[i] = QUEUED
        self.pushes += 1
        self.queue.push(cohort, i, i + 1)
        self.queued[query] = (cohort.deadlines_ns[i], self.pushes, i)

    @invariant()
    def length_and_head_are_right(self) -> None:
        """The length counts what is queued, holes left out, and the head is the earliest."""
        assert len(self.queue) == len(self.queued)
        order, head = self.order(), self.queue.head()
        found: Any = None if head is None else (head[1].serial, head[2])
        assert found == (order[0] if order else None)
        if head is not None:
            assert head[0] == self.queued[order[0]][0]


Model.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=25, deadline=None)
TestEdfQueue = Model.TestCase


@given(values=st.lists(st.integers(0, 5)), cut=st.integers(0, 3))
def test_ascending_stretches_are_maximal_and_cover_everything(values: list[int], cut: int) -> None:
    """Stretches ascend, touch, and end only where the next value is smaller."""
    lo = min(cut, len(values))
    stretches = list(ascending_stretches(values, lo, len(values)))

    assert [i for start, end in stretches for i in range(start, end)] == list(range(lo, len(values)))
    for start, end in stretches:
        assert values[start:end] == sorted(values[start:end])
        assert end == len(values) or values[end] < values[end - 1]


def test_ties_go_to_whoever_came_first() -> None:
    """Of equal deadlines the earlier message's is served first, even if the later one has the head."""
    queue = EdfQueue()
    queue.push(make_cohort(1, [10]), 0, 1)
    queue.push(make_cohort(2, [5, 10]), 0, 2)

    assert flat(queue.take(3, 0)[0]) == [(2, 0), (1, 0), (2, 1)]


def test_a_floor_above_the_subnet_stops_the_batch() -> None:
    """What needs a better subnet is left, and with it all behind it: order comes before size."""
    queue = EdfQueue()
    queue.push(make_cohort(1, [1, 2, 3, 4], floors=[0, 1, 2, 0]), 0, 4)

    assert flat(queue.take(4, 1)[0]) == [(1, 0), (1, 1)]
    assert queue.take(4, 1) == ([], 0)
    assert len(queue) == 2
