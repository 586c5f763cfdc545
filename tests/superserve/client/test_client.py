"""The client ends every future, and says why: against a router that the test plays."""

from __future__ import annotations

import concurrent.futures
import math
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from superserve.client.client import Client
from superserve.client.session import GRACE_NS
from superserve.errors import (
    CancelledQueryError,
    ConfigError,
    DrainingError,
    ExpiredError,
    InfeasibleError,
    InvalidQueryError,
    ModelFailedError,
    OverloadedError,
    QueryError,
    UnansweredError,
    UsageError,
    WorkerLostError,
)
from superserve.wire import TRACED, Cancel, Control, Kind, Queries, Results, Status
from superserve.wire.traceparent import parsed, unpacked
from tests.superserve.client.fakes import WAIT_S, FakeRouter, group, ids_of, poll

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.client.futures import QueryFuture


SLO_MS = 20_000.0  # no answer of these tests is late on its own account


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    """Yield a router that the test plays."""
    fake = FakeRouter()
    yield fake
    fake.close()


@pytest.fixture
def client(router: FakeRouter) -> Iterator[Client]:
    """Yield a client that the router has welcomed."""
    client = Client(router.endpoint)
    connect(client, router)
    yield client
    client.close()


def connect(client: Client, router: FakeRouter) -> None:
    """Let a client and a router of one thread greet each other."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        connected = pool.submit(client.connect)
        router.serve(connected.done)
    connected.result()


def taken(router: FakeRouter, futures: list[QueryFuture]) -> dict[int, bytes]:
    """Return the payloads by id once every one of these queries has reached the router."""
    payloads: dict[int, bytes] = {}
    while len(payloads) < len(futures):
        queries = router.expect(Queries)
        each: list[bytes] = []
        if queries.framed:
            each = [bytes(payload) for payload in queries.payloads]
        else:
            packed, at = bytes(queries.payloads[0]), 0
            lengths = (
                [queries.payload_bytes] * queries.n
                if queries.lengths is None
                else np.frombuffer(queries.lengths, "<u4").tolist()
            )
            for length in lengths:
                each.append(packed[at : at + length])
                at += length
        payloads |= dict(zip(ids_of(queries), each, strict=True))
    return payloads


# --- replies --------------------------------------------------------------------------------


def test_a_reply_says_who_served_it_and_where_its_time_went(client: Client, router: FakeRouter) -> None:
    """Every field of a reply is what the router said; latency is by this process's clock."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    router.answer(router.expect(Queries))

    reply = future.result(WAIT_S)

    assert (reply.output, reply.is_late, reply.subnet) == (b"out!", False, "large")
    assert (reply.accuracy, reply.batch_size) == (80.0, 4)
    timeline = reply.timeline
    assert (timeline.queued_ms, timeline.to_start_ms) == (1.0, 2.0)
    assert (timeline.executing_ms, timeline.returning_ms) == (3.0, 4.0)
    assert 0 < reply.latency_ms < WAIT_S * 1000
    assert client.outstanding == 0


def test_a_late_reply_carries_its_output_and_is_marked(client: Client, router: FakeRouter) -> None:
    """LATE is a reply, not an error: the application may still want it."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    router.answer(router.expect(Queries), Status.LATE)

    assert future.result(WAIT_S).is_late
    assert future.result().output == b"out!"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.EXPIRED, ExpiredError),
        (Status.INFEASIBLE, InfeasibleError),
        (Status.OVERLOADED, OverloadedError),
        (Status.FAILED, ModelFailedError),
        (Status.WORKER_LOST, WorkerLostError),
        (Status.INVALID, InvalidQueryError),
        (Status.CANCELLED, CancelledQueryError),
        (Status.DRAINING, DrainingError),
    ],
)
def test_each_refusal_is_an_error_of_its_own_with_the_routers_reason(
    client: Client, router: FakeRouter, status: Status, kind: type[QueryError]
) -> None:
    """Applications distinguish refusals by class, people by the router's message."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    router.answer(router.expect(Queries), status, b"because I say so")

    with pytest.raises(kind, match="because I say so"):
        future.result(WAIT_S)


