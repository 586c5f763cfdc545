"""Sockets never block, never tear a message, and say why they cannot be had."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zmq

from superserve import wire
from superserve.clock import MS
from superserve.errors import ConfigError, WireError
from superserve.net import sockets
from superserve.wire import MAX_FRAMES, Control, Kind
from tests.superserve.client.fakes import next_message, poll

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.wire import Buffer

Socket = zmq.Socket[bytes]


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    """Yield a context of its own."""
    with zmq.Context() as context:
        yield context


@pytest.fixture
def pair(context: zmq.Context[Socket]) -> Iterator[tuple[Socket, Socket, bytes]]:
    """Yield a ROUTER, a DEALER connected to it, and the name the ROUTER knows it by."""
    router, endpoint = sockets.bind_router(context, "tcp://127.0.0.1:*")
    dealer = sockets.connect_dealer(context, endpoint)
    poll(lambda: sockets.send(dealer, [b"hello"]))
    key = bytes(next_message(router)[0])
    yield router, dealer, key
    router.close(0)
    dealer.close(0)


@pytest.mark.parametrize("size", [0, 1, sockets.ZERO_COPY_BYTES - 1, sockets.ZERO_COPY_BYTES, 1 << 20])
def test_frames_arrive_as_they_were_sent(pair: tuple[Socket, Socket, bytes], size: int) -> None:
    """On both sides of the size from which buffers are pinned rather than copied."""
    router, dealer, key = pair
    frames: list[Buffer] = [b"head", os.urandom(size), memoryview(b"tail")]
    assert sockets.send(dealer, frames)
    received = next_message(router)

    assert [bytes(frame) for frame in received] == [key, *map(bytes, frames)]
    assert sockets.send(router, received)
    assert [bytes(frame) for frame in next_message(dealer)] == [bytes(frame) for frame in frames]


def test_an_address_of_ipv6_is_bound_and_found(context: zmq.Context[Socket]) -> None:
    """In brackets, as wherever a port follows; a machine without IPv6 has nothing to show."""
    known = Path("/proc/net/if_inet6")
    if not known.exists() or " lo\n" not in known.read_text():
        pytest.skip("this machine has no IPv6 address on loopback")
    router, endpoint = sockets.bind_router(context, "tcp://[::1]:*")
    assert endpoint.startswith("tcp://[::1]:")
    dealer = sockets.connect_dealer(context, endpoint)
    try:
        poll(lambda: sockets.send(dealer, [b"hello"]))
        assert bytes(next_message(router)[1]) == b"hello"
    finally:
        router.close(0)
        dealer.close(0)


def test_receiving_nothing_returns_at_once(pair: tuple[Socket, Socket, bytes]) -> None:
    """None, not a wait."""
    assert sockets.receive(pair[0]) is None


def test_a_message_of_too_many_frames_is_dropped_whole(pair: tuple[Socket, Socket, bytes]) -> None:
    """The next message is read from its beginning."""
    router, dealer, key = pair
    dealer.send_multipart([b""] * (MAX_FRAMES + 3))
    sockets.send(dealer, [b"after"])
    poll(lambda: bool(sockets.Waiter((router,)).wait(0)))

    with pytest.raises(WireError, match=f"at most {MAX_FRAMES} frames"):
        sockets.receive(router)
    assert next_message(router) == [key, b"after"]


def test_sending_to_nobody_is_refused_at_once(context: zmq.Context[Socket]) -> None:
    """A DEALER queues nothing for a router that is not there; a ROUTER nothing for strangers."""
    router, _ = sockets.bind_router(context, "tcp://127.0.0.1:*")
    assert not sockets.send(router, [b"stranger", b"hello"])
    router.close(0)
    # Bound and not listening: nobody answers, and nobody else can take the port.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with sockets.connect_dealer(context, endpoint) as dealer:
            assert not sockets.send(dealer, [b"hello"])


def test_a_full_queue_refuses_whole_messages(pair: tuple[Socket, Socket, bytes]) -> None:
    """A peer that does not read costs False, not a block; what was sent arrives untorn."""
    router, dealer, _ = pair
    n_sent = 0
    while sockets.send(dealer, [b"%d" % n_sent, bytes(1_000), b"end"]):
        n_sent += 1
        assert n_sent < 10 * sockets.HIGH_WATER_MARK, "nothing bounds the queue"

    for i in range(n_sent):
        assert next_message(router)[1:] == [b"%d" % i, bytes(1_000), b"end"]


def test_an_endpoint_that_is_taken_is_a_clear_error(context: zmq.Context[Socket]) -> None:
    """The error names the endpoint and the system's reason."""
    router, endpoint = sockets.bind_router(context, "tcp://127.0.0.1:*")
    with pytest.raises(ConfigError, match=f"bind {endpoint}: Address already in use"):
        sockets.bind_router(context, endpoint)
    router.close(0)


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:5555", "tcp://127.0.0.1", "no://such:1"])
def test_a_malformed_endpoint_is_a_clear_error(context: zmq.Context[Socket], endpoint: str) -> None:
    """Binding and connecting alike say so."""
    with pytest.raises(ConfigError, match="bind"):
        sockets.bind_router(context, endpoint)
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT"):
        sockets.connect_dealer(context, endpoint)


