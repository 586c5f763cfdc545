"""The poll loop around RouterCore, between its two sides.

One thread, one loop: wait, drain both sockets, let the core decide once, carry out its actions.
The sides turn messages into events and actions into messages; nothing is decided here.
No send ever blocks: what a peer cannot take at once is counted, and the peer is dropped.
"""

from __future__ import annotations

import gc
import logging
import select
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from router.core import RouterCore
from router.core.events import Answer, Complaint, CoreSettings, Dispatch, Fence, Released
from router.policies.registry import make_policy
from router.report.flight import DEFAULT_BYTES, FlightRecorder
from router.report.load import Load
from router.report.status import LoopFacts, status_of, summary_of
from router.serve.client_side import ClientSide
from router.serve.doors import Doors
from router.serve.gate import Gate, check_reach
from router.serve.listed import RouterList, ready_gpus
from router.serve.memories import RouterMemories
from router.serve.side import Serving
from router.serve.worker_side import WorkerSide
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.net.context import new_context
from superserve.net.sockets import rest
from superserve.shared.offers import is_allowed

if TYPE_CHECKING:
    from pathlib import Path

    import zmq

    from router.core.events import Action
    from router.report.metrics import RouterMetrics
    from router.serve.recording import Recorder
    from router.serve.settings_file import SettingsFile
    from superserve.status import RouterStatus

log = logging.getLogger("router")

