"""ZeroMQ sockets as every role here uses them: bounded, never blocking, never silent.

One thread owns a socket, closing included. Routers bind, everything else connects.
Sends never wait: the caller handles and counts what cannot be sent at once.
"""

from __future__ import annotations

import errno
import ipaddress
import select
import socket as stdlib_socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq
from zmq.backend import Socket as _Socket
from zmq.backend import zmq_poll

from superserve.errors import ConfigError, WireError
from superserve.wire import MAX_FRAMES, Buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from superserve.net.keys import PeerKeys, RouterKeys

ZERO_COPY_BYTES = 65_536
"""From this size on, pinning a buffer costs less than copying it: pyzmq's own threshold, and ours measured
the same."""

KEEP_BYTES = 8_192
"""A received frame of this size or more stays ZeroMQ's own object and is forwarded by reference: 2 us for
any size, while copying 8 KiB costs 4 us and 150 kB 70. Smaller frames share ZeroMQ's receive buffers of
8 KiB, and keeping one would hold the whole buffer."""

MAX_MESSAGE_BYTES = 256 << 20
"""A longer frame ends the connection: a faulty peer cannot exhaust the memory."""

HIGH_WATER_MARK = 10_000
"""Messages queued per peer before a send fails; credits and admission keep queues far below it."""

_PROBE_S = 1.0
"""For an answer from who listens at a path; the kernel gives it."""

# Plain integers: the enumerations' operators would cost more than the calls.
_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE_NOBLOCK = int(zmq.SNDMORE | zmq.NOBLOCK)

# The methods without pyzmq's wrappers, whose keyword handling costs as much again.
_send: Any = _Socket.send
_recv: Any = _Socket.recv
_get: Any = _Socket.get
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)


def bind_router(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: RouterKeys | None = None, domain: str = ""
) -> tuple[zmq.Socket[bytes], str]:
    """Bind a ROUTER at `endpoint` (tcp port * or 0 lets the system pick).

    Args:
        context: The ZeroMQ context; with keys, a ZAP handler must already be bound in it.
        endpoint: Where to bind.
        keys: With keys, only peers that the context's ZAP handler admits can connect.
        domain: Names the socket to the handler.

    Returns:
        The socket, and the endpoint that peers connect to.

    Raises:
        ConfigError: The endpoint is malformed or taken.
    """
    _check_free(endpoint)
    socket = context.socket(zmq.ROUTER)
    _set_common(socket)
    socket.set(zmq.ROUTER_MANDATORY, 1)  # a send to a peer that is gone fails, instead of being dropped
    if keys is not None:
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode("ascii"))
        socket.set(zmq.ZAP_DOMAIN, domain.encode("ascii"))
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a handler, refuse every peer instead of admitting all
    _speak_ipv6(socket, endpoint)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"bind {endpoint}: {error.strerror}") from error
    return socket, socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")


def _check_free(endpoint: str) -> None:
    """Refuse a path that another process listens at, or that is no socket: libzmq removes what is there.

    A client of the first would not hear from it again, and would not know why.
    """
    scheme, _, name = endpoint.partition("://")
    if scheme != "ipc" or not name or name.startswith("@") or name == "*":
        return  # the kernel keeps other addresses to one process
    path = Path(name)
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"bind {endpoint}: expected a socket or nothing at that path, got a file")
        with stdlib_socket.socket(stdlib_socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_S)
            probe.connect(name)
    except OSError:
        return  # nothing is there, or nobody any more
    raise ConfigError(f"bind {endpoint}: Address already in use")


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    keys: PeerKeys | None = None,
    prepare: Callable[[zmq.Socket[bytes]], None] | None = None,
) -> zmq.Socket[bytes]:
    """Connect a DEALER to a router's `endpoint`; ZeroMQ reconnects it, with back-off.

    With keys it talks only to the router with that key. ZeroMQ does not retry a refused handshake:
    `superserve.net.handshake` does. `prepare` is called with the socket before it connects.

    Raises:
        ConfigError: The endpoint is malformed.
    """
    socket = context.socket(zmq.DEALER)
    _set_common(socket)
    # Queue nothing for a router that is not there: stale work must not flood it when it returns.
    socket.set(zmq.IMMEDIATE, 1)
    # Milliseconds: soon at first, since a router restarts quickly; rarely if it stays away.
    socket.set(zmq.RECONNECT_IVL, 50)
    socket.set(zmq.RECONNECT_IVL_MAX, 2000)
    if keys is not None:
        socket.set(zmq.CURVE_SERVERKEY, keys.router.encode("ascii"))
        socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode("ascii"))
        socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode("ascii"))
    _speak_ipv6(socket, endpoint)
    if prepare is not None:
        prepare(socket)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"connect {endpoint!r}: expected tcp://HOST:PORT: {error.strerror}") from error
    return socket


