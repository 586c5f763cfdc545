"""The common part of the router's two sides, clients and workers: one socket, its peers, and their keys.

A side drains its socket, decodes, keeps what the loop needs about each connection, and pings. `client_side`
and `worker_side` define what each message means.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, ClassVar

from router.core.estimates import TransitClock, WindowedMin
from router.serve.listed import ALONE, ready_gpus
from router.serve.memories import NO_READS, RouterMemories
from superserve import wire
from superserve.clock import MS
from superserve.errors import VersionError, WireError
from superserve.hello import RouterBrief
from superserve.net.sockets import bind_router, is_readable, receive, send
from superserve.wire import Control, Kind, Ping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import zmq

    from profiles.table import Profile
    from router.core import RouterCore
    from router.core.events import Event
    from router.report.flight import FlightRecorder
    from router.serve.gate import Door, Gate
    from router.serve.listed import Listed
    from router.serve.memories import ClientMemory
    from router.serve.recording import Recorder
    from superserve.hello import ModelSpec
    from superserve.net.keys import RouterKeys
    from superserve.status import RouterStatus
    from superserve.wire import Buffer, Message

log = logging.getLogger("router")

DRAIN_NS = 2 * MS
"""Longest time spent on one socket before the core decides: a flood must not delay what is due."""
_PINGS_AT_ONCE = 16
"""PINGs in one pass: a thousand clients that connected together must not stop the router every second."""
_RTT_WINDOW_NS = 10_000 * MS  # the least round trip within this counts: longer ones waited in buffers


class PeerConnection:
    """What a side knows about one peer: how far away it is, and when it last sent something."""

    __slots__ = (
        "heard_ns", "host", "life", "memory", "n_pongs", "one_way_ns", "pinged_ns", "reads", "rtts",
        "transit", "user", "version", "wire",
    )  # fmt: skip

    def __init__(self, now_ns: int, user: str = "") -> None:
        self.heard_ns = now_ns
        self.host = ""
        self.life = ""
        self.version = ""
        self.wire = wire.HIGHEST  # the version agreed on at its HELLO
        self.user = user  # the public key that it sent HELLO with, if the router has keys
        self.memory: ClientMemory | None = None  # that a client has offered
        self.reads = NO_READS  # which memories a worker reads
        self.n_pongs = 0
        self.one_way_ns = 0
        self.pinged_ns = 0
        self.transit = TransitClock()
        self.rtts = WindowedMin(_RTT_WINDOW_NS)


class Serving:
    """The state that both sides and the loop share.

    Args:
        core: The router's.
        policy: As given to `--policy`.
        recorder: Writes every event, for replay; None records nothing.
        status: Returns STATUS as of an instant.
        flight: The record of the last minutes; None keeps none.

    Attributes:
        epoch: This router's life, as clients see it.
        counts: Messages, loops and faults, by name.
        memories: The memories that clients share; none may unless the router is made so.
        listed: The cluster's routers, if there are several.
        n_gpus: GPUs that get work, as clients were told.
        gate: Checks both sides' peers; None without keys.
        model: What the workers serve; None before one has joined.
        reference: The profile of the first worker of that model.
        handle: Passes an event to the core, and to the recorder.
    """

    def __init__(
        self,
        core: RouterCore,
        policy: str,
        recorder: Recorder | None,
        status: Callable[[int], RouterStatus],
        flight: FlightRecorder | None = None,
    ) -> None:
        self.core = core
        self.policy = policy
        self.epoch = time.time_ns()
        self.counts: Counter[str] = Counter()
        self.memories = RouterMemories(self.counts, is_allowed=False)
        self.listed: Listed = ALONE
        self.n_gpus = 0
        self.gate: Gate | None = None
        self.model: ModelSpec | None = None
        self.reference: Profile | None = None
        self.status = status
        self.flight = flight
        self._recorder = recorder
        self.handle: Callable[[Event, int], None] = core.handle if recorder is None else self._recorded

    def brief(self, now_ns: int) -> RouterBrief:
        """Return what a worker needs to know to choose a router."""
        return RouterBrief(
            self.epoch, ready_gpus(self.core), self.core.draining, self.listed.workers or None,
            self.price(now_ns),
        )  # fmt: skip

    def price(self, now_ns: int) -> float | None:
        """Return what GPU time is worth here, for workers of other routers; None if there are none."""
        return self.core.price.at(now_ns) if len(self.listed.workers) > 1 else None

    def _recorded(self, event: Event, now_ns: int) -> None:
        assert self._recorder is not None, "without one, the core takes events itself"
        self._recorder.event(now_ns, event)
        self.core.handle(event, now_ns)


class RouterSide(ABC):
    """One socket and the peers on it.

    Args:
        serving: The state shared with the other side.
        ping_every_ns: How often each peer is pinged.

    Attributes:
        endpoint: Where peers connect, once bound.
        post: Sends a peer a message, by its routing id, without waiting; False if it cannot take it.
        connections: The peers that said HELLO, by routing id.
    """

    peer: ClassVar[str]
    """What to call a peer."""
    domain: ClassVar[str]
    """The list of keys that the gate compares with."""
    gone_ns: ClassVar[int | None] = None
    """Silence after which a peer is forgotten; None if the core judges that."""

    def __init__(self, serving: Serving, ping_every_ns: int) -> None:
        self.endpoint = ""
        self.connections: dict[bytes, PeerConnection] = {}
        self.socket: zmq.Socket[bytes]
        self.post: Callable[[bytes, Sequence[Buffer]], bool] = self._post
        self._serving = serving
        self._handle = serving.handle
        self._core = serving.core
        self._counts = serving.counts
        self._door: Door | None = None
        self._admits: Callable[[zmq.Frame], bool] | None = None
        self._entry = self._take
        self._ping_every_ns = ping_every_ns
        self._due: deque[tuple[int, bytes, PeerConnection]] = deque()  # the PINGs to send, by time

    # --- opening and closing --------------------------------------------------------------

    def bind(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: RouterKeys | None) -> None:
        """Bind the socket.

        Raises:
            ConfigError: The endpoint is malformed or taken.
        """
        self.socket, self.endpoint = bind_router(context, endpoint, keys, self.domain)

    def admit_only(self, door: Door) -> None:
        """Accept messages only from peers whose key the door lists."""
        self._door, self._admits, self._entry = door, door.admits, self._take_known

    def say_bye(self, reason: str) -> None:
        """Tell every peer that the router stops, and why."""
        goodbye = wire.encode_control(Control(Kind.BYE, {"reason": reason}))
        for key in self.connections:
            self.post(key, goodbye)

    def fileno(self) -> int:
        """Return the descriptor that wakes a loop: see `Waiter`."""
        return int(self.socket.fileno())

    def is_readable(self) -> bool:
        """Return whether something has arrived; without asking, the descriptor may stay silent."""
        return is_readable(self.socket)

    def discard(self) -> None:
        """Drop all that has arrived."""
        while self.is_readable():
            try:
                receive(self.socket)
            except WireError:
                continue  # too many frames

    def close(self, linger_ms: int) -> None:
        """Close the socket; wait at most this long for what was sent to leave this machine."""
        self.socket.close(linger=linger_ms)

    def _post(self, key: bytes, frames: Sequence[Buffer]) -> bool:
        return send(self.socket, [key, *frames])

    # --- receiving ------------------------------------------------------------------------

    def drain(self) -> int:
        """Handle messages that have arrived, for at most `DRAIN_NS`; return how many there were."""
        now_ns = time.monotonic_ns()
        end_ns = now_ns + DRAIN_NS
        n = 0
        socket = self.socket
        if not is_readable(socket):
            return 0
        take, admits = self._entry, self._admits
        while now_ns < end_ns:
            try:
                frames = receive(socket, admits)
                if frames is None:
                    return n
                if not frames:  # not admitted
                    now_ns = time.monotonic_ns()
                    continue
                n += 1
                key = bytes(frames[0])
                del frames[0]
                now_ns = time.monotonic_ns()
                take(key, frames, now_ns)
            except WireError as error:
                self._counts["malformed"] += 1
                log.warning("malformed message: %s", error)
        return n

    def _decode(self, key: bytes, frames: list[Buffer]) -> Message | None:
        """Return the message. If it is malformed: count it, tell its sender, and return None."""
        try:
            return wire.decode(frames)
        except VersionError as error:
            self._counts["wrong_version"] += 1
            log.warning("refused %s: %s", key.hex(), error)
            self.post(key, wire.encode_control(wire.refusal(error)))
            return None
        except WireError as error:
            self._counts["malformed"] += 1
            log.warning("malformed message from %s: %s", key.hex(), error)
            self.refuse(key, "malformed", str(error))
            return None

    @abstractmethod
    def _take(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        """Handle one message."""

    def _take_known(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        """Handle a message of a peer with a listed key; another peer may have used its routing id before."""
        assert self._door is not None, "only a router with keys calls this"
        connection = self.connections.get(key)
        if connection is not None and connection.user != self._door.user:
            self.lose(key, now_ns)
        self._take(key, frames, now_ns)

    def _control(self, key: bytes, message: Control, now_ns: int) -> None:
        """Handle a control message."""
        match message.kind:
            case Kind.HELLO:
                self._hello(key, message, now_ns)
            case Kind.BYE:
                self.forget(key, now_ns, orderly=True)
            case Kind.DRAIN:
                self._drain_asked(key, message, now_ns)
            case Kind.STATUS if message.body.get("brief") is True:
                answer = Control(Kind.STATUS, self._serving.brief(now_ns).body(), wire.agreed(message))
                self.post(key, wire.encode_control(answer))
            case Kind.STATUS:
                body = self._serving.status(now_ns).body()
                asked = message.body.get("flight")
                if isinstance(asked, dict):
                    body["flight"] = self._flown(asked, now_ns)
                answer = Control(Kind.STATUS, body, wire.agreed(message))
                self.post(key, wire.encode_control(answer))
            case Kind.SHARE if key in self.connections:
                self._shared(key, message)
            case _:
                name = message.kind.name
                self.refuse(key, "malformed", f"{name} is not a {self.peer}'s to send")

    def _flown(self, asked: dict[str, Any], now_ns: int) -> dict[str, Any] | None:
        """Return the part of the flight record that a peer asks for; None if the router keeps none."""
        flight = self._serving.flight
        return None if flight is None else flight.answer(self._core, asked, now_ns)

    @abstractmethod
    def _hello(self, key: bytes, message: Control, now_ns: int) -> None:
        """Handle a HELLO, and answer it."""

    @abstractmethod
    def _drain_asked(self, key: bytes, message: Control, now_ns: int) -> None:
        """Handle a DRAIN."""

    @abstractmethod
    def _shared(self, key: bytes, message: Control) -> None:
        """Handle a SHARE of a known peer."""

    # --- answering ------------------------------------------------------------------------

    def refuse(self, key: bytes, code: str, reason: str) -> None:
        """Tell a peer what is wrong with its message, or with itself."""
        refusal = Control(Kind.REFUSED, {"code": code, "reason": reason})
        self.post(key, wire.encode_control(refusal))

    # --- peers ----------------------------------------------------------------------------

    def _greet(self, key: bytes, version: int, now_ns: int) -> PeerConnection:
        """Register a peer after its HELLO, with the agreed wire version; ping it from now on."""
        user = "" if self._door is None else self._door.user
        self.connections[key] = connection = PeerConnection(now_ns, user)
        connection.wire = version
        self._due.append((now_ns + self._ping_every_ns, key, connection))
        return connection

    @abstractmethod
    def _left(self, key: bytes, *, orderly: bool) -> Event:
        """Return the event for a peer that has left."""

    def forget(self, key: bytes, now_ns: int, *, orderly: bool) -> None:
        """Drop a peer, if it is known; `orderly` if it sent BYE."""
        if self.connections.pop(key, None) is not None:
            self._handle(self._left(key, orderly=orderly), now_ns)

    def lose(self, key: bytes, now_ns: int) -> None:
        """Drop a peer that is silent, cannot be reached, or has been replaced."""
        self.forget(key, now_ns, orderly=False)

    def expel(self, now_ns: int) -> None:
        """Drop every peer whose key is not listed any more, and tell it."""
        assert self._door is not None, "only a router with keys calls this"
        for key, connection in list(self.connections.items()):
            if connection.user not in self._door.listed:
                log.warning("%s %s: its key was revoked", self.peer, key.hex())
                self.refuse(key, "revoked", "the router does not list this key any more")
                self.lose(key, now_ns)

    def next_ping_ns(self) -> int | None:
        """Return when the next PING is due."""
        return self._due[0][0] if self._due else None

    def ping_due(self, now_ns: int) -> None:
        """Send the PINGs that are due, a few in each pass; drop unreachable peers."""
        due = self._due
        for _ in range(_PINGS_AT_ONCE):
            if not due or due[0][0] > now_ns:
                return
            _, key, connection = due.popleft()
            if self.connections.get(key) is connection:  # otherwise it has left
                self._ping(key, connection, now_ns)

    def _ping(self, key: bytes, connection: PeerConnection, now_ns: int) -> None:
        connection.pinged_ns = now_ns
        # ROUTER_MANDATORY makes a send to a connection that is gone fail, so a PING also finds that out.
        is_reached = self.post(key, wire.encode_ping(Ping(now_ns)))
        if not is_reached or (self.gone_ns is not None and now_ns - connection.heard_ns > self.gone_ns):
            self.lose(key, now_ns)
        else:
            self._due.append((now_ns + self._ping_every_ns, key, connection))
