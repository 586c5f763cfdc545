"""The router's worker side: checks HELLOs, receives credit and reports, sends directives."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson

from profiles.table import Profile
from router.core.events import DrainWorker, Finished, Pulled, WorkerHeard, WorkerJoined, WorkerLeft
from router.core.workers import TransitionError
from router.report.status import Origin
from router.serve.directives import directive_of
from router.serve.gate import WORKER_DOMAIN
from router.serve.lives import check_name, life_of
from router.serve.memories import NO_READS, WorkerReads
from router.serve.side import RouterSide
from superserve import wire
from superserve.errors import ConfigError, SuperServeError, WireError
from superserve.hello import ModelSpec, WorkerHello, WorkerWelcome
from superserve.shared.offers import MemoriesGone, MemoryAnswer
from superserve.wire import Control, Done, Kind, Ping, Pong, Pull

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.core.events import Dispatch, Event
    from router.serve.side import PeerConnection, Serving
    from superserve.wire import Buffer

log = logging.getLogger("router")

_MAX_PROFILES = 256
"""Most distinct profiles of workers: for each, the policy builds its tables."""


class WorkerSide(RouterSide):
    """The socket that workers connect to.

    Args:
        serving: The state shared with the other side.
        heartbeat_ns: How often workers are pinged.
        on_model: Called when the workers' model has changed.
    """

    peer = "worker"
    domain = WORKER_DOMAIN

    def __init__(self, serving: Serving, heartbeat_ns: int, on_model: Callable[[], None]) -> None:
        super().__init__(serving, heartbeat_ns)
        self._on_model = on_model
        self._profiles: dict[bytes, Profile] = {}
        self._next_epoch = 0
        self._on: dict[Kind, Callable[[bytes, Any, int], None]] = {
            Kind.PULL: self._pull,
            Kind.DONE: self._done,
            Kind.PONG: self._pong,
        }

    def origins(self) -> dict[bytes, Origin]:
        """Return the host and version that each worker process states."""
        return {key: Origin(one.host, one.version) for key, one in self.connections.items()}

    # --- in -------------------------------------------------------------------------------

    def _take(self, key: bytes, frames: list[Buffer], now_ns: int) -> None:
        message = self._decode(key, frames)
        if message is None:
            return
        if isinstance(message, Control):
            self._control(key, message, now_ns)
        elif key not in self.connections:
            self.refuse(key, "say-hello", "the router has no HELLO from you: send one")
        elif isinstance(message, Ping):
            self._handle(WorkerHeard(key), now_ns)
            self.post(key, wire.encode_pong(Pong(message.stamp_ns, now_ns, self._serving.price(now_ns))))
        else:
            handler = self._on.get(message.kind)
            try:
                if handler is None:
                    raise WireError(f"{message.kind.name} is not a worker's to send")
                handler(key, message, now_ns)
            except (WireError, TransitionError) as error:
                self._counts["malformed"] += 1
                log.warning("worker %s broke the protocol: %s", key.hex(), error)
                self.refuse(key, "malformed", str(error))
                self.forget(key, now_ns, orderly=False)

    def _pull(self, key: bytes, pull: Pull, now_ns: int) -> None:
        self._handle(Pulled(key, pull), now_ns)

    def _done(self, key: bytes, done: Done, now_ns: int) -> None:
        self._handle(Finished(key, done), now_ns)

    def _pong(self, key: bytes, pong: Pong, now_ns: int) -> None:
        connection = self.connections[key]
        connection.one_way_ns = connection.rtts.add(max(0, now_ns - pong.stamp_ns), now_ns) // 2
        self._handle(WorkerHeard(key), now_ns)

    # --- control --------------------------------------------------------------------------

    def _drain_asked(self, key: bytes, message: Control, now_ns: int) -> None:
        del message  # a worker can only drain itself
        self._handle(DrainWorker(key, None), now_ns)

    def _hello(self, key: bytes, message: Control, now_ns: int) -> None:
        try:
            self.admit(key, WorkerHello.from_body(message.body, key.hex()), wire.agreed(message), now_ns)
        except SuperServeError as error:
            log.warning("worker refused: %s", error)
            self.refuse(key, "refused", str(error))

    def admit(self, key: bytes, hello: WorkerHello, version: int, now_ns: int) -> None:
        """Register a worker process, with the agreed wire version, and welcome it.

        Raises:
            SuperServeError: A profile is malformed, or does not fit the cluster.
        """
        serving, name = self._serving, hello.name
        profiles = [
            self._interned(Profile.from_dict(table, where=f"worker {name}")) for table in hello.profiles
        ]
        model = ModelSpec(hello.input, hello.output, profiles[0].supernet)
        if serving.model is not None and self._core.peers and model != serving.model:
            raise ConfigError(
                f"worker {name}: expected the model {_words(serving.model)}, which others host; "
                f"got {_words(model)}"
            )
        life = life_of(key, hello)
        for peer in [p for p in self._core.peers.values() if p.name == name]:
            first = self.connections.get(peer.key)
            if first is not None and first.life != life:
                check_name(name, now_ns - peer.heard_ns, self._ping_every_ns, first.host)
            self.forget(peer.key, now_ns, orderly=False)  # an earlier process of the same worker
        self.forget(key, now_ns, orderly=False)
        self._next_epoch += 1
        slots = profiles * hello.n_slots if len(profiles) == 1 else profiles
        n_bytes = None if hello.input is None else hello.input.n_bytes
        is_guest = bool(hello.guest)
        self._handle(WorkerJoined(key, name, self._next_epoch, slots, n_bytes, is_guest), now_ns)
        connection = self._greet(key, version, now_ns)
        connection.host, connection.version, connection.life = hello.host, hello.version, life
        connection.reads = WorkerReads(is_asked_for=bool(hello.shared))
        welcome = WorkerWelcome(self._next_epoch, serving.epoch, version, serving.listed.workers or None)
        self.post(key, wire.encode_control(Control(Kind.WELCOME, welcome.body(), version)))
        if is_guest:
            log.debug("worker %s visits with %d GPUs", name, hello.n_slots)
            return
        log.info("worker %s joined with %d GPUs (%s)", name, hello.n_slots, profiles[0].name)
        if model != serving.model:
            serving.model, serving.reference = model, profiles[0]
            self._on_model()

    def _interned(self, profile: Profile) -> Profile:
        """Return one object for equal profiles, so that a thousand workers share one policy."""
        key = profile.to_json()
        if key not in self._profiles and len(self._profiles) >= _MAX_PROFILES:
            raise ConfigError(
                f"profile {profile.name}: expected one of at most {_MAX_PROFILES} distinct ones"
            )
        return self._profiles.setdefault(key, profile)

    # --- peers ----------------------------------------------------------------------------

    def _left(self, key: bytes, *, orderly: bool) -> Event:
        return WorkerLeft(key, orderly)

    def lose(self, key: bytes, now_ns: int) -> None:
        """Drop a worker that cannot be reached or has been replaced, and count it."""
        peer = self._core.peers.get(key)
        log.warning("worker %s is gone", peer.name if peer is not None else key.hex())
        self._counts["workers_lost"] += 1
        super().lose(key, now_ns)

    def _ping(self, key: bytes, connection: PeerConnection, now_ns: int) -> None:
        if key in self._core.peers:
            super()._ping(key, connection, now_ns)
        else:
            del self.connections[key]  # the core has buried it; its next message gets a fence
            self.refuse(key, "say-hello", "you were silent for too long: send HELLO")

    # --- out ------------------------------------------------------------------------------

    def tell_routers(self, now_ns: int) -> None:
        """Send every worker the list of routers: one that knows a single router asks for none."""
        body = self._serving.brief(now_ns).body()
        for key, connection in self.connections.items():
            self.post(key, wire.encode_control(Control(Kind.STATUS, body, connection.wire)))

    def order_drain(self, name: str, now_ns: int) -> bool:
        """Make the worker process of that name drain; False if there is none."""
        peers = [peer.key for peer in self._core.peers.values() if peer.name == name and not peer.is_guest]
        order = wire.encode_control(Control(Kind.DRAIN, {"worker": name}))
        for peer in peers:
            self._handle(DrainWorker(peer, None), now_ns)
            self.post(peer, order)  # or it would take the later BYE for the end of the router
        return bool(peers)

    def dispatch(self, action: Dispatch) -> bool:
        """Send a batch; False if the worker cannot be reached."""
        key = action.peer
        connection = self.connections.get(key)
        reads = NO_READS if connection is None else connection.reads
        is_sent = self.post(key, wire.encode_directive(directive_of(action.batch, reads)))
        if reads.to_offer:
            self._offer(key, reads)
        return is_sent

    def _offer(self, key: bytes, reads: WorkerReads) -> None:
        """Offer a worker the memories that its batches refer to: until it answers, they are copied for it."""
        for memory in reads.to_offer:
            self.post(key, wire.encode_control(Control(Kind.SHARE, memory.memory.offer.body())))
        reads.to_offer.clear()

    def _shared(self, key: bytes, message: Control) -> None:
        try:
            self.connections[key].reads.answered(MemoryAnswer.from_body(message.body))
        except WireError as error:
            self.refuse(key, "malformed", str(error))

    def ping_due(self, now_ns: int) -> None:
        """Send the PINGs that are due, and tell workers which memories are gone."""
        memories = self._serving.memories
        if memories.gone:
            numbers = memories.taken_gone()
            for key, connection in self.connections.items():
                if gone := connection.reads.forget(numbers):
                    body = MemoriesGone(tuple(gone)).body()
                    self.post(key, wire.encode_control(Control(Kind.SHARE, body)))
        super().ping_due(now_ns)

    def release(self, key: bytes) -> None:
        """Tell a worker that it has drained."""
        self.post(key, wire.encode_control(Control(Kind.BYE, {"reason": "drained"})))


def _words(model: ModelSpec) -> str:
    """Return a model in the form of its JSON object."""
    return str(orjson.loads(orjson.dumps(model)))