def test_a_refusal_without_words_is_named(client: Client, router: FakeRouter) -> None:
    """No error has an empty message."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    router.answer(router.expect(Queries), Status.EXPIRED, b"")

    with pytest.raises(ExpiredError, match="EXPIRED"):
        future.result(WAIT_S)


def test_outputs_become_arrays_once_the_first_worker_joins(router: FakeRouter) -> None:
    """A client that came before any worker learns the model from the second WELCOME."""
    router.model = None
    with _connected(router) as client:
        router.model = {"input": None, "output": {"dtype": "float32", "shape": [2]}, "supernet": "fake"}
        router.welcome()
        future = client.submit(b"image", slo_ms=SLO_MS)
        router.answer(router.expect(Queries), output=np.array([1.5, 2.5], np.float32).tobytes())

        np.testing.assert_array_equal(future.result(WAIT_S).output, np.array([1.5, 2.5], np.float32))


def test_every_answer_goes_to_its_own_query(client: Client, router: FakeRouter) -> None:
    """Mixed sizes, some in frames of their own, answered backwards: each future gets its echo."""
    sent = [bytes([i]) * size for i, size in enumerate((0, 1, 64, 200_000, 7, 70_000, 64))]
    futures = [client.submit(payload, slo_ms=SLO_MS) for payload in sent]
    payloads = taken(router, futures)
    groups = [
        group(query_id.to_bytes(8, "little"), Status.OK, payload)
        for query_id, payload in reversed(payloads.items())
    ]
    router.send(Results(router.epoch, groups))

    assert [future.result(WAIT_S).output for future in futures] == sent


def test_arrays_and_any_buffer_arrive_as_their_bytes(client: Client, router: FakeRouter) -> None:
    """Arrays travel in C order, whatever their layout; so do bytearrays and memoryviews."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    sent: list[Any] = [array, array.T, array[::2], np.array(3.0), bytearray(b"ab")]
    sent += [memoryview(array.tobytes()), np.zeros((0, 3))]
    futures = [client.submit(payload, slo_ms=SLO_MS) for payload in sent]
    payloads = taken(router, futures)

    for future, payload in zip(futures, sent, strict=True):
        expected = payload.tobytes() if hasattr(payload, "tobytes") else bytes(payload)
        assert payloads[future.query_id] == expected


def test_options_travel_with_their_query(client: Client, router: FakeRouter) -> None:
    """The slack is what is left of the SLO, never more; floor and class are as asked."""
    client.submit(b"image", slo_ms=SLO_MS, min_accuracy=75.5, priority=3)
    queries = router.expect(Queries)

    assert 0 < np.frombuffer(queries.slacks, "<i8")[0] <= SLO_MS * 1e6
    assert queries.min_accuracy is not None
    assert np.frombuffer(queries.min_accuracy, "<f4").tolist() == [75.5]
    assert queries.priority == b"\x03"
    assert not queries.resubmitted


def test_a_trace_context_travels_with_its_query(client: Client, router: FakeRouter) -> None:
    """A malformed one is ignored and counted; without any, a message has no bytes more than before."""
    text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.submit(b"image", slo_ms=SLO_MS)
    assert router.expect(Queries).traced is None
    client.submit(b"image", slo_ms=SLO_MS, traceparent=text.upper())
    assert router.expect(Queries).traced is None
    assert client.ignored_traceparents == 1
    client.submit(b"image", slo_ms=SLO_MS, traceparent=text)
    traced = router.expect(Queries).traced

    assert traced is not None
    ((index, context),) = TRACED.iter_unpack(traced)
    assert (index, unpacked(context)) == (0, parsed(text))
    assert client.ignored_traceparents == 1