def _speak_ipv6(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Allow IPv6 for an address in brackets only; names are still looked up as IPv4."""
    if endpoint.startswith("tcp://["):
        socket.set(zmq.IPV6, 1)


def _set_common(socket: zmq.Socket[bytes]) -> None:
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    # Milliseconds. Finds dead TCP peers; our own heartbeats show whether a role still works.
    socket.set(zmq.HEARTBEAT_IVL, 2000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, 10_000)


def is_local(endpoint: str) -> bool:
    """Return whether only this machine can reach a socket bound at `endpoint`."""
    scheme, colon, address = endpoint.partition("://")
    if scheme != "tcp":
        return scheme in ("ipc", "inproc") or not colon  # malformed: nothing binds there
    host = address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False  # a name or an interface: it may be anywhere


def is_own_host(endpoint: str) -> bool:
    """Return whether an endpoint that this process connects to is on this host, as far as its form shows."""
    if is_local(endpoint):
        return True
    host = endpoint.partition("://")[2].rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name may be anywhere, and looking it up may take seconds
    family = stdlib_socket.AF_INET6 if address.version == 6 else stdlib_socket.AF_INET
    with stdlib_socket.socket(family, stdlib_socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))  # the kernel binds only addresses of this host
        except OSError:
            return False
    return True


def is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Return whether a message has arrived; costs a sixth of a `receive` that finds none."""
    events: int = _get(socket, _EVENTS)
    return bool(events & _POLLIN)


def receive(
    socket: zmq.Socket[bytes], admits: Callable[[zmq.Frame], bool] | None = None
) -> list[Buffer] | None:
    """Return the frames of the next message without waiting, or None if there is none.

    Args:
        socket: Where to receive.
        admits: Called with the first frame. If it returns False, the message is discarded and the result
            is an empty list.

    From the third frame on, after a ROUTER's key and the header, frames of `KEEP_BYTES` or more are
    ZeroMQ's own objects: buffers that `send` forwards without copying, but that cannot be sliced. A second
    frame of that size is a view; smaller ones are copied, which is cheaper.

    Raises:
        WireError: More frames than any message has; the rest is discarded.
    """
    try:
        frame = _recv(socket, _NOBLOCK, False)
    except zmq.Again:
        return None
    if admits is not None and not admits(frame):
        while frame.more:  # a message is received whole: the next receive must begin a new one
            frame = _recv(socket, _NOBLOCK, False)
        return []
    frames: list[Buffer] = [frame.bytes]
    while frame.more:
        frame = _recv(socket, _NOBLOCK, False)
        if len(frames) > MAX_FRAMES + 1:
            while frame.more:
                frame = _recv(socket, _NOBLOCK, False)
            raise WireError(f"expected at most {MAX_FRAMES} frames")
        if len(frame) < KEEP_BYTES:
            frames.append(frame.bytes)
        else:
            frames.append(frame.buffer if len(frames) == 1 else frame)
    return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Buffer]) -> bool:
    """Send without waiting; False if the peer is gone, or its queue is full.

    A message is sent whole or not at all: only the first frame can be refused.
    """
    try:
        # Below its threshold, `ZERO_COPY_BYTES`, pyzmq copies in spite of copy=False, except for a frame
        # that was received as an object.
        if len(frames) == 2 and len(frames[1]) < KEEP_BYTES:  # the usual message of a ROUTER, without a loop
            _send(socket, frames[0], _SNDMORE_NOBLOCK, True)
            _send(socket, frames[1], _NOBLOCK, True)
            return True
        for frame in frames[:-1]:
            _send(socket, frame, _SNDMORE_NOBLOCK, len(frame) < KEEP_BYTES)
        frame = frames[-1]
        _send(socket, frame, _NOBLOCK, len(frame) < KEEP_BYTES)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH, errno.EHOSTUNREACH):
            return False
        raise
    return True


REST_NS = 500_000
"""A busy loop looks at its sockets at most this often. A pass with its wake-up and its messages costs
some 150 us even if it finds little to do, most of it on cold caches; messages that arrive meanwhile
share the next pass. An idle loop wakes for the first message at once."""

LONGEST_REST_NS = 1_000_000
"""A loop that is busy for more than a third of its time rests up to this: on a loaded machine clients and
workers need the processors too, and larger passes cost less per query."""

_LEAST_REST_NS = 60_000
"""The kernel's timer slack is about this: a shorter sleep is not worth its system call."""


def rest(began_ns: int) -> None:
    """Sleep from the end of a pass, which began at `began_ns`, until the next one is due."""
    now_ns = time.monotonic_ns()
    # Three times the pass: the loop is busy for a third of the time.
    period_ns = min(LONGEST_REST_NS, max(REST_NS, 3 * (now_ns - began_ns)))
    left_ns = began_ns + period_ns - now_ns
    if left_ns > _LEAST_REST_NS:
        time.sleep(left_ns / 1e9)


class Waiter:
    """Waits until a socket or file descriptor has something to read, or the time is up.

    ZeroMQ's own poll counts in whole milliseconds, which is long compared with a batch; select() on
    its file descriptors gives microseconds. These are edge-triggered: ask for the events before
    sleeping, and receive until nothing is left.

    Args:
        sockets: In the order in which `wait` reports them. Make them early: select() takes no
            descriptor above 1023.
        fds: Further file descriptors that end the wait.
    """

    __slots__ = ("_fds", "_pairs", "_sockets")

    def __init__(self, sockets: Sequence[zmq.Socket[bytes]], fds: Sequence[int] = ()) -> None:
        self._sockets = tuple(sockets)
        self._pairs = [(socket, int(zmq.POLLIN)) for socket in sockets]
        self._fds = [*(socket.fileno() for socket in sockets), *fds]

    def wait(self, timeout_ns: int | None) -> list[zmq.Socket[bytes]]:
        """Return the sockets that have something to read; none after a timeout."""
        events: list[tuple[Any, int]] = zmq_poll(self._pairs, 0)
        if not events and (timeout_ns is None or timeout_ns > 0):
            select.select(self._fds, (), (), None if timeout_ns is None else timeout_ns / 1e9)
            events = zmq_poll(self._pairs, 0)
        return [socket for socket, _ in events]


def wait(sockets: Sequence[zmq.Socket[bytes]], timeout_ns: int | None, fds: Sequence[int] = ()) -> None:
    """Wait once; see `Waiter`, which loops use."""
    Waiter(sockets, fds).wait(timeout_ns)
