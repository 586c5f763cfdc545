"""Queries that a client sends again, after it lost its connection or an answer on the way."""

from __future__ import annotations

from superserve.wire import Status
from tests.router.core.books import books_of, sent
from tests.router.core.harness import CNN, World
from tests.router.core.test_core import make_world

OK, EXPIRED = Status.OK, Status.EXPIRED


def test_what_was_answered_is_taken_again() -> None:
    """Its answer was lost on the way: it is queued and answered again; the other is not queued twice."""
    world = World()
    short, long = world.submit(10, 300)
    world.run(20)
    assert world.status(short) is EXPIRED
    del world.answers["client", short]  # it never reached the client
    world.submit(100, 280, ids=[short, long], resubmitted=True)

    assert (books_of(world).received, books_of(world).waiting) == (3, 2)
    world.join("w0", CNN)
    world.run(100)
    assert world.statuses([short, long]) == [OK, OK]
    assert sum(batch.n for batch in sent(world)) == 2
    assert books_of(world).held_bytes == 0


def test_what_is_in_flight_is_not_taken_again() -> None:
    """A worker has it: its answer serves, and neither the queue nor the count of queries grows."""
    world = make_world()
    (query,) = world.submit(100)
    assert len(world.dispatches()) == 1
    world.submit(99, ids=[query], resubmitted=True)
    books = books_of(world)
    assert (books.received, books.waiting, books.in_flight) == (1, 0, 1)
    world.run(100)

    assert world.status(query) is OK
    assert len(world.dispatches()) == 1
    assert books_of(world).held_bytes == 0


def test_the_unknown_among_the_known_are_taken() -> None:
    """Each query of the message is judged alone, whichever message brought it first."""
    world = World()
    first, second = world.submit(200), world.submit(200)
    world.submit(*[190] * 5, ids=[50, first[0], 51, second[0], 52], resubmitted=True)

    assert (books_of(world).received, books_of(world).waiting) == (5, 5)
    world.join("w0", CNN)
    world.run(100)
    assert world.statuses([*first, *second, 50, 51, 52]) == [OK] * 5
    assert books_of(world).answered == {OK: 5}
    assert books_of(world).held_bytes == 0


def test_what_is_sent_again_to_a_router_that_knows_nothing_is_taken_whole() -> None:
    """A router that has just started, or another one, takes them like any other."""
    world = World()
    ids = world.submit(100, 100, ids=[7, 8], resubmitted=True)
    world.join("w0", CNN)
    world.run(100)

    assert world.statuses(ids) == [OK, OK]
    assert books_of(world).received == 2


def test_another_clients_ids_are_its_own() -> None:
    """Two clients may use the same numbers; what one sends again is not compared with the other's."""
    world = World()
    world.submit(100, client="a", ids=[1])
    world.submit(100, client="b", ids=[2])
    world.submit(90, client="b", ids=[1], resubmitted=True)
    world.join("w0", CNN)
    world.run(90)

    assert {key: answer.status for key, answer in world.answers.items()} == {
        ("a", 1): OK,
        ("b", 1): OK,
        ("b", 2): OK,
    }


def test_the_end_of_an_old_connection_harms_no_session_that_moved() -> None:
    """The client speaks on a new one by then: its queries are served, and answered there."""
    world = World()
    world.client("old", session=7)
    (query,) = world.submit(100, client="old")
    world.client("new", session=7)
    world.leave("old")
    world.join("w0", CNN)
    world.run(100)

    assert {key: answer.status for key, answer in world.answers.items()} == {("new", query): OK}
    again = world.submit(50, client="new")
    world.run(50)
    assert world.status(again[0], "new") is OK
