"""The client's core on a virtual clock: every query ends once, and nothing is held or sent in vain."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve.client.checks import MAX_PAYLOAD_BYTES
from superserve.client.outgoing import FRAMED_BYTES, PACKED_BYTES
from superserve.client.reply import Answers, Reply
from superserve.client.session import GRACE_NS, HOPELESS_NS, MAX_SENDS, PROBE_NS, QUIET_NS, Session
from superserve.errors import CancelledQueryError, DrainingError, OverloadedError, QueryError, UnansweredError
from superserve.net import sockets
from superserve.subnet import TensorSpec
from superserve.wire import VARIED, Cancel, Group, Queries, Results, Status, decode, encode
from tests.superserve.client.fakes import group, ids_of

MS = 1_000_000
SLO_NS = 36 * MS


@dataclass(eq=False)
class FakeQuery:
    """A query as the session sees it; `ends` lists how it ended."""

    payload: Any
    deadline_ns: int
    submitted_ns: int = 0
    min_accuracy: float = 0.0
    priority: int = 0
    trace: bytes = b""
    query_id: int = 0
    n_sends: int = 0
    n_bytes: int = 0
    ends: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n_bytes = len(self.payload)


class World:
    """A session, its clock, and a router that remembers what it was sent."""

    def __init__(self, **bounds: int) -> None:
        limits: Any = {"max_outstanding": 10_000, "max_bytes": 1 << 40} | bounds
        self.session: Session[FakeQuery] = Session(threading.RLock(), "no router answers at HERE", **limits)
        self.now_ns = 0
        self.heard_ns = 0
        self.queries: list[FakeQuery] = []
        self.sent: list[int] = []
        self.messages: list[Queries | Cancel] = []

    def submit(self, slo_ns: int = SLO_NS, n_bytes: int = 4) -> FakeQuery:
        """Submit a query; its payload is its number, over and over."""
        query = FakeQuery(bytes([len(self.queries) % 256]) * n_bytes, self.now_ns + slo_ns, self.now_ns)
        self.session.submit(query)
        self.queries.append(query)
        return query

    def turn(self, *, is_sent: bool = True) -> list[Queries | Cancel]:
        """End what has waited too long, send what is due; or fail at it."""
        for query, error in self.session.expired(self.now_ns, self.heard_ns):
            query.ends.append(error)
        messages = self.session.outbound(self.now_ns)
        for message in messages:
            self._check(message)
        if not is_sent:  # some may have left all the same
            self.session.lost()
            return []
        for message in messages:
            assert encode(decode(encode(message))) == encode(message)
            self.messages.append(message)
        return messages

    def _check(self, message: Queries | Cancel) -> None:
        if isinstance(message, Cancel):
            return
        known = set(self.sent)
        for query_id, slack_ns in zip(ids_of(message), message.slack_ns(), strict=True):
            query = self.queries[query_id - 1]
            assert not query.ends, "nobody is served twice"
            assert slack_ns == query.deadline_ns - self.now_ns
            assert message.resubmitted or query_id not in known
            assert not message.resubmitted or (query_id in known and slack_ns > HOPELESS_NS)
            self.sent.append(query_id)

    def answer(self, ids: list[int], status: Status = Status.OK) -> None:
        """Answer these queries, known or not."""
        column = np.array(ids, "<u8").tobytes()
        self.answer_with(group(column, status, b"out!"))

    def answer_with(self, *groups: Group) -> None:
        """Hand over a RESULTS message."""
        self.heard_ns = self.now_ns
        for answers, queries in self.session.answered(Results(1, list(groups)), self.now_ns):
            for i, query in enumerate(queries):
                if query is not None:
                    query.ends.append(answers.outcome(i, query.submitted_ns))

    def cancel(self, query: FakeQuery) -> None:
        """Cancel a query."""
        is_ended, _ = self.session.cancel(query)
        if is_ended:
            query.ends.append("cancelled")

    def check(self) -> None:
        """Compare the session's books with what the queries say."""
        left = [query for query in self.queries if not query.ends]
        assert self.session.outstanding == len(left)
        assert self.session.held_bytes == sum(query.n_bytes for query in left)
        assert all(len(query.ends) <= 1 for query in self.queries)


@pytest.fixture
def world() -> World:
    """Return a world with a router."""
    world = World()
    world.session.welcomed(1)
    return world


