"""How answered queries end: OK or LATE to the nanosecond, by query, as the client will see it."""

from __future__ import annotations

import pytest

from router.core.events import Answer, QueriesArrived
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.books import books_of, hang, numbers, report, sent
from tests.router.core.harness import CNN, World, ids_of, make_queries
from tests.router.core.test_core import make_world

OK, LATE, FAILED = Status.OK, Status.LATE, Status.FAILED

PATIENT = numbers(overrun_factor=100)
"""No batch overruns: its worker's own answer is the one that counts."""


def hung_world(n_workers: int = 1) -> World:
    """Return a world whose GPUs answer when the test reports for them."""
    world = make_world(n_workers, PATIENT)
    for key in world.processes:
        hang(world, key)
    return world


def test_a_batch_on_a_gpu_slower_than_its_profile_is_late() -> None:
    """Sixteen queries in a batch that takes a third longer than profiled end LATE, with what ran."""
    world = World()
    world.join("w0", CNN, speed=4 / 3)
    ids = world.submit(*[36.0] * 16)
    world.run(60)

    assert world.statuses(ids) == [LATE] * 16
    for i in ids:
        ran = world.answers["client", i].ran
        assert ran is not None
        assert ran.batch_size == 16
        assert world.answered_ns["client", i] > world.sent["client", i]
    assert books_of(world).answered == {LATE: 16}
    assert books_of(world).ok_accuracy == 0


@pytest.mark.parametrize(("after_ns", "status"), [(-1, OK), (0, OK), (1, LATE)])
def test_an_answer_is_late_from_the_first_nanosecond_past_its_deadline(after_ns: int, status: Status) -> None:
    """At the deadline itself it is in time."""
    world = hung_world()
    (query,) = world.submit(50)
    report(world, 0, world.sent["client", query] + after_ns)

    assert world.status(query) is status
    assert books_of(world).answered == {status: 1}
    accuracy = CNN.subnets[sent(world)[0].subnet].accuracy
    assert books_of(world).ok_accuracy == (accuracy if status is OK else 0)


@pytest.mark.parametrize(("before_ns", "status"), [(3 * MS, OK), (3 * MS - 1, LATE)])
def test_the_way_back_to_the_client_counts(before_ns: int, status: Status) -> None:
    """An answer that leaves the router in time and reaches a distant client past the deadline is LATE."""
    world = hung_world()
    world.client()
    for i in range(40):  # its messages take 3 ms, and so do answers
        world.do(QueriesArrived("client", make_queries([2_000 + i], [-1]), transit_ns=3 * MS))
        world.now_ns += 2 * MS
    (query,) = world.submit(80)
    report(world, 0, world.sent["client", query] - before_ns)

    assert world.status(query) is status


def test_queries_of_one_batch_end_each_by_its_own_deadline() -> None:
    """The earlier are LATE and the later OK, and each finds its place in the batch's output."""
    world = hung_world()
    early, late, last = world.submit(40, 50, 60)
    (batch,) = sent(world)
    assert batch.n == 3
    report(world, 0, world.sent["client", late])

    assert world.statuses([early, late, last]) == [LATE, OK, OK]
    answers = [action for _, action in world.actions if isinstance(action, Answer)]
    assert [(ids_of(a), a.at, a.n) for a in answers] == [([early], 0, 1), ([late, last], 1, 2)]
    assert books_of(world).answered == {LATE: 1, OK: 2}
    assert books_of(world).ok_accuracy == pytest.approx(2 * CNN.subnets[batch.subnet].accuracy)


def test_a_late_failure_is_a_failure() -> None:
    """Of a batch with a status for each query only what is OK becomes LATE."""
    world = hung_world()
    ids = world.submit(40, 40, 70)
    report(world, 0, world.sent["client", ids[0]] + 1, statuses=[OK, FAILED, OK])

    assert world.statuses(ids) == [LATE, FAILED, OK]
    assert [world.answers["client", i].at for i in ids] == [0, 1, 2]


def test_a_batch_from_the_middle_of_a_message_finds_its_outputs() -> None:
    """Places count from the batch's first query, not from the message's."""
    world = hung_world()
    ids = world.submit(*[100.0] * 20)
    report(world, 0, world.now_ns + 20 * MS)
    assert [batch.n for batch in sent(world)] == [16, 4]
    report(world, 1, world.now_ns + 10 * MS, statuses=[OK, FAILED, OK, FAILED])

    assert world.statuses(ids[16:]) == [OK, FAILED, OK, FAILED]
    assert [world.answers["client", i].at for i in ids[16:]] == [0, 1, 2, 3]


def test_batches_of_many_messages_answer_each_client_once() -> None:
    """Queries of two clients that share a batch are answered in one group a client, in the batch's order."""
    world = hung_world()
    blocker = world.submit(200)
    world.submit(60, 62, client="a", ids=[1, 2])
    world.submit(61, client="b", ids=[3])
    world.submit(63, client="a", ids=[4])
    report(world, 0, world.now_ns + 20 * MS)
    assert world.status(blocker[0]) is OK
    batch = sent(world)[1]
    assert batch.n == 4
    report(world, 1, world.now_ns + 10 * MS)

    answers = [action for _, action in world.actions if isinstance(action, Answer)][1:]
    assert sorted((a.client, sorted(ids_of(a)), a.n) for a in answers) == [("a", [1, 2, 4], 3), ("b", [3], 1)]
    order = [c.message.ids[8 * i] for c, lo, hi in batch.stretches for i in range(lo, hi)]
    for one in answers:
        assert [order[one.at + k] for k in range(one.n)] == ids_of(one)


def test_the_timeline_is_split_between_the_ways() -> None:
    """Of what a batch was neither waiting nor running, half is the way there and half the way back."""
    world = hung_world()
    (query,) = world.submit(100)
    report(world, 0, world.now_ns + 20 * MS, waited_ns=5 * MS, executing_ns=8 * MS)

    ran = world.answers["client", query].ran
    assert ran is not None
    assert (ran.to_start_ns, ran.executing_ns, ran.returning_ns) == (3_500_000 + 5 * MS, 8 * MS, 3_500_000)
    assert (ran.subnet, ran.batch_size) == (sent(world)[0].subnet, 1)
    books = books_of(world)
    assert (books.busy_ns, world.worker("w0").busy_ns) == (8 * MS, 8 * MS)
    assert (books.executed, books.output_bytes) == (1, 4)


def test_a_client_that_left_is_told_nothing() -> None:
    """Neither what its queries in flight give, nor that their worker died under others of them."""
    world = hung_world(2)
    world.submit(100)
    world.submit(100)
    first, second = sent(world)
    assert first.peer != second.peer
    world.leave()
    report(world, 0, world.now_ns + 10 * MS)
    world.kill(second.peer, seen=True)

    assert [action for _, action in world.actions if isinstance(action, Answer)] == []
    books = books_of(world)
    assert books.answered == {OK: 1, Status.WORKER_LOST: 1}
    assert (books.in_flight, books.held_bytes) == (0, 0)
