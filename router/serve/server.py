"""The sockets and the poll loop around RouterCore.

One thread, one loop: wait, drain both sockets, let the core decide once, carry out what
it says. Messages become events here and actions become messages; nothing is decided here.
No send ever blocks: what a peer cannot take at once is counted, and costs that peer its place.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import operator
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq

from profiles.table import Profile
from router.core import RouterCore
from router.core.estimates import TransitClock, WindowedMin
from router.core.events import (
    Answer,
    CancelAsked,
    ClientJoined,
    ClientLeft,
    Dispatch,
    DrainRouter,
    DrainWorker,
    Fence,
    Finished,
    Pulled,
    QueriesArrived,
    Released,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.core.state import CoreSettings
from router.core.workers import TransitionError
from router.policies.registry import make_policy
from router.report.load import Load
from router.report.status import status_of_server
from router.serve.directives import directive_of, group_of, results_of
from router.serve.doors import Doors
from router.serve.gate import CLIENT_DOMAIN, WORKER_DOMAIN, Gate, check_reach
from router.serve.lives import check_name, life_of
from superserve import wire
from superserve.errors import ConfigError, SuperServeError, WireError
from superserve.net.sockets import Waiter, bind_router, is_readable, receive, rest, send
from superserve.subnet import TensorSpec
from superserve.wire import Cancel, Control, Done, Kind, Ping, Pong, Pull, Queries

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from router.core.events import Action, Event
    from router.report.metrics import RouterMetrics
    from router.serve.recording import Recorder
    from superserve.wire import Buffer, Message

log = logging.getLogger("router")

MS = 1_000_000
_DRAIN_NS = 2 * MS
"""Longest time spent on one socket before the core decides: a flood must not delay what is due."""
_GOODBYE_MS = 1_000
"""How long a stopping router waits for its last answers and BYEs to leave this machine, at most."""
_MAX_PROFILES = 256
"""Distinct profiles that workers may bring: each costs a policy's tables."""
_PINGS_AT_ONCE = 16
"""PINGs in one pass: a thousand clients that came together shall not stop the router every second."""
_COLLECT_NS = 100 * MS
_CLIENT_PING_NS = 1_000 * MS
_CLIENT_GONE_NS = 10_000 * MS
_NEAR_NS = 20 * MS
_ENOUGH_PONGS = 3
"""A client that is busy when it has just connected answers late: until it has answered so often, a round
trip longer than `_NEAR_NS` is taken for that, and not for a way that eats the slack of its queries."""
_RTT_WINDOW_NS = 10_000 * MS
_MAX_TRANSIT_NS = 60_000 * MS
"""What a message may claim to have been under way: stamps are the peer's, and may be anything."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the router listens and which policy it runs.

    Attributes:
        client_endpoint: Where clients connect; tcp port 0 or * lets the system pick.
        worker_endpoint: Where workers connect.
        policy: As `router.policies.registry.make_policy` takes it.
        drain_timeout_ns: How long a SIGTERM waits for queued queries.
        keys: The folder of keys; see `superserve.net.keys`. Without, anybody who reaches a socket is served.
        is_open: Without keys, other machines may reach the sockets all the same.
    """

    client_endpoint: str = "tcp://127.0.0.1:*"
    worker_endpoint: str = "tcp://127.0.0.1:*"
    policy: str = "demandfit"
    core: CoreSettings = field(default_factory=CoreSettings)
    drain_timeout_ns: int = 5_000 * MS
    keys: Path | None = None
    is_open: bool = False


class PeerConnection:
    """What the server keeps of one peer: how far away it is, and when it last spoke."""

    __slots__ = (
        "heard_ns", "host", "life", "n_pongs", "one_way_ns", "pinged_ns", "rtts", "transit", "user", "version"
    )  # fmt: skip

    def __init__(self, now_ns: int, user: str = "") -> None:
        self.heard_ns = now_ns
        self.host = ""
        self.life = ""
        self.version = ""
        self.user = user  # the public key that it said HELLO with, if the router has keys
        self.n_pongs = 0
        self.one_way_ns = 0
        self.pinged_ns = 0
        self.transit = TransitClock()
        self.rtts = WindowedMin(_RTT_WINDOW_NS)