def test_a_wait_ends_with_its_time_a_message_or_a_descriptor(pair: tuple[Socket, Socket, bytes]) -> None:
    """Whichever comes first, or earlier; only sockets that have something are returned."""
    router, dealer, _ = pair
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    assert sockets.Waiter((router, dealer), (fd,)).wait(None) == []
    os.close(fd)
    waiter = sockets.Waiter((router, dealer))
    assert waiter.wait(5 * MS) == []
    sockets.send(dealer, [b"hello"])
    while not (readable := waiter.wait(None)):
        pass  # ZeroMQ's descriptor wakes for its own business too
    assert readable == [router]


def test_a_large_frame_is_handed_on_without_copying(pair: tuple[Socket, Socket, bytes]) -> None:
    """From KEEP_BYTES on a received frame is ZeroMQ's own, and whoever gets it next reads the same bytes."""
    router, dealer, key = pair
    payload = bytes(range(256)) * (sockets.KEEP_BYTES // 256)
    dealer.send_multipart([b"head", payload, payload[:-1]])
    frames: Any = next_message(router)
    kept: Any = frames[2]

    assert (type(kept), type(frames[3])) == (zmq.Frame, bytes)
    assert sockets.send(router, [key, kept])
    assert sockets.send(router, [key, kept])
    assert [bytes(frame) for _ in range(2) for frame in next_message(dealer)] == [payload, payload]


def test_a_large_header_can_be_sliced(pair: tuple[Socket, Socket, bytes]) -> None:
    """A message's first frame is columns, and a decoder cuts it, however long it is."""
    router, dealer, _ = pair
    columns = bytes(range(256)) * (sockets.KEEP_BYTES // 128)
    dealer.send(columns)

    assert bytes(next_message(router)[1][256:512]) == bytes(range(256))


@pytest.mark.parametrize("n", [1, 100, 100_000])
def test_a_control_message_of_any_length_is_read(pair: tuple[Socket, Socket, bytes], n: int) -> None:
    """A worker's HELLO holds its profile, which of a thousand subnets is long."""
    router, dealer, key = pair
    body = {"role": "worker", "profiles": ["subnet"] * n}
    assert sockets.send(dealer, wire.encode(Control(Kind.HELLO, body)))
    received = next_message(router)

    assert received[0] == key
    assert wire.decode(received[1:]) == Control(Kind.HELLO, body)


def test_a_path_that_another_listens_at_is_taken(context: zmq.Context[Socket], tmp_path: Path) -> None:
    """It would be removed, and with it every way to the first; what a dead one left is free."""
    endpoint = f"ipc://{tmp_path}/router"
    first, _ = sockets.bind_router(context, endpoint)
    with pytest.raises(ConfigError, match=r"ipc://.*: Address already in use"):
        sockets.bind_router(context, endpoint)
    assert (tmp_path / "router").is_socket()
    first.close(0)

    with socket.socket(socket.AF_UNIX) as dead:
        (tmp_path / "router").unlink(missing_ok=True)
        dead.bind(str(tmp_path / "router"))
    sockets.bind_router(context, endpoint)[0].close(0)


def test_a_path_of_a_file_is_no_endpoint(context: zmq.Context[Socket], tmp_path: Path) -> None:
    """Libzmq would remove the file."""
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="expected a socket or nothing at that path, got a file"):
        sockets.bind_router(context, f"ipc://{tmp_path}/notes")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("endpoint", "is_own"),
    [
        ("ipc:///tmp/router.sock", True),
        ("inproc://clients", True),
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.9.9:5555", True),
        ("tcp://localhost:5555", True),
        ("tcp://[::1]:5555", True),
        ("tcp://192.0.2.1:5555", False),
        ("tcp://[2001:db8::1]:5555", False),
        ("tcp://router.example:5555", False),
        ("tcp://:5555", False),
    ],
)
def test_an_endpoint_shows_whether_it_is_on_this_host(endpoint: str, *, is_own: bool) -> None:
    """By its form and its address; a name is not looked up, which may take seconds."""
    assert sockets.is_own_host(endpoint) == is_own
