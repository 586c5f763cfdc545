"""LaneQueue against a model that sorts a list, and what lanes add to one queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.edf import ANSWERED, DISPATCHED, QUEUED, Cohort, EdfQueue
from router.core.lanes import LaneQueue
from router.policies.due import UNIT
from tests.effort import examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from router.core.edf import Stretch

QUERIES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 2), st.sampled_from([0, 0, 7])), min_size=1, max_size=8
)
"""Deadline, floor and class of each query of a message."""

Query = tuple[int, int]

WEIGHTS = (UNIT, 20, 37)
"""What a query of each floor weighs."""


def make_cohort(
    serial: int,
    deadlines: Sequence[int],
    floors: Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
) -> Cohort:
    """Return a message's queries."""
    return Cohort(
        serial, None, list(deadlines), 0, 0,
        floors=None if floors is None else list(floors), classes=None if classes is None else bytes(classes),
    )  # fmt: skip


def flat(stretches: Sequence[Stretch]) -> list[Query]:
    """Return the queries of these stretches: (serial, index)."""
    return [(cohort.serial, i) for cohort, lo, hi in stretches for i in range(lo, hi)]


class Model(RuleBasedStateMachine):
    """Pushes, takes, sheds, cancels and requeues, beside a dictionary of what must be queued."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = LaneQueue(weights=WEIGHTS)
        self.cohorts: dict[int, Cohort] = {}
        self.queued: dict[Query, tuple[int, int, int]] = {}  # deadline, floor, class
        self.dispatched: dict[Query, tuple[int, int, int]] = {}

    @rule(queries=QUERIES, is_plain=st.booleans())
    def push(self, queries: list[tuple[int, int, int]], is_plain: bool) -> None:
        """A message arrives, with floors and classes or without."""
        serial = len(self.cohorts)
        if is_plain:
            queries = [(deadline, 0, 0) for deadline, _, _ in queries]
        deadlines, floors, classes = (list(column) for column in zip(*queries, strict=True))
        cohort = make_cohort(serial, deadlines, *((None, None) if is_plain else (floors, classes)))
        self.cohorts[serial] = cohort
        self.queue.push(cohort, 0, len(queries))
        self.queued |= {(serial, i): query for i, query in enumerate(queries)}

    @rule(k=st.integers(1, 6), subnet=st.integers(0, 2), until=st.none() | st.integers(0, 12))
    def take(self, k: int, subnet: int, until: int | None) -> None:
        """A batch is the earliest that its subnet may serve, whatever waits between them."""
        allowed = [d for d, floor, _ in self.queued.values() if floor <= subnet]
        expected = sorted(d for d in allowed if until is None or d <= until)[:k]

        stretches, n = self.queue.take(k, subnet, until)

        taken = flat(stretches)
        assert [self.queued[query][0] for query in taken] == expected
        assert n == len(expected)
        assert all(self.queued[query][1] <= subnet for query in taken)
        self._mark(stretches, DISPATCHED)

    @rule(k=st.integers(1, 6), subnet=st.integers(0, 2), first_above=st.integers(0, 2))
    def take_packed(self, k: int, subnet: int, first_above: int) -> None:
        """Those of a high floor first, each group by deadline; never a floor above the subnet."""
        floors = {query: floor for query, (_, floor, _) in self.queued.items() if floor <= subnet}
        high = sorted(self.queued[query][0] for query, floor in floors.items() if floor > first_above)
        low = sorted(self.queued[query][0] for query, floor in floors.items() if floor <= first_above)

        stretches, n = self.queue.take_packed(k, subnet, first_above)

        taken = flat(stretches)
        assert [self.queued[query][0] for query in taken] == (high + low)[:k]
        assert n == len(taken) == len(set(taken))
        assert set(taken) <= set(floors)
        is_high = [floors[query] > first_above for query in taken]
        assert is_high == sorted(is_high, reverse=True)
        self._mark(stretches, DISPATCHED)

    @rule(limit=st.integers(0, 13))
    def take_before(self, limit: int) -> None:
        """The doomed are taken from every lane."""
        stretches = self.queue.take_before(limit)

        expected = [query for query, (deadline, _, _) in self.queued.items() if deadline < limit]
        assert sorted(flat(stretches)) == sorted(expected)
        self._mark(stretches, ANSWERED)

    @precondition(lambda self: self.queued)
    @rule(n=st.integers(1, 4), after=st.integers(1, 5))
    def shed(self, n: int, after: int) -> None:
        """The lowest class gives way: its late ones for its own head, its earliest for a higher one's."""
        head = self.queue.head()
        assert head is not None
        before = head[0] + after
        lowest = min(priority for _, _, priority in self.queued.values())
        mine = sorted(d for d, _, priority in self.queued.values() if priority == lowest)
        is_own = self.queued[head[1].serial, head[2]][2] == lowest
        expected = [d for d in mine if d < before] if is_own else mine[:n]

        stretches = self.queue.shed(before, n)

        assert expected
        assert sorted(self.queued[query][0] for query in flat(stretches)) == expected
        assert all(self.queued[query][2] == lowest for query in flat(stretches))
        self._mark(stretches, ANSWERED)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A query anywhere in the queue ends from outside."""
        serial, i = data.draw(st.sampled_from(sorted(self.queued)))
        self.queue.forget(self.cohorts[serial], i, i + 1)
        del self.queued[serial, i]
        self.cohorts[serial].states[i] = ANSWERED

    @precondition(lambda self: self.dispatched)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        """A query whose worker was lost comes back to its lane."""
        serial, i = data.draw(st.sampled_from(sorted(self.dispatched)))
        self.queued[serial, i] = self.dispatched.pop((serial, i))
        self.cohorts[serial].states[i] = QUEUED
        self.queue.push(self.cohorts[serial], i, i + 1)

    def _mark(self, stretches: Sequence[Stretch], state: int) -> None:
        for cohort, lo, hi in stretches:
            cohort.states[lo:hi] = bytes([state]) * (hi - lo)
        for query in flat(stretches):
            terms = self.queued.pop(query)
            if state == DISPATCHED:
                self.dispatched[query] = terms

    @invariant()
    def length_and_head_are_right(self) -> None:
        """The length counts what is queued in all lanes, and the head is the earliest of them."""
        assert len(self.queue) == len(self.queued)
        head = self.queue.head()
        earliest = min((deadline for deadline, _, _ in self.queued.values()), default=None)
        assert (None if head is None else head[0]) == earliest

    @invariant()
    def what_is_due_is_what_is_queued(self) -> None:
        """However queries came and went, their work and floors are counted, to the last."""
        due, floors = self.queue.due, [floor for _, floor, _ in self.queued.values()]
        assert due.total == sum(WEIGHTS[floor] for floor in floors)
        assert [due.floored(row - 1, row) for row in (1, 2)] == [floors.count(1), floors.count(2)]
        head = self.queue.head()
        if head is not None:
            assert due.steps(head[0])[-1][1] == due.total


Model.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=25, deadline=None)
TestLaneQueue = Model.TestCase


def test_a_batch_passes_over_a_floor_above_its_subnet() -> None:
    """Where one queue would end the batch, lanes leave out what the subnet may not serve."""
    queue = LaneQueue()
    queue.push(make_cohort(1, [1, 2, 3, 4], floors=[0, 1, 2, 0]), 0, 4)

    assert flat(queue.take(4, 1)[0]) == [(1, 0), (1, 1), (1, 3)]
    assert queue.take(4, 1) == ([], 0)
    assert flat(queue.take(4, 2)[0]) == [(1, 2)]


def test_what_waited_before_there_were_lanes_is_taken_over() -> None:
    """A queue filled before the first worker joined keeps its queries, in their lanes."""
    earlier = EdfQueue()
    earlier.push(make_cohort(1, [5, 3, 4], floors=[0, 2, 0], classes=[9, 0, 0]), 0, 3)

    queue = LaneQueue(earlier)

    assert len(queue) == 3
    assert queue.head_class() == (0, 0)
    assert sorted(lane for _, lane in queue.heads()) == [(0, 0), (0, 2), (9, 0)]


def test_of_queries_due_together_the_higher_class_is_first() -> None:
    """Whichever came first: a spike has one deadline, and the first batches may be all that are in time."""
    queue = LaneQueue(weights=WEIGHTS)
    queue.push(make_cohort(0, [5] * 4, None, [0, 7, 0, 3]), 0, 4)
    queue.push(make_cohort(1, [5, 4], None, [7, 0]), 0, 2)

    head = queue.head()

    assert head is not None
    assert (head[0], head[1].serial) == (4, 1)
    assert flat(queue.take(6, 0)[0]) == [(1, 1), (0, 1), (1, 0), (0, 3), (0, 0), (0, 2)]
