"""Peers and workers: every pair of both tables, credit, and what is learnt from measurements."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import load_profile
from router.core.workers import (
    PEER_TRANSITIONS,
    WORKER_TRANSITIONS,
    Batch,
    Peer,
    PeerEvent,
    PeerState,
    StateMachine,
    TransitionError,
    Worker,
    WorkerEvent,
    WorkerState,
)
from router.policies.slackfit import SlackFit
from superserve.clock import MS
from superserve.wire import PullRow

if TYPE_CHECKING:
    from collections.abc import Mapping

CNN = load_profile("cnn-8gpu-modelled")
NOW_NS = 1_000 * MS

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)


def make_worker() -> Worker:
    """Return a worker of a live peer."""
    return Worker(Peer("key", "host", 1, NOW_NS), 0, CNN, SlackFit(CNN), NOW_NS)


def hold(worker: Worker, batch_id: int, subnet: int = 0) -> None:
    """Give the worker a batch of one, sent just now."""
    profiled_ns = CNN.latency_ns(subnet, 1)
    batch = Batch(batch_id, worker, subnet, 1, [], NOW_NS, NOW_NS, profiled_ns, 50 * MS)
    worker.outstanding[batch_id] = batch


def report(running_batch: int, running_for_ns: int, last_batch: int) -> PullRow:
    """Return the report of a GPU that takes nothing more."""
    return PullRow(0, 0, 0, 1, last_batch, running_batch, running_for_ns)


@pytest.mark.parametrize("event", PeerEvent)
@pytest.mark.parametrize("state", PeerState)
def test_every_pair_of_the_peer_table(state: PeerState, event: PeerEvent) -> None:
    """A pair in the table leads where it says; any other raises with state, event and history."""
    walk(state, event, PEER_TRANSITIONS)


@pytest.mark.parametrize("event", WorkerEvent)
@pytest.mark.parametrize("state", WorkerState)
def test_every_pair_of_the_worker_table(state: WorkerState, event: WorkerEvent) -> None:
    """A pair in the table leads where it says; any other raises with state, event and history."""
    walk(state, event, WORKER_TRANSITIONS)


def walk(state: S, event: E, table: Mapping[tuple[S, E], S]) -> None:
    """Put one event to one state."""
    machine = StateMachine[S, E]("worker x", state, table)
    if (state, event) in table:
        assert machine.on(event) is machine.state is table[state, event]
        return
    with pytest.raises(TransitionError, match=f"worker x: {event.value} while {state.value}; .*nothing"):
        machine.on(event)
    assert machine.state is state


def test_nothing_leads_out_of_the_last_states() -> None:
    """DEAD and GONE are final: a process that comes back is a new peer under a new epoch."""
    assert not [state for state, _ in PEER_TRANSITIONS if state is PeerState.DEAD]
    assert not [state for state, _ in WORKER_TRANSITIONS if state is WorkerState.GONE]


def test_a_transition_error_tells_the_recent_history() -> None:
    """The last changes of state, 16 at most, stand in the message, oldest first."""
    machine = make_worker().machine
    for _ in range(20):
        machine.on(WorkerEvent.OVERRAN)
        machine.on(WorkerEvent.ANSWERED)
    machine.on(WorkerEvent.LOST)

    assert len(machine.history()) == 16
    with pytest.raises(TransitionError, match=r"overrun -answered-> ready, ready -lost-> gone$"):
        machine.on(WorkerEvent.ANSWERED)


@given(credit=st.integers(0, 5), last_batch=st.integers(0, 6), held=st.sets(st.integers(1, 6)))
def test_credit_is_what_is_offered_less_what_is_under_way(
    credit: int, last_batch: int, held: set[int]
) -> None:
    """Batches sent after the worker spoke count against its offer; credit is never negative."""
    worker = make_worker()
    for batch_id in sorted(held):
        hold(worker, batch_id)

    worker.grant(credit, last_batch)

    assert worker.credit == max(0, credit - len([b for b in held if b > last_batch]))


def test_work_is_taken_only_with_credit_ready_and_live() -> None:
    """A worker without credit, in overrun or of a suspect peer may take nothing."""
    worker = make_worker()
    told = [worker.may_take]
    worker.credit = 1
    told.append(worker.may_take)
    worker.peer.machine.on(PeerEvent.QUIET)
    told.append(worker.may_take)
    worker.peer.machine.on(PeerEvent.HEARD)
    worker.machine.on(WorkerEvent.OVERRAN)
    told.append(worker.may_take)

    assert told == [False, True, False, False]


def test_a_worker_with_nothing_outstanding_is_free_now() -> None:
    """Whatever it reports of its queue, it has no batch of this router."""
    worker = make_worker()
    worker.expect_free(NOW_NS, report(9, 50 * MS, last_batch=9))

    assert worker.free_at_ns == NOW_NS


WAY_NS = 200_000  # half the transport that is assumed at first


def test_the_end_is_reckoned_from_when_the_batch_began() -> None:
    """A batch that had run for a while as its worker spoke ends the expected time after it began.

    Behind it come one that is held and one that is still on the way.
    """
    worker = make_worker()
    for batch_id in (1, 2, 3):
        hold(worker, batch_id, subnet=batch_id)
    worker.expect_free(NOW_NS, report(1, 400_000, last_batch=2))

    took_ns = [CNN.latency_ns(subnet, 1) for subnet in (1, 2, 3)]
    assert worker.free_at_ns == NOW_NS - WAY_NS - 400_000 + sum(took_ns)
    assert worker.outstanding[1].begin_ns == NOW_NS - WAY_NS - 400_000


def test_all_that_is_held_is_corrected_by_what_is_known_now() -> None:
    """On a GPU seen to be 1.5 times slower each batch takes that much longer, whenever it was sent."""
    worker = make_worker()
    hold(worker, 1)
    hold(worker, 2)
    for _ in range(80):
        worker.measure(0, 1_000, 1_500)
    worker.expect_free(NOW_NS, report(1, 0, last_batch=2))

    assert worker.free_at_ns == pytest.approx(NOW_NS - WAY_NS + 3 * CNN.latency_ns(0, 1), abs=10_000)


@pytest.mark.parametrize("running_for_ns", [2 * CNN.latency_ns(0, 1), 2**63 - 1])
def test_an_overdue_batch_ends_now_at_the_earliest(running_for_ns: int) -> None:
    """However long it says that it has been running, the next one begins no sooner than now."""
    worker = make_worker()
    hold(worker, 1)
    worker.expect_free(NOW_NS, report(1, running_for_ns, last_batch=1))
    alone_ns = worker.free_at_ns
    hold(worker, 2)
    worker.expect_free(NOW_NS, report(1, running_for_ns, last_batch=2))

    assert alone_ns == NOW_NS
    assert worker.free_at_ns == NOW_NS + CNN.latency_ns(0, 1)


def test_what_a_worker_invents_keeps_it_busy_no_longer() -> None:
    """A batch that it reports as still to begin counts as begun at the report."""
    worker = make_worker()
    hold(worker, 1)
    worker.expect_free(NOW_NS, report(1, -(2**63), last_batch=1))

    assert worker.free_at_ns == NOW_NS - WAY_NS + CNN.latency_ns(0, 1)


def test_a_batch_under_way_begins_when_it_arrives() -> None:
    """An idle worker that has not seen a directive yet is busy with it from its arrival on."""
    worker = make_worker()
    hold(worker, 1)
    worker.expect_free(NOW_NS, report(0, 0, last_batch=0))

    assert worker.free_at_ns == NOW_NS + WAY_NS + CNN.latency_ns(0, 1)


@given(ratios=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=50))
def test_slowdowns_stay_within_their_bounds(ratios: list[float]) -> None:
    """No measurement drives a correction below 1/4 or above 16."""
    worker = make_worker()
    for ratio in ratios:
        worker.measure(2, MS, int(ratio * MS))

    assert all(0.25 <= worker.corrected(subnet) <= 16 for subnet in range(CNN.n_subnets))
    assert 0.25 <= worker.slowdown <= 16


def test_a_subnet_not_measured_yet_follows_the_gpu() -> None:
    """A device that is 1.5 times slower on one subnet is expected to be so on all that are not measured."""
    worker = make_worker()
    for _ in range(40):
        worker.measure(0, MS, int(1.5 * MS))
    followed = worker.corrected(4)
    for _ in range(40):
        worker.measure(4, MS, 2 * MS)
        worker.measure(0, MS, int(1.5 * MS))

    assert followed == pytest.approx(1.5, abs=0.1)
    assert worker.corrected(4) == pytest.approx(2.0, abs=0.1)
    assert worker.corrected(0) == pytest.approx(1.5, abs=0.1)


def test_a_stall_does_not_refuse_what_fits() -> None:
    """One batch that a stall made sixty times longer moves the estimate by a fifth, the first one to 2.5."""
    fresh, known = make_worker(), make_worker()
    for _ in range(20):
        known.measure(0, MS, MS)
    fresh.measure(0, MS, 60 * MS)
    known.measure(0, MS, 60 * MS)

    assert 2.0 < fresh.corrected(0) <= 2.5
    assert known.corrected(0) < 1.2


def test_a_stall_of_the_first_batch_is_soon_forgotten() -> None:
    """By the next sound batch more than half of it, by four nearly all; without any, by three heartbeats."""
    measured, idle, slow = make_worker(), make_worker(), make_worker()
    measured.measure(0, MS, 60 * MS)
    idle.measure(0, MS, 60 * MS)
    measured.measure(0, MS, MS)
    assert measured.corrected(0) < 1.5
    for _ in range(3):
        measured.measure(0, MS, MS)
        idle.ease()
        slow.measure(0, MS, 3 * MS)
    assert measured.corrected(0) < 1.2
    assert idle.corrected(0) < 1.2
    # What three batches agree on is not forgotten so soon.
    for _ in range(3):
        slow.ease()
    assert slow.corrected(0) > 1.8


def test_a_throttled_gpu_is_known_after_ten_batches() -> None:
    """A worker that becomes three times as slow is corrected to at least 2.4 within ten batches."""
    worker = make_worker()
    for _ in range(50):
        worker.measure(0, MS, MS)
    for _ in range(10):
        worker.measure(0, MS, 3 * MS)

    assert worker.corrected(0) > 2.4


def test_one_slow_subnet_is_told_from_a_slow_gpu() -> None:
    """Of two subnets in turn, one 3 times slower, each is near its own ratio after ten batches of both."""
    worker = make_worker()
    for _ in range(10):
        worker.measure(0, MS, 3 * MS)
        worker.measure(1, MS, MS)

    assert worker.corrected(0) > 2.4
    assert worker.corrected(1) < 1.25


def test_noise_is_not_corrected() -> None:
    """Batches that differ by 4 % from the profile leave choices as they are."""
    worker = make_worker()
    for _ in range(20):
        worker.measure(1, MS, int(1.04 * MS))

    assert worker.corrected(1) == 1.0


def test_an_idle_worker_gets_another_chance() -> None:
    """Eased often enough, the worst estimates are those of a new worker within 20 %."""
    worker = make_worker()
    for _ in range(100):
        worker.measure(0, MS, 1_000 * MS)
        worker.transport.add(500 * MS)
    worker.peer.workers.append(worker)
    for _ in range(256):
        worker.peer.ease(worker.answered_ns, idle_ns=0)

    assert worker.corrected(0) < 1.2
    assert worker.slowdown < 1.2
    assert worker.transport.bound_ns() < 2 * MS


def test_the_batches_of_one_stall_count_once() -> None:
    """A hundred batches that a stall held up come back together, and are one measurement."""
    peer = make_worker().peer
    for _ in range(100):
        peer.sample_way(50 * MS, now_ns=10 * MS)

    assert peer.transport.median_ns < MS


def test_the_worst_way_is_known_once_many_are_measured() -> None:
    """Each millisecond one; it is remembered for ten seconds, and then others are the worst."""
    peer = make_worker().peer
    unknown_ns = peer.worst_way_ns
    assert unknown_ns > 1_000_000 * MS

    for i in range(1, 121):
        assert peer.worst_way_ns == unknown_ns
        peer.sample_way(3 * MS if i == 50 else MS, now_ns=i * MS)
    assert peer.worst_way_ns == 3 * MS

    for i in range(1, 111):
        peer.sample_way(MS, now_ns=(120 + 100 * i) * MS)
    assert peer.worst_way_ns == MS
