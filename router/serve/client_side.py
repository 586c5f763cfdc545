"""The router's client side: queries in, results out, and operators' requests."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from router.core.events import CancelAsked, ClientJoined, ClientLeft, DrainRouter, QueriesArrived
from router.serve.directives import frames_of, results_of
from router.serve.gate import CLIENT_DOMAIN
from router.serve.side import DRAIN_NS, RouterSide
from superserve import wire
from superserve.clock import MS
from superserve.errors import WireError
from superserve.hello import ClientHello, ClientWelcome
from superserve.net.stream import StreamRouter, speaks
from superserve.wire import Cancel, Control, Group, Kind, Ping, Pong, Queries, Results, Status
from superserve.wire.traceparent import unpacked

if TYPE_CHECKING:
    from collections.abc import Callable

    import zmq

    from router.core.events import Answer, Event
    from router.serve.side import PeerConnection, Serving
    from router.serve.worker_side import WorkerSide
    from superserve.net.keys import RouterKeys
    from superserve.wire import Buffer

log = logging.getLogger("router")

_PING_NS = 1_000 * MS  # the way to a client changes slowly, and with a thousand clients each PING costs
_GONE_NS = 10_000 * MS  # ten PINGs: a busy application may pause for seconds, and keeps its queries meanwhile
_NEAR_NS = 20 * MS  # a client that is near answers sooner, unless it is busy
_ENOUGH_PONGS = 3
"""A client that is busy just after it connected answers late. Until it has answered this often, a round
trip longer than `_NEAR_NS` counts as that, not as a distance that uses up the slack of its queries."""
_MAX_TRANSIT_NS = 60_000 * MS
"""Most time that a message counts as under way: the stamps are the peer's, and may be anything."""


