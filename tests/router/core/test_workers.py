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

if TYPE_CHECKING:
    from collections.abc import Mapping

CNN = load_profile("cnn-8gpu-modelled")
NOW_NS = 1_000 * MS

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)


def make_worker() -> Worker:
    """Return a worker of a live peer."""
    return Worker(Peer("key", "host", 1, NOW_NS), 0, CNN, SlackFit(CNN), NOW_NS)


def hold(worker: Worker, batch_id: int, expected_ns: int = 5 * MS) -> None:
    """Let the worker have a batch outstanding."""
    batch = Batch(batch_id, worker, 0, 1, [], NOW_NS, NOW_NS, expected_ns, 10 * expected_ns)
    worker.outstanding[batch_id] = batch


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
    """Whatever it says of its queue, we know that it has nothing of ours."""
    worker = make_worker()
    worker.expect_free(NOW_NS, 50 * MS, last_batch=0)

    assert worker.free_at_ns == NOW_NS


def test_the_time_until_free_counts_what_the_worker_had_not_seen() -> None:
    """Its own report, less half a round trip, plus the batches still on the way to it."""
    worker = make_worker()
    hold(worker, 1)
    hold(worker, 2, expected_ns=7 * MS)
    worker.expect_free(NOW_NS, 3 * MS, last_batch=1)

    assert worker.free_at_ns == NOW_NS - 200_000 + 3 * MS + 7 * MS


@given(ratios=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=50))
def test_slowdowns_stay_within_their_bounds(ratios: list[float]) -> None:
    """No measurement drives a correction below 1/4 or above 16."""
    worker = make_worker()
    for ratio in ratios:
        worker.measure(2, MS, int(ratio * MS))

    assert 0.25 <= worker.slowdowns[2] <= 16
    assert 0.25 <= worker.slowdown <= 16
    assert worker.slowdowns[1] == 1.0


def test_a_throttled_gpu_is_known_after_ten_batches() -> None:
    """A worker three times as slow is corrected to at least 2.4 within ten batches; noise of 4 % is not."""
    worker = make_worker()
    for _ in range(10):
        worker.measure(0, MS, 3 * MS)
        worker.measure(1, MS, int(1.04 * MS))

    assert worker.corrected(0) > 2.4
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

    assert worker.slowdowns[0] < 1.2
    assert worker.slowdown < 1.2
    assert worker.transport.bound_ns() < 2 * MS


def test_the_batches_of_one_stall_count_once() -> None:
    """A hundred batches that a stall held up come back together, and are one measurement."""
    peer = make_worker().peer
    for _ in range(100):
        peer.sample_way(50 * MS, now_ns=10 * MS)

    assert peer.transport.median_ns < MS