def test_an_answer_that_comes_twice_counts_once(client: Client, router: FakeRouter) -> None:
    """The first end of a query is its end; answers to unknown ids are ignored."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    queries = router.expect(Queries)
    router.answer(queries)
    router.answer(queries, Status.FAILED, b"no")
    router.send(Results(router.epoch, [group((10**6).to_bytes(8, "little"), Status.OK, b"out!")]))
    again = client.submit(b"image", slo_ms=SLO_MS)
    router.answer(router.expect(Queries, lambda q: again.query_id in ids_of(q)))

    assert future.result(WAIT_S).output == again.result(WAIT_S).output == b"out!"


def test_a_malformed_message_is_counted_and_the_client_lives(client: Client, router: FakeRouter) -> None:
    """Noise from the router's side ends nothing."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    queries = router.expect(Queries)
    for noise in (b"", b"SS", b"noise" * 9, b"SS\x02\x04" + bytes(12)):
        router.socket.send_multipart([bytes(router.peer), noise])
    router.answer(queries)

    assert future.result(WAIT_S).output == b"out!"


# --- what a query must be -------------------------------------------------------------------


@pytest.mark.parametrize("slo_ms", [0, -1, math.nan, math.inf, 86_400_001, "36", None, 1j])
def test_an_slo_that_is_no_duration_is_refused(client: Client, slo_ms: Any) -> None:
    """The error names the field and what it got."""
    with pytest.raises(InvalidQueryError, match=r"slo_ms: expected milliseconds .* got"):
        client.submit(b"image", slo_ms=slo_ms)


@pytest.mark.parametrize("min_accuracy", [-1, 100.5, math.nan, "80", [80], np.array([80, 90])])
def test_a_floor_that_is_no_percentage_is_refused(client: Client, min_accuracy: Any) -> None:
    """The error names the field, and the refused query holds no bytes of the bound."""
    with pytest.raises(InvalidQueryError, match=r"min_accuracy: expected 0 to 100 percent, got"):
        client.submit(b"image", slo_ms=36, min_accuracy=min_accuracy)
    assert client.held_bytes == 0


@pytest.mark.parametrize("priority", [-1, 256, 1.5, math.inf, "high", None, np.array([1, 2])])
def test_a_priority_that_is_no_class_is_refused(client: Client, priority: Any) -> None:
    """The error names the field, and the refused query holds no bytes of the bound."""
    with pytest.raises(InvalidQueryError, match="priority: expected a class from 0 to 255, got"):
        client.submit(b"image", slo_ms=36, priority=priority)
    assert client.held_bytes == 0


@pytest.mark.parametrize(
    "payload",
    [None, "text", 7, [1.0], np.array([None, {}]), memoryview(bytes(8))[::2]],
    ids=["none", "text", "number", "list", "objects", "strided"],  # no addresses: the same in every process
)
def test_a_payload_that_is_no_bytes_is_refused(client: Client, payload: Any) -> None:
    """The error says what a payload is."""
    with pytest.raises(InvalidQueryError, match="input: expected"):
        client.submit(payload, slo_ms=36)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (np.zeros((2, 3)), "input: expected dtype float32, got float64"),
        (np.zeros((3, 2), np.float32), r"input: expected shape \(2, 3\), got \(3, 2\)"),
        (bytes(23), r"input: expected 24 bytes \(float32 \(2, 3\)\), got 23"),
    ],
    ids=["dtype", "shape", "bytes"],
)
def test_a_payload_that_the_model_does_not_take_never_leaves(
    router: FakeRouter, payload: Any, message: str
) -> None:
    """WELCOME says what the model takes; the error names the field, expected and got."""
    router.model = {"input": {"dtype": "float32", "shape": [2, 3]}, "output": None, "supernet": "fake"}
    with _connected(router) as client:
        with pytest.raises(InvalidQueryError, match=message):
            client.submit(payload, slo_ms=36)
        future = client.submit(np.ones((2, 3), np.float32), slo_ms=SLO_MS)
        router.answer(router.expect(Queries))
        assert future.result(WAIT_S).output == b"out!"


