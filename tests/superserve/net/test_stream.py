"""A ROUTER on plain sockets is one to ZeroMQ's own sockets, and survives what strangers send it."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
import zmq

from superserve.errors import ConfigError
from superserve.net import sockets, stream, zmtp
from superserve.net.stream import StreamRouter, speaks
from superserve.wire import MAX_FRAMES
from tests.superserve.client.fakes import poll

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.wire import Buffer

Socket = zmq.Socket[bytes]
Received = list[tuple[bytes, list["Buffer"]]]
_SECOND_NS = 1_000_000_000
_made: list[Socket] = []


@pytest.fixture
def router() -> Iterator[StreamRouter]:
    """Yield one at a port that the system picked."""
    router = StreamRouter("tcp://127.0.0.1:*")
    yield router
    router.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    """Yield a context of its own; every socket made in it is closed at the end."""
    context: zmq.Context[Socket] = zmq.Context()
    _made.clear()
    yield context
    for one in _made:
        one.close(0)
    context.term()


def dealer_of(context: zmq.Context[Socket], router: StreamRouter) -> Socket:
    """Return a DEALER that connects to it."""
    _made.append(sockets.connect_dealer(context, router.endpoint))
    return _made[-1]


def messages(router: StreamRouter, n: int) -> Received:
    """Return the next `n` messages."""
    found: Received = []

    def have_all() -> bool:
        found.extend(router.receive() or [])
        return len(found) >= n

    poll(have_all)
    assert len(found) == n
    return found


def greeted(context: zmq.Context[Socket], router: StreamRouter) -> tuple[Socket, bytes]:
    """Return a DEALER and the router's key for it."""
    dealer = dealer_of(context, router)

    def is_sent() -> bool:
        router.receive()
        return sockets.send(dealer, [b"hello"])

    poll(is_sent)
    ((key, _),) = messages(router, 1)
    return dealer, key


def plain(router: StreamRouter) -> socket.socket:
    """Return a plain connection to it, which has said nothing yet."""
    return socket.create_connection(("127.0.0.1", int(router.endpoint.rpartition(":")[2])), 5)


def is_closed(router: StreamRouter, link: socket.socket) -> bool:
    """Return whether the router closes a connection, whatever it has sent before."""
    link.settimeout(0.01)
    seen: list[bytes] = []

    def ends() -> bool:
        router.receive()
        try:
            seen.append(link.recv(65_536))
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True
        return not seen[-1]

    try:
        poll(ends)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("size", [0, 1, 113, 255, 256, 8_191, 32_767, 32_768, 65_536, 1 << 20])
def test_messages_pass_both_ways_as_they_were_sent(
    router: StreamRouter, context: zmq.Context[Socket], size: int
) -> None:
    """With frames of every kind of length, alone and beside others; what goes back is what came."""
    dealer, key = greeted(context, router)
    body = os.urandom(size)
    for frames in ([body], [b"head", body, b"tail"], [body, body]):
        assert sockets.send(dealer, frames)
        ((came_from, received),) = messages(router, 1)
        assert (came_from, [bytes(frame) for frame in received]) == (key, frames)
        assert router.send(key, received)
        back: list[bytes] = []

        def is_back(back: list[bytes] = back) -> bool:
            router.receive()  # sends what the kernel did not take at once
            back[:] = [bytes(frame) for frame in sockets.receive(dealer) or []]
            return bool(back)

        poll(is_back)
        assert back == frames


def test_a_flood_arrives_whole_and_in_order(router: StreamRouter, context: zmq.Context[Socket]) -> None:
    """A thousand messages of one peer, and one of another in between."""
    busy, busy_key = greeted(context, router)
    quiet, quiet_key = greeted(context, router)
    for i in range(1_000):
        assert sockets.send(busy, [b"%d" % i])
    assert messages(router, 1) == [(busy_key, [b"0"])]
    assert sockets.send(quiet, [b"one"])
    order: list[tuple[bytes, bytes]] = []

    def have_all() -> bool:
        order.extend((key, bytes(frames[0])) for key, frames in router.receive() or [])
        return len(order) >= 1_000

    poll(have_all)
    assert [body for key, body in order if key == busy_key] == [b"%d" % i for i in range(1, 1_000)]
    assert order.count((quiet_key, b"one")) == 1
    assert not router.has_more()


