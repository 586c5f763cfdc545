"""What the core learns of the way to its clients, and what it does not make of a few messages."""

from __future__ import annotations

import itertools

import pytest

from router.core.events import ClientJoined, QueriesArrived
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.books import sent
from tests.router.core.harness import CNN, World, make_queries

OK = Status.OK
BEST = CNN.n_subnets - 1
IDS = itertools.count(10**6)
TIGHT_MS = 34.0
"""Just enough for the largest batch on the best subnet, which takes 31.621 ms, if the client is near."""


def make_world() -> World:
    """Return a world of one worker, and a client `near` of whose messages none was under way for long."""
    world = World()
    world.join("w0", CNN)
    world.do(ClientJoined("near", session=1))
    return world


def hear(world: World, transit_ms: float, *, client: str = "near", n: int = 1, gap_ms: float = 3) -> None:
    """Deliver messages that took `transit_ms`; their queries are too late for an answer."""
    for _ in range(n):
        message = make_queries([next(IDS)], [-1])
        world.do(QueriesArrived(client, message, transit_ns=round(transit_ms * MS)))
        world.run(gap_ms)


def chosen(world: World, client: str = "near") -> int:
    """Return the subnet that one query of tight slack is given."""
    world.submit(TIGHT_MS, client=client)
    return sent(world)[-1].subnet


def test_a_near_client_is_given_the_best() -> None:
    """Nothing is held back for a way that takes no time."""
    world = make_world()
    hear(world, 0, n=120)

    assert chosen(world) == BEST


@pytest.mark.parametrize("n", [20, 120])
def test_the_way_back_to_a_far_client_costs_slack(n: int) -> None:
    """Its queries took 3 ms, so its answers will: the batch is shorter by as much, and in time."""
    world = make_world()
    hear(world, 3, n=n)
    query = world.submit(TIGHT_MS, client="near")

    assert sent(world)[-1].subnet < BEST
    world.run(TIGHT_MS)
    assert world.status(query[0], "near") is OK
    assert world.answered_ns["near", query[0]] <= world.sent["near", query[0]] - 3 * MS


def test_a_backlog_is_one_measurement() -> None:
    """Two hundred messages that waited behind a stall come at once: the way has not become longer."""
    world = make_world()
    hear(world, 0, n=120)
    hear(world, 50, n=200, gap_ms=0)
    world.run(3)

    assert chosen(world) == BEST


def test_two_slow_messages_of_a_new_client_are_not_its_way() -> None:
    """Until it has sent a hundred, its way varies as that of all clients does."""
    world = make_world()
    hear(world, 0, n=300)
    world.do(ClientJoined("new", session=2))
    hear(world, 30, client="new", n=2)
    hear(world, 0, client="new", n=6)

    assert chosen(world, "new") == BEST


def test_the_worst_of_many_messages_is_its_way() -> None:
    """Of a client that has sent hundreds, what three in a hundred took is allowed for."""
    world = make_world()
    for _ in range(6):
        hear(world, 0, n=32)
        hear(world, 8, n=1)

    assert chosen(world) < BEST
