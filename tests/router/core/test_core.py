"""RouterCore on integers: admission, order, dispatch, answers, cancels, draining, determinism."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from router.core.events import Answer, ClientJoined, Dispatch, DrainRouter, DrainWorker, Finished, Released
from router.core.state import CoreSettings
from superserve.clock import MS
from superserve.errors import ConfigError, WireError
from superserve.wire import Status
from tests.router.core.harness import CNN, TRANSFORMER, Gpu, World, ids_of

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.core.workers import Worker

OK, LATE, EXPIRED, INFEASIBLE = Status.OK, Status.LATE, Status.EXPIRED, Status.INFEASIBLE


def make_world(n_workers: int = 1, settings: CoreSettings | None = None) -> World:
    """Return a world of so many worker processes, one CNN GPU each."""
    world = World(settings)
    for k in range(n_workers):
        world.join(f"w{k}", CNN)
    return world


def slower(profile: Profile, factor: int) -> Profile:
    """Return the same subnets on a device so many times slower."""
    subnets = tuple(
        dataclasses.replace(
            subnet,
            latency_ns=tuple(factor * ns for ns in subnet.latency_ns),
            latency_p99_ns=tuple(factor * ns for ns in subnet.latency_p99_ns),
        )
        for subnet in profile.subnets
    )
    return dataclasses.replace(profile, name="slow", subnets=subnets)


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


def test_dispatch_is_earliest_deadline_first() -> None:
    """Deadlines that arrive in any order leave in their own; the world checks each directive."""
    world = make_world()
    ids = world.submit(*[60 + (37 * k) % 101 for k in range(120)])
    world.run(300)

    order = [i for d in world.dispatches() for c, lo, hi in d.stretches for i in c.deadlines_ns[lo:hi]]
    assert order == sorted(order)
    assert None not in world.statuses(ids)
    assert world.statuses(ids).count(OK) > 60


def test_what_cannot_be_met_is_infeasible_on_arrival() -> None:
    """Less slack than the smallest subnet needs alone is refused in the same step, with both figures."""
    world = make_world()
    hopeless, late, fine = world.submit(1.2, -5, 36)

    assert world.statuses([hopeless, late, fine]) == [INFEASIBLE, INFEASIBLE, None]
    assert "quickest answer takes" in world.answers["client", hopeless].reason


def test_what_becomes_hopeless_in_the_queue_is_infeasible_then() -> None:
    """Behind a worker that hangs a query is refused once no subnet can meet it, before its deadline."""
    world = make_world()
    world.processes["w0"].gpus[0].hang()
    world.submit(*[36.0] * 64)
    (query,) = world.submit(20)
    world.run(20)

    assert world.status(query) is INFEASIBLE
    assert world.answered_ns["client", query] < world.sent["client", query]


def test_without_workers_a_query_expires_at_its_deadline() -> None:
    """Nobody is there: EXPIRED within a nanosecond of the deadline, and the reason says why."""
    world = World()
    (query,) = world.submit(10)
    world.run(50)

    assert world.status(query) is EXPIRED
    assert world.answered_ns["client", query] == world.sent["client", query] + 1
    assert "no worker is connected" in world.answers["client", query].reason


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
    world.core.payload_bytes = 4
    (query,) = world.submit(36, payload=b"12345")

    assert world.status(query) is Status.INVALID
    assert world.answers["client", query].reason == "payload: the model takes 4 bytes a query, got 5 bytes"


@pytest.mark.parametrize("row", range(CNN.n_subnets))
def test_a_floor_equal_to_a_subnets_accuracy_allows_that_subnet(row: int) -> None:
    """A floor crosses the wire as f32 and is not rounded above what was asked, even the best."""
    world = make_world()
    world.submit(36, min_accuracy=[CNN.subnets[row].accuracy])

    (dispatch,) = world.dispatches()
    cohort = dispatch.stretches[0][0]
    assert (cohort.floors or [0])[0] == row <= dispatch.subnet


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
    assert sum(dispatch.n for dispatch in world.dispatches()) == 1


def test_a_query_cancelled_in_flight_is_answered_once() -> None:
    """CANCELLED at once; what its worker says later is nobody's."""
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
    sent = sum(dispatch.n for dispatch in world.dispatches())
    world.leave()
    world.run(100)

    assert not world.answers
    assert sum(dispatch.n for dispatch in world.dispatches()) == sent
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
    assert sum(dispatch.n for dispatch in world.dispatches()) <= 32