def test_turns_go_round(router: StreamRouter) -> None:
    """A peer that has sent fifty messages at once, and one that has sent two: the two are served second."""
    keys = []
    links = [plain_open(router, zmtp.frame_of(b"hello")) for _ in range(2)]
    for key, _ in messages(router, 2):
        keys.append(key)
    links[0].sendall(b"".join(zmtp.frame_of(b"%d" % i) for i in range(50)))
    links[1].sendall(zmtp.frame_of(b"a") + zmtp.frame_of(b"b"))
    # Both have arrived: the kernel passes on what loopback carries before sendall returns.
    order = [bytes(frames[0]) for _, frames in messages(router, 52)]
    assert set(order[:4]) == {b"0", b"a", b"1", b"b"}
    assert [body for body in order if body.isdigit()] == [b"%d" % i for i in range(50)]
    for link in links:
        link.close()


def test_messages_that_wait_here_are_shown(router: StreamRouter) -> None:
    """The descriptor is silent about what has been read, so `has_more` is not."""
    link = plain_open(router)
    link.sendall(b"".join(zmtp.frame_of(b"%d" % i) for i in range(3)))
    poll(lambda: bool(router.receive()))
    assert router.has_more()
    assert [frames for _, frames in messages(router, 2)] == [[b"1"], [b"2"]]
    assert not router.has_more()
    link.close()


def plain_open(router: StreamRouter, said: bytes = b"") -> socket.socket:
    """Return a plain connection that has greeted, and then said something."""
    link = plain(router)
    link.sendall(zmtp.GREETING + zmtp.ready(b"DEALER") + said)
    return link


def test_bytes_may_come_one_by_one(router: StreamRouter) -> None:
    """Wherever a packet ends: in the greeting, in a frame's head, in its body."""
    link = plain(router)
    long = os.urandom(300)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    found: Received = []
    for byte in zmtp.GREETING + zmtp.ready(b"DEALER") + zmtp.frame_of(b"a", more=True) + zmtp.frame_of(long):
        link.sendall(bytes((byte,)))
        found += router.receive() or []
    if not found:
        found = messages(router, 1)
    assert [bytes(frame) for frame in found[0][1]] == [b"a", long]
    link.close()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n".ljust(64, b" "),
        zmtp.GREETING[:10] + b"\x01" + zmtp.GREETING[11:],
        zmtp.GREETING.replace(b"NULL", b"PLAI"),
        zmtp.GREETING + zmtp.ready(b"PUB"),
        zmtp.GREETING + zmtp.frame_of(b"too soon"),
        zmtp.GREETING + zmtp.frame_of(b"\x05READY\xff", command=True),
        zmtp.GREETING + zmtp.ready(b"DEALER") + b"\x02" + b"\xff" * 8,
    ],
    ids=["http", "zmtp 1", "mechanism", "pub", "no ready", "cut ready", "long frame"],
)
def test_whoever_speaks_otherwise_is_cut_off(
    router: StreamRouter, context: zmq.Context[Socket], said: bytes
) -> None:
    """And costs the others nothing."""
    link = plain(router)
    link.sendall(said)
    assert is_closed(router, link)
    link.close()
    _, key = greeted(context, router)
    assert router.send(key, [b"served"])


def test_too_many_frames_come_as_an_empty_message(router: StreamRouter) -> None:
    """So that the owner refuses it by name, and the connection goes on."""
    link = plain_open(router)
    link.sendall(
        zmtp.frame_of(b"", more=True) * (MAX_FRAMES + 5) + zmtp.frame_of(b"") + zmtp.frame_of(b"next")
    )
    assert [frames for _, frames in messages(router, 2)] == [[], [b"next"]]
    link.close()


def test_a_ping_is_answered_with_its_context(router: StreamRouter) -> None:
    """ZeroMQ's own heartbeat, which keeps the connection of an idle client."""
    link = plain_open(router, zmtp.frame_of(b"\x04PING\x00\x10context", command=True))
    expected = zmtp.GREETING + zmtp.ready(b"ROUTER") + zmtp.frame_of(b"\x04PONGcontext", command=True)
    seen = b""
    link.settimeout(5)
    while len(seen) < len(expected):
        router.receive()
        link.settimeout(0.05)
        try:
            seen += link.recv(4_096)
        except TimeoutError:
            continue
    assert seen == expected
    link.close()


