"""RouterCore on integers: bounds, floors, cancels, clients that leave, come back and send again."""

from __future__ import annotations

import pytest

from router.core.events import ClientJoined, CoreSettings, DrainRouter
from superserve.wire import Status
from tests.router.core.harness import CNN, World
from tests.router.core.test_core import make_world

OK, LATE, EXPIRED, INFEASIBLE = Status.OK, Status.LATE, Status.EXPIRED, Status.INFEASIBLE


def test_queries_beyond_the_bound_are_overloaded() -> None:
    """The first max_queries of a message are admitted, the rest refused with the option's name."""
    world = World(CoreSettings(max_queries=3))
    ids = world.submit(*[36.0] * 5)

    assert world.statuses(ids) == [None, None, None, Status.OVERLOADED, Status.OVERLOADED]
    assert "--max-queries" in world.answers["client", ids[4]].reason


def test_bytes_beyond_the_bound_are_overloaded_until_some_are_given_back() -> None:
    """A message that would exceed max_bytes is refused with the option's name; answered ones give back."""
    world = World(CoreSettings(max_bytes=30))
    first, second = world.submit(10, payload=b"x" * 20), world.submit(10, payload=b"x" * 20)
    assert world.statuses(second) == [Status.OVERLOADED]
    assert "--max-bytes" in world.answers["client", second[0]].reason
    world.run(50)

    third = world.submit(10, payload=b"x" * 20)
    assert world.statuses([*first, *third]) == [EXPIRED, None]


def test_a_payload_of_another_size_is_invalid() -> None:
    """What the model does not take is refused with both sizes."""
    world = World()
    world.core.model.payload_bytes = 4
    (query,) = world.submit(36, payload=b"12345")

    assert world.status(query) is Status.INVALID
    assert world.answers["client", query].reason == "payload: the model takes 4 bytes a query, got 5 bytes"


@pytest.mark.parametrize("row", range(CNN.n_subnets))
def test_a_floor_equal_to_a_subnets_accuracy_allows_that_subnet(row: int) -> None:
    """A floor crosses the wire as f32 and is not rounded above what was asked, even the best."""
    world = make_world()
    world.submit(36, min_accuracy=[CNN.subnets[row].accuracy])

    (dispatch,) = world.dispatches()
    cohort = dispatch.batch.stretches[0][0]
    assert (cohort.floors or [0])[0] == row <= dispatch.batch.subnet


@pytest.mark.parametrize("floor", [80.2, float("inf"), float("nan")])
def test_a_floor_that_no_subnet_reaches_is_invalid(floor: float) -> None:
    """The reason names the best accuracy there is, and the bytes are given back."""
    world = make_world()
    ids = world.submit(36, 36, min_accuracy=[floor, floor])

    assert world.statuses(ids) == [Status.INVALID] * 2
    assert "80.16 %" in world.answers["client", ids[0]].reason
    assert world.core.held_bytes == 0


def test_a_floor_asked_for_before_the_first_worker_is_honoured() -> None:
    """Queries that wait for the first worker keep their floors, and impossible ones end when it comes."""
    world = World()
    low, high, impossible = world.submit(50, 50, 50, min_accuracy=[0, 80.16, 99])
    world.join("w0", CNN)
    world.run(50)

    assert world.statuses([low, high, impossible]) == [OK, OK, Status.INVALID]
    ran = world.answers["client", high].ran
    assert ran is not None
    assert ran.subnet == CNN.n_subnets - 1


def test_a_queued_query_that_is_cancelled_never_runs() -> None:
    """CANCELLED at once, and no directive holds it; unknown ids are ignored."""
    world = World()
    first, second = world.submit(50, 50)
    world.cancel(first, 12345)
    world.join("w0", CNN)
    world.run(50)

    assert world.statuses([first, second]) == [Status.CANCELLED, OK]
    assert sum(dispatch.batch.n for dispatch in world.dispatches()) == 1


def test_a_query_cancelled_in_flight_is_answered_once() -> None:
    """CANCELLED at once; its worker's later answer is dropped."""
    world = make_world()
    first, second = world.submit(36, 36)
    world.cancel(first)
    assert world.status(first) is Status.CANCELLED
    world.run(50)

    assert world.statuses([first, second]) == [Status.CANCELLED, OK]


def test_a_client_that_leaves_is_forgotten() -> None:
    """Its queued queries cost no GPU time, those in flight end unheard, nothing is held."""
    world = make_world()
    world.submit(*[36.0] * 100)
    sent = sum(dispatch.batch.n for dispatch in world.dispatches())
    world.leave()
    world.run(100)

    assert not world.answers
    assert sum(dispatch.batch.n for dispatch in world.dispatches()) == sent
    assert world.core.n_answered == world.core.received == 100
    assert world.core.held_bytes == 0


def test_a_connection_taken_over_by_another_session_leaves_the_first() -> None:
    """One key, one client: the queries of the session before are forgotten, not answered to a stranger."""
    world = World()
    world.submit(50)
    world.do(ClientJoined("client", session=99))
    world.run(100)

    assert not world.answers
    assert world.core.n_answered == world.core.received == 1


def test_a_session_on_a_new_connection_takes_its_queries_along() -> None:
    """Answers go where the client is now."""
    world = World()
    world.client("old", session=7)
    (query,) = world.submit(50, client="old")
    world.client("new", session=7)
    world.join("w0", CNN)
    world.run(50)

    assert world.answers.keys() == {("new", query)}


def test_what_is_sent_again_is_not_run_twice() -> None:
    """Ids still on their way to an answer are skipped, whether queued or in flight; new ones are admitted."""
    world = make_world()
    ids = world.submit(*[36.0] * 30)
    world.submit(*[36.0] * 32, ids=[*ids, 1000, 1001], resubmitted=True)
    world.run(100)

    assert set(world.statuses([*ids, 1000, 1001])) <= {OK, LATE, INFEASIBLE}
    assert world.core.received == 32
    assert sum(dispatch.batch.n for dispatch in world.dispatches()) <= 32


def test_a_draining_router_ends_what_it_has_and_takes_no_more() -> None:
    """New queries are DRAINING; queued ones are served."""
    world = make_world()
    (before,) = world.submit(36)
    world.do(DrainRouter())
    (after,) = world.submit(36)
    world.run(50)

    assert world.statuses([before, after]) == [OK, Status.DRAINING]
