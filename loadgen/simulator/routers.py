"""Several routers, their clients and workers on one virtual clock: what passes between them, and what breaks.

Every decision is that of the code that serves: `RouterCore`, `WorkerCore` with `RouterChoice`, and `Session`
with its `Spread`. Here are the loops around them, the connections and their deaths, and a router's side of
both protocols as in `router.serve`. `loadgen.simulator.chaos.routers` draws worlds and judges them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from gpu_worker.core.lending import Lender
from gpu_worker.core.link import LinkState
from gpu_worker.core.played import PlayedGpu
from loadgen.simulator.links import FAR_NS, SimLink, Trouble, Way
from loadgen.simulator.workers import SimProcess, outcome_of
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
from router.serve.listed import ready_gpus
from superserve.clock import MS
from superserve.hello import RouterBrief
from superserve.wire import Cancel, Control, Done, Kind, Ping, Pong, Pull, Queries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_worker.core.choice import RouterChoice
    from profiles.table import Profile
    from router.core import RouterCore
    from router.core.events import Action
    from router.core.workers import Batch
    from superserve.wire import Message

DRAIN_NS = 5_000 * MS
"""Longest that a router drains, as in `router.serve.loop`."""
_TELL_NS = 50 * MS
_RECONNECT_NS = 100 * MS
"""Longest that a peer takes to connect again, as `superserve.net.sockets` sets it."""
_SAY_HELLO = Control(Kind.REFUSED, {"code": "say-hello"})


@dataclass(slots=True, eq=False)
class Conn:
    """One connection between a peer and a router's life; what is under way when it breaks is lost."""

    key: int
    way_in: SimLink  # to the router
    way_out: SimLink
    is_open: bool = True


class World:
    """The clock, and all that is on it.

    Args:
        seed: Of the delays.
        way: How long a message takes.
        troubles: Windows of trouble between a peer and a router, by `client:0@1` or `worker:2@0`.
    """

    def __init__(self, seed: int, way: Way, troubles: dict[str, tuple[Trouble, ...]]) -> None:
        self.now_ns = 0
        self.routers: list[SimRouter] = []
        self.workers: list[SimWorker] = []
        self.rng = random.Random(f"{seed}/world")
        self._seed = seed
        self._way = way
        self._troubles = troubles
        self._agenda: list[tuple[int, int, Callable[[int], None]]] = []
        self._serial = 0

    def later(self, at_ns: int, act: Callable[[int], None]) -> None:
        """Call `act` with the instant, when it comes."""
        self._serial += 1
        heappush(self._agenda, (max(at_ns, self.now_ns), self._serial, act))

    def run(self, until_ns: int) -> None:
        """Let time pass."""
        agenda = self._agenda
        while agenda and agenda[0][0] <= until_ns:
            self.now_ns, _, act = heappop(agenda)
            act(self.now_ns)
        self.now_ns = until_ns

    def connect(self, peer: str, router: int) -> Conn:
        """Return a new connection of a peer to a router."""
        self._serial += 1
        name = f"{peer}@{router}"
        troubles = self._troubles.get(name, ())
        seed = f"{self._seed}/{name}/{self._serial}"
        to, back = (SimLink(self._way, f"{seed}/{end}", troubles) for end in ("in", "out"))
        return Conn(self._serial, to, back)

    def carry(self, way: SimLink, conn: Conn, act: Callable[[int], None]) -> None:
        """Let `act` happen at the other end, unless the connection breaks before."""
        for at_ns in way.arrivals(self.now_ns):
            self.later(at_ns, lambda now_ns: act(now_ns) if conn.is_open else None)