_GOODBYE_MS = 1_000
"""Most time that a stopping router waits for its last answers and BYEs to leave this machine."""
_TELL_NS = 50 * MS  # least time between two counts of the GPUs that get work
_COLLECT_NS = 100 * MS  # least time between two collections of garbage by idle passes


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the router listens and which policy it runs.

    Attributes:
        client_endpoint: Where clients connect; tcp port 0 or * lets the system pick.
        worker_endpoint: Where workers connect.
        policy: As `router.policies.registry.make_policy` takes it.
        drain_timeout_ns: How long a SIGTERM waits for queued queries.
        keys: The folder of keys; see `superserve.net.keys`. Without it, any peer is served.
        secret: The file with the router's secret, if it is not in that folder.
        is_open: Without keys, bind even if other machines can reach the sockets.
        spin_ns: How long after the last message the loop looks again at once instead of sleeping. It takes a
            whole processor meanwhile, and what arrives wakes no thread.
        shared_memory: Whether clients on this host may share memory with large payloads; None asks the
            environment. See `superserve.shared`.
        flight_bytes: Most bytes of the record of the last minutes; 0 keeps none.
        file: Where policy, margin and bounds come from, and change while it runs; None for those above.
        routers: The file with the list of the cluster's routers; None if this is the only one.
    """

    client_endpoint: str = "tcp://127.0.0.1:*"
    worker_endpoint: str = "tcp://127.0.0.1:*"
    policy: str = "planfit"
    core: CoreSettings = field(default_factory=CoreSettings)
    drain_timeout_ns: int = 5_000 * MS
    keys: Path | None = None
    secret: Path | None = None
    is_open: bool = False
    spin_ns: int = 0
    shared_memory: bool | None = None
    flight_bytes: int = DEFAULT_BYTES
    file: SettingsFile | None = None
    routers: Path | None = None


class RouterServer:
    """The live router. `open()` binds, `run()` serves until `stop()`, then closes.

    Args:
        settings: Where to listen and what to run.
        recorder: Writes every event and directive, for replay; None records nothing.
        metrics: Receives the loop's figures for scrapes; None exports nothing.

    Attributes:
        core: Decides.
        clients: The client side.
        workers: The worker side.
        counts: Messages, loops and faults, by name.
        loop_ns: Time spent in passes.
    """

    def __init__(
        self, settings: ServerSettings, recorder: Recorder | None = None, metrics: RouterMetrics | None = None
    ) -> None:
        self.settings = settings
        self.core = RouterCore(partial(make_policy, settings.policy), settings.core)
        self.loop_ns = 0
        n_bytes = settings.flight_bytes
        self._flight = FlightRecorder(n_bytes) if n_bytes else None
        self._serving = serving = Serving(self.core, settings.policy, recorder, self._status, self._flight)
        self.counts = serving.counts
        serving.memories = RouterMemories(serving.counts, is_allowed=is_allowed(settings.shared_memory))
        self.workers = WorkerSide(serving, settings.core.heartbeat_ns, self._model_changed)
        self.clients = ClientSide(serving, self.workers)
        self._list = RouterList(settings.routers)
        self._told_ns = 0
        self._load = Load()
        self._recorder = recorder
        self._metrics = metrics
        self._context: zmq.Context[zmq.Socket[bytes]] = new_context()
        self._gate_version = 0
        self._is_stopping = False
        self._collected_ns = 0

    @property
    def client_endpoint(self) -> str:
        """Where clients connect; "" before `open`."""
        return self.clients.endpoint

    @property
    def worker_endpoint(self) -> str:
        """Where workers connect; "" before `open`."""
        return self.workers.endpoint

    # --- opening and closing --------------------------------------------------------------

    def open(self) -> None:
        """Bind both sockets.

        Raises:
            ConfigError: An endpoint is malformed, taken, or open to other machines without keys; or the
                folder of keys is malformed.
        """
        settings = self.settings
        context, keys = self._context, None
        gate: Gate | None = None
        with ExitStack() as undone:  # at a signal, too: what is bound would keep Python from ending
            undone.callback(context.destroy, 0)
            undone.callback(self.clients.unbind)
            self._list.load()
            self._serving.listed = self._list.listed
            if settings.keys is None and not settings.is_open:
                check_reach("--client-endpoint", settings.client_endpoint)
                check_reach("--worker-endpoint", settings.worker_endpoint)
            if settings.keys is not None:
                self._serving.gate = gate = Gate(context, settings.keys, settings.secret)
                gate.open()
                keys = gate.keys
                self.clients.admit_only(gate.clients)
                self.workers.admit_only(gate.workers)
            self.clients.bind(context, settings.client_endpoint, keys)
            self.workers.bind(context, settings.worker_endpoint, keys)
            self._doors = Doors((self.client_endpoint, self.worker_endpoint))
            undone.callback(self._doors.close)
            if gate is not None:
                gate.start({"client": self.clients.socket, "worker": self.workers.socket})
            undone.pop_all()

    def stop(self) -> None:
        """Ask `run` to drain and return. Safe in a signal handler."""
        self._is_stopping = True

    def close(self) -> None:
        """Send the peers BYE and close the sockets. `run` ends so; what has opened and cannot run must."""
        for side in (self.clients, self.workers):
            side.say_bye("the router stops")
        self._let_peers_read()
        self._doors.close()
        for side in (self.clients, self.workers):
            side.close(_GOODBYE_MS)
        if self._serving.gate is not None:
            self._serving.gate.close()
        if self._recorder is not None:
            self._recorder.close()
        self._context.term()

    def _let_peers_read(self) -> None:
        """Keep the connections open for a moment: a DEALER drops what it has not read when one breaks."""
        sides = (self.clients, self.workers)
        end_ns = time.monotonic_ns() + _GOODBYE_MS * MS // 2
        has_peers = bool(self.clients.connections or self.workers.connections)
        while has_peers and (left_ns := end_ns - time.monotonic_ns()) > 0:
            for side in sides:
                side.discard()  # messages that arrive now are not served
            self._await(left_ns)

    # --- the loop -------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop()` was called and the queue is empty, or the drain timeout is over."""
        # Objects that exist now live until the end: frozen, they are left out of later collections.
        gc.collect()
        gc.freeze()
        gc.disable()  # the hot path makes no cycles, and a collection would delay it; idle passes collect
        spin_ns = self.settings.spin_ns
        try:
            deadline_ns: int | None = None
            spin_until_ns = 0
            while True:
                began_ns = time.monotonic_ns()
                # Busy: messages during the rest share the next pass. Idle: the first one is served at once.
                if self._pass():
                    if spin_ns:
                        spin_until_ns = began_ns + spin_ns
                    else:
                        rest(began_ns)
                elif began_ns >= spin_until_ns:
                    self._await(self._timeout_ns())
                if self._is_stopping:
                    now_ns = time.monotonic_ns()
                    if deadline_ns is None:
                        self.clients.begin_drain(now_ns)
                        deadline_ns = now_ns + self.settings.drain_timeout_ns
                    core = self.core
                    if now_ns >= deadline_ns or not (core.queue or core.in_flight):
                        break
        finally:
            self.close()

    def _await(self, timeout_ns: int) -> None:
        """Wait until a side has something to read, or the time is up."""
        sides = (self.clients, self.workers)
        # ZeroMQ's descriptors are edge-triggered: ask for the events before you sleep on one.
        if timeout_ns > 0 and not any([side.is_readable() for side in sides]):  # noqa: C419  a generator is slower
            select.select(sides, (), (), timeout_ns / 1e9)

    def _timeout_ns(self) -> int:
        now_ns = time.monotonic_ns()
        latest_ns = 50 * MS  # an idle router checks keys, descriptors and `stop` this often
        for side in (self.workers, self.clients):
            ping_ns = side.next_ping_ns()
            if ping_ns is not None:
                latest_ns = min(latest_ns, ping_ns - now_ns)
        wake_ns = self.core.next_wake_ns()
        return max(0, latest_ns if wake_ns is None else min(latest_ns, wake_ns - now_ns))

    def _pass(self) -> int:
        """Drain every socket, decide once, act; return how many messages arrived."""
        began_ns = time.monotonic_ns()
        gate = self._serving.gate
        if gate is not None and gate.version != self._gate_version:
            self._gate_version = gate.version
            self.clients.expel(began_ns)
            self.workers.expel(began_ns)
        n_of_workers = self.workers.drain()
        n_of_clients = self.clients.drain()
        counts = self.counts
        counts["worker_messages"] += n_of_workers
        counts["client_messages"] += n_of_clients
        n = n_of_workers + n_of_clients
        now_ns = time.monotonic_ns()
        self.workers.ping_due(now_ns)
        self.clients.ping_due(now_ns)
        self._doors.look(now_ns)
        if self.settings.file is not None:
            self._look_at(self.settings.file, now_ns)
        if now_ns - self._told_ns >= _TELL_NS:
            self._tell_others(now_ns)
        if n == 0 and not self.core.ledger.batches and now_ns - self._collected_ns >= _COLLECT_NS:
            self._collected_ns = now_ns
            gc.collect(0)
        actions = self.core.advance(now_ns)
        if self._recorder is not None:
            self._recorder.advance(now_ns, actions)
        if actions:
            self._carry_out(actions)
            if self._flight is not None:
                self._flight.note(self.core, actions, now_ns)  # after the sends: they must not wait for it
        counts["loops"] += 1
        ended_ns = time.monotonic_ns()
        self.loop_ns += ended_ns - began_ns
        self._load.note(self.core, ended_ns)
        if self._metrics is not None:
            self._tell_metrics(self._metrics, actions, ended_ns - began_ns)
        return n

    def _look_at(self, file: SettingsFile, now_ns: int) -> None:
        """Take other settings that the file has, or keep those in force if they cannot be taken."""
        settings = file.look(now_ns)
        if settings is None:
            return
        try:
            self._serving.handle(settings.event(), now_ns)
        except ConfigError as error:
            file.refused(str(error))
            return
        self._serving.policy = settings.policy
        file.took(settings)

    def _tell_others(self, now_ns: int) -> None:
        """Tell clients again which routers there are, and how many GPUs this one has, if that changed.

        Workers hear of the routers alone.
        """
        self._told_ns = now_ns
        serving = self._serving
        n_gpus, is_new = ready_gpus(self.core), self._list.look(now_ns)
        serving.listed = self._list.listed
        if n_gpus != serving.n_gpus or is_new:
            serving.n_gpus = n_gpus
            if serving.listed.clients or is_new:
                self.clients.welcome_all()
        if is_new:
            self.workers.tell_routers(now_ns)

    def _carry_out(self, actions: list[Action]) -> None:
        workers = self.workers
        # All answers of a pass to one client leave as one message: each costs a system call.
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
                if not workers.dispatch(action):
                    lost.append(action.peer)
            elif isinstance(action, Fence):
                workers.refuse(action.peer, "say-hello", action.reason)
            elif isinstance(action, Released):
                workers.release(action.peer)
            elif isinstance(action, Complaint):
                log.error("%s", action.reason)
        send_results = self.clients.send_results
        for client, of_client in answers.items():
            send_results(client, of_client)
        # After the answers: the core requeues what the lost worker held, and the next pass dispatches it.
        for key in lost:
            workers.lose(key, time.monotonic_ns())

    def _model_changed(self) -> None:
        self.clients.welcome_all()

    # --- reports --------------------------------------------------------------------------

    def _facts(self) -> LoopFacts:
        serving = self._serving
        gate = serving.gate
        return LoopFacts(
            epoch=serving.epoch,
            policy=serving.policy,
            client_endpoint=self.clients.endpoint,
            worker_endpoint=self.workers.endpoint,
            loop_ns=self.loop_ns,
            model=serving.model,
            n_clients=len(self.clients.connections),
            counts=self.counts if gate is None else {**self.counts, **gate.counts()},
            load=self._load,
            settings_error="" if self.settings.file is None else self.settings.file.error,
        )

    def _status(self, now_ns: int) -> RouterStatus:
        gate = self._serving.gate
        keys = None if gate is None else gate.listed()
        return status_of(self.core, self._facts(), now_ns, origins=self.workers.origins(), keys=keys)

    def _tell_metrics(self, metrics: RouterMetrics, actions: list[Action], took_ns: int) -> None:
        metrics.passed(actions, took_ns)
        if metrics.is_wanted:
            reference = self._serving.reference
            names = [] if reference is None else [subnet.name for subnet in reference.subnets]
            metrics.give(summary_of(self.core, self._facts(), time.monotonic_ns()), names)
