"""One connection to a router: HELLO, heartbeats, and messages in bulk. It has no thread.

Its owner, a client's I/O thread or a load generator's sender, calls `tick` now and then,
`send_queries` with whole columns, and `receive` until it yields nothing more.
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
from superserve.clock import MS
from superserve.errors import NoRouterError, VersionError, WireError
from superserve.hello import ClientHello, ClientWelcome
from superserve.net.context import check_descriptors, new_context
from superserve.net.endpoints import endpoints_of
from superserve.net.handshake import Handshake
from superserve.net.keys import peer_keys
from superserve.net.sockets import is_own_host, receive, send
from superserve.shared.offers import MemoryAnswer, is_allowed
from superserve.shared.placing import SHARED_BYTES, PayloadPlacing
from superserve.status import RouterStatus
from superserve.whole import whole_of
from superserve.wire import Cancel, Control, Kind, Ping, Pong, Queries, Results

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from superserve.hello import ModelSpec
    from superserve.net.keys import PeerKeys

log = logging.getLogger("superserve")

HELLO_EVERY_NS = 100 * MS
"""Time between the first two HELLOs; it doubles with each one that gets no answer."""
HELLO_EVERY_AT_MOST_NS = 1_000 * MS
"""Longest time between two HELLOs: without back-off a thousand clients would flood a router that returns."""
PING_EVERY_NS = 1_000 * MS  # often enough to notice in SILENT_NS that the router has gone
SILENT_NS = 3_000 * MS
"""A router that has not answered three PINGs counts as gone; HELLO finds the next one."""

_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)
_EVENTS = int(zmq.EVENTS)


class Connection:
    """A DEALER that knows the protocol; for one thread.

    Args:
        endpoint: The router's client endpoint.
        context: The ZeroMQ context to make the socket in.
        keys: The client's keys; None for a router without keys.
        shared_memory: Whether large payloads may go through memory shared with a router on this host; None
            asks the environment; see `superserve.shared`.

    Attributes:
        placing: Which payloads go through shared memory.
        epoch: The router's, after its WELCOME; None before, and after it fell silent.
        model: The model's input and output, from WELCOME; None if no worker has joined.
        subnets: Name and accuracy (percent) of each row of the profile.
        routers: The client endpoints of all routers, from WELCOME; empty if there is one.
        gpus: GPUs that get work at this router, from WELCOME; None if it did not say.
        is_draining: The router takes no new queries.
        n_welcomes: How often `epoch` changed: compare it to notice that the router is another one, even if
            the old one was never missed.
        heard_ns: When the last message of the router arrived.
        refusals: Reasons of the router's REFUSED messages, latest last; at most 16.
        n_malformed: Messages that could not be decoded.
        mismatch: Set while the router speaks none of our wire versions; None after a WELCOME.
        status: The latest answer to a STATUS, or why it could not be read; None before the first.
        flight: The part of the flight record that came with it; None if none was asked for, or is kept.
    """

    def __init__(
        self,
        endpoint: str,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: PeerKeys | None = None,
        *,
        shared_memory: bool | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.placing = PayloadPlacing(is_possible=is_allowed(shared_memory) and is_own_host(endpoint))
        self.session = secrets.randbits(62)
        self.epoch: int | None = None
        self.model: ModelSpec | None = None
        self.subnets: list[tuple[str, float]] = []
        self.routers: tuple[str, ...] = ()
        self.gpus: int | None = None
        self.is_draining = False
        self.refusals: list[str] = []
        self.n_malformed = 0
        self.mismatch: VersionError | None = None
        self.status: RouterStatus | WireError | None = None
        self.flight: dict[str, Any] | None = None
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
        """Why no router answers, as far as known, and what to do."""
        if self.mismatch is not None:
            return f"{self.endpoint}: {self.mismatch}"
        if self._handshake.failure is None and self.epoch is None and self.n_welcomes == 0 and self.refusals:
            return f"{self.endpoint} refused this client: {self.refusals[-1]}"
        return self._handshake.failure or no_router(self.endpoint)

    def close(self) -> None:
        """Send BYE if a router is there, and close the socket."""
        with contextlib.suppress(zmq.ZMQError):  # the context was terminated: the socket sends nothing more
            self._handshake.close()
            if self.epoch is not None:
                send(self.socket, wire.encode_control(Control(Kind.BYE)))
        self.placing.close()
        # Milliseconds for the BYE to leave; `Context.term` waits for it, so no longer than that.
        self.socket.close(linger=100)

    def tick(self, now_ns: int) -> None:
        """Send HELLO until a router answers WELCOME, and PING now and then."""
        if self.epoch is not None:
            if now_ns - self.heard_ns > SILENT_NS:
                self.epoch = None
            elif now_ns - self._ping_ns >= PING_EVERY_NS:
                self.ping(now_ns)
        if self.epoch is None and now_ns - self._hello_ns >= self._hello_wait_ns:
            self._hello(now_ns)
        if self.epoch is None and self._handshake.look(now_ns):
            log.warning("%s", self.absence)
            self._has_sent = True  # the socket was connected again: its events must be asked for

    def _hello(self, now_ns: int) -> None:
        hello = Control(Kind.HELLO, ClientHello(session=self.session, wire=wire.OURS).body(), wire.LOWEST)
        if self._send(wire.encode_control(hello)):
            self._hello_ns = now_ns
            # Jitter: clients that lost the same router at once must not greet the next one in step.
            self._hello_wait_ns = int(self._hello_every_ns * random.uniform(0.75, 1.25))
            self._hello_every_ns = min(2 * self._hello_every_ns, HELLO_EVERY_AT_MOST_NS)

    def ping(self, now_ns: int) -> None:
        """Ask whether the router is there; any answer updates `heard_ns`."""
        self._ping_ns = now_ns
        self._send(wire.encode_ping(Ping(now_ns)))

    def look(self) -> None:
        """Notice that the connection broke, or that there is a new one; on a new one send HELLO at once.

        ZeroMQ does not report a broken connection. But with IMMEDIATE a DEALER has a pipe only while it is
        connected, and is writable only with a pipe; its file descriptor also wakes for that change.
        """
        is_connected = bool(self._seen & _POLLOUT)
        if is_connected and not self._is_connected:
            self._hello_wait_ns, self._hello_every_ns = 0, HELLO_EVERY_NS
        elif not is_connected and self.epoch is not None:
            self.lose()
        self._is_connected = is_connected

    def is_readable(self) -> bool:
        """Return whether a message has arrived that the socket's descriptor will not wake for.

        The descriptor is edge-triggered, and every call on the socket may consume an edge. What `receive`
        saw last is still true unless something was sent since.
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
        """Treat the router as gone: send HELLO soon, and no queries until a WELCOME."""
        self.epoch = None

    def send_queries(self, queries: Queries) -> bool:
        """Send; False if the router is gone or its queue is full."""
        if queries.payload_bytes >= SHARED_BYTES:
            return self._send_large(queries)
        return self._send(wire.encode_queries(queries))

    def _send_large(self, queries: Queries) -> bool:
        """Send queries with large payloads: what fits into the shared memory goes there."""
        placing = self.placing
        if not placing.takes(queries):
            return self._send(wire.encode_queries(queries))
        offer = placing.offer()
        if offer is not None:
            self._send(wire.encode_control(Control(Kind.SHARE, offer.body())))
        parts = placing.placed(queries, time.monotonic_ns())
        for i, part in enumerate(parts):
            if not self._send(wire.encode_queries(part)):
                for unsent in parts[i:]:
                    placing.unsent(unsent)
                return False
        return True

    def send_cancel(self, n: int, ids: bytes) -> bool:
        """Ask the router to forget queries; ids as u64 bytes."""
        return self._send(wire.encode_cancel(Cancel(self.epoch or 0, n, ids)))

    def send_control(self, kind: Kind, body: dict[str, Any] | None = None) -> bool:
        """Send a STATUS question or a DRAIN."""
        return self._send(wire.encode_control(Control(kind, body or {})))

    def receive(self) -> Iterator[Results]:
        """Yield every RESULTS that has arrived; all other messages are handled here."""
        while self._look_up() & _POLLIN:  # cheaper than receiving until that fails
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
                self.placing.ended(message)  # not after the yield: the caller may stop here
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
            self.epoch = None
        elif message.kind is Kind.DRAIN:
            self.is_draining = True
        elif message.kind is Kind.SHARE:
            self.placing.answered(MemoryAnswer.from_body(body))
        elif message.kind is Kind.STATUS:
            flight = body.pop("flight", None)
            self.flight = flight if isinstance(flight, dict) else None
            try:
                self.status = RouterStatus.from_body(body)
            except WireError as error:
                self.status = error
                raise

    def _welcomed(self, welcome: ClientWelcome) -> None:
        if self.epoch != welcome.epoch:
            self.n_welcomes += 1
            self.is_draining = False
            self.placing.welcomed(is_asked_for=bool(welcome.shared))
        self._handshake.succeeded()
        self.mismatch = None
        self.epoch = welcome.epoch
        self._ping_ns = self.heard_ns
        self._hello_every_ns = HELLO_EVERY_NS
        self.model = welcome.model
        self.subnets = list(welcome.subnets)
        self.routers, self.gpus = welcome.routers or (), welcome.gpus

    def _mismatched(self, error: VersionError) -> None:
        """Record that this router shares no version with us; HELLO goes on, since it may be replaced."""
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
        endpoint: The router's client endpoint; of several, separated by commas, the whole is returned.
        timeout_s: How long to wait for the answer.
        keys: As for `Client`.

    Raises:
        NoRouterError: No router answers within `timeout_s`, or it shares no wire version with us.
        ConfigError: The key file is malformed, or this process may open no more files or threads.
        WireError: A field of the answer is missing or has another type; the error names it.
    """
    endpoints = endpoints_of(endpoint)
    if len(endpoints) > 1:
        return _ask_all(endpoints, timeout_s, keys)
    (endpoint,) = endpoints
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
                connection.socket.poll(50)  # ms; then HELLO and STATUS are due again
                for _ in connection.receive():
                    pass
                if connection.mismatch is not None:
                    break
        finally:
            connection.close()
    if connection.status is None:
        raise NoRouterError(connection.absence)
    if isinstance(connection.status, WireError):
        raise WireError(f"{endpoint}: {connection.status}; is it of another version?")
    return connection.status


def _ask_all(
    endpoints: tuple[str, ...], timeout_s: float, keys: str | os.PathLike[str] | None
) -> RouterStatus:
    """Ask several routers, and return the whole of those that answer; NoRouterError if none does."""
    found: list[tuple[str, RouterStatus | None]] = []
    reasons: list[str] = []
    for endpoint in endpoints:
        try:
            found.append((endpoint, ask_status(endpoint, timeout_s, keys)))
        except NoRouterError as error:
            found.append((endpoint, None))
            reasons.append(str(error))
    if len(reasons) == len(endpoints):
        raise NoRouterError("; ".join(reasons))
    return whole_of(found)


def no_router(endpoint: str) -> str:
    """Return the message for an endpoint where no router answers: what to type."""
    return f"no router answers at {endpoint}: start one with `python -m router`, or check host and port"
