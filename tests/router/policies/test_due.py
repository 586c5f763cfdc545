"""What is due by when, against a list of the queries that are counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.policies.due import UNIT, Due, weights_of
from superserve.clock import MS

WEIGHTS = (UNIT, 24, 40)
FINE_NS, COARSE_NS = 1 << 21, 1 << 25
HORIZON_NS = 40 * COARSE_NS
"""What is due later than this counts as due then."""

INSTANTS = st.integers(0, 60 * MS) | st.integers(0, 3_000 * MS) | st.just(3_600_000 * MS)
QUERIES = st.lists(st.tuples(INSTANTS, st.integers(0, 4)), min_size=1, max_size=6)
"""Deadline and floor of each query of a message; floors beyond the last weight weigh as much as that."""


@dataclass
class Terms:
    """A message's queries."""

    deadlines_ns: list[int]
    floors: list[int] | None


class Model(RuleBasedStateMachine):
    """Stretches of messages come and go in any order, beside a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.due = Due(WEIGHTS)
        self.counted: list[tuple[Terms, int]] = []

    @rule(queries=QUERIES, is_plain=st.booleans())
    def add(self, queries: list[tuple[int, int]], is_plain: bool) -> None:
        """A message is counted whole."""
        floors = None if is_plain else [floor for _, floor in queries]
        terms = Terms([deadline for deadline, _ in queries], floors)
        self.due.add(terms, 0, len(queries))
        self.counted += [(terms, i) for i in range(len(queries))]

    @rule(n=st.integers(2, 40), at=INSTANTS, width=st.integers(0, 5 * MS))
    def add_burst(self, n: int, at: int, width: int) -> None:
        """Many queries that are due at nearly the same instant."""
        terms = Terms([at + width * i // n for i in range(n)], None)
        self.due.add(terms, 0, n)
        self.counted += [(terms, i) for i in range(n)]

    @precondition(lambda self: self.counted)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """A stretch of what is still counted of a message goes."""
        terms, lo = data.draw(st.sampled_from(self.counted))
        hi = lo + 1
        while any(one is terms and i == hi for one, i in self.counted) and data.draw(st.booleans()):
            hi += 1
        self.due.remove(terms, lo, hi)
        self.counted = [(one, i) for one, i in self.counted if one is not terms or not lo <= i < hi]

    @precondition(lambda self: self.counted)
    @rule()
    def remove_all(self) -> None:
        """Everything goes, one by one."""
        for terms, i in self.counted:
            self.due.remove(terms, i, i + 1)
        self.counted = []

    @invariant()
    def totals_are_right(self) -> None:
        """Work, queries of each floor, and nothing at all when nothing is queued."""
        floors = [0 if terms.floors is None else terms.floors[i] for terms, i in self.counted]
        assert self.due.total == sum(WEIGHTS[min(floor, 2)] for floor in floors)
        for above in range(4):
            for up_to in range(5):
                assert self.due.floored(above, up_to) == sum(above < floor <= up_to for floor in floors)
        if not self.counted:
            assert self.due.total == 0
            assert not any(self.due.floors.values())
            assert self.due.steps(0) == []

    @invariant()
    def steps_miss_nothing(self) -> None:
        """At each step all that is due by then is counted, and nothing that is due much later."""
        if not self.counted:
            return
        works = [
            (terms.deadlines_ns[i], WEIGHTS[0 if terms.floors is None else min(terms.floors[i], 2)])
            for terms, i in self.counted
        ]
        head_ns = min(works)[0]
        steps = self.due.steps(head_ns)
        assert steps == sorted(steps)
        assert len(steps) <= 24 + 40 + 1
        assert steps[-1][1] == self.due.total
        last_ns = -1
        for at_ns, work in steps[:-1]:
            assert work >= sum(one for due_ns, one in works if due_ns <= at_ns)
            far = at_ns - head_ns > 8 * FINE_NS
            late_ns = at_ns + (COARSE_NS // 2 if far else FINE_NS)
            assert work <= sum(one for due_ns, one in works if due_ns < late_ns)
            assert at_ns > last_ns
            last_ns = at_ns
        # What is far ahead counts too early, never too late by more than half a bucket.
        assert steps[-1][0] <= max(works)[0] + COARSE_NS // 2
        assert steps[-1][0] <= head_ns + HORIZON_NS + 2 * COARSE_NS


Model.TestCase.settings = settings(max_examples=120, stateful_step_count=20, deadline=None)
TestDue = Model.TestCase


def test_near_deadlines_are_told_apart_by_two_milliseconds_far_ones_by_thirty() -> None:
    """Within 17 ms of the head a step each 2.1 ms, behind that one each 33.6 ms."""
    due = Due()
    near, far = [10 * MS, 13 * MS, 16 * MS], [203 * MS, 207 * MS, 300 * MS]
    due.add(Terms([*near, *far], None), 0, 6)

    steps = due.steps(10 * MS)

    assert [work // UNIT for _, work in steps] == [1, 2, 3, 5, 6]
    assert all(abs(at_ns - due_ns) <= FINE_NS // 2 for (at_ns, _), due_ns in zip(steps, near, strict=False))
    assert all(abs(steps[i][0] - due_ns) <= COARSE_NS // 2 for i, due_ns in ((3, far[1]), (4, far[2])))


@given(costs=st.lists(st.floats(1.0, 1e6), min_size=1, max_size=6))
def test_a_query_weighs_what_its_floor_costs(costs: list[float]) -> None:
    """In proportion to the smallest row, within a half; never less than one without a floor."""
    ascending = sorted(costs)
    weights = weights_of(ascending)
    assert weights[0] == UNIT
    assert all(type(weight) is int and weight >= UNIT for weight in weights)
    for weight, cost in zip(weights, ascending, strict=True):
        assert abs(weight - UNIT * cost / ascending[0]) <= 0.5 + 1e-9 * weight


def test_the_first_step_is_the_heads_own_deadline() -> None:
    """A plan that gives the head a millisecond more than it has serves one query of a message too late."""
    due = Due()
    due.add(Terms([15 * MS + 200_000] * 18, None), 0, 18)
    assert due.steps(15 * MS + 200_000) == [(15 * MS + 200_000, 18 * UNIT)]


@given(queries=QUERIES, ahead_ns=st.integers(0, 5_000 * MS))
def test_work_until_an_instant_is_known_to_a_bucket(queries: list[tuple[int, int]], ahead_ns: int) -> None:
    """Nothing that is due by then is left out, and nothing counted that is due a bucket later."""
    due = Due(WEIGHTS)
    due.add(Terms([one for one, _ in queries], [floor for _, floor in queries]), 0, len(queries))
    head_ns = min(one for one, _ in queries)
    works = [(one, WEIGHTS[min(floor, 2)]) for one, floor in queries]
    found = due.until(head_ns, head_ns + ahead_ns)
    bucket_ns = FINE_NS if ahead_ns <= 24 * FINE_NS else COARSE_NS if ahead_ns < HORIZON_NS else 1 << 62
    assert found >= sum(work for one, work in works if one <= head_ns + ahead_ns)
    assert found <= sum(work for one, work in works if one <= head_ns + ahead_ns + bucket_ns)


# --- what the steps ask of the GPUs -----------------------------------------------------------


@dataclass
class GpuTime:
    """What GPU time there is, for `Due.ask`."""

    begin_ns: int = 0
    slowdown: float = 1.0
    others: float = 7.0
    taken_ns: float = 0.0
    lost_ns: float = 0.0
    unit_ns: float = 0.46 * MS
    enough_ns: float = math.inf
    lost_at_ns: float = -math.inf
    patience_ns: float = 35.0 * MS


TIMES = st.builds(
    GpuTime,
    begin_ns=st.integers(-5 * MS, 20 * MS),
    slowdown=st.sampled_from([1.0, 0.7, 2.5]),
    others=st.sampled_from([0.0, 0.4, 3.0, 7.0]),
    taken_ns=st.sampled_from([0.0, 20.0 * MS, 400.0 * MS]),
    lost_ns=st.sampled_from([0.0, 20.0 * MS, 400.0 * MS]),
    unit_ns=st.sampled_from([0.46 * MS, 6.0 * MS]),
    patience_ns=st.sampled_from([5.0 * MS, 35.0 * MS, 3_000.0 * MS]),
)


def expected_asked(due: Due, head_ns: int, time: GpuTime) -> tuple[float, list[tuple[float, float]], int]:
    """Return what all steps ask, one by one."""
    intensity, soon = 0.0, 0
    tight: list[tuple[float, float]] = []
    for due_ns, work in due.steps(head_ns):
        until_ns = (due_ns - time.begin_ns) / time.slowdown
        gpu_ns = max(until_ns * (time.others + 1) - time.taken_ns, until_ns / 2)
        if gpu_ns > 0:
            intensity = max(intensity, work / gpu_ns)
        left = work / UNIT - max(0.0, time.others * until_ns - time.lost_ns) / time.unit_ns
        if left > max([1.0, *[one for _, one in tight]]):
            tight.append((until_ns, left))
        if until_ns <= time.patience_ns:
            soon = work
    return intensity, tight, soon


@given(queries=st.lists(QUERIES, min_size=1, max_size=12), copies=st.integers(1, 60), time=TIMES)
def test_what_the_queue_asks_is_what_its_steps_ask(
    queries: list[list[tuple[int, int]]], copies: int, time: GpuTime
) -> None:
    """The pass leaves steps out, and no answer differs but the last, where it may be too small."""
    due = Due(WEIGHTS)
    for message in queries:
        terms = Terms([one for one, _ in message] * copies, [floor for _, floor in message] * copies)
        due.add(terms, 0, len(message) * copies)
    head_ns = min(one for message in queries for one, _ in message)
    intensity, tight, soon = expected_asked(due, head_ns, time)
    for harmless in (-1.0, float(soon - 1), float(soon)):
        found = due.ask(head_ns, time, harmless)
        assert found[0] == pytest.approx(intensity, rel=1e-9)
        assert found[1] is not None
        assert [at_ns for at_ns, _ in found[1]] == pytest.approx([at_ns for at_ns, _ in tight])
        assert [left for _, left in found[1]] == pytest.approx([left for _, left in tight], abs=1e-9)
        assert found[2] == soon if soon > harmless else found[2] <= soon


def test_a_queue_that_is_lost_is_not_read_to_its_end() -> None:
    """A thousand due in 10 ms are more than a batch can mend, and more than all GPUs serve in time."""
    due = Due(WEIGHTS)
    due.add(Terms([10 * MS] * 1_000, None), 0, 1_000)
    assert due.ask(10 * MS, GpuTime(lost_at_ns=-20.0 * MS), 0.0)[1] is None
    # On ten times as many GPUs they are no loss; nor are they where one batch could take them all.
    assert due.ask(10 * MS, GpuTime(lost_at_ns=-20.0 * MS, others=79.0), 0.0)[1] is not None
    assert due.ask(10 * MS, GpuTime(lost_at_ns=-500.0 * MS), 0.0)[1] is not None


@pytest.mark.parametrize(
    ("first_ms", "last_ms", "others", "most"),
    [(20, 10_000, 7.0, 24 + 40 + 4), (300, 800, 79.0, 16)],
    ids=["ten seconds", "all have time"],
)
def test_a_decision_reads_few_buckets(first_ms: int, last_ms: int, others: float, most: int) -> None:
    """However long the queue; and where all have time, the near part is not read."""
    due = Due(WEIGHTS)
    n_read = 0

    class Counting(dict[int, int]):
        def get(self, key: int, default: Any = None) -> Any:
            nonlocal n_read
            n_read += 1
            return super().get(key, default)

    due._fine, due._coarse = Counting(), Counting()
    for at_ms in range(first_ms, last_ms, 2):
        due.add(Terms([at_ms * MS] * 50, None), 0, 50)
    n_read = 0
    due.ask(first_ms * MS, GpuTime(others=others), math.inf)
    assert n_read <= most
