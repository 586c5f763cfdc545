"""A router core and its surroundings on a virtual clock: the loop of the simulator.

It does what `router.serve.loop` does around the core: it wakes for the first message, reads what has
arrived, lets the core decide once, carries out the actions, and rests if there was something to do.
`loadgen.simulator` is the entry point.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_worker.core.link import HEARTBEAT_NS
from gpu_worker.core.played import AS_PROFILED, Pace, PlayedGpu
from loadgen.simulator.clients import OpenLoopClient
from loadgen.simulator.links import FAR_NS, SimLink, Trouble, Way
from loadgen.simulator.workers import SimProcess, outcome_of
from router.core import RouterCore
from router.core.events import (
    Answer,
    ClientJoined,
    ClientLeft,
    Complaint,
    CoreSettings,
    Dispatch,
    DrainWorker,
    Fence,
    Finished,
    Pulled,
    Released,
    WorkerHeard,
    WorkerJoined,
    WorkerLeft,
)
from router.policies.registry import make_policy
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Control, Done, Kind, Ping, Pong, Pull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from loadgen.simulator.clients import Connecting, SimClient
    from loadgen.simulator.delays import MachineDelays
    from loadgen.simulator.faults import Fault
    from loadgen.simulator.workers import Inbound
    from loadgen.simulator.workloads import Workload
    from profiles.table import Profile
    from router.core.events import Action, Event
    from router.policies import Policy
    from superserve.wire import Message

log = logging.getLogger("router")

START_NS = 1_000 * MS
"""The router's clock when the trace begins; workers have joined by then."""

_SAY_HELLO = Control(Kind.REFUSED, {"code": "say-hello"})
_PONG = Pong(0, 0)
_JOIN_NS = START_NS - 100 * MS  # workers have said HELLO and sent PULL before the first query
_GRACE_NS = 3_000 * MS  # after the last deadline, so that a lost worker is noticed and its queries end


@dataclass(frozen=True, slots=True)
class SimSettings:
    """The delays of the machine and the network around the core.

    The defaults are those of loopback on a quiet machine, as measured with the live loops.

    Attributes:
        way: How long each message takes, from one loop into the other's buffer.
        router_rest_ns: Time between two passes of a busy router.
        worker_rest_ns: Time between two passes of a worker process with several GPUs.
        send_every_ns: Least time between two messages of a client.
        n_clients: Number of clients; the queries are shared out to them in turn.
        gpus_per_process: GPUs of one worker process.
        actuation_ns: How long a GPU takes to change subnet.
        pace: Of the GPUs compared with their profiles; drift counts from the start of the trace.
        machine: A live run's delays for the same trace, instead of ways and rests. None is a quiet machine.
        core: What the core allows for them; None is as live.
    """

    way: Way = field(default_factory=lambda: Way(100_000, 50_000))
    router_rest_ns: int = 600_000
    worker_rest_ns: int = 600_000
    send_every_ns: int = 500_000
    n_clients: int = 1
    gpus_per_process: int = 8
    actuation_ns: int = 0
    pace: Pace = AS_PROFILED
    machine: MachineDelays | None = None
    core: CoreSettings | None = None

    def like(self, machine: MachineDelays) -> SimSettings:
        """Return settings with the message delays of a live run, and its loops' rests."""
        return replace(self, machine=machine, router_rest_ns=0, worker_rest_ns=0, n_clients=1)


WITHOUT_HOST = SimSettings(
    Way(0, 0), 0, 0, 0,
    core=CoreSettings(dispatch_ahead_ns=0, least_ahead_ns=0, margin_ns=0, least_margin_ns=0),
)  # fmt: skip
"""No time passes between a client, the router and a GPU, and the core allows for none."""