def test_a_draining_router_ends_what_it_has_and_takes_no_more() -> None:
    """New queries are DRAINING; queued ones are served."""
    world = make_world()
    (before,) = world.submit(36)
    world.do(DrainRouter())
    (after,) = world.submit(36)
    world.run(50)

    assert world.statuses([before, after]) == [OK, Status.DRAINING]


def test_a_draining_worker_is_released_once_it_holds_nothing() -> None:
    """It gets no new batch, answers the one it has, and is then told that it may go."""
    world = make_world()
    (query,) = world.submit(36)
    assert not [a for a in world.do(DrainWorker("w0", None)) if isinstance(a, Released)]
    world.submit(20)
    world.run(50)

    assert world.status(query) is OK
    assert len(world.dispatches()) == 1
    assert [action for _, action in world.actions if isinstance(action, Released)]


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


def test_nothing_is_sent_long_before_a_worker_is_free() -> None:
    """At most dispatch_ahead and the transport before the GPU is really free; then it does not idle."""
    world = make_world(2)
    early: list[int] = []

    def measure(dispatch: Dispatch, gpu: Gpu) -> None:
        worker: Worker = world.worker(dispatch.peer, dispatch.slot)
        ahead_ns = world.core.settings.dispatch_ahead_ns + worker.transport.median_ns
        early.append(gpu.free_at_ns(world.now_ns, world.way_ns) - world.now_ns - ahead_ns)

    world.on_dispatch = measure
    for _ in range(40):
        world.submit(*[36.0] * 12)
        world.run(5)
    world.run(50)

    assert len(early) > 20
    assert max(early) <= MS // 2  # what the estimate of the way may be off


def test_a_report_of_another_length_is_a_wire_error() -> None:
    """A worker that answers for three of two queries loses its connection, not ours its count."""
    world = make_world()
    world.submit(36, 36)
    (dispatch,) = world.dispatches()
    process = world.processes["w0"]
    row = world.done_row(dispatch)
    row.n = 3

    with pytest.raises(WireError, match="expected 2 queries, got 3"):
        world.do(Finished("w0", process.epoch, [row]))
    world.core.check()


def test_a_slot_that_is_not_there_is_a_wire_error() -> None:
    """A worker process speaks only of the GPUs that it said hello for."""
    world = make_world()
    world.submit(36)
    process = world.processes["w0"]
    row = world.done_row(world.dispatches()[0])
    row.slot = 5

    with pytest.raises(WireError, match="w0 has 1 GPUs, got slot 5"):
        world.do(Finished("w0", process.epoch, [row]))


def test_a_head_too_tight_for_a_slow_gpu_goes_to_a_fast_one() -> None:
    """Of unequal GPUs the one that can meet the deadline gets the query, though the other is idle longer."""
    world = World()
    world.join("slow", slower(CNN, 8))
    world.run(1)
    world.join("fast", CNN)
    tight = world.submit_spaced(8, n=3, gap_ms=10)

    assert world.statuses(tight) == [OK] * 3
    assert {dispatch.peer for dispatch in world.dispatches()} == {"fast"}


def test_a_head_waits_for_the_fast_gpu_without_a_busy_loop() -> None:
    """While the fast GPU is busy and the slow one too slow, no wake is due at once."""
    world = World()
    world.join("slow", slower(CNN, 8))
    world.join("fast", CNN)
    ids = [i for _ in range(8) for i in world.submit(*[12.5] * 4)]
    world.run(100)

    assert None not in world.statuses(ids)
    assert world.statuses(ids).count(OK) >= 16


def test_workers_of_other_subnets_are_refused() -> None:
    """A worker that hosts another supernet is a ConfigError, and changes nothing."""
    world = make_world()

    with pytest.raises(ConfigError, match="transformer-8gpu-modelled: expected the subnets of cnn"):
        world.join("other", TRANSFORMER)
    assert set(world.core.peers) == {"w0"}


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
            stretches = [(c.serial, lo, hi) for c, lo, hi in action.stretches]
            return f"{at_ns} {action.peer} {action.batch_id} {action.subnet} {stretches}"
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
