"""What a policy of another package may return by mistake: it is named once, and the router serves on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from router.core.events import Complaint
from router.policies import Choice, QueueView, Shed, WorkerView
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.books import sent
from tests.router.core.harness import CNN, World

if TYPE_CHECKING:
    from profiles.table import Profile

OK, INFEASIBLE = Status.OK, Status.INFEASIBLE


class Careless:
    """Returns what it was made with, whatever the queue."""

    name = "careless"

    def __init__(self, answer: Any, *, sees_demand: bool) -> None:
        self.answer = answer
        self.sees_demand = sees_demand

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Any:
        """Return the answer."""
        del queue, worker, now_ns
        return self.answer


def make_world(answer: Any, *, sees_demand: bool = False) -> World:
    """Return a world of two GPUs whose policy always returns this."""

    def make_policy(_profile: Profile) -> Any:
        return Careless(answer, sees_demand=sees_demand)

    world = World(make_policy=make_policy)
    world.join("w0", CNN, CNN)
    return world


def complaints(world: World) -> list[str]:
    """Return what was said of the policy."""
    return [action.reason for _, action in world.actions if isinstance(action, Complaint)]


WRONG = [
    Choice(6, 1),  # rows are 0 to 5
    Choice(-1, 1),
    Choice(0, 0),
    Choice(0, -3),
    Choice(0, 17),  # the profile knows 16
    Choice(0, 1.0),  # type: ignore[arg-type]
    Choice(np.int64(0), 1),  # type: ignore[arg-type]
    Choice(True, 1),
    Choice("cnn-78.25", 1),  # type: ignore[arg-type]
    Choice(0, 1, 0.5),  # type: ignore[arg-type]
    (0, 1),
    "0",
    Shed(1_000 * MS, 1),  # an instant long past
]


@pytest.mark.parametrize("sees_demand", [False, True])
@pytest.mark.parametrize("answer", WRONG, ids=repr)
def test_the_head_is_served_on_the_smallest_row_instead(answer: Any, sees_demand: bool) -> None:
    """In the largest batch that fits; the wrong answers are counted, and named once."""
    world = make_world(answer, sees_demand=sees_demand)
    ids = world.submit(*[36.0] * 20)
    world.run(30)
    ids += world.submit(36)
    world.run(30)

    assert world.statuses(ids) == [OK] * 21
    assert [(batch.subnet, batch.n) for batch in sent(world)] == [(0, 16), (0, 4), (0, 1)]
    assert world.core.n_wrong_choices == 3
    (reason,) = complaints(world)
    assert reason.startswith("policy 'careless': expected a Choice of a row from 0")
    assert repr(answer) in reason
    assert ("a Shed after the head's deadline" in reason) == sees_demand


def test_a_row_below_the_heads_floor_is_raised_to_it() -> None:
    """The promise to the query comes before the policy's wish; a head without a floor is served as wished."""
    world = make_world(Choice(1, 4))
    plain = world.submit(36)
    world.run(20)
    assert complaints(world) == []
    floored = world.submit(36, min_accuracy=[79.0])
    world.run(20)

    assert world.statuses(plain + floored) == [OK, OK]
    assert [batch.subnet for batch in sent(world)] == [1, 4]
    (reason,) = complaints(world)
    assert (
        "a row from 4 (the head's floor) to 5 and of 1 to 16 queries, or None; got Choice(subnet=1" in reason
    )
    assert f"Served on {CNN.subnets[4].name} instead" in reason


def test_what_does_not_fit_is_refused_as_ever() -> None:
    """Where the smallest row that satisfies the head is too slow for it, it ends INFEASIBLE."""
    world = make_world(Choice(99, 1))
    served = world.submit(36)
    refused = world.submit(4.5, min_accuracy=[80.0])  # alone 4.78 ms
    world.run(40)

    assert world.statuses(served + refused) == [OK, INFEASIBLE]
    assert "slack 4.50 ms" in world.answers["client", refused[0]].reason


@pytest.mark.parametrize("shed", [Shed(0, 1), Shed(10**18, 0), Shed(1e30, 1)], ids=repr)  # type: ignore[arg-type]
def test_a_shed_of_nothing_is_no_shed(shed: Shed) -> None:
    """Before the head's deadline nothing is due, and none at all is not one."""
    world = make_world(shed, sees_demand=True)
    ids = world.submit(*[36.0] * 3)
    world.run(30)
    assert world.statuses(ids) == [OK] * 3
    assert len(complaints(world)) == 1


def test_a_sound_shed_is_carried_out() -> None:
    """It refuses what it describes, and is no reason to complain."""
    world = make_world(Shed(10**18, 1), sees_demand=True)
    ids = world.submit(*[36.0] * 3)
    assert world.statuses(ids) == [Status.OVERLOADED] * 3
    assert complaints(world) == []
    assert world.core.n_wrong_choices == 0


def test_a_policy_that_sees_no_demand_may_not_shed() -> None:
    """Its queue has no lanes to shed from: the head is served."""
    world = make_world(Shed(10**18, 1))
    ids = world.submit(*[36.0] * 3)
    world.run(30)
    assert world.statuses(ids) == [OK] * 3
    assert len(complaints(world)) == 1


class Failing(Careless):
    """Raises what it was made with on every second question."""

    n = 0

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Any:
        """Raise, or choose the largest row."""
        del queue, worker, now_ns
        self.n += 1
        if self.n % 2:
            raise self.answer
        return Choice(5, 4)


@pytest.mark.parametrize("sees_demand", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError("no rate"), KeyError(7), RecursionError()], ids=repr)
def test_a_policy_that_raises_is_a_wrong_answer(error: Exception, sees_demand: bool) -> None:
    """The head is served on the smallest row; what was raised, and where, is said once."""
    world = World(make_policy=lambda _profile: Failing(error, sees_demand=sees_demand))
    world.join("w0", CNN)
    ids = []
    for _ in range(4):
        ids += world.submit(36)
        world.run(30)

    assert world.statuses(ids) == [OK] * 4
    assert [batch.subnet for batch in sent(world)] == [0, 5, 0, 5]
    assert world.core.n_wrong_choices == 2
    (reason,) = complaints(world)
    assert reason.startswith("policy 'careless': expected a Choice of a row from 0")
    assert f"it raised {error!r} at {__file__}:" in reason


def test_a_long_answer_is_cut() -> None:
    """A log line is no place for a megabyte."""
    world = make_world(["x" * 10_000])
    world.submit(36)
    (reason,) = complaints(world)
    assert len(reason) < 600
