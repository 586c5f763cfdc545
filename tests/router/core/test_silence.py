"""Heartbeats: what a stall of the router excuses, and what it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.core.events import WorkerHeard
from router.core.workers import PeerState
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.books import books_of
from tests.router.core.test_core import make_world

if TYPE_CHECKING:
    from tests.router.core.harness import World


def stall(world: World, duration_ms: int) -> None:
    """Stall the router: the clock goes on, and nothing is handled."""
    world.now_ns += duration_ms * MS
    world.core.advance(world.now_ns)


def test_workers_outlive_a_stall_of_the_router() -> None:
    """All of them are still there after two seconds in which the router heard none of them, and get work."""
    world = make_world(3)
    world.run(500)
    stall(world, 2_000)

    assert set(world.core.peers) == {"w0", "w1", "w2"}
    assert books_of(world).lost == 0
    ids = world.submit(100, 100, 100)
    world.run(100)
    assert world.statuses(ids) == [Status.OK] * 3


def test_a_worker_that_died_before_a_stall_is_found_after_it() -> None:
    """It is given back the time of the stall and no more: half a second later it is gone, the others live."""
    world = make_world(2)
    world.run(160)
    world.kill("w0", seen=False)  # last heard at 150 ms
    stall(world, 5_000)
    assert set(world.core.peers) == {"w0", "w1"}
    world.run(450)
    assert set(world.core.peers) == {"w0", "w1"}
    world.run(450)

    assert set(world.core.peers) == {"w1"}
    assert books_of(world).lost == 1


def test_a_stall_shorter_than_two_heartbeats_excuses_nobody() -> None:
    """Rounds that come a little late are no stall: silence still counts."""
    world = make_world()
    world.processes["w0"].alive = False
    for _ in range(4):
        stall(world, 190)

    assert set(world.core.peers) == set()


def test_a_peer_is_judged_by_what_it_said_last() -> None:
    """A worker heard during the stall's first round is not credited with time ahead of the clock."""
    world = make_world()
    world.run(120)
    world.now_ns += 3_000 * MS
    world.do(WorkerHeard("w0"))
    world.processes["w0"].alive = False
    world.run(450)
    assert world.core.peers["w0"].machine.state is PeerState.SUSPECT
    world.run(350)
    assert set(world.core.peers) == set()


def test_many_processes_are_all_judged() -> None:
    """Of more GPUs than one pass looks at, each silent one is found within its time, and no other."""
    world = make_world(150)
    silent = {f"w{k}" for k in range(0, 150, 7)}
    alive = set(world.core.peers) - silent
    left = []
    for step in range(90):  # an advance every 10 ms, a heartbeat every 100
        world.now_ns += 10 * MS
        if step % 10 == 0:
            for key in alive:
                world.core.handle(WorkerHeard(key), world.now_ns)
        world.core.advance(world.now_ns)
        left.append(set(world.core.peers))

    assert left[58] == alive | silent  # 590 ms: not six heartbeats yet
    assert left[75] == left[-1] == alive
    assert books_of(world).lost == len(silent)
