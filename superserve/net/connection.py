"""One connection to a router: HELLO, heartbeats, and messages in bulk. No thread of its own.

Whoever owns it, a client's I/O thread or a load generator's sender, calls `tick` now and
then, `send_queries` with whole columns, and `receive` until it yields nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import time
from typing import TYPE_CHECKING, Any

import zmq

from superserve import wire
from superserve.errors import ConfigError, VersionError, WireError
from superserve.hello import ClientHello, ClientWelcome
from superserve.net.context import check_descriptors, new_context
from superserve.net.handshake import Handshake
from superserve.net.keys import peer_keys
from superserve.net.sockets import receive, send
from superserve.status import RouterStatus
from superserve.wire import Cancel, Control, Kind, Ping, Pong, Queries, Results

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from superserve.hello import ModelSpec
    from superserve.net.keys import PeerKeys

log = logging.getLogger("superserve")

MS = 1_000_000
HELLO_EVERY_NS = 100 * MS
HELLO_EVERY_AT_MOST_NS = 1_000 * MS
"""While nobody answers, HELLO is said ever less often up to this: a thousand clients must not stampede."""
PING_EVERY_NS = 1_000 * MS
SILENT_NS = 3_000 * MS
"""A router that has not answered three PINGs is taken for gone; HELLO finds the next one."""

_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)
_EVENTS = int(zmq.EVENTS)


class Connection:
    """A DEALER that knows the protocol; for one thread.

    Args:
        endpoint: The router's client endpoint.
        context: Whose socket it is.
        keys: What it shows the router; None for a router without keys.

    Attributes:
        epoch: The router's, once it said WELCOME; None before, and after it fell silent.
        model: What WELCOME said of the model's input and output; None if no worker has joined.
        subnets: Name and accuracy (percent) of each row of the profile.
        n_welcomes: How often `epoch` became another one: whoever counts along misses no new router.
        heard_ns: When the router last said anything.
        refusals: What the router objected to, latest last; at most 16.
        n_malformed: Messages that could not be decoded.
        mismatch: The router speaks none of our wire versions; None again once one welcomes us.
        status: The latest answer to a STATUS, or why it could not be read; None before one came.
    """

    def __init__(
        self, endpoint: str, context: zmq.Context[zmq.Socket[bytes]], keys: PeerKeys | None = None
    ) -> None:
        self.endpoint = endpoint
        self.session = secrets.randbits(62)
        self.epoch: int | None = None
        self.model: ModelSpec | None = None
        self.subnets: list[tuple[str, float]] = []
        self.refusals: list[str] = []
        self.said_bye = False
        self.n_malformed = 0
        self.mismatch: VersionError | None = None
        self.status: RouterStatus | WireError | None = None
        self.n_welcomes = 0
        self.heard_ns = 0
        self._hello_ns = 0
        self._hello_wait_ns = 0
        self._hello_every_ns = HELLO_EVERY_NS
        self._ping_ns = 0
        self._is_connected = False
        self._seen = 0
        self._has_sent = True
        self._handshake = Handshake(context, endpoint, keys)
        self.socket = self._handshake.socket

    @property
    def absence(self) -> str:
        """Why no router answers, as far as is known, and what to do."""
        if self.mismatch is not None:
            return f"{self.endpoint}: {self.mismatch}"
        if self._handshake.failure is None and self.epoch is None and self.n_welcomes == 0 and self.refusals:
            return f"{self.endpoint} refused this client: {self.refusals[-1]}"
        return self._handshake.failure or no_router(self.endpoint)

    def close(self) -> None:
        """Say BYE if anybody listens, and close the socket."""
        with contextlib.suppress(zmq.ZMQError):  # of no use any more: the context was terminated
            self._handshake.close()
            if self.epoch is not None:
                send(self.socket, wire.encode_control(Control(Kind.BYE)))
        self.socket.close(linger=100)  # `Context.term` waits for this

    def tick(self, now_ns: int) -> None:
        """Say HELLO while nobody has welcomed us, and PING now and then."""
        if self.epoch is not None:
            if now_ns - self.heard_ns > SILENT_NS:
                self.epoch = None
            elif now_ns - self._ping_ns >= PING_EVERY_NS:
                self.ping(now_ns)
        if self.epoch is None and now_ns - self._hello_ns >= self._hello_wait_ns:
            self._hello(now_ns)
        if self.epoch is None and self._handshake.look(now_ns):
            log.warning("%s", self.absence)
            self._has_sent = True  # what the socket can do has changed

    def _hello(self, now_ns: int) -> None:
        hello = Control(Kind.HELLO, ClientHello(session=self.session, wire=wire.OURS).body(), wire.LOWEST)
        if self._send(wire.encode_control(hello)):
            self._hello_ns = now_ns
            self._hello_wait_ns = int(self._hello_every_ns * random.uniform(0.75, 1.25))
            self._hello_every_ns = min(2 * self._hello_every_ns, HELLO_EVERY_AT_MOST_NS)

    def ping(self, now_ns: int) -> None:
        """Ask whether the router is there; any answer moves `heard_ns`."""
        self._ping_ns = now_ns
        self._send(wire.encode_ping(Ping(now_ns)))

    def look(self) -> None:
        """Take a router whose connection was found broken for gone, and greet one as it appears.

        ZeroMQ tells nobody that a connection broke. But with IMMEDIATE a DEALER has no pipe without a
        connection, and what has no pipe cannot be written to; its file descriptor wakes for that too.
        """
        is_connected = bool(self._seen & _POLLOUT)
        if is_connected and not self._is_connected:
            self._hello_wait_ns, self._hello_every_ns = 0, HELLO_EVERY_NS
        elif not is_connected and self.epoch is not None:
            self.lose()
        self._is_connected = is_connected

    def is_readable(self) -> bool:
        """Tell whether something has come that the socket's descriptor will not tell of.

        It tells of changes only, and every call on the socket takes in those that it meets. What
        `receive` saw last still holds, unless something was sent since.
        """
        return bool((self._look_up() if self._has_sent else self._seen) & _POLLIN)

    def _look_up(self) -> int:
        self._has_sent = False
        self._seen = int(self.socket.getsockopt(_EVENTS))
        return self._seen

    def _send(self, frames: list[wire.Buffer]) -> bool:
        self._has_sent = True
        return send(self.socket, frames)

    def next_tick_ns(self) -> int:
        """Return when `tick` has something to do."""
        if self.epoch is not None:
            return min(self._ping_ns + PING_EVERY_NS, self.heard_ns + SILENT_NS + MS)
        if self._is_connected:
            return self._hello_ns + self._hello_wait_ns
        return time.monotonic_ns() + HELLO_EVERY_NS

    def lose(self) -> None:
        """Take the router for gone: say HELLO soon, and send nothing until a WELCOME."""
        self.epoch = None

    def send_queries(self, queries: Queries) -> bool:
        """Send; False if the router is not there or takes no more just now."""
        return self._send(wire.encode_queries(queries))

    def send_cancel(self, n: int, ids: bytes) -> bool:
        """Ask the router to forget queries; ids as u64 bytes."""
        return self._send(wire.encode_cancel(Cancel(self.epoch or 0, n, ids)))

    def send_control(self, kind: Kind, body: dict[str, Any] | None = None) -> bool:
        """Send a STATUS question or a DRAIN."""
        return self._send(wire.encode_control(Control(kind, body or {})))

    def receive(self) -> Iterator[Results]:
        """Yield every RESULTS that has arrived; everything else is dealt with here."""
        while self._look_up() & _POLLIN:  # cheaper than to receive until that fails
            try:
                frames = receive(self.socket)
                if frames is None:
                    return
                message = wire.decode(frames)
                self.heard_ns = time.monotonic_ns()
                if isinstance(message, Ping):
                    self._send(wire.encode_pong(Pong(message.stamp_ns, time.monotonic_ns())))
                elif isinstance(message, Control):
                    self._control(message)
            except WireError as error:
                self.n_malformed += 1
                log.warning("malformed message from %s: %s", self.endpoint, error)
                continue
            if isinstance(message, Results):
                yield message

    def _control(self, message: Control) -> None:
        body = message.body
        refused = wire.version_refused(message)
        if refused is not None:
            self._mismatched(refused)
        elif message.kind is Kind.WELCOME:
            self._welcomed(ClientWelcome.from_body(body))
        elif message.kind is Kind.REFUSED:
            reason = str(body.get("reason"))
            is_new = reason not in self.refusals
            self.refusals = [*self.refusals[-15:], reason]
            if body.get("code") == "say-hello":
                self.lose()
            elif body.get("code") == "revoked":
                self._handshake.failure = f"{self.endpoint}: {body.get('reason')}"
                log.warning("%s", self.absence)
                self.lose()
            elif is_new:  # it is said again with each HELLO
                log.warning("%s refused a message: %s", self.endpoint, reason)
        elif message.kind is Kind.BYE:
            self.epoch, self.said_bye = None, True
        elif message.kind is Kind.STATUS:
            try:
                self.status = RouterStatus.from_body(body)
            except WireError as error:
                self.status = error
                raise

    def _welcomed(self, welcome: ClientWelcome) -> None:
        self.n_welcomes += self.epoch != welcome.epoch
        self._handshake.succeeded()
        self.mismatch = None
        self.epoch = welcome.epoch
        self._ping_ns = self.heard_ns
        self._hello_every_ns = HELLO_EVERY_NS
        self.said_bye = False
        self.model = welcome.model
        self.subnets = list(welcome.subnets)

    def _mismatched(self, error: VersionError) -> None:
        """Note that this router speaks none of our versions; HELLO goes on, since it may be replaced."""
        is_new = self.mismatch is None
        self.mismatch = error
        self.lose()
        if is_new:
            log.warning("%s", self.absence)


def ask_status(
    endpoint: str, timeout_s: float = 2.0, keys: str | os.PathLike[str] | None = None
) -> RouterStatus:
    """Ask the router at `endpoint` for its STATUS.

    Args:
        endpoint: The router's client endpoint.
        timeout_s: How long to wait for the answer.
        keys: As for `Client`.

    Raises:
        ConfigError: Nothing answers within `timeout_s`, or speaks none of our wire versions; or the key file
            is not what it should be.
        WireError: What it answers lacks a field, or has another type there; names both.
    """
    own = peer_keys(keys)
    check_descriptors("asking a router for its status")
    with new_context() as context:
        connection = Connection(endpoint, context, own)
        try:
            deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
            while connection.status is None and (now_ns := time.monotonic_ns()) < deadline_ns:
                connection.tick(now_ns)
                if connection.epoch is not None:
                    connection.send_control(Kind.STATUS, {"wire": wire.OURS})
                connection.socket.poll(50)
                for _ in connection.receive():
                    pass
                if connection.mismatch is not None:
                    break
        finally:
            connection.close()
    if connection.status is None:
        raise ConfigError(connection.absence)
    if isinstance(connection.status, WireError):
        raise WireError(f"{endpoint}: {connection.status}; is it of another version?")
    return connection.status


def no_router(endpoint: str) -> str:
    """Say that nobody answers at `endpoint`, and what to type."""
    return f"no router answers at {endpoint}: start one with `python -m router`, or check host and port"