# --- the property ---------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from([1, MS, 36 * MS, 10**9]), st.integers(0, 9)),
    st.tuples(st.just("turn"), st.booleans()),
    st.tuples(st.just("answer"), st.lists(st.integers(0, 30), max_size=6), st.sampled_from(Status)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("time"), st.sampled_from([1, MS, QUIET_NS, 34 * MS, PROBE_NS, GRACE_NS])),
    st.tuples(st.just("heard")),
    st.tuples(st.just("lost")),
    st.tuples(st.just("welcomed"), st.integers(1, 3)),
)


def step(world: World, what: str, *arguments: Any) -> None:
    """Take one step of a history."""
    session = world.session
    match what, arguments:
        case "submit", (slo_ns, n_bytes):
            world.submit(slo_ns, n_bytes)
        case "turn", (is_sent,):
            world.turn(is_sent=is_sent)
        case "answer", (picks, status):
            if ids := [world.sent[pick % len(world.sent)] for pick in picks if world.sent]:
                world.answer(ids, status)
        case "cancel", (pick,):
            if world.queries:
                world.cancel(world.queries[pick % len(world.queries)])
        case "time", (duration_ns,):
            world.now_ns += duration_ns
        case "heard", ():
            world.heard_ns = world.now_ns
        case "lost", ():
            session.lost()
        case "welcomed", (epoch,):
            session.welcomed(epoch)


@given(st.lists(STEPS, max_size=60))
def test_every_query_ends_once_and_gives_its_bytes_back(history: list[tuple[Any, ...]]) -> None:
    """Whatever the order of submits, sends, answers, cancels, routers and time."""
    world = World()
    for what, *arguments in history:
        step(world, what, *arguments)
        world.check()
    world.turn()
    for _ in range(3):  # asked for a PING, silent, given up
        world.now_ns += max(10**9, GRACE_NS) + 1
        world.turn()

    world.check()
    assert [len(query.ends) for query in world.queries] == [1] * len(world.queries)
    assert world.session.outstanding == world.session.held_bytes == 0
    assert world.session.next_wake_ns() is None


@given(st.lists(STEPS, max_size=40))
def test_closing_ends_what_is_left(history: list[tuple[Any, ...]]) -> None:
    """At any moment; nothing is taken in later."""
    world = World()
    for what, *arguments in history:
        step(world, what, *arguments)
    for query, error in world.session.close(CancelledQueryError("closed")):
        query.ends.append(error)

    world.check()
    assert all(len(query.ends) == 1 and query.payload == b"" for query in world.queries if query.n_bytes)
    with pytest.raises(DrainingError, match="the client is closed: make a new one"):
        world.submit()


# --- sending --------------------------------------------------------------------------------


def test_what_has_gathered_is_one_message(world: World) -> None:
    """Ids, slacks and payloads are columns in the order of submission."""
    for i in range(3):
        world.submit(SLO_NS + i)
        world.now_ns += 10
    (message,) = world.turn()

    assert isinstance(message, Queries)
    assert (message.n, ids_of(message), message.payload_bytes) == (3, [1, 2, 3], 4)
    assert message.slack_ns() == [SLO_NS - 30, SLO_NS + 1 - 20, SLO_NS + 2 - 10]
    assert bytes(message.payloads[0]) == b"\0\0\0\0\1\1\1\1\2\2\2\2"
    assert message.lengths is message.min_accuracy is message.priority is None
    assert world.turn() == []


def test_large_payloads_ride_uncopied_in_frames_of_their_own(world: World) -> None:
    """The small ones are joined; the large ones are the very buffers that were submitted."""
    small, large = world.submit(n_bytes=FRAMED_BYTES - 1), world.submit(n_bytes=FRAMED_BYTES)
    packed, framed = world.turn()

    assert isinstance(packed, Queries)
    assert isinstance(framed, Queries)
    assert (ids_of(packed), packed.framed) == ([small.query_id], False)
    assert (ids_of(framed), framed.framed) == ([large.query_id], True)
    assert framed.payloads[0] is large.payload


def test_a_large_array_is_not_copied_either(world: World) -> None:
    """Its frame is a view of its memory."""
    array = np.zeros((2, FRAMED_BYTES), np.float32)
    payload, n_bytes = world.session.checked(array)
    query = world.submit(n_bytes=0)
    query.payload, query.n_bytes = payload, n_bytes
    (message,) = world.turn()

    assert isinstance(message, Queries)
    assert np.shares_memory(np.frombuffer(message.payloads[0], np.uint8), array)


