"""Which worker is given the head, and when: the earliest-free one, or the one that can still meet it."""

from __future__ import annotations

from router.core.events import DrainWorker
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.books import earliness, sent, slower
from tests.router.core.harness import CNN, World
from tests.router.core.test_core import make_world

OK = Status.OK


def test_the_worker_that_is_free_first_is_given_the_head() -> None:
    """Of three busy workers the next query goes to the one whose batch ends first, whatever its name."""
    world = make_world(3)
    for n in (16, 2, 8):
        world.submit(*[36.0] * n)
    held = {batch.n: batch.peer for batch in sent(world)}
    assert len(set(held.values())) == 3
    world.run(5)
    world.submit(100)
    world.run(60)

    fourth = sent(world)[3]
    assert fourth.peer == held[2]


def test_an_idle_worker_is_given_work_at_once() -> None:
    """However many others are busy."""
    world = make_world(4)
    for _ in range(3):
        world.submit(*[36.0] * 16)
    busy = {batch.peer for batch in sent(world)}
    assert len(busy) == 3
    world.run(1)
    before = len(sent(world))
    world.submit(36)

    assert len(sent(world)) == before + 1
    assert sent(world)[-1].peer not in busy


def test_a_head_that_waits_for_the_fast_worker_is_sent_when_that_is_about_to_be_free() -> None:
    """The slow one is idle and too slow; the fast one is not decided for a whole batch ahead."""
    world = World()
    world.join("fast", CNN)
    early = earliness(world)
    world.submit(*[36.0] * 16)
    world.join("slow", slower(CNN, 20))
    tight = world.submit(45)  # the fast one begins in 31 ms; alone the slow one takes 29
    world.run(1)
    (waiting,) = world.submit(20 + 25)
    world.run(50)

    assert world.statuses([*tight, waiting]) == [OK, OK]
    assert max(early) <= MS


def test_a_head_that_another_worker_can_just_serve_alone_goes_there() -> None:
    """What that one needs is a batch of one, nearly the worst way back and the margin: 3.25 ms."""
    world = World()
    world.join("slow", slower(CNN, 20))
    world.run(1)
    world.join("fast", CNN)
    (query,) = world.submit(3.4)
    world.run(5)

    assert world.status(query) is OK
    assert [batch.peer for batch in sent(world)] == ["fast"]


def test_the_queue_behind_a_waiting_head_is_served_later_not_never() -> None:
    """While the head waits for the fast worker, what comes behind it waits too, and all are answered."""
    world = World()
    world.join("fast", CNN)
    world.submit(*[36.0] * 16)
    world.join("slow", slower(CNN, 10))
    ids = world.submit(40) + world.submit(*[300.0] * 6)
    world.run(300)

    assert None not in world.statuses(ids)
    assert world.statuses(ids).count(OK) >= 6


def test_a_draining_worker_is_no_rival() -> None:
    """A head too tight for the slow worker is refused, not kept for one that takes no more."""
    world = World()
    world.join("fast", CNN)
    world.join("slow", slower(CNN, 20))
    world.submit(*[600.0] * 2)
    world.do(DrainWorker("fast", None))
    (query,) = world.submit(12)
    world.run(12)

    assert world.status(query) is Status.INFEASIBLE