class SimRouter:
    """One router through all its lives: the loop of `router.serve` around a core.

    Args:
        world: Where it is.
        number: Which router it is.
        make_core: Builds a life's core.
        rest_ns: Time between two passes.
        watch: Called with the router when a life begins.
    """

    def __init__(
        self, world: World, number: int, make_core: Callable[[], RouterCore], rest_ns: int,
        watch: Callable[[SimRouter], None],
    ) -> None:  # fmt: skip
        self.world = world
        self.number = number
        self.rest_ns = rest_ns
        self.on_pass: Callable[[int, list[Action]], None] | None = None
        self.is_up = False
        self.is_pricing = True
        self.life = 0
        self.core: RouterCore
        self.frozen_until_ns = 0
        self._make_core = make_core
        self._watch = watch
        self._mail: list[tuple[Callable[[int], None], Conn]] = []
        self._at_ns = FAR_NS
        self._rest_until_ns = 0
        self._next_epoch = 0
        self._told = (0, 0)
        self._drain_until_ns: int | None = None
        self.clients: dict[int, tuple[Any, Conn]] = {}
        self.peers: dict[int, tuple[SimWorker, Conn]] = {}

    @property
    def processes(self) -> list[SimProcess]:
        """The worker processes of the world: none may hold too much, whichever router sent it."""
        return [worker.process for worker in self.world.workers]

    # --- lives ----------------------------------------------------------------------------

    def begin(self, now_ns: int) -> None:
        """Begin a life."""
        if self.is_up:
            return
        self.life += 1
        self.is_up = True
        self.core = self._make_core()
        self.clients, self.peers, self._mail = {}, {}, []
        self._drain_until_ns, self._told, self.frozen_until_ns = None, (0, 0), 0
        self._watch(self)
        for peer in (*self.world.workers, *self.world_clients):
            self.world.later(
                now_ns + self.world.rng.randrange(_RECONNECT_NS), partial(peer.reach, self.number)
            )

    @property
    def world_clients(self) -> list[Any]:
        """The clients of the world; set by the host."""
        return self._clients

    def serve(self, clients: list[Any]) -> None:
        """Know the clients, and begin."""
        self._clients = clients
        self.begin(self.world.now_ns)

    def die(self, _now_ns: int) -> None:
        """End at once: every connection breaks, and what was not sent is lost."""
        if not self.is_up:
            return
        self.is_up = False
        for peer in (*self.world.workers, *self._clients):
            peer.cut(self.number)

    def freeze(self, for_ns: int, now_ns: int) -> None:
        """Stop for a while; connections stay."""
        self.frozen_until_ns = max(self.frozen_until_ns, now_ns + for_ns)

    def drain(self, now_ns: int) -> None:
        """Begin an orderly end, as SIGTERM does."""
        if self.is_up and self._drain_until_ns is None:
            self._drain_until_ns = now_ns + DRAIN_NS
            self.core.handle(DrainRouter(), now_ns)
            for client, conn in list(self.clients.values()):
                self._to(conn, partial(client.told_drain, self.number))
            self._wake(now_ns)

    # --- the loop -------------------------------------------------------------------------

    def take(self, act: Callable[[int], None], conn: Conn, now_ns: int) -> None:
        """Read a message in the next pass."""
        if self.is_up:
            self._mail.append((act, conn))
            self._wake(now_ns)

    def _wake(self, at_ns: int) -> None:
        at_ns = max(at_ns, self._rest_until_ns, self.frozen_until_ns)
        if at_ns < self._at_ns:
            self._at_ns = at_ns
            self.world.later(at_ns, self._pass)

    def _pass(self, now_ns: int) -> None:
        if now_ns != self._at_ns:
            return
        self._at_ns = FAR_NS
        if not self.is_up:
            return
        if now_ns < self.frozen_until_ns:
            self._wake(now_ns)
            return
        mail, self._mail = self._mail, []
        for act, conn in mail:
            if conn.is_open:
                act(now_ns)
        actions = self.core.advance(now_ns)
        if self.on_pass is not None:
            self.on_pass(now_ns, actions)
        for action in actions:
            self._carry_out(action, now_ns)
        self._tell(now_ns)
        self._rest_until_ns = now_ns + (self.rest_ns if mail else 0)
        core = self.core
        if self._drain_until_ns is not None and (
            now_ns >= self._drain_until_ns or not (core.queue or core.in_flight)
        ):
            self._end(now_ns)
            return
        wakes = [self.core.next_wake_ns(), self._drain_until_ns]
        self._wake(min([at_ns for at_ns in wakes if at_ns is not None], default=FAR_NS))

    def _end(self, now_ns: int) -> None:
        """Say BYE to all; half a second later the connections break. What arrives meanwhile is not read."""
        for client, conn in list(self.clients.values()):
            self._to(conn, partial(client.told_bye, self.number))
        for worker, conn in list(self.peers.values()):
            self._to(conn, partial(worker.receive, self.number, Control(Kind.BYE, {})))
        self.is_up = False

        def breaks(_now_ns: int) -> None:
            if not self.is_up:
                for peer in (*self.world.workers, *self._clients):
                    peer.cut(self.number)

        self.world.later(now_ns + 400 * MS, breaks)

    def _to(self, conn: Conn, act: Callable[[int], None]) -> None:
        self.world.carry(conn.way_out, conn, act)

    def _carry_out(self, action: Action, now_ns: int) -> None:
        if isinstance(action, Answer):
            client, conn = self.clients.get(action.client, (None, None))
            if client is not None and conn is not None and conn.is_open:
                self._to(conn, partial(client.answered, self.number, self.life, action))
            elif action.client in self.core.clients:
                self.core.handle(ClientLeft(action.client), now_ns)
        elif isinstance(action, Dispatch):
            if not self._say(action.peer, action.batch):
                self.core.handle(WorkerLeft(action.peer, orderly=False), now_ns)
        elif isinstance(action, Fence):
            self._say(action.peer, _SAY_HELLO)
        elif isinstance(action, Released):
            self._say(action.peer, Control(Kind.BYE, {}))

    def _say(self, key: int, message: Any) -> bool:
        worker, conn = self.peers.get(key, (None, None))
        if worker is None or conn is None or not conn.is_open:
            return False
        self._to(conn, partial(worker.receive, self.number, message))
        return True

    def _tell(self, now_ns: int) -> None:
        """Tell clients how many GPUs there are, if that has changed."""
        told_ns, n_told = self._told
        n_gpus = ready_gpus(self.core)
        if n_gpus != n_told and now_ns - told_ns >= _TELL_NS:
            self._told = (now_ns, n_gpus)
            for client, conn in list(self.clients.values()):
                self._to(conn, partial(client.told_gpus, self.number, n_gpus))
        elif n_gpus != n_told:
            self.world.later(told_ns + _TELL_NS, self._wake)

    # --- both protocols, as in `router.serve` ---------------------------------------------

    def client_hello(self, client: Any, conn: Conn, now_ns: int) -> None:
        """Welcome a client."""
        self.clients[conn.key] = (client, conn)
        self.core.handle(ClientJoined(conn.key, client.number + 1), now_ns)
        n_gpus = ready_gpus(self.core)
        self._to(conn, partial(client.welcomed, self.number, self.life, n_gpus))

    def from_client(self, client: Any, conn: Conn, message: Any, now_ns: int) -> None:
        """Handle what a client says."""
        if isinstance(message, Ping):
            self._to(conn, partial(client.heard, self.number))
        elif conn.key not in self.core.clients:
            self._to(conn, partial(client.told_bye, self.number))  # "say HELLO"
        elif isinstance(message, Queries):
            self.core.handle(QueriesArrived(conn.key, message, now_ns - message.sent_ns), now_ns)
        elif isinstance(message, Cancel):
            self.core.handle(CancelAsked(conn.key, message), now_ns)

    def client_gone(self, conn: Conn, now_ns: int) -> None:
        """A client's connection broke."""
        if self.is_up and self.clients.pop(conn.key, None) is not None and conn.key in self.core.clients:
            self.core.handle(ClientLeft(conn.key), now_ns)
            self._wake(now_ns)

    def from_worker(self, worker: SimWorker, conn: Conn, message: Message, now_ns: int) -> None:
        """Handle what a worker process says."""
        core, key = self.core, conn.key
        self.peers[key] = (worker, conn)
        is_known = key in core.peers
        if isinstance(message, Control):
            if message.kind is Kind.HELLO:
                self._worker_hello(worker, key, now_ns, is_guest=bool(message.body.get("guest")))
            elif message.kind is Kind.STATUS:
                brief = RouterBrief(
                    1_000 * self.number + self.life, ready_gpus(core), core.draining,
                    price=core.price.at(now_ns) if self.is_pricing else None,
                )  # fmt: skip
                self._to(conn, partial(worker.told, self.number, brief))
            elif message.kind is Kind.DRAIN and is_known:
                core.handle(DrainWorker(key, None), now_ns)
            elif message.kind is Kind.BYE and is_known:
                core.handle(WorkerLeft(key, orderly=True), now_ns)
        elif not is_known:
            self._say(key, _SAY_HELLO)
        elif isinstance(message, Ping):
            core.handle(WorkerHeard(key), now_ns)
            price = core.price.at(now_ns) if self.is_pricing else None
            self._say(key, Pong(message.stamp_ns, 0, price))
        elif isinstance(message, Pull):
            core.handle(Pulled(key, message), now_ns)
        elif isinstance(message, Done):
            core.handle(Finished(key, message), now_ns)

    def _worker_hello(self, worker: SimWorker, key: int, now_ns: int, *, is_guest: bool) -> None:
        name = worker.process.name
        for peer in [peer for peer in self.core.peers.values() if peer.name == name]:
            self.core.handle(WorkerLeft(peer.key, orderly=False), now_ns)
        self._next_epoch += 1
        profiles = [gpu.profile for gpu in worker.process.gpus]
        self.core.handle(
            WorkerJoined(key, name, self._next_epoch, profiles, is_guest=is_guest), now_ns
        )  # fmt: skip
        welcome = {"epoch": self._next_epoch, "router": 1_000 * self.number + self.life}
        self._say(key, Control(Kind.WELCOME, welcome))

    def worker_gone(self, conn: Conn, now_ns: int) -> None:
        """A worker's connection broke: the next PING to it fails."""
        self.peers.pop(conn.key, None)
        if self.is_up and conn.key in self.core.peers:
            self.core.handle(WorkerLeft(conn.key, orderly=False), now_ns)
            self._wake(now_ns)


