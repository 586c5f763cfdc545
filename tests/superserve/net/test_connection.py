"""A connection greets with patience, and notices at once when it breaks."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import struct
import threading
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import zmq

from superserve.errors import ConfigError, WireError
from superserve.hello import ModelSpec
from superserve.net.connection import (
    HELLO_EVERY_AT_MOST_NS,
    HELLO_EVERY_NS,
    PING_EVERY_NS,
    SILENT_NS,
    Connection,
    ask_status,
)
from superserve.shared.foreign import ForeignMemory
from superserve.shared.offers import MemoryAnswer, MemoryOffer
from superserve.status import RouterStatus
from superserve.subnet import TensorSpec
from superserve.wire import Control, Group, Kind, Ping, Queries, Results, decode
from tests.superserve.client.fakes import WAIT_S, FakeRouter, next_message, poll
from tests.superserve.shared.descriptors import memories_of
from tests.superserve.statuses import status

if TYPE_CHECKING:
    from collections.abc import Iterator

MS = 1_000_000


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    """Yield a router that the test plays."""
    fake = FakeRouter()
    yield fake
    fake.close()


@pytest.fixture
def connection(router: FakeRouter) -> Iterator[Connection]:
    """Yield a connection whose socket is connected; nothing has been said."""
    with zmq.Context() as context:
        connection = Connection(router.endpoint, context)
        poll(lambda: is_connected(connection))
        yield connection
        connection.close()


def is_connected(connection: Connection) -> bool:
    """Process events, and return whether a router is connected."""
    for _ in connection.receive():
        pass
    connection.look()
    return connection._is_connected


def welcome(connection: Connection, router: FakeRouter, now_ns: int) -> None:
    """Let the two greet each other."""
    connection.tick(now_ns)
    router._next(10**9)
    poll(lambda: is_connected(connection) and connection.epoch == router.epoch)


def test_nobody_who_answers_is_greeted_ever_less_often(connection: Connection, router: FakeRouter) -> None:
    """From 100 ms up to a second, with jitter, so that a thousand clients do not come at once."""
    said = []
    for now_ns in range(10**9, 11 * 10**9, MS):
        before = connection._hello_ns
        connection.tick(now_ns)
        if connection._hello_ns != before:
            said.append(now_ns)
    gaps = [after - before for before, after in pairwise(said)]

    assert 0.75 * HELLO_EVERY_NS <= gaps[0] <= 1.25 * HELLO_EVERY_NS + MS
    assert max(gaps) <= 1.25 * HELLO_EVERY_AT_MOST_NS + MS
    assert all(gap >= 0.75 * HELLO_EVERY_AT_MOST_NS for gap in gaps[4:])
    assert len(set(gaps[4:])) > 1, "jitter"
    for _ in said:
        message = decode(next_message(router.socket)[1:])
        assert isinstance(message, Control)
        assert (message.kind, message.version, message.body["wire"]) == (Kind.HELLO, 2, [2, 2])


def test_without_a_connection_nothing_is_said_and_nothing_queued() -> None:
    """HELLOs do not pile up for a router that comes later; the first to come is greeted once."""
    router = FakeRouter()
    router.close()
    with zmq.Context() as context:
        connection = Connection(router.endpoint, context)
        for now_ns in range(10**9, 2 * 10**9, 10 * MS):
            connection.tick(now_ns)
        router = FakeRouter(router.endpoint)
        poll(lambda: is_connected(connection))
        welcome(connection, router, 3 * 10**9)
        assert len(router.hellos) == 1
        connection.close()
    router.close()


def test_a_broken_connection_is_noticed_without_a_word(connection: Connection, router: FakeRouter) -> None:
    """Long before the heartbeat would show it."""
    welcome(connection, router, 10**9)
    router.close()
    poll(lambda: not is_connected(connection))

    assert connection.epoch is None


def test_a_router_that_forgot_us_is_greeted_no_more_often_than_that(
    connection: Connection, router: FakeRouter
) -> None:
    """A router that welcomes and refuses in turn is not asked in a busy loop."""
    now_ns = 10**9
    welcome(connection, router, now_ns)
    connection.lose()
    connection.tick(now_ns + MS)
    assert len(router.hellos) == 1
    connection.tick(now_ns + 2 * HELLO_EVERY_NS)
    assert router._next(10**9) is not None
    assert len(router.hellos) == 2


def test_a_silent_router_is_asked_and_then_taken_for_gone(connection: Connection, router: FakeRouter) -> None:
    """Three PINGs go unanswered, though the connection stands."""
    welcome(connection, router, 10**9)
    heard_ns = connection.heard_ns
    for i in range(1, 4):
        connection.tick(heard_ns + i * PING_EVERY_NS)
        assert isinstance(decode(next_message(router.socket)[1:]), Ping)
    assert connection.epoch is not None
    connection.tick(heard_ns + SILENT_NS + 1)

    assert connection.epoch is None


def test_a_status_that_cannot_be_read_is_kept_as_what_is_wrong_with_it(
    connection: Connection, router: FakeRouter
) -> None:
    """It is counted, the connection goes on, and a sound one takes its place."""
    welcome(connection, router, 10**9)
    router.send(Control(Kind.STATUS, {"router": 7}))
    poll(lambda: is_connected(connection) and connection.status is not None)
    assert isinstance(connection.status, WireError)
    assert str(connection.status) == "status: router: expected an object, got 7"
    assert connection.n_malformed == 1
    router.send(Control(Kind.STATUS, status(clients=9).body()))
    poll(lambda: is_connected(connection) and isinstance(connection.status, RouterStatus))
    assert connection.epoch == router.epoch


def test_a_welcome_that_cannot_be_read_welcomes_nobody(connection: Connection, router: FakeRouter) -> None:
    """HELLO is said on; a sound one comes in its time."""
    connection.tick(10**9)
    router.model = {"input": {"dtype": "no such", "shape": [1]}}
    router._next(10**9)
    poll(lambda: is_connected(connection) and connection.n_malformed == 1)
    assert connection.epoch is None
    router.model = {"input": {"dtype": "uint8", "shape": [1]}}
    welcome(connection, router, 20 * 10**9)
    assert connection.model == ModelSpec(TensorSpec("uint8", (1,)))


def test_who_asks_for_a_status_that_cannot_be_read_learns_which_field_is_wrong(router: FakeRouter) -> None:
    """And not that no router answers."""
    asked = threading.Event()

    def serve() -> None:
        while not asked.is_set():
            message = router._next(MS)
            if isinstance(message, Control) and message.kind is Kind.STATUS:
                router.send(Control(Kind.STATUS, {**status().body(), "clients": None}))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(WireError, match=r"status: clients: expected an integer, got None; is it of"):
            ask_status(router.endpoint, timeout_s=20.0)
    finally:
        asked.set()
        thread.join()


REFUSALS = (
    (Control(Kind.REFUSED, {"code": "malformed", "reason": "version: expected 1, got 2"}, 1), "1"),
    (Control(Kind.REFUSED, {"code": "version", "reason": "no", "wire": [3, 4]}), "3 to 4"),
)


@pytest.mark.parametrize(("refused", "theirs"), REFUSALS, ids=["older", "newer"])
def test_a_router_that_speaks_other_wire_versions_is_named_with_both(
    connection: Connection, router: FakeRouter, refused: Control, theirs: str
) -> None:
    """HELLO goes on, and a router of our version that takes its place is welcome."""
    connection.tick(10**9)
    router.peer = next_message(router.socket)[0]
    router.send(refused)
    poll(lambda: is_connected(connection) and connection.mismatch is not None)

    assert connection.absence.startswith(f"{router.endpoint}: wire version: expected 2, got {theirs}: ")
    assert connection.epoch is None
    welcome(connection, router, 10 * 10**9)
    assert connection.mismatch is None


@pytest.mark.parametrize(("refused", "theirs"), REFUSALS, ids=["older", "newer"])
def test_asking_such_a_router_for_status_fails_at_once(
    router: FakeRouter, refused: Control, theirs: str
) -> None:
    """The error names both versions; the time-out is not waited for."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_status, router.endpoint, 600.0)
        router.peer = next_message(router.socket)[0]
        router.send(refused)
        with pytest.raises(ConfigError, match=f"wire version: expected 2, got {theirs}: "):
            asked.result(WAIT_S)