def test_outstanding_work_is_bounded_and_the_error_names_the_knob(router: FakeRouter) -> None:
    """Neither queries nor bytes grow without end; an answer makes room again."""
    with _connected(router, max_outstanding=2, max_bytes=100) as client:
        futures = [client.submit(b"x" * 40, slo_ms=SLO_MS) for _ in range(2)]
        with pytest.raises(OverloadedError, match=r"max_outstanding: 2 queries .* at most 2"):
            client.submit(b"x", slo_ms=SLO_MS)
        taken_ids = taken(router, futures)
        ids = b"".join(query_id.to_bytes(8, "little") for query_id in taken_ids)
        router.send(Results(router.epoch, [group(ids, Status.OK, b"out!")]))
        concurrent.futures.wait(futures, WAIT_S)
        with pytest.raises(OverloadedError, match=r"max_bytes: 0 payload bytes .* at most 100"):
            client.submit(b"x" * 101, slo_ms=SLO_MS)
        assert not client.submit(b"x" * 100, slo_ms=SLO_MS).done()


# --- ends that are not answers --------------------------------------------------------------


def test_cancelling_ends_the_future_and_tells_the_router(client: Client, router: FakeRouter) -> None:
    """CANCEL names the query; whatever still comes for it is dropped."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    queries = router.expect(Queries)

    assert future.cancel()
    cancel = router.expect(Cancel)
    assert np.frombuffer(cancel.ids, "<u8").tolist() == [future.query_id]
    assert future.cancelled()
    router.answer(queries)
    poll(lambda: client.outstanding == 0)
    assert client.held_bytes == 0


def test_an_answered_query_cannot_be_cancelled(client: Client, router: FakeRouter) -> None:
    """As futures do: False, and the reply stays."""
    future = client.submit(b"image", slo_ms=SLO_MS)
    router.answer(router.expect(Queries))
    future.result(WAIT_S)

    assert not future.cancel()
    assert future.result().output == b"out!"


def test_closing_ends_every_query(router: FakeRouter) -> None:
    """What waits ends as cancelled, what comes later is refused, and the router hears BYE."""
    client = Client(router.endpoint)
    connect(client, router)
    futures = [client.submit(b"image", slo_ms=SLO_MS) for _ in range(3)]
    client.close()

    for future in futures:
        with pytest.raises(CancelledQueryError, match="closed before the answer came"):
            future.result(WAIT_S)
    with pytest.raises(DrainingError, match="closed: make a new one"):
        client.submit(b"image", slo_ms=36)
    router.expect(Control, lambda message: message.kind is Kind.BYE)
    client.close()  # the second time does nothing


def test_closing_while_threads_submit_leaves_no_future_waiting(router: FakeRouter) -> None:
    """Whichever comes first, close or submit, each future ends or the submit is refused."""
    client = Client(router.endpoint)
    connect(client, router)
    futures: list[QueryFuture] = []

    def submit() -> None:
        for _ in range(2_000):
            try:
                futures.append(client.submit(b"", slo_ms=SLO_MS))
            except (DrainingError, OverloadedError):
                return

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    client.close()
    for thread in threads:
        thread.join(WAIT_S)

    for future in futures:
        with pytest.raises(CancelledQueryError):
            future.result(WAIT_S)


def closed_endpoint() -> str:
    """Return an endpoint at which nobody listens."""
    fake = FakeRouter()
    fake.close()
    return fake.endpoint


def test_connecting_to_nobody_says_where_and_what_to_do() -> None:
    """The error names the endpoint and the command that starts a router."""
    endpoint = closed_endpoint()
    with (
        pytest.raises(UnansweredError, match=f"no router answers at {endpoint}: start one with `python -m"),
        Client(endpoint, connect_timeout_s=0.05),
    ):
        pass


def test_a_query_to_nobody_ends_at_its_deadline() -> None:
    """Without a router a query waits for one until its deadline, no longer."""
    client = Client(closed_endpoint())
    try:
        with pytest.raises(UnansweredError, match=r"query 1: no router answers at tcp://.*check host"):
            client.infer(b"image", slo_ms=50)
        assert client.outstanding == client.held_bytes == 0
    finally:
        client.close()


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://", "udp://x:1"])
def test_a_malformed_endpoint_is_a_clear_error(endpoint: str) -> None:
    """Said at connect, not by silence."""
    with pytest.raises(ConfigError, match=f"connect '{endpoint}': expected tcp://HOST:PORT"):
        Client(endpoint).connect()


def test_a_router_that_answers_nothing_leaves_no_query_waiting(client: Client, router: FakeRouter) -> None:
    """With a router there, a query ends one grace after its deadline."""
    started_ns = time.monotonic_ns()
    future = client.submit(b"image", slo_ms=10)
    router.serve(future.done)

    with pytest.raises(UnansweredError, match="gave no answer within 2000 ms of its deadline"):
        future.result(WAIT_S)
    assert time.monotonic_ns() - started_ns >= GRACE_NS


def test_a_router_that_vanishes_leaves_no_query_waiting() -> None:
    """The broken connection is seen at once: no grace, for those sent before and after alike."""
    fake = FakeRouter()
    client = Client(fake.endpoint)
    connect(client, fake)
    futures = [client.submit(b"image", slo_ms=slo_ms) for slo_ms in (20, 50, 100, 200)]
    fake.expect(Queries)
    fake.close()
    futures += [client.submit(b"image", slo_ms=20)]
    try:
        for future in futures:
            with pytest.raises(UnansweredError, match="no router answers at"):
                future.result(WAIT_S)
    finally:
        client.close()
    assert client.outstanding == 0


def test_a_restarted_router_is_greeted_and_given_what_has_slack_left() -> None:
    """Same port, new epoch: HELLO again, RESUBMITTED queries, each answered once."""
    first = FakeRouter()
    client = Client(first.endpoint)
    connect(client, first)
    kept = [client.submit(b"kept%d" % i, slo_ms=SLO_MS) for i in range(3)]
    lost = client.submit(b"lost", slo_ms=1)
    taken(first, [*kept, lost])
    first.close()
    second = FakeRouter(first.endpoint, epoch=2)
    try:
        seen: dict[int, bytes] = {}
        while len(seen) < 3:
            queries = second.expect(Queries, lambda q: q.resubmitted)
            assert queries.epoch == 2
            seen |= dict.fromkeys(ids_of(queries), b"")
            second.answer(queries)
        assert set(seen) == {future.query_id for future in kept}
        assert [future.result(WAIT_S).output for future in kept] == [b"out!"] * 3
        assert {hello["session"] for hello in second.hellos} == {first.hellos[0]["session"]}
        with pytest.raises(UnansweredError):
            lost.result(WAIT_S)
    finally:
        client.close()
        second.close()


def test_a_router_that_forgot_the_client_is_greeted_again(client: Client, router: FakeRouter) -> None:
    """Refused with say-hello, the client says HELLO and sends its queries again."""
    router.peers.clear()
    future = client.submit(b"image", slo_ms=SLO_MS)
    queries = router.expect(Queries, lambda q: q.resubmitted)
    router.answer(queries)

    assert future.result(WAIT_S).output == b"out!"
    assert len(router.hellos) >= 2  # said again while no WELCOME has come


def test_a_client_from_before_a_fork_says_so(client: Client) -> None:
    """The thread does not come along: an error that says what to do, not a future that never ends."""
    client.pid = os.getppid()  # as the child of a fork sees it
    try:
        with pytest.raises(UsageError, match=r"Client was made before a fork.* Make one in each process"):
            client.submit(b"image", slo_ms=36)
    finally:
        client.pid = os.getpid()


def _connected(router: FakeRouter, **options: Any) -> Client:
    """Return a client that the router has welcomed; leaving its block closes it."""
    client = Client(router.endpoint, **options)
    connect(client, router)
    return client