class ClientSide(RouterSide):
    """The socket that clients connect to.

    Args:
        serving: The state shared with the other side.
        workers: The other side, for operators that drain a worker.
    """

    peer = "client"
    domain = CLIENT_DOMAIN
    gone_ns = _GONE_NS

    def __init__(self, serving: Serving, workers: WorkerSide) -> None:
        super().__init__(serving, _PING_NS)
        self._workers = workers
        self._stream: StreamRouter | None = None
        self._on: dict[Kind, Callable[[bytes, Any, int], None]] = {
            Kind.CANCEL: self._cancel,
            Kind.PONG: self.pong,
        }

    # --- the socket -----------------------------------------------------------------------

    def bind(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: RouterKeys | None) -> None:
        """Bind the socket: plain ones if they serve, since clients are many and their messages small.

        Raises:
            ConfigError: The endpoint is malformed or taken.
        """
        if keys is not None or not speaks(endpoint):
            super().bind(context, endpoint, keys)
            return
        self._stream = stream = StreamRouter(endpoint)
        self.endpoint, self.post = stream.endpoint, stream.send

    def unbind(self) -> None:
        """Close the plain sockets, if they serve: those of ZeroMQ end with their context."""
        if self._stream is not None:
            self._stream.close()

    def fileno(self) -> int:
        """Return the descriptor that wakes a loop."""
        return super().fileno() if self._stream is None else self._stream.fileno()

    def is_readable(self) -> bool:
        """Return whether something has arrived; of a stream, what its descriptor does not show."""
        return super().is_readable() if self._stream is None else self._stream.has_more()

    def discard(self) -> None:
        """Drop all that has arrived."""
        if self._stream is None:
            super().discard()
        else:
            while self._stream.receive() is not None:
                pass

    def close(self, linger_ms: int) -> None:
        """Close the socket; wait at most this long for what was sent to leave this machine."""
        if self._stream is None:
            super().close(linger_ms)
        else:
            self._stream.close(linger_ms)

    def drain(self) -> int:
        """Handle messages that have arrived, for at most `DRAIN_NS`; return how many there were."""
        stream = self._stream
        if stream is None:
            return super().drain()
        now_ns = time.monotonic_ns()
        stream.look(now_ns)
        end_ns, n, take = now_ns + DRAIN_NS, 0, self._take
        while now_ns < end_ns:
            found = stream.receive()
            if found is None:
                break
            n += len(found)
            for key, frames in found:
                now_ns = time.monotonic_ns()
                take(key, frames, now_ns)
            if not found:
                now_ns = time.monotonic_ns()
        return n

    # --- in -------------------------------------------------------------------------------

    def _take(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        message = self._decode(key, frames)
        if message is None:
            return
        connection = self.connections.get(key)
        if connection is not None:
            connection.heard_ns = now_ns
            if type(message) is Queries and key in self._core.clients:
                self._queries(key, connection, message, now_ns)
                return
        if isinstance(message, Control):
            self._control(key, message, now_ns)
        elif isinstance(message, Ping):
            self.post(key, wire.encode_pong(Pong(message.stamp_ns, now_ns)))
        elif connection is None or key not in self._core.clients:
            # Unknown, or its session moved to another connection, which made this one's HELLO void.
            self.connections.pop(key, None)
            self.refuse(key, "say-hello", "the router has no HELLO from you: send one")
        else:
            handler = self._on.get(message.kind)
            if handler is None:
                self.refuse(key, "malformed", f"{message.kind.name} is not a client's")
            else:
                handler(key, message, now_ns)

    def _queries(self, key: bytes, connection: PeerConnection, queries: Queries, now_ns: int) -> None:
        if queries.shared is not None and not self._find(key, connection, queries):
            return
        if queries.traced is not None:
            self._note_traces(key, queries)
        transit_ns = connection.one_way_ns + connection.transit.excess_ns(queries.sent_ns, now_ns)
        self._handle(QueriesArrived(key, queries, min(transit_ns, _MAX_TRANSIT_NS)), now_ns)

    def _note_traces(self, key: bytes, queries: Queries) -> None:
        """Record which of a message's queries belong to a caller's trace."""
        assert queries.traced is not None, "only then is it called"
        flight, serial, ids = self._serving.flight, self._core.clients[key].serial, wire.uint64s(queries.ids)
        for i, context in wire.TRACED.iter_unpack(queries.traced):
            if not unpacked(context).is_valid:
                self._counts["ignored_traceparents"] += 1
            elif flight is not None:
                flight.trace(serial, ids[i], context)

    def _flown(self, asked: dict[str, Any], now_ns: int) -> dict[str, Any] | None:
        """With keys, only operators read the record: it has every client's queries."""
        gate = self._serving.gate
        if gate is not None and gate.clients.user not in gate.operators:
            return {"refused": "flight record: expected an operator's key", "since": asked.get("since")}
        return super()._flown(asked, now_ns)

    def _find(self, key: bytes, connection: PeerConnection, queries: Queries) -> bool:
        """Find the memory with a message's payloads; if that fails, its queries end here."""
        try:
            self._serving.memories.find(queries, connection.memory)
        except WireError as error:
            log.warning("client %s: %s", key.hex(), error)
            reason, n = str(error).encode(), queries.n
            group = Group(n, Status.INVALID, 0, 0, 0.0, 0, 0, 0, 0, queries.ids, 0, reason)
            self.post(key, wire.encode_results(Results(self._serving.epoch, [group])))
            return False
        return True

    def _shared(self, key: bytes, message: Control) -> None:
        try:
            memory, answer = self._serving.memories.opened(message.body)
        except WireError as error:
            self.refuse(key, "malformed", str(error))
            return
        self.connections[key].memory = memory
        self.post(key, wire.encode_control(Control(Kind.SHARE, answer.body())))

    def _cancel(self, key: bytes, message: Cancel, now_ns: int) -> None:
        self._handle(CancelAsked(key, message), now_ns)

    def pong(self, key: bytes, pong: Pong, now_ns: int) -> None:
        """Handle a known client's answer to a PING: it shows how far away the client is."""
        connection = self.connections[key]
        if pong.stamp_ns != connection.pinged_ns:
            return  # of an older PING: it was unread for a while, which says nothing about the distance
        connection.n_pongs += 1
        rtt_ns = connection.rtts.add(max(0, now_ns - pong.stamp_ns), now_ns)
        is_likely = rtt_ns <= _NEAR_NS or connection.n_pongs >= _ENOUGH_PONGS
        connection.one_way_ns = rtt_ns // 2 if is_likely else 0

    # --- control --------------------------------------------------------------------------

    def _hello(self, key: bytes, message: Control, now_ns: int) -> None:
        try:
            hello = ClientHello.from_body(message.body)
        except WireError as error:
            self.refuse(key, "malformed", str(error))
            return
        connection = self._greet(key, wire.agreed(message), now_ns)
        self._handle(ClientJoined(key, hello.session), now_ns)
        self._welcome(key)
        # At once, not with the next round of PINGs: the way to this client matters from its first query on.
        connection.pinged_ns = time.monotonic_ns()
        self.post(key, wire.encode_ping(Ping(connection.pinged_ns)))

    def _welcome(self, key: bytes) -> None:
        serving = self._serving
        rows = () if serving.reference is None else serving.reference.subnets
        version = self.connections[key].wire
        subnets = tuple((row.name, row.accuracy) for row in rows)
        takes = serving.memories.is_allowed or None
        routers = serving.listed.clients or None
        n_gpus = None if routers is None else serving.n_gpus
        welcome = ClientWelcome(
            serving.epoch, serving.model, subnets, serving.policy, version, takes, routers, n_gpus
        )
        self.post(key, wire.encode_control(Control(Kind.WELCOME, welcome.body(), version)))

    def welcome_all(self) -> None:
        """Send WELCOME to every client again: the model has changed."""
        for key in self.connections:
            self._welcome(key)

    def _left(self, key: bytes, *, orderly: bool) -> Event:
        del orderly  # its queries end either way
        return ClientLeft(key)

    def _drain_asked(self, key: bytes, message: Control, now_ns: int) -> None:
        """Drain the worker process named in `worker`, or the whole router without a name."""
        gate = self._serving.gate
        if gate is not None and gate.clients.user not in gate.operators:
            self.refuse(key, "not-an-operator", "drain: expected an operator's key")
            return
        name = message.body.get("worker")
        if name is None:
            self.begin_drain(now_ns)
        elif not self._workers.order_drain(name, now_ns):
            known = (
                ", ".join(sorted(peer.name for peer in self._core.peers.values() if not peer.is_guest))
                or "none"
            )
            self.refuse(key, "unknown-worker", f"worker {name!r}: known are: {known}")

    def begin_drain(self, now_ns: int) -> None:
        """Take no new queries from now on, and tell clients, which may know another router."""
        self._handle(DrainRouter(), now_ns)
        notice = wire.encode_control(Control(Kind.DRAIN, {}))
        for key in self.connections:
            self.post(key, notice)

    # --- out ------------------------------------------------------------------------------

    def send_results(self, client: bytes, answers: list[Answer]) -> None:
        """Send a client its answers; if it does not take them, count them and drop the client."""
        epoch = self._serving.epoch
        if len(answers) == 1:
            if not self.post(client, frames_of(epoch, answers[0])):
                self._drop_results(client, answers[0].n)
            return
        for results in results_of(epoch, answers):
            if not self.post(client, wire.encode_results(results)):
                self._drop_results(client, sum(group.count for group in results.groups))
                return

    def _drop_results(self, client: bytes, n: int) -> None:
        """Drop a client that is gone or does not read: its queries must cost no more GPU time."""
        self._counts["results_dropped"] += n
        self.lose(client, time.monotonic_ns())