class RouterServer:
    """The live router. `open()` binds, `run()` serves until `stop()`, then closes.

    Args:
        settings: Where to listen and what to run.
        recorder: Writes every event and directive, for replay; None records nothing.
        metrics: Is told what was done, and hands it to whoever asks; None where nobody may.
    """

    def __init__(
        self, settings: ServerSettings, recorder: Recorder | None = None, metrics: RouterMetrics | None = None
    ) -> None:
        self.settings = settings
        self.core = RouterCore(partial(make_policy, settings.policy), settings.core)
        self.epoch = time.time_ns()
        self.client_endpoint = ""
        self.worker_endpoint = ""
        self.counts: Counter[str] = Counter()
        self.model: dict[str, Any] | None = None
        self.reference: Profile | None = None
        self.loop_ns = 0
        self.load = Load()
        self._recorder = recorder
        self._metrics = metrics
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._clients: dict[bytes, PeerConnection] = {}
        self._workers: dict[bytes, PeerConnection] = {}
        self._profiles: dict[bytes, Profile] = {}
        self._gate: Gate | None = None
        self._gate_version = 0
        self._is_stopping = False
        self._clients_due: deque[tuple[int, bytes, PeerConnection]] = deque()  # whom to ping, and when
        self._workers_due: deque[tuple[int, bytes, PeerConnection]] = deque()
        self._collected_ns = 0
        self._next_epoch = 0
        self._on_client: dict[Kind, Callable[[bytes, Any, int], None]] = {
            Kind.CANCEL: self._cancel,
            Kind.PONG: self._client_pong,
        }
        self._on_worker: dict[Kind, Callable[[bytes, Any, int], None]] = {
            Kind.PULL: self._pull,
            Kind.DONE: self._done,
            Kind.PONG: self._worker_pong,
        }

    def open(self) -> None:
        """Bind both sockets.

        Raises:
            ConfigError: An endpoint is malformed, taken, or open to other machines without keys; or the
                folder of keys is not what it should be.
        """
        settings = self.settings
        context, keys = self._context, None
        try:
            if settings.keys is None and not settings.is_open:
                check_reach("--client-endpoint", settings.client_endpoint)
                check_reach("--worker-endpoint", settings.worker_endpoint)
            if settings.keys is not None:
                self._gate = gate = Gate(context, settings.keys)
                gate.open()
                keys = gate.keys
            self._client_socket, self.client_endpoint = bind_router(
                context, settings.client_endpoint, keys, CLIENT_DOMAIN
            )
            self._worker_socket, self.worker_endpoint = bind_router(
                context, settings.worker_endpoint, keys, WORKER_DOMAIN
            )
        except ConfigError:
            context.destroy(0)
            raise
        self._doors = Doors((self.client_endpoint, self.worker_endpoint))
        if self._gate is not None:
            self._gate.start({"client": self._client_socket, "worker": self._worker_socket})

    @property
    def n_clients(self) -> int:
        """How many clients are connected."""
        return len(self._clients)

    def host_of(self, peer: bytes) -> str:
        """Return the host that a worker process says it runs on; "" where it did not say."""
        return self._workers[peer].host if peer in self._workers else ""

    def version_of(self, peer: bytes) -> str:
        """Return the version that a worker process says it runs; "" where it did not say."""
        return self._workers[peer].version if peer in self._workers else ""

    def stop(self) -> None:
        """Ask `run` to drain and return. Safe in a signal handler."""
        self._is_stopping = True

    def run(self) -> None:
        """Serve until `stop()` was called and the queue is empty, or the drain's time is up."""
        gc.collect()
        gc.freeze()
        gc.disable()  # nothing on the hot path makes cycles; idle passes collect what others made
        waiter = Waiter((self._client_socket, self._worker_socket))
        try:
            deadline_ns: int | None = None
            while True:
                began_ns = time.monotonic_ns()
                if self._pass():
                    rest(began_ns)
                else:
                    waiter.wait(self._timeout_ns())
                if self._is_stopping:
                    now_ns = time.monotonic_ns()
                    if deadline_ns is None:
                        self._handle(DrainRouter(), now_ns)
                        deadline_ns = now_ns + self.settings.drain_timeout_ns
                    core = self.core
                    if now_ns >= deadline_ns or not (core.queue or core.in_flight):
                        break
        finally:
            self._close()

    def _close(self) -> None:
        goodbye = wire.encode_control(Control(Kind.BYE, {"reason": "the router stops"}))
        for socket, keys in ((self._client_socket, self._clients), (self._worker_socket, self._workers)):
            for key in keys:
                send(socket, [key, *goodbye])
        self._let_peers_read()
        self._doors.close()
        for socket in (self._client_socket, self._worker_socket):
            socket.close(linger=_GOODBYE_MS)
        if self._gate is not None:
            self._gate.close()
        if self._recorder is not None:
            self._recorder.close()
        self._context.term()

    def _let_peers_read(self) -> None:
        """Leave the connections open a moment: a DEALER drops what it has not read when one breaks."""
        waiter = Waiter((self._client_socket, self._worker_socket))
        end_ns = time.monotonic_ns() + _GOODBYE_MS * MS // 2
        while (self._clients or self._workers) and (left_ns := end_ns - time.monotonic_ns()) > 0:
            for socket in waiter.wait(left_ns):
                with contextlib.suppress(WireError):
                    while receive(socket) is not None:
                        pass  # nothing that comes now is served

    def _timeout_ns(self) -> int:
        now_ns = time.monotonic_ns()
        latest_ns = 50 * MS
        for due in (self._workers_due, self._clients_due):
            if due:
                latest_ns = min(latest_ns, due[0][0] - now_ns)
        wake_ns = self.core.next_wake_ns()
        return max(0, latest_ns if wake_ns is None else min(latest_ns, wake_ns - now_ns))

    def _pass(self) -> int:
        """Drain every socket, decide once, act; return how many messages there were."""
        began_ns = time.monotonic_ns()
        gate = self._gate
        if gate is None:
            n_of_workers = self._drain(self._worker_socket, self._from_worker)
            n_of_clients = self._drain(self._client_socket, self._from_client)
        else:
            if gate.version != self._gate_version:
                self._expel(gate)
            n_of_workers = self._drain(self._worker_socket, self._from_known_worker, gate.workers.admits)
            n_of_clients = self._drain(self._client_socket, self._from_known_client, gate.clients.admits)
        self.counts["worker_messages"] += n_of_workers
        self.counts["client_messages"] += n_of_clients
        n = n_of_workers + n_of_clients
        now_ns = time.monotonic_ns()
        self._keep_alive(now_ns)
        self._doors.look(now_ns)
        if n == 0 and not self.core.ledger and now_ns - self._collected_ns >= _COLLECT_NS:
            self._collected_ns = now_ns
            gc.collect(0)
        actions = self.core.advance(now_ns)
        if self._recorder is not None:
            self._recorder.advance(now_ns, actions)
        if actions:
            self._carry_out(actions)
        self.counts["loops"] += 1
        ended_ns = time.monotonic_ns()
        self.loop_ns += ended_ns - began_ns
        self.load.note(self.core, ended_ns)
        if self._metrics is not None:
            self._metrics.passed(self, actions, ended_ns - began_ns)
        return n

    def _drain(
        self,
        socket: zmq.Socket[bytes],
        take: Callable[[bytes, list[Buffer], int], None],
        admits: Callable[[zmq.Frame], bool] | None = None,
    ) -> int:
        now_ns = time.monotonic_ns()
        end_ns = now_ns + _DRAIN_NS
        n = 0
        if not is_readable(socket):
            return 0
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
                self.counts["malformed"] += 1
                log.warning("malformed message: %s", error)
        return n

    def _handle(self, event: Event, now_ns: int) -> None:
        if self._recorder is not None:
            self._recorder.event(now_ns, event)
        self.core.handle(event, now_ns)

    def _decode(self, key: bytes, frames: list[Buffer], socket: zmq.Socket[bytes]) -> Message | None:
        """Return the message; a malformed one is counted and its sender told, and None returned."""
        try:
            return wire.decode(frames)
        except WireError as error:
            self.counts["malformed"] += 1
            log.warning("malformed message from %s: %s", key.hex(), error)
            self._refuse(socket, key, "malformed", str(error))
            return None

    def _refuse(self, socket: zmq.Socket[bytes], key: bytes, code: str, reason: str) -> None:
        send(socket, [key, *wire.encode_control(Control(Kind.REFUSED, {"code": code, "reason": reason}))])

    # --- with keys ----------------------------------------------------------------------

    def _from_known_client(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        """Take a message from a client with a listed key; its routing id may have been another's."""
        assert self._gate is not None, "only a router with keys comes here"
        connection = self._clients.get(key)
        if connection is not None and connection.user != self._gate.clients.user:
            self._forget_client(key, now_ns)
        self._from_client(key, frames, now_ns)

    def _from_known_worker(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        """Take a message from a worker with a listed key, likewise."""
        assert self._gate is not None, "only a router with keys comes here"
        connection = self._workers.get(key)
        if connection is not None and connection.user != self._gate.workers.user:
            self._lose_worker(key, now_ns)
        self._from_worker(key, frames, now_ns)

    def _expel(self, gate: Gate) -> None:
        """Forget whoever said HELLO with a key that is not listed any more, and tell them so."""
        self._gate_version = gate.version
        now_ns = time.monotonic_ns()
        reason = "the router does not list this key any more"
        for key, connection in list(self._clients.items()):
            if connection.user not in gate.clients.listed:
                log.warning("client %s: its key was revoked", key.hex())
                self._refuse(self._client_socket, key, "revoked", reason)
                self._forget_client(key, now_ns)
        for key, connection in list(self._workers.items()):
            if connection.user not in gate.workers.listed:
                self._refuse(self._worker_socket, key, "revoked", reason)
                self._lose_worker(key, now_ns)

    # --- from clients -------------------------------------------------------------------

    def _from_client(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        message = self._decode(key, frames, self._client_socket)
        if message is None:
            return
        connection = self._clients.get(key)
        if connection is not None:
            connection.heard_ns = now_ns
            if type(message) is Queries and key in self.core.clients:
                self._queries(key, connection, message, now_ns)
                return
        if isinstance(message, Control):
            self._client_control(key, message, now_ns)
        elif isinstance(message, Ping):
            send(self._client_socket, [key, *wire.encode_pong(Pong(message.stamp_ns, now_ns))])
        elif connection is None or key not in self.core.clients:
            # Unknown, or its session went on over another connection: this one's HELLO is void.
            self._clients.pop(key, None)
            self._refuse(self._client_socket, key, "say-hello", "this router does not know you: say HELLO")
        else:
            handler = self._on_client.get(message.kind)
            if handler is None:
                self._refuse(self._client_socket, key, "malformed", f"{message.kind.name} is not a client's")
            else:
                handler(key, message, now_ns)

    def _queries(self, key: bytes, connection: PeerConnection, queries: Queries, now_ns: int) -> None:
        transit_ns = connection.one_way_ns + connection.transit.excess_ns(queries.sent_ns, now_ns)
        self._handle(QueriesArrived(key, queries, min(transit_ns, _MAX_TRANSIT_NS)), now_ns)

    def _cancel(self, key: bytes, message: Cancel, now_ns: int) -> None:
        self._handle(CancelAsked(key, message.ids), now_ns)

    def _client_pong(self, key: bytes, pong: Pong, now_ns: int) -> None:
        connection = self._clients[key]
        if pong.stamp_ns != connection.pinged_ns:
            return  # of an older PING: it lay unread, which says nothing of the way
        connection.n_pongs += 1
        rtt_ns = connection.rtts.add(max(0, now_ns - pong.stamp_ns), now_ns)
        is_likely = rtt_ns <= _NEAR_NS or connection.n_pongs >= _ENOUGH_PONGS
        connection.one_way_ns = rtt_ns // 2 if is_likely else 0

    def _client_control(self, key: bytes, message: Control, now_ns: int) -> None:
        socket = self._client_socket
        if message.kind is Kind.HELLO:
            session = message.body.get("session")
            if not isinstance(session, int):
                self._refuse(socket, key, "malformed", "hello: session: expected an integer")
                return
            user = "" if self._gate is None else self._gate.clients.user
            self._clients[key] = connection = PeerConnection(now_ns, user)
            self._clients_due.append((now_ns + _CLIENT_PING_NS, key, connection))
            self._handle(ClientJoined(key, session), now_ns)
            self._welcome_client(key)
            connection.pinged_ns = time.monotonic_ns()
            send(socket, [key, *wire.encode_ping(Ping(connection.pinged_ns))])
        elif message.kind is Kind.BYE:
            self._forget_client(key, now_ns)
        elif message.kind is Kind.STATUS:
            self._send_status(socket, key, now_ns)
        elif message.kind is Kind.DRAIN:
            self._operator_drain(key, message.body, now_ns)
        else:
            self._refuse(socket, key, "malformed", f"{message.kind.name} is not a client's to send")

    def _welcome_client(self, key: bytes) -> None:
        profile = self.reference
        subnets = [] if profile is None else [[s.name, s.accuracy] for s in profile.subnets]
        body = {"epoch": self.epoch, "model": self.model, "subnets": subnets, "policy": self.settings.policy}
        send(self._client_socket, [key, *wire.encode_control(Control(Kind.WELCOME, body))])

    def _forget_client(self, key: bytes, now_ns: int) -> None:
        if self._clients.pop(key, None) is not None:
            self._handle(ClientLeft(key), now_ns)

    def _operator_drain(self, key: bytes, body: dict[str, Any], now_ns: int) -> None:
        """Drain the worker process named in `worker`, or the whole router where there is none."""
        gate = self._gate
        if gate is not None and gate.clients.user not in gate.operators:
            self._refuse(self._client_socket, key, "not-an-operator", "drain: expected an operator's key")
            return
        name = body.get("worker")
        if name is None:
            self._handle(DrainRouter(), now_ns)
            return
        peers = [peer.key for peer in self.core.peers.values() if peer.name == name]
        if not peers:
            known = ", ".join(sorted(peer.name for peer in self.core.peers.values())) or "none"
            self._refuse(self._client_socket, key, "unknown-worker", f"worker {name!r}: known are: {known}")
        order = wire.encode_control(Control(Kind.DRAIN, {"worker": name}))
        for peer in peers:
            self._handle(DrainWorker(peer, None), now_ns)
            send(self._worker_socket, [peer, *order])  # else it would take the BYE for a router's end

    def _send_status(self, socket: zmq.Socket[bytes], key: bytes, now_ns: int) -> None:
        body = status_of_server(self, now_ns)
        if self._gate is not None:
            body["keys"] = self._gate.status()
            body["counts"] |= self._gate.counts()
        send(socket, [key, *wire.encode_control(Control(Kind.STATUS, body))])

    # --- from workers -------------------------------------------------------------------

    def _from_worker(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        socket = self._worker_socket
        message = self._decode(key, frames, socket)
        if message is None:
            return
        connection = self._workers.get(key)
        if isinstance(message, Control):
            self._worker_control(key, message, now_ns)
        elif connection is None:
            self._refuse(socket, key, "say-hello", "this router does not know you: say HELLO")
        elif isinstance(message, Ping):
            self._handle(WorkerHeard(key), now_ns)
            send(socket, [key, *wire.encode_pong(Pong(message.stamp_ns, now_ns))])
        else:
            handler = self._on_worker.get(message.kind)
            try:
                if handler is None:
                    raise WireError(f"{message.kind.name} is not a worker's to send")
                handler(key, message, now_ns)
            except (WireError, TransitionError) as error:
                self.counts["malformed"] += 1
                log.warning("worker %s broke the protocol: %s", key.hex(), error)
                self._refuse(socket, key, "malformed", str(error))
                self._forget_worker(key, now_ns, orderly=False)

    def _pull(self, key: bytes, pull: Pull, now_ns: int) -> None:
        self._handle(Pulled(key, pull.epoch, pull.rows), now_ns)

    def _done(self, key: bytes, done: Done, now_ns: int) -> None:
        self._handle(Finished(key, done.epoch, done.rows), now_ns)

    def _worker_pong(self, key: bytes, pong: Pong, now_ns: int) -> None:
        connection = self._workers[key]
        connection.one_way_ns = connection.rtts.add(max(0, now_ns - pong.stamp_ns), now_ns) // 2
        self._handle(WorkerHeard(key), now_ns)

    def _worker_control(self, key: bytes, message: Control, now_ns: int) -> None:
        socket = self._worker_socket
        if message.kind is Kind.HELLO:
            try:
                self._admit_worker(key, message.body, now_ns)
            except SuperServeError as error:
                log.warning("worker refused: %s", error)
                self._refuse(socket, key, "refused", str(error))
        elif message.kind is Kind.BYE:
            self._forget_worker(key, now_ns, orderly=True)
        elif message.kind is Kind.DRAIN:
            self._handle(DrainWorker(key, None), now_ns)
        elif message.kind is Kind.STATUS:
            self._send_status(socket, key, now_ns)
        else:
            self._refuse(socket, key, "malformed", f"{message.kind.name} is not a worker's to send")

    def _admit_worker(self, key: bytes, body: dict[str, Any], now_ns: int) -> None:
        """Register a worker process.

        Raises:
            SuperServeError: Its HELLO lacks something, or does not fit the cluster.
        """
        name = str(body.get("name") or key.hex())
        n_slots, tables = body.get("n_slots"), body.get("profiles")
        if not isinstance(n_slots, int) or not 1 <= n_slots <= 4096:
            raise ConfigError(f"worker {name}: n_slots: expected 1 to 4096, got {n_slots!r}")
        if not isinstance(tables, list) or len(tables) not in (1, n_slots):
            raise ConfigError(f"worker {name}: profiles: expected one for all GPUs, or one for each")
        profiles = [self._interned(Profile.from_dict(table, where=f"worker {name}")) for table in tables]
        model = {"input": body.get("input"), "output": body.get("output"), "supernet": profiles[0].supernet}
        n_bytes = _n_bytes(name, "input", model["input"])
        _n_bytes(name, "output", model["output"])
        if self.model is not None and self.core.peers and model != self.model:
            raise ConfigError(
                f"worker {name}: expected the model {self.model}, which others host; got {model}"
            )
        life = life_of(key, body)
        for peer in [p for p in self.core.peers.values() if p.name == name]:
            first = self._workers.get(peer.key)
            if first is not None and first.life != life:
                check_name(name, now_ns - peer.heard_ns, self.settings.core.heartbeat_ns, first.host)
            self._forget_worker(peer.key, now_ns, orderly=False)  # an older life of the same worker
        self._forget_worker(key, now_ns, orderly=False)
        self._next_epoch += 1
        slots = profiles * n_slots if len(profiles) == 1 else profiles
        self._handle(WorkerJoined(key, name, self._next_epoch, slots, n_bytes), now_ns)
        user = "" if self._gate is None else self._gate.workers.user
        self._workers[key] = connection = PeerConnection(now_ns, user)
        connection.life = life
        connection.host = str(body.get("host") or "")
        connection.version = str(body.get("version") or "")
        self._workers_due.append((now_ns + self.settings.core.heartbeat_ns, key, connection))
        welcome = {"epoch": self._next_epoch, "router": self.epoch}
        send(self._worker_socket, [key, *wire.encode_control(Control(Kind.WELCOME, welcome))])
        log.info("worker %s joined with %d GPUs (%s)", name, n_slots, profiles[0].name)
        if model != self.model:
            self.model, self.reference = model, profiles[0]
            for client in self._clients:
                self._welcome_client(client)

    def _interned(self, profile: Profile) -> Profile:
        """Return one object for equal profiles, so that a thousand workers share one policy."""
        key = profile.to_json()
        if key not in self._profiles and len(self._profiles) >= _MAX_PROFILES:
            raise ConfigError(
                f"profile {profile.name}: expected one of at most {_MAX_PROFILES} distinct ones"
            )
        return self._profiles.setdefault(key, profile)

    def _forget_worker(self, key: bytes, now_ns: int, *, orderly: bool) -> None:
        if self._workers.pop(key, None) is not None:
            self._handle(WorkerLeft(key, orderly), now_ns)

    # --- out ----------------------------------------------------------------------------

    def _keep_alive(self, now_ns: int) -> None:
        """Ping workers every heartbeat and clients every second, a few a pass; forget the unreachable."""
        for due in (self._workers_due, self._clients_due):
            for _ in range(_PINGS_AT_ONCE):
                if not due or due[0][0] > now_ns:
                    break
                _, key, connection = due.popleft()
                if due is self._workers_due:
                    self._ping_worker(key, connection, now_ns)
                else:
                    self._ping_client(key, connection, now_ns)

    def _ping_worker(self, key: bytes, connection: PeerConnection, now_ns: int) -> None:
        if self._workers.get(key) is not connection:
            return  # it left
        if key not in self.core.peers:
            del self._workers[key]  # buried by the core; it is fenced when it speaks again
            self._refuse(self._worker_socket, key, "say-hello", "you were silent for too long: say HELLO")
        elif send(self._worker_socket, [key, *wire.encode_ping(Ping(now_ns))]):
            self._workers_due.append((now_ns + self.settings.core.heartbeat_ns, key, connection))
        else:
            self._lose_worker(key, now_ns)

    def _ping_client(self, key: bytes, connection: PeerConnection, now_ns: int) -> None:
        if self._clients.get(key) is not connection:
            return
        connection.pinged_ns = now_ns
        is_reached = send(self._client_socket, [key, *wire.encode_ping(Ping(now_ns))])
        if not is_reached or now_ns - connection.heard_ns > _CLIENT_GONE_NS:
            self._forget_client(key, now_ns)
        else:
            self._clients_due.append((now_ns + _CLIENT_PING_NS, key, connection))

    def _lose_worker(self, key: bytes, now_ns: int) -> None:
        peer = self.core.peers.get(key)
        log.warning("worker %s is gone", peer.name if peer is not None else key.hex())
        self.counts["workers_lost"] += 1
        self._forget_worker(key, now_ns, orderly=False)

    def _carry_out(self, actions: list[Action]) -> None:
        answers: dict[bytes, list[Answer]] = {}
        lost: list[bytes] = []
        for action in actions:
            if isinstance(action, Answer):
                of_client = answers.get(action.client)
                if of_client is None:
                    answers[action.client] = [action]
                else:
                    of_client.append(action)
            elif isinstance(action, Dispatch):
                frames = wire.encode_directive(directive_of(action))
                if not send(self._worker_socket, [action.peer, *frames]):
                    lost.append(action.peer)
            elif isinstance(action, Fence):
                self._refuse(self._worker_socket, action.peer, "say-hello", action.reason)
            elif isinstance(action, Released):
                self._say_bye(action)
        for client, of_client in answers.items():
            self._send_results(client, of_client)
        for key in lost:
            self._lose_worker(key, time.monotonic_ns())

    def _say_bye(self, action: Released) -> None:
        send(
            self._worker_socket, [action.peer, *wire.encode_control(Control(Kind.BYE, {"reason": "drained"}))]
        )

    def _send_results(self, client: bytes, answers: list[Answer]) -> None:
        if len(answers) == 1:
            frames = wire.encode_group(self.epoch, group_of(answers[0]))
            if not send(self._client_socket, [client, *frames]):
                self._drop_results(client, answers[0].n)
            return
        for results in results_of(self.epoch, answers):
            if not send(self._client_socket, [client, *wire.encode_results(results)]):
                self._drop_results(client, sum(group.count for group in results.groups))
                return

    def _drop_results(self, client: bytes, n: int) -> None:
        """Gone, or not reading: its queries shall cost no more GPU time."""
        self.counts["results_dropped"] += n
        self._forget_client(client, time.monotonic_ns())


def _n_bytes(worker: str, field: str, body: Any) -> int | None:
    """Return the bytes of one tensor that a HELLO describes; None where it does not say."""
    if body is None:
        return None
    try:
        return TensorSpec(str(body["dtype"]), tuple(map(operator.index, body["shape"]))).n_bytes
    except (ConfigError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"worker {worker}: {field}: expected a dtype and a shape, got {body!r}: {error}"
        ) from error