def test_no_frame_grows_without_bound(world: World) -> None:
    """What would end the connection is split, and loses nothing."""
    each = FRAMED_BYTES - 1
    queries = [world.submit(n_bytes=each) for _ in range(PACKED_BYTES // each + 2)]
    messages = world.turn()

    assert len(messages) == 2
    assert world.sent == [query.query_id for query in queries]
    assert all(len(bytes(m.payloads[0])) <= PACKED_BYTES for m in messages if isinstance(m, Queries))


def test_the_thresholds_are_those_of_the_sockets() -> None:
    """The core does not import ZeroMQ, so it has the numbers a second time."""
    assert FRAMED_BYTES == sockets.ZERO_COPY_BYTES
    assert MAX_PAYLOAD_BYTES == sockets.MAX_MESSAGE_BYTES


def test_one_of_many_who_submit_is_asked_to_tell(world: World) -> None:
    """The sender is woken once in each rest, and not at all while it is awake."""
    session = world.session
    told = [session.submit(FakeQuery(b"", SLO_NS)) for _ in range(3)]
    assert told == [True, False, False]
    assert not session.rest(), "something has gathered: no rest"
    world.session.outbound(0)
    assert session.rest()
    assert session.submit(FakeQuery(b"", SLO_NS))
    assert session.resume(), "somebody has told"
    session.outbound(0)
    assert session.rest()
    assert not session.resume(), "nobody has told"
    assert not session.submit(FakeQuery(b"", SLO_NS)), "he is awake"


def test_in_a_pause_only_who_need_not_wait_for_others_tells(world: World) -> None:
    """While answers are awaited messages keep their distance; once none is, a query goes at once."""
    session = world.session
    first = world.submit()
    assert not session.pause(), "nothing was sent yet: no reason to wait"
    world.turn()
    assert session.pause()
    assert not session.submit(FakeQuery(b"", SLO_NS))
    world.cancel(first)
    world.answer([2])
    assert session.is_idle
    assert session.submit(FakeQuery(b"", SLO_NS))


def test_options_are_columns_only_where_somebody_has_them(world: World) -> None:
    """A floor of one query makes the column of all, for this message and no other."""
    world.submit()
    world.submit().min_accuracy = 75.0
    query = FakeQuery(b"", SLO_NS, priority=3)
    world.queries.append(query)
    world.session.submit(query)
    (message,) = world.turn()
    world.submit()
    (plain,) = world.turn()

    assert isinstance(message, Queries)
    assert message.min_accuracy is not None
    assert np.frombuffer(message.min_accuracy, "<f4").tolist() == [0, 75, 0]
    assert message.priority == b"\0\0\3"
    assert isinstance(plain, Queries)
    assert plain.min_accuracy is plain.priority is None


# --- cancelling -----------------------------------------------------------------------------


def test_a_query_cancelled_before_it_was_sent_is_never_sent(world: World) -> None:
    """And no CANCEL is sent for it."""
    kept, gone = world.submit(), world.submit()
    world.cancel(gone)
    (message,) = world.turn()

    assert isinstance(message, Queries)
    assert ids_of(message) == [kept.query_id]
    assert gone.payload == b""


def test_a_query_cancelled_after_it_was_sent_is_cancelled_at_the_router(world: World) -> None:
    """Once; and the second cancel of an ended query says that it ended nothing."""
    query = world.submit()
    world.turn()
    world.cancel(query)
    (message,) = world.turn()

    assert isinstance(message, Cancel)
    assert np.frombuffer(message.ids, "<u8").tolist() == [query.query_id]
    assert world.session.cancel(query) == (False, False)


# --- routers that come and go ---------------------------------------------------------------


def test_without_a_router_queries_wait_for_one(world: World) -> None:
    """They are sent to the first router that comes, unmarked: no router can know them."""
    world.session.lost()
    world.submit()
    assert world.turn() == []
    world.submit()
    world.session.welcomed(2)
    (message,) = world.turn()

    assert isinstance(message, Queries)
    assert (ids_of(message), message.epoch, message.resubmitted) == ([1, 2], 2, False)


def test_a_new_router_is_given_what_has_slack_left(world: World) -> None:
    """Marked where the old one may have had it; and never without slack."""
    lost, again = world.submit(10 * MS), world.submit(SLO_NS)
    world.turn()
    world.now_ns = 10 * MS - HOPELESS_NS
    world.session.lost()
    fresh = world.submit()
    world.session.welcomed(2)
    first, second = world.turn()

    assert isinstance(first, Queries)
    assert isinstance(second, Queries)
    assert (ids_of(first), first.resubmitted) == ([again.query_id], True)
    assert (ids_of(second), second.resubmitted) == ([fresh.query_id], False)
    assert lost.ends == []  # the new router was there just in time for it to wait out its grace


def test_a_query_is_not_sent_round_for_ever(world: World) -> None:
    """One that kills every router that it meets meets few."""
    query = world.submit(10**12)
    for epoch in range(2, 20):
        world.turn()
        world.session.lost()
        world.session.welcomed(epoch)

    assert world.sent == [query.query_id] * MAX_SENDS


def test_a_message_that_could_not_be_sent_is_not_lost(world: World) -> None:
    """Its queries go to the next router that is there, marked, since some may have left."""
    small, large = world.submit(), world.submit(n_bytes=FRAMED_BYTES)
    world.turn(is_sent=False)
    world.session.welcomed(2)
    messages = world.turn()

    assert [ids_of(m) for m in messages if isinstance(m, Queries)] == [[small.query_id], [large.query_id]]
    assert all(isinstance(m, Queries) and m.resubmitted for m in messages)


# --- waiting too long -----------------------------------------------------------------------


def test_without_a_router_a_query_ends_just_before_its_deadline(world: World) -> None:
    """The error names the query, and says where no router answers."""
    world.session.lost()
    query = world.submit()
    world.turn()
    world.now_ns = SLO_NS - HOPELESS_NS - 1
    world.turn()
    assert query.ends == []
    assert world.session.next_wake_ns() == SLO_NS - HOPELESS_NS
    world.now_ns += 1
    world.turn()

    (error,) = query.ends
    assert isinstance(error, UnansweredError)
    assert str(error) == "query 1: no router answers at HERE"


def test_a_router_that_breaks_off_ends_what_waits_for_its_grace(world: World) -> None:
    """What is past its deadline has nothing to wait for; the rest has its slack."""
    late, alive = world.submit(MS), world.submit(SLO_NS)
    world.turn()
    world.now_ns = world.heard_ns = 2 * MS
    world.turn()
    assert late.ends == []
    world.session.lost()
    world.turn()

    assert isinstance(late.ends[0], UnansweredError)
    assert alive.ends == []


def test_a_router_that_speaks_is_given_a_grace(world: World) -> None:
    """A LATE answer may be under way."""
    query = world.submit()
    world.turn()
    world.now_ns = world.heard_ns = SLO_NS
    world.turn()
    assert not world.session.wants_ping
    assert world.session.next_wake_ns() == SLO_NS + GRACE_NS
    world.now_ns = SLO_NS + GRACE_NS
    world.turn()

    assert str(query.ends[0]) == "query 1: the router gave no answer within 2000 ms of its deadline"


def test_a_router_that_is_silent_is_asked_and_soon_given_up(world: World) -> None:
    """The first query that is overdue asks; later ones do not wait for their own answer to that."""
    first, second = world.submit(), world.submit(SLO_NS + PROBE_NS - MS)
    world.turn()
    world.now_ns = SLO_NS
    world.turn()
    assert world.session.next_wake_ns() == SLO_NS + QUIET_NS, "not asked yet"
    world.now_ns = SLO_NS + QUIET_NS
    world.turn()
    assert world.session.wants_ping
    assert (first.ends, second.ends) == ([], [])
    world.now_ns += PROBE_NS
    world.turn()

    for query in (first, second):
        assert str(query.ends[0]).endswith(
            "its deadline has passed, and the router has not answered a PING for 100 ms"
        )


def test_a_router_that_answers_when_asked_keeps_its_grace(world: World) -> None:
    """The PONG counts as speaking."""
    query = world.submit()
    world.turn()
    world.now_ns = SLO_NS + QUIET_NS
    world.turn()
    world.now_ns = world.heard_ns = SLO_NS + QUIET_NS + PROBE_NS
    world.turn()

    assert query.ends == []
    world.answer([query.query_id], Status.LATE)
    (reply,) = query.ends
    assert isinstance(reply, Reply)
    assert reply.is_late


def test_a_process_that_was_stopped_itself_asks_before_it_gives_up(world: World) -> None:
    """Its own absence is no sign that the router is silent."""
    query = world.submit()
    world.turn()
    world.now_ns = SLO_NS + PROBE_NS * 3
    world.turn()

    assert query.ends == []
    assert world.session.wants_ping


def test_answered_queries_do_not_pile_up_until_their_deadlines(world: World) -> None:
    """A day's SLO costs no day's memory."""
    for _ in range(40):
        queries = [world.submit(86_400 * 10**9) for _ in range(500)]
        world.turn()
        world.answer([query.query_id for query in queries])

    assert sum(len(ids) for _, _, ids in world.session._timed) < 6_000


# --- bounds and shares ----------------------------------------------------------------------


def test_bounds_are_exact_and_say_their_names() -> None:
    """Count and bytes; the refused query holds nothing."""
    world = World(max_outstanding=3, max_bytes=10)
    world.submit(n_bytes=5)
    with pytest.raises(OverloadedError, match=r"max_bytes: 5 payload bytes .* at most 10, .* has 6: await"):
        world.submit(n_bytes=6)
    world.submit(n_bytes=5)
    world.submit(n_bytes=0)
    with pytest.raises(OverloadedError, match=r"max_outstanding: 3 queries .* at most 3: await some"):
        world.submit(n_bytes=0)

    assert (world.session.outstanding, world.session.held_bytes) == (3, 10)


def outcomes(n: int, whole: Group, spec: TensorSpec | None = None) -> list[Reply | QueryError]:
    """Return what each query of a group gets, the last first."""
    answers = Answers(whole, "small", spec, 7 * MS)
    return [answers.outcome(i, MS) for i in reversed(range(n))][::-1]


def test_each_query_gets_its_own_share() -> None:
    """Rows of one array where the output is the model's, else its bytes; and how long each waited."""
    ids, waits = bytes(16), np.array([1_000, 2_000], "<u4").tobytes()
    rows = np.array([[1, 2], [3, 4]], "<f4")
    whole = group(ids, Status.OK, b"")
    whole.output, whole.output_bytes, whole.queued_us = rows.tobytes(), 8, waits
    first, second = outcomes(2, whole, TensorSpec("float32", (2,)))

    assert isinstance(first, Reply)
    assert isinstance(second, Reply)
    assert (first.output.tolist(), second.output.tolist()) == ([1, 2], [3, 4])
    assert (first.timeline.queued_ms, second.timeline.queued_ms) == (1, 2)
    assert (first.latency_ms, first.subnet) == (6.0, "small")
    with pytest.raises(ValueError, match="read-only"):
        second.output[0] = 9


@pytest.mark.parametrize("lengths", [[8, 0, 8], [8, 3, 8], [8, 8, 8]])
def test_a_whole_output_is_an_array_whatever_stands_beside_it(lengths: list[int]) -> None:
    """In a batch of which some failed the outputs have lengths of their own; good ones are arrays still."""
    outputs = [bytes([i]) * length for i, length in enumerate(lengths)]
    whole = group(bytes(24), Status.OK, b"")
    whole.output, whole.output_bytes = b"".join(outputs), VARIED
    whole.lengths = np.array(lengths, "<u4").tobytes()

    for reply, output in zip(outcomes(3, whole, TensorSpec("uint8", (2, 4))), outputs, strict=True):
        assert isinstance(reply, Reply)
        if len(output) != 8:
            assert reply.output == output
            continue
        assert (reply.output.shape, reply.output.tobytes()) == ((2, 4), output)
        with pytest.raises(ValueError, match="read-only"):
            reply.output[0] = 9


def test_shares_of_varied_length_are_told_apart() -> None:
    """Outputs and reasons alike."""
    ids, lengths = bytes(24), np.array([1, 0, 3], "<u4").tobytes()
    whole = group(ids, Status.OK, b"")
    whole.output, whole.lengths = b"abcd", lengths
    assert [r.output for r in outcomes(3, whole) if isinstance(r, Reply)] == [b"a", b"", b"bcd"]
    whole.status = Status.FAILED
    assert list(map(str, outcomes(3, whole))) == ["a", "FAILED", "bcd"]