def test_why_a_router_refuses_is_said_once_and_kept(
    connection: Connection, router: FakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal comes with each HELLO; who gives up waiting hears it, and not that nobody answers."""
    assert "no router answers" in connection.absence
    router.welcome = lambda: None  # type: ignore[method-assign]  # this one refuses
    connection.tick(10**9)
    router._next(10**9)
    for _ in range(3):
        router.send(Control(Kind.REFUSED, {"code": "refused", "reason": "expected that of clients"}))
    poll(lambda: is_connected(connection) and len(connection.refusals) == 3)

    assert connection.absence == f"{router.endpoint} refused this client: expected that of clients"
    assert caplog.text.count("expected that of clients") == 1


def test_an_answer_frees_its_slot_even_if_nothing_more_is_read(
    router: FakeRouter, connection: Connection
) -> None:
    """A client reads a bounded number of messages at a time, and may stop at this one."""
    gc.collect()
    before = memories_of(os.getpid())  # other tests of this process may have some open
    router.shared = True
    welcome(connection, router, 10**9)
    payload = bytes(50_000)
    message = Queries(1, 0, 1, bytes(8), struct.pack("<q", 10**10), len(payload), [payload], True)
    assert connection.send_queries(message)
    offer = MemoryOffer.from_body(router.expect(Control, lambda one: one.kind is Kind.SHARE).body)
    assert router.expect(Queries).shared is None, "until the router has answered"
    router.send(Control(Kind.SHARE, MemoryAnswer(offer.memory, ForeignMemory(offer).seen).body()))
    assert memories_of(os.getpid()) > before
    poll(lambda: not list(connection.receive()) and connection.placing.is_shared)
    assert connection.send_queries(message)
    assert router.expect(Queries).shared is not None
    assert connection.placing.n_placed == 1

    router.send(Results(1, [Group(1, 0, 0, 1, 0.0, 0, 0, 0, 0, bytes(8), 0, b"")]))
    assert connection.socket.poll(int(1_000 * WAIT_S))
    next(connection.receive())

    assert connection.placing.n_placed == 0

    connection.close()
    gc.collect()

    assert memories_of(os.getpid()) <= before
