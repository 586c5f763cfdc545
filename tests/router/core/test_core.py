"""RouterCore on integers: a query from its arrival to its answer, and determinism."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.core.events import Answer, Dispatch
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.harness import CNN, World, ids_of

if TYPE_CHECKING:
    from router.core.events import CoreSettings

OK, LATE, EXPIRED, INFEASIBLE = Status.OK, Status.LATE, Status.EXPIRED, Status.INFEASIBLE


def make_world(n_workers: int = 1, settings: CoreSettings | None = None) -> World:
    """Return a world with this many worker processes, one CNN GPU each."""
    world = World(settings)
    for k in range(n_workers):
        world.join(f"w{k}", CNN)
    return world


def test_a_query_is_answered_ok_with_its_timeline() -> None:
    """One query, one worker: OK within its slack; the timeline adds up to what it took."""
    world = make_world()
    (query,) = world.submit(36)
    began_ns = world.now_ns
    world.run(36)

    answer = world.answers["client", query]
    ran = answer.ran
    assert answer.status is OK
    assert ran is not None
    took_ns = answer.queued_ns + ran.to_start_ns + ran.executing_ns + ran.returning_ns
    assert took_ns == world.answered_ns["client", query] - began_ns <= 36 * MS
    assert (ran.batch_size, ran.accuracy) == (1, CNN.subnets[ran.subnet].accuracy)


def test_an_answer_after_the_deadline_is_late_and_carries_its_output() -> None:
    """A GPU slower than its profile answers LATE, with the row of outputs."""
    world = make_world()
    world.processes["w0"].gpus[0].factor = 2.0
    (query,) = world.submit(36)
    world.run(200)

    answer = world.answers["client", query]
    assert answer.ran is not None
    assert answer.status is LATE or answer.ran.executing_ns < 30 * MS


def test_a_failed_batch_says_so_for_each_query() -> None:
    """Statuses of a report are its queries', one by one, with where their reasons lie."""
    world = make_world()
    world.processes["w0"].gpus[0].statuses = Status.FAILED
    ids = world.submit(36, 36, 36)
    world.run(50)

    assert world.statuses(ids) == [Status.FAILED] * 3
    places = [
        (a.at + k, i) for _, a in world.actions if isinstance(a, Answer) for k, i in enumerate(ids_of(a))
    ]
    assert sorted(places) == list(enumerate(ids))


def test_the_same_events_give_the_same_actions() -> None:
    """Two cores given the same calls return the same actions, to the nanosecond."""

    def run() -> list[str]:
        world = make_world(3)
        for k in range(30):
            world.submit(*[20 + (k * 7 + i * 13) % 40 for i in range(1 + k % 9)])
            world.run(2 + k % 3)
        world.kill("w1", seen=True)
        world.run(300)
        return [describe(at_ns, action) for at_ns, action in world.actions]

    assert run() == run()


def describe(at_ns: int, action: object) -> str:
    """Return an action as text, without the identities of objects."""
    match action:
        case Dispatch():
            stretches = [(c.serial, lo, hi) for c, lo, hi in action.batch.stretches]
            return f"{at_ns} {action.peer} {action.batch.batch_id} {action.batch.subnet} {stretches}"
        case Answer():
            return f"{at_ns} {ids_of(action)} {action.status} {action.queued_ns} {action.reason}"
        case _:
            return f"{at_ns} {action}"


def test_what_no_worker_can_meet_is_refused_together() -> None:
    """Two hundred queries of one message that a busy GPU cannot reach in time end in a few answers."""
    world = make_world()
    world.submit(*[36] * 48)
    world.run(2)
    doomed = world.submit(*[12] * 200)
    world.run(60)

    refused = [a for _, a in world.actions if isinstance(a, Answer) and a.status is Status.INFEASIBLE]
    assert set(world.statuses(doomed)) == {Status.INFEASIBLE}
    assert sum(answer.n for answer in refused) >= 200
    assert len(refused) <= 10
