"""Corners of the client's core: a second silence, outputs of the wrong size, callbacks that come back."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from superserve.client.futures import QueryFuture, settle
from superserve.client.outgoing import FRAMED_BYTES
from superserve.client.reply import Answers, Reply
from superserve.client.session import GRACE_NS, PROBE_NS, QUIET_NS, Session
from superserve.errors import QueryError, UnansweredError
from superserve.subnet import TensorSpec
from superserve.wire import MAX_QUERIES, Cancel, Queries, Status
from tests.superserve.client.fakes import WAIT_S, group, ids_of
from tests.superserve.client.test_session import MS, SLO_NS, FakeQuery, World

if TYPE_CHECKING:
    import contextlib


@pytest.fixture
def world() -> World:
    """Return a world with a router."""
    world = World()
    world.session.welcomed(1)
    return world


@pytest.fixture
def settled(world: World) -> World:
    """Return a world whose router has been given what there was: from now on only what is new is sent."""
    world.submit()
    world.turn()
    world.answer([1])
    return world


# --- sending ---------------------------------------------------------------------------------


def test_what_is_cancelled_before_its_turn_is_never_sent(settled: World) -> None:
    """Neither the query nor a CANCEL for it; those around it are."""
    first, gone, last = settled.submit(), settled.submit(), settled.submit()
    settled.cancel(gone)
    (message,) = settled.turn()

    assert isinstance(message, Queries)
    assert ids_of(message) == [first.query_id, last.query_id]
    assert gone.payload == b""
    settled.cancel(last)
    (cancel,) = settled.turn()
    assert isinstance(cancel, Cancel)
    assert np.frombuffer(cancel.ids, "<u8").tolist() == [last.query_id]


@pytest.mark.parametrize(("floor", "priority"), [(75.0, 0), (0.0, 3), (75.0, 3)])
def test_options_are_sent_with_the_message_that_has_them(settled: World, floor: float, priority: int) -> None:
    """Each as a column for all of its queries where one has it; the next message is plain again."""
    plain = settled.submit()
    query = FakeQuery(b"1234", SLO_NS, min_accuracy=floor, priority=priority)
    settled.queries.append(query)
    settled.session.submit(query)
    (message,) = settled.turn()
    settled.submit()
    (after,) = settled.turn()

    assert isinstance(message, Queries)
    assert ids_of(message) == [plain.query_id, query.query_id]
    floors = None if message.min_accuracy is None else np.frombuffer(message.min_accuracy, "<f4").tolist()
    assert floors == ([0.0, floor] if floor else None)
    assert message.priority == (bytes([0, priority]) if priority else None)
    assert isinstance(after, Queries)
    assert after.min_accuracy is after.priority is None


def test_only_what_is_new_is_sent(settled: World) -> None:
    """What the router has is not sent again while it is there, answered or not."""
    settled.submit()
    settled.turn()
    fresh = settled.submit()
    (message,) = settled.turn()

    assert isinstance(message, Queries)
    assert (ids_of(message), message.resubmitted) == ([fresh.query_id], False)
    assert settled.turn() == []


def test_many_small_queries_are_split_by_number() -> None:
    """No message holds more than the wire allows, and none is lost between two."""
    limits: Any = {"max_outstanding": MAX_QUERIES + 3, "max_bytes": 0}
    session: Session[FakeQuery] = Session(threading.RLock(), "no router", **limits)
    session.welcomed(1)
    for _ in range(MAX_QUERIES + 3):
        session.submit(FakeQuery(b"", SLO_NS))
    messages = [message for message in session.outbound(0) if isinstance(message, Queries)]

    assert [message.n for message in messages] == [MAX_QUERIES, 3]
    assert [*ids_of(messages[0]), *ids_of(messages[1])] == list(range(1, MAX_QUERIES + 4))


def test_a_new_router_is_work_for_the_sender(settled: World) -> None:
    """Nothing was submitted since, but what the old router had is to be sent: no rest before that."""
    settled.submit()
    settled.turn()
    assert settled.session.rest()
    settled.session.lost()
    rested = [settled.session.rest()]
    settled.session.welcomed(2)
    rested.append(settled.session.rest())
    settled.turn()
    rested.append(settled.session.rest())

    assert rested == [True, False, True]


@pytest.mark.parametrize("status", [Status.OK, Status.LATE, Status.EXPIRED])
def test_an_answer_gives_a_querys_bytes_back(settled: World, status: Status) -> None:
    """Whatever the answer; its payload is let go as well, and an unknown id gives nothing back."""
    small, large = settled.submit(n_bytes=10), settled.submit(n_bytes=FRAMED_BYTES)
    settled.turn()
    assert settled.session.held_bytes == 10 + FRAMED_BYTES
    settled.answer([large.query_id], status)
    assert settled.session.held_bytes == 10
    assert (small.payload, large.payload) == (bytes([1]) * 10, b"")
    settled.answer([large.query_id, 999], status)
    assert settled.session.held_bytes == 10
    settled.answer([small.query_id], status)

    assert (settled.session.held_bytes, settled.session.outstanding) == (0, 0)


# --- silence ---------------------------------------------------------------------------------


def test_a_new_router_is_asked_for_itself(world: World) -> None:
    """The old one's silence does not count: the new one has the whole time for its own PONG."""
    world.submit()
    world.turn()
    world.now_ns = SLO_NS + QUIET_NS
    world.turn()
    assert world.session.wants_ping
    world.session.wants_ping = False
    world.session.welcomed(2)
    world.now_ns += PROBE_NS // 2
    late = world.submit(MS)
    world.turn()
    world.now_ns += QUIET_NS + 6 * MS
    world.turn()
    assert world.session.wants_ping, "the new one has been asked"
    world.now_ns += PROBE_NS - 10 * MS
    world.turn()
    assert late.ends == []
    world.now_ns += 20 * MS
    world.turn()

    assert isinstance(late.ends[0], UnansweredError)