class Simulation:
    """A router core and its surroundings on a virtual clock.

    Args:
        cluster: A profile for each GPU.
        policy: As `make_policy` takes it, or a function that builds a policy from a profile.
        seed: Of the network's delays.
        faults: What goes wrong, and when: instants count from the start of the trace.
        settings: The delays of machine and network.
        core: The core's settings; None are those of `settings`.
        make_core: Builds the core; tests pass broken ones.

    Attributes:
        core: The router's core.
        processes: The worker processes, in order.
        now_ns: The router's clock.
        ways_back: From the router to each client, by key.
        on_pass: Called in each pass with its instant and the core's actions, before they are carried out;
            may be None.
    """

    def __init__(
        self,
        cluster: Sequence[Profile],
        *,
        policy: str | Callable[[Profile], Policy] = "slackfit",
        seed: int = 0,
        faults: Iterable[Fault] = (),
        settings: SimSettings | None = None,
        core: CoreSettings | None = None,
        make_core: Callable[..., RouterCore] = RouterCore,
    ) -> None:
        if not cluster:
            raise ConfigError("cluster: expected one GPU at least")
        self.settings = settings or SimSettings()
        self._build = partial(make_policy, policy) if isinstance(policy, str) else policy
        self._sees_demand = False
        self.core = make_core(self._built, core or self.settings.core)
        self._max_queries = self.core.settings.max_queries // self.settings.n_clients
        self.now_ns = _JOIN_NS
        self.clients: dict[int, SimClient] = {}
        self.on_pass: Callable[[int, list[Action]], None] | None = None
        self.n_passes = 0
        self._seed = seed
        self._rng = random.Random(f"{seed}/host")
        # The last entry never comes due, so the agenda is never empty.
        self._agenda: list[tuple[int, int, Callable[[int], None]]] = [(FAR_NS, 0, lambda _: None)]
        self._mail: list[tuple[int, int, Callable[[Any, int], None], Any]] = []
        self._serial = 0
        self._next_epoch = 0
        self._n_lives = 0
        self._n_connections = 0
        self._rest_until_ns = 0
        self._wake_ns = FAR_NS
        machine = self.settings.machine
        self._passes_ns = None if machine is None else (machine.passes_ns + START_NS).tolist()
        self._end_ns = FAR_NS
        self.ways_back: dict[int, SimLink] = {}
        self._troubles: dict[str, list[Trouble]] = {}
        self._speakers: dict[int, SimProcess] = {}  # by connection; a new life has a new one
        each = self.settings.gpus_per_process
        self.processes = [
            self._process(i // each, cluster[i : i + each]) for i in range(0, len(cluster), each)
        ]
        for fault in faults:
            self._plan(fault)
        for process in self.processes:
            self._begin(process, _JOIN_NS)

    def _process(self, number: int, profiles: Sequence[Profile]) -> SimProcess:
        settings = self.settings
        pace = replace(settings.pace, began_ns=START_NS)
        gpus = [
            PlayedGpu(profile, outcome_of, pace=pace, actuation_ns=settings.actuation_ns)
            for profile in profiles
        ]
        jitter = partial(self._rng.uniform, 0.75, 1.25)
        return SimProcess(f"worker:{number}", gpus, settings.worker_rest_ns, jitter)

    def _built(self, profile: Profile) -> Policy:
        """Build the policy for a profile, and record whether it looks at more than the queue's head."""
        policy = self._build(profile)
        self._sees_demand = self._sees_demand or bool(getattr(policy, "sees_demand", False))
        return policy

    # --- what will happen -----------------------------------------------------------------

    def offer(self, workload: Workload) -> list[OpenLoopClient]:
        """Share a workload out to open-loop clients, and return them."""
        n = self.settings.n_clients
        due_ns = workload.trace.due_ns + START_NS
        deadlines_ns = due_ns + workload.slo_ns
        clients = []
        for key in range(min(n, workload.trace.n)):
            mine = slice(key, None, n)
            client = OpenLoopClient(
                key, due_ns[mine], deadlines_ns[mine], self._link(f"client:{key}", "in"),
                every_ns=self.settings.send_every_ns, played=self._played(),
                min_accuracy=None if workload.min_accuracy is None else workload.min_accuracy[mine],
                priority=None if workload.priority is None else workload.priority[mine],
            )  # fmt: skip
            clients.append(client)
            self.join(client)
        self._end_ns = int(deadlines_ns.max()) + _GRACE_NS
        return clients

    def join(self, client: SimClient) -> SimLink:
        """Make a client send HELLO before the trace begins; return its way to the router."""
        name = f"client:{client.key}"
        self.clients[client.key] = client
        self.ways_back[client.key] = self._link(name, "out")
        self.core.handle(ClientJoined(client.key, client.key + 1), self.now_ns)
        return self._link(name, "in")

    def reconnect(self, client: Connecting) -> None:
        """Replace a client's connection; what was under way on the old one is lost."""
        del self.clients[client.key]
        self._n_connections += 1
        client.key = key = 1_000_000 + self._n_connections
        self.clients[key] = client
        name = f"client:{client.number}"
        self.ways_back[key] = self._link(name, f"{key}/out")
        client.connected(self._link(name, f"{key}/in"))

    def later(self, at_ns: int, act: Callable[[int], None]) -> None:
        """Call `act` with the instant, when it comes."""
        self._serial += 1
        heappush(self._agenda, (at_ns, self._serial, act))

    def _plan(self, fault: Fault) -> None:
        """Apply a fault when its time comes; links know trouble on the way beforehand."""
        fault.check([len(process.gpus) for process in self.processes], self.settings.n_clients)
        trouble = fault.trouble(START_NS)
        if trouble is None:
            self.later(START_NS + fault.at_ns, partial(fault.strike, self))
        else:
            self._troubles.setdefault(fault.peer, []).append(trouble)

    def _played(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """Return when a live run's queries were sent and read, if its machine is reproduced."""
        machine = self.settings.machine
        if machine is None:
            return None
        sent_ns, read_ns = machine.sent_ns, machine.read_ns
        return np.where(sent_ns < 0, -1, sent_ns + START_NS), np.where(read_ns < 0, -1, read_ns + START_NS)

    def _link(self, name: str, way: str) -> SimLink:
        """Return one direction of a connection of the peer `name`; both directions share its troubles."""
        machine = self.settings.machine
        if machine is not None:
            back = machine.to_clients if name.startswith("client") else machine.to_workers
            series = back if way.endswith("in") or name.startswith("client") else machine.from_workers
            return series.link(START_NS, tuple(self._troubles.get(name, ())))
        return SimLink(self.settings.way, f"{self._seed}/{name}/{way}", tuple(self._troubles.get(name, ())))

    # --- the loop -------------------------------------------------------------------------

    def run(self, until_ns: int | None = None) -> None:
        """Let time pass: until everything is answered, or until an instant of the router's clock."""
        end_ns = self._end_ns if until_ns is None else until_ns
        agenda, mail, clients = self._agenda, self._mail, tuple(self.clients.values())
        while True:
            router_ns = self._wake_ns
            if mail and mail[0][0] < router_ns:
                router_ns = mail[0][0]
            for client in clients:
                if client.next_ns < router_ns:
                    router_ns = client.next_ns
            if router_ns < self._rest_until_ns:
                router_ns = self._rest_until_ns
            if self._passes_ns is not None:
                router_ns = self._played_pass_ns(router_ns)
            at_ns = agenda[0][0]
            if at_ns <= router_ns:
                if at_ns >= end_ns:
                    break
                self.now_ns = at_ns
                heappop(agenda)[2](at_ns)
            else:
                if router_ns >= end_ns:
                    break
                self.now_ns = router_ns
                if self._may_wait(router_ns):
                    self._rest_until_ns = router_ns + self.settings.router_rest_ns
                    continue
                self._pass(router_ns)
                if until_ns is None and self._is_over():
                    break

    def _played_pass_ns(self, due_ns: int) -> int:
        """Return when a live router's loop made its next pass; after its last one, when a pass is due."""
        assert self._passes_ns is not None, "called only if a live run is reproduced"
        place = bisect_left(self._passes_ns, max(due_ns, self._rest_until_ns))
        return self._passes_ns[place] if place < len(self._passes_ns) else due_ns

    def _may_wait(self, now_ns: int) -> bool:
        """Return whether a pass now would only admit queries that cannot change anything yet.

        Before its next wake the core has nothing to do, whatever joins the queue behind its head. So such a
        pass is skipped, which saves half the cost of a run, and the next one admits its queries too. Not
        under a policy that sees demand, because that depends on the parts in which queries come. Messages
        that are read together say less of their client's way, which is known some of them later.
        """
        queue = self.core.model.queue
        if self._wake_ns <= now_ns or not queue or self._sees_demand or self.on_pass is not None:
            return False
        if self._mail and self._mail[0][0] <= now_ns:
            return False
        head = queue.head()
        assert head is not None, "a queue with a length has a head"
        room = self._max_queries - len(queue) - self.core.ledger.in_flight
        for client in self.clients.values():
            if client.next_ns <= now_ns and not client.may_wait(now_ns, head[0], room):
                return False
        return True

    def _is_over(self) -> bool:
        is_idle = not self.core.ledger.in_flight and not self.core.model.queue
        clients = self.clients.values()
        return is_idle and all(one.next_ns == FAR_NS and not one.has_unread for one in clients)

    def _pass(self, now_ns: int) -> None:
        """Do what the live router does when it wakes: read what has arrived, decide once, act."""
        core, mail = self.core, self._mail
        is_busy = False
        for client in self.clients.values():
            if client.next_ns <= now_ns or client.has_unread:
                for read_ns, event in client.arrived(now_ns):
                    core.handle(event, read_ns)
                is_busy = True
        while mail and mail[0][0] <= now_ns:
            _, _, take, message = heappop(mail)
            take(message, now_ns)
            is_busy = True
        actions = core.advance(now_ns)
        if self.on_pass is not None:
            self.on_pass(now_ns, actions)
        if actions:
            self._carry_out(actions, now_ns)
        wake_ns = core.next_wake_ns()
        self._wake_ns = FAR_NS if wake_ns is None else wake_ns
        if is_busy:
            self._rest_until_ns = now_ns + self.settings.router_rest_ns
        self.n_passes += 1

    def _carry_out(self, actions: list[Action], now_ns: int) -> None:
        lost: list[int] = []
        gone: list[int] = []
        arrivals: dict[int, tuple[int, ...]] = {}  # a client's answers of one pass share a message
        for action in actions:
            if isinstance(action, Answer):
                key = action.client
                if key not in self.clients:  # its connection broke
                    gone.append(key)
                    continue
                instants = arrivals.get(key)
                if instants is None:
                    instants = arrivals[key] = self.ways_back[key].arrivals(now_ns)
                for at_ns in instants:
                    self.clients[key].answered(action, at_ns)
            elif isinstance(action, Dispatch):
                peer = action.peer
                if not self._say(peer, action.batch, now_ns):
                    lost.append(peer)
            elif isinstance(action, Fence):
                self._say(action.peer, _SAY_HELLO, now_ns)
            elif isinstance(action, Released):
                self._release(action.peer, now_ns)
            elif isinstance(action, Complaint):
                log.error("%s", action.reason)
        for key in lost:
            self._lose(key, now_ns)
        for key in gone:
            self.core.handle(ClientLeft(key), now_ns)

    # --- the router's side of the workers' protocol, as in `router.serve` -----------------

    def _hello(self, process: SimProcess, now_ns: int) -> None:
        """Register a worker process, and forget its earlier life."""
        for key in [peer.key for peer in self.core.peers.values() if peer.name == process.name]:
            self._lose(key, now_ns)
        self._next_epoch += 1
        profiles = [gpu.profile for gpu in process.gpus]
        self.core.handle(WorkerJoined(process.key, process.name, self._next_epoch, profiles), now_ns)
        self._say(process.key, Control(Kind.WELCOME, {"epoch": self._next_epoch}), now_ns)

    def _heard(self, event: WorkerHeard, now_ns: int) -> None:
        """Handle and answer a PING; a process that is unknown, or no longer known, must send HELLO."""
        if event.peer in self.core.peers:
            self.core.handle(event, now_ns)
            self._say(event.peer, _PONG, now_ns)
        else:
            self._say(event.peer, _SAY_HELLO, now_ns)

    def _lose(self, key: int, now_ns: int) -> None:
        self.core.handle(WorkerLeft(key, orderly=False), now_ns)

    def _say(self, key: int, message: Inbound, now_ns: int) -> bool:
        """Send to a worker process; False if its connection is known to be broken."""
        process = self._speakers.get(key)
        if process is None:
            return False
        if process.is_alive:  # otherwise the router has not noticed yet
            for at_ns in process.way_in.arrivals(now_ns):
                process.inbox.append((at_ns, message))
            self._schedule(process)
        return True

    # --- the worker processes -------------------------------------------------------------

    def _begin(self, process: SimProcess, now_ns: int) -> None:
        """Start a life of a worker process, on a new connection."""
        self._n_lives += 1
        process.key = key = self._n_lives
        process.way_in = self._link(process.name, f"{key}/in")
        process.way_out = self._link(process.name, f"{key}/out")
        process.act = partial(self._step, process)
        process.begin(now_ns)
        self._speakers[key] = process
        self._schedule(process)

    def _schedule(self, process: SimProcess) -> None:
        at_ns = process.next_pass_ns()
        if at_ns < process.at_ns:
            process.at_ns = at_ns
            self._serial += 1
            heappush(self._agenda, (at_ns, self._serial, process.act))

    def _step(self, process: SimProcess, now_ns: int) -> None:
        if now_ns != process.at_ns:
            return  # it was rescheduled
        process.at_ns = FAR_NS
        if now_ns >= process.frozen_until_ns:
            for message in process.step(now_ns):
                self._carry(process, message, now_ns)
        self._schedule(process)

    def _carry(self, process: SimProcess, message: Message, now_ns: int) -> None:
        """Send a worker process's message to the router, which reads it as its server would."""
        key = process.key
        if isinstance(message, Done):
            self._tell(process, self.core.handle, Finished(key, message), now_ns)
        elif isinstance(message, Ping):
            self._tell(process, self._heard, WorkerHeard(key), now_ns)
        elif isinstance(message, Pull):
            self._tell(process, self.core.handle, Pulled(key, message), now_ns)
        else:
            assert isinstance(message, Control), "a worker says nothing else"
            assert message.kind is Kind.HELLO, "a simulated worker is drained by the router"
            self._tell(process, self._hello, process, now_ns)

    def _tell(
        self, process: SimProcess, take: Callable[[Any, int], None], message: Event | SimProcess, now_ns: int
    ) -> None:
        """Send to the router, where `take` reads it."""
        for at_ns in process.way_out.arrivals(now_ns):
            self._serial += 1
            heappush(self._mail, (at_ns, self._serial, take, message))

    # --- what faults do -------------------------------------------------------------------

    def kill(self, i: int, now_ns: int, *, silently: bool) -> None:
        """End a worker process. The router finds its connection broken, or, if silently, only misses it."""
        process = self.processes[i]
        if not process.is_alive:
            return
        key = process.key
        process.die()
        if not silently:
            # A send will fail: that of the next directive, or of the next PING.
            del self._speakers[key]
            seen_ns = now_ns + self._rng.randrange(HEARTBEAT_NS)
            self.later(seen_ns, lambda at_ns: self._mail_in(at_ns, self._left, key))

    def _left(self, key: int, now_ns: int) -> None:
        self._lose(key, now_ns)

    def _mail_in(self, at_ns: int, take: Callable[[Any, int], None], message: Any) -> None:
        self._serial += 1
        heappush(self._mail, (at_ns, self._serial, take, message))

    def drain(self, i: int, now_ns: int) -> None:
        """Make the router give a worker process no more work, and release it when it holds none."""
        process = self.processes[i]
        if process.is_alive:
            self._mail_in(now_ns, self._drained, process.key)

    def _drained(self, key: int, now_ns: int) -> None:
        self.core.handle(DrainWorker(key, None), now_ns)

    def _release(self, key: int, now_ns: int) -> None:
        """Release a drained worker process: it sends BYE and ends."""
        process = self._speakers.pop(key, None)
        if process is not None and process.is_alive:
            process.die()
        self.core.handle(WorkerLeft(key, orderly=True), now_ns)

    def revive(self, i: int, now_ns: int) -> None:
        """Start a killed worker process again, under its old name."""
        process = self.processes[i]
        if not process.is_alive:
            self._begin(process, now_ns)

    def freeze(self, i: int, now_ns: int, for_ns: int) -> None:
        """Stop a worker process for a while; its GPUs continue with what they hold."""
        process = self.processes[i]
        process.frozen_until_ns = max(process.frozen_until_ns, now_ns + for_ns)

    def slow(self, i: int, factor: float, slot: int | None = None) -> None:
        """Make GPUs take `factor` times what their profile says, for batches that start from now on."""
        for number, gpu in enumerate(self.processes[i].gpus):
            if slot is None or slot == number:
                gpu.factor = factor