def test_a_silent_peer_is_asked_and_then_dropped(router: StreamRouter, context: zmq.Context[Socket]) -> None:
    """One that answers stays, one that has died without a word goes, one that never greeted too."""
    _, alive = greeted(context, router)
    mute = plain_open(router)
    poll(lambda: (router.receive(), len(router._of_key))[1] == 2)
    stranger = plain(router)
    poll(lambda: (router.receive(), len(router._of_key))[1] == 3)
    router.receive()
    now_ns = time.monotonic_ns()
    router.look(now_ns + 3 * _SECOND_NS)
    assert len(router._of_key) == 3, "asked, not dropped"
    mute.settimeout(5)
    seen = b""
    while zmtp.PING not in seen:
        seen += mute.recv(4_096)
    for peer in router._of_fd.values():
        peer.heard_ns = now_ns + (12 * _SECOND_NS if peer.key == alive else 0)
    router.look(now_ns + 13 * _SECOND_NS)
    assert alive in router._of_key
    router.look(now_ns + 31 * _SECOND_NS)
    stranger.settimeout(5)
    assert is_closed(router, mute)
    assert is_closed(router, stranger)
    mute.close()
    stranger.close()


def test_what_a_peer_does_not_read_is_kept_up_to_a_bound(
    router: StreamRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sends never wait; beyond the bound they fail; what was taken arrives whole and in order."""
    monkeypatch.setattr(stream, "HIGH_WATER_MARK", 50)
    link = plain_open(router, zmtp.frame_of(b"hello"))
    ((key, _),) = messages(router, 1)
    body, n = os.urandom(100_000), 0
    while router.send(key, [n.to_bytes(4, "big"), body]):
        n += 1
        assert n < 10_000, "no bound"
    expected = b"".join(
        zmtp.frame_of(i.to_bytes(4, "big"), more=True) + zmtp.frame_of(body) for i in range(n)
    )
    greeting = zmtp.GREETING + zmtp.ready(b"ROUTER")
    seen = bytearray()
    link.settimeout(5)
    while len(seen) < len(greeting) + len(expected):
        seen += link.recv(1 << 20)
        router.receive()
    assert bytes(seen) == greeting + expected
    assert router.send(key, [b"again"])
    link.close()


def test_a_send_to_a_peer_that_is_gone_fails(router: StreamRouter, context: zmq.Context[Socket]) -> None:
    """At once if the connection is known to be closed; never by an exception."""
    dealer, key = greeted(context, router)
    assert not router.send(b"nobody", [b"x"])
    dealer.close(0)
    poll(lambda: (router.receive(), not router.send(key, [b"x"]))[1])
    assert not router.send(key, [b"x"])


def test_what_was_sent_before_leaving_is_received(router: StreamRouter) -> None:
    """The last words of a peer that hangs up: its BYE, and what it sent before."""
    link = plain_open(router, b"".join(zmtp.frame_of(b"%d" % i) for i in range(200)))
    link.close()
    assert [bytes(frames[0]) for _, frames in messages(router, 200)] == [b"%d" % i for i in range(200)]


def test_closing_waits_for_what_was_sent(router: StreamRouter) -> None:
    """A BYE behind a backlog leaves this process before the connection ends."""
    link = plain_open(router, zmtp.frame_of(b"hello"))
    ((key, _),) = messages(router, 1)
    assert router.send(key, [bytes(8 << 20)])
    assert router.send(key, [b"bye"])
    seen = bytearray()

    def read() -> None:
        while part := link.recv(1 << 20):
            seen.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    router.close(linger_ms=10_000)
    reader.join(10)
    assert not reader.is_alive()
    assert seen.endswith(zmtp.frame_of(b"bye"))
    link.close()


@pytest.mark.parametrize(
    ("endpoint", "is_spoken"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://*:*", True),
        ("tcp://[::1]:0", True),
        ("tcp://localhost:5555", False),
        ("tcp://eth0:*", False),
        ("tcp://127.0.0.1:99999", False),
        ("ipc:///run/router", False),
        ("127.0.0.1:5555", False),
    ],
)
def test_it_binds_addresses_in_numbers(endpoint: str, is_spoken: bool) -> None:
    """Names, interfaces and paths are left to ZeroMQ."""
    assert speaks(endpoint) == is_spoken


def test_a_taken_port_is_named(router: StreamRouter) -> None:
    """As with ZeroMQ's own."""
    with pytest.raises(ConfigError, match=f"bind {router.endpoint}: Address already in use"):
        StreamRouter(router.endpoint)