def test_a_router_that_falls_silent_twice_is_asked_twice(world: World) -> None:
    """Between the two it answered: the first PING says nothing of the second silence."""
    first = world.submit(GRACE_NS)
    second = world.submit(GRACE_NS + 400 * MS)
    world.turn()
    for query in (first, second):
        world.session.wants_ping = False
        world.now_ns = query.deadline_ns + QUIET_NS + 4 * MS
        world.turn()
        assert world.session.wants_ping
        world.now_ns += 5 * MS
        world.heard_ns = world.now_ns
        world.turn()

    assert (first.ends, second.ends) == ([], [])


# --- replies ---------------------------------------------------------------------------------


def replies(n: int, status: Status, output: bytes, spec: TensorSpec | None) -> list[Reply | QueryError]:
    """Return what each of n queries of one group gets."""
    whole = group(bytes(8 * n), status, b"")
    whole.output, whole.output_bytes = output, len(output) // n
    answers = Answers(whole, "small", spec, 7 * MS)
    return [answers.outcome(i, MS) for i in range(n)]


@pytest.mark.parametrize("spec", [None, TensorSpec("float32", (5,))])
def test_outputs_that_are_not_the_models_are_given_as_bytes(spec: TensorSpec | None) -> None:
    """Each query its own, where the router said nothing of the model or other sizes come."""
    got = replies(3, Status.OK, b"aaaabbbbcccc", spec)

    assert [reply.output for reply in got if isinstance(reply, Reply)] == [b"aaaa", b"bbbb", b"cccc"]


def test_an_output_cannot_be_written_to() -> None:
    """Not even where the message it came in could be: all queries of a group share it."""
    whole = group(bytes(16), Status.OK, b"")
    whole.output, whole.output_bytes = memoryview(bytearray(8)), 4
    answers = Answers(whole, "small", TensorSpec("float32", ()), 0)
    reply = answers.outcome(1, 0)

    assert isinstance(reply, Reply)
    with pytest.raises(ValueError, match="read-only"):
        reply.output[...] = 1.0


@pytest.mark.parametrize(("status", "is_late"), [(Status.OK, False), (Status.LATE, True)])
def test_only_late_replies_are_late(status: Status, is_late: bool) -> None:
    """And both carry the output, the figures of the batch and the time that it took here."""
    for reply in replies(2, status, np.array([1, 2], "<f4").tobytes(), TensorSpec("float32", ())):
        assert isinstance(reply, Reply)
        assert reply.is_late is is_late
        assert (reply.subnet, reply.accuracy, reply.batch_size, reply.latency_ms) == ("small", 80.0, 4, 6.0)
        timeline = reply.timeline
        assert (timeline.queued_ms, timeline.to_start_ms) == (1.0, 2.0)
        assert (timeline.executing_ms, timeline.returning_ms) == (3.0, 4.0)


# --- futures ---------------------------------------------------------------------------------


class Owner:
    """A client of one thread whose queries end when a test settles them."""

    def __init__(self) -> None:
        self.guard: contextlib.AbstractContextManager[Any] = threading.RLock()
        self.pid = os.getpid()
        self.thread: threading.Thread | None = None

    def future(self) -> QueryFuture:
        """Return the future of a new query."""
        return QueryFuture(self, b"", 0, 0, SLO_NS, 0.0, 0)

    def cancel_query(self, future: QueryFuture) -> bool:
        """End nothing: every query of this client has its answer."""
        raise AssertionError(future)


def test_futures_of_one_group_get_each_its_own_output() -> None:
    """By their places in the group, those that had ended left out."""
    owner = Owner()
    futures = [owner.future() for _ in range(4)]
    whole = group(bytes(32), Status.OK, b"")
    whole.output, whole.output_bytes = b"abcd", 1
    settle(owner.guard, [futures[0], None, futures[2], futures[3]], Answers(whole, "s", None, 0))

    assert [futures[i].result().output for i in (0, 2, 3)] == [b"a", b"c", b"d"]
    assert not futures[1].done()


def test_a_future_settled_again_calls_nobody_again() -> None:
    """Callbacks are gone once they were called."""
    owner = Owner()
    called: list[QueryFuture] = []
    future = owner.future()
    future.add_done_callback(called.append)
    answers = Answers(group(bytes(8), Status.OK, b"out!"), "s", None, 0)
    settle(owner.guard, [future], answers)
    settle(owner.guard, [future], answers)

    assert called == [future]


def test_a_finished_query_is_not_cancelled() -> None:
    """The router is not asked to, and the reply stays."""
    owner = Owner()
    future = owner.future()
    settle(owner.guard, [future], Answers(group(bytes(8), Status.OK, b"out!"), "s", None, 0))

    assert not future.cancel()
    assert not future.cancelled()
    assert future.result().output == b"out!"


@pytest.mark.parametrize("what", ["result", "exception"])
def test_waiting_threads_are_woken_by_the_end(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A thread that blocks without a time limit goes on when the answer comes."""
    is_waiting = threading.Event()

    class Telling(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            is_waiting.set()  # its lock is let go only once it would hear of a notification
            return super().wait(timeout)

    owner = Owner()
    future = owner.future()
    thread = threading.Thread(target=getattr(future, what), daemon=True)
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Condition", Telling)
        thread.start()
        assert is_waiting.wait(WAIT_S)
    settle(owner.guard, [future], Answers(group(bytes(8), Status.OK, b"out!"), "s", None, 0))
    thread.join(5)

    assert not thread.is_alive()