class SimWorker:
    """One worker process, with a connection to each router: the loop of `gpu_worker.serve`.

    Args:
        world: Where it is.
        number: Which process it is.
        profiles: Of its GPUs.
        make_choice: Builds the choice of its router.
        make_lender: Builds what lends its credits.

    Attributes:
        rest_ns: Time between two passes of its loop.
        is_visiting: Whether it visits all routers, whatever GPU time is worth there.
    """

    def __init__(
        self, world: World, number: int, profiles: Sequence[Profile],
        make_choice: Callable[..., RouterChoice], make_lender: Callable[..., Lender[Batch]] = Lender,
    ) -> None:  # fmt: skip
        self.world = world
        self.name = f"worker:{number}"
        gpus = [PlayedGpu(profile, outcome_of) for profile in profiles]
        self.process = SimProcess(self.name, gpus, 0)
        self.choice: RouterChoice
        self.lender: Lender[Batch]
        self._mail: list[tuple[int, Any]] = []
        self.conns: list[Conn | None] = []
        self._number = number
        self._make_choice = make_choice
        self._make_lender = make_lender
        self.rest_ns = 0
        self.is_visiting = False
        self._rest_until_ns = 0
        self._at_ns = FAR_NS

    def begin(self, now_ns: int) -> None:
        """Begin a life."""
        if self.process.is_alive:
            return
        process, n = self.process, len(self.world.routers)
        process.begin(now_ns)
        self._mail = []
        self.lender = self._make_lender(process.core, process.core.gpus, {"name": self.name})
        # Its list begins with another router than its neighbour's, as `cluster up` gives it.
        self.choice = self._make_choice(
            [f"r{i}" for i in range(n)], len(process.gpus), now_ns,
            partial(self.world.rng.uniform, 0.7, 1.3),
        )  # fmt: skip
        self.conns = [None] * n
        for i in range(n):
            self.reach(i, now_ns)
        self._wake(now_ns)

    def die(self, now_ns: int) -> None:
        """End at once."""
        if self.process.is_alive:
            self.process.die()
            for i in range(len(self.conns)):
                self._close(i, now_ns)

    def freeze(self, for_ns: int, now_ns: int) -> None:
        """Stop for a while; the GPUs go on with what they hold."""
        self.process.frozen_until_ns = max(self.process.frozen_until_ns, now_ns + for_ns)

    def reach(self, i: int, now_ns: int) -> None:
        """Connect to a router that is up."""
        if self.process.is_alive and self.conns[i] is None and self.world.routers[i].is_up:
            self.conns[i] = self.world.connect(self.name, i)
            self._wake(now_ns)

    def cut(self, i: int) -> None:
        """A router has died: its connection breaks."""
        if i < len(self.conns) and (conn := self.conns[i]) is not None:
            conn.is_open = False
            self.conns[i] = None
            self._wake(self.world.now_ns)

    def _close(self, i: int, now_ns: int) -> None:
        conn, self.conns[i] = self.conns[i], None
        if conn is not None:
            conn.is_open = False
            # The router's next PING to it fails, within a heartbeat.
            self.world.later(
                now_ns + self.world.rng.randrange(100 * MS), partial(self.world.routers[i].worker_gone, conn)
            )

    def receive(self, i: int, message: Any, now_ns: int) -> None:
        """Take a router's message in the next pass."""
        if self.process.is_alive:
            self._mail.append((i, message))
            self._wake(now_ns)

    def told(self, i: int, brief: RouterBrief, now_ns: int) -> None:
        """Take a router's answer to a question; a process that is frozen reads it later."""
        if self.process.is_alive:
            at_ns = max(now_ns, self.process.frozen_until_ns)
            if at_ns > now_ns:
                self.world.later(at_ns, partial(self.told, i, brief))
                return
            self.choice.told(i, brief, now_ns)
            self._wake(now_ns)

    def credits_at(self) -> list[list[int]]:
        """Return the routers that have a credit of each GPU under an epoch that this process goes by."""
        found: list[list[int]] = [[] for _ in self.process.gpus]
        if not self.process.is_alive:
            return found
        core, visits = self.process.core, self.lender.visits
        for i, conn in enumerate(self.conns):
            router = self.world.routers[i]
            peer = router.core.peers.get(conn.key) if conn is not None and router.is_up else None
            epoch = core.epoch if i == self.choice.own else visits[i].epoch if i in visits else None
            if peer is not None and peer.epoch == epoch:
                for slot, worker in enumerate(peer.workers):
                    if worker.credit > 0:
                        found[slot].append(i)
        return found

    def _wake(self, at_ns: int) -> None:
        if not self.process.is_alive:
            return
        at_ns = max(at_ns, self.process.frozen_until_ns, self.world.now_ns, self._rest_until_ns)
        if at_ns < self._at_ns or self._at_ns < self.world.now_ns:
            self._at_ns = at_ns
            self.world.later(at_ns, self._pass)

    def _pass(self, now_ns: int) -> None:
        if now_ns != self._at_ns:
            return
        self._at_ns = FAR_NS
        process, choice = self.process, self.choice
        if not process.is_alive:
            return
        if now_ns < process.frozen_until_ns:
            self._wake(now_ns)
            return
        self._rest_until_ns = now_ns + self.rest_ns
        core = process.core
        lender = self.lender
        mail, self._mail = self._mail, []
        for i, message in mail:
            if i == choice.own:
                pong = core.receive(message, now_ns)
                assert pong is None, "a simulated router sends no PING"
            else:
                lender.receive(i, message, now_ns)
        if choice.is_many:
            for i, conn in enumerate(self.conns):
                if conn is None and i != choice.own:
                    choice.forget(i)
            for i in choice.questions(now_ns):
                self._say(i, Control(Kind.STATUS, {"brief": True}))
            own = choice.own
            is_connected = own is not None and self.conns[own] is not None
            to = choice.turn(core, now_ns, is_connected=is_connected)
            if to is not None:
                if own is not None and own != to:
                    self._say(own, Control(Kind.BYE, {}))
                core.greet(now_ns)
            prices = choice.prices(now_ns)
            lender.turn(choice.own, dict.fromkeys(prices, 1.0) if self.is_visiting else prices, now_ns)
        if choice.own is not None:
            for message in core.poll(now_ns):
                if not self._say(choice.own, message) and not _is_hello(message):
                    core.lost("the router cannot be reached", now_ns)
                    break
        lost: set[int] = set()
        for i, message in lender.poll(now_ns):
            if i not in lost and not self._say(i, message):
                lost.add(i)
                lender.lost(i, now_ns)
        due = [core.next_due_ns() if choice.own is not None else FAR_NS, choice.next_due_ns()]
        due.append(lender.next_due_ns())
        if core.link is not LinkState.STOPPED:
            self._wake(max(now_ns + 1, min(at_ns for at_ns in due if at_ns is not None)))

    def _say(self, i: int, message: Message) -> bool:
        conn = self.conns[i]
        if conn is None:
            return False
        router = self.world.routers[i]
        act = partial(router.from_worker, self, conn, message)
        self.world.carry(conn.way_in, conn, lambda now_ns: router.take(act, conn, now_ns))
        return True


def _is_hello(message: Message) -> bool:
    return isinstance(message, Control) and message.kind is Kind.HELLO
