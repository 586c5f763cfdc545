"""Start the roles of a plan in order, watch them, start again what crashed, stop all.

    IDLE -start-> STARTING -announced-> READY -crashed-> WAITING -start-> STARTING ...
                     +-------gave up------> FATAL <---gave up---+
                                         READY -left-> STOPPED
    READY, STARTING -stop-> STOPPING -left-> STOPPED        WAITING -stop-> STOPPED
    STOPPED, FATAL -start-> STARTING

The router comes first; workers are started once it has said where they connect. A role that
ends before it was ever ready is FATAL at once: what is wrong with it, it will be again. One
that crashes after a good start is started again after half a second, and after twice as long
each further time, five times in a row at most; a minute of good service forgets the past.
A router that is started again gets the ports it had, so that clients and workers find it.

An operator may order a role to stop, and to start. Whatever ends a role that was told to stop,
it has stopped; what had happened to one before it was told to start is forgotten.

The supervisor is asked, by `step`, and waits for nothing: whoever owns it has the loop.
"""

from __future__ import annotations

import logging
import signal
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING

from cluster.spec.plan import METRICS_PORT
from superserve.clock import MS, SECOND
from superserve.errors import ProcessError
from superserve.roles.local import ProcessId, Role, RoleState

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cluster.host.launcher import Handle, Launcher
    from cluster.spec.plan import Plan, RolePlan
    from superserve.clock import Clock

log = logging.getLogger(__name__)

MAX_RESTARTS_IN_A_ROW = 5
"""After so many a role is FATAL: something is wrong that starting does not mend."""

FIRST_BACKOFF_NS = 500 * MS
"""How long a crashed role waits before its first restart; twice as long each further time."""

GOOD_SERVICE_NS = 60 * SECOND
"""A role that served so long starts with a clean slate when it crashes."""

ROUTER_STOP_S, WORKER_STOP_S = 8.0, 5.0
"""How long they have after SIGTERM: the router drains for up to 5 s, a worker for up to 4."""

_POLL_NS = 50 * MS  # while something starts: ends and signals of running roles wake the owner's loop
_MAX_STOPPING_AT_ONCE = 64


class RoleEvent(Enum):
    """What changes a role's state."""

    START = "start"
    ANNOUNCED = "announced"
    CRASHED = "crashed"  # and will be started again
    LEFT = "left"  # ended as told
    STOP = "stop"
    GAVE_UP = "gave up"


TRANSITIONS: dict[tuple[RoleState, RoleEvent], RoleState] = {
    (RoleState.IDLE, RoleEvent.START): RoleState.STARTING,
    (RoleState.IDLE, RoleEvent.GAVE_UP): RoleState.FATAL,
    (RoleState.STARTING, RoleEvent.ANNOUNCED): RoleState.READY,
    (RoleState.STARTING, RoleEvent.CRASHED): RoleState.WAITING,
    (RoleState.STARTING, RoleEvent.GAVE_UP): RoleState.FATAL,
    (RoleState.READY, RoleEvent.CRASHED): RoleState.WAITING,
    (RoleState.READY, RoleEvent.LEFT): RoleState.STOPPED,
    (RoleState.READY, RoleEvent.GAVE_UP): RoleState.FATAL,
    (RoleState.WAITING, RoleEvent.START): RoleState.STARTING,
    (RoleState.WAITING, RoleEvent.GAVE_UP): RoleState.FATAL,
    (RoleState.STARTING, RoleEvent.STOP): RoleState.STOPPING,
    (RoleState.READY, RoleEvent.STOP): RoleState.STOPPING,
    (RoleState.WAITING, RoleEvent.STOP): RoleState.STOPPED,
    (RoleState.STOPPING, RoleEvent.LEFT): RoleState.STOPPED,
    (RoleState.STOPPED, RoleEvent.START): RoleState.STARTING,
    (RoleState.FATAL, RoleEvent.START): RoleState.STARTING,
}
"""A pair that is not here is a mistake of ours."""


def backoff_ns(n_in_a_row: int) -> int | None:
    """Return how long to wait before restart number `n_in_a_row`, from 1; None if there is none."""
    return None if n_in_a_row > MAX_RESTARTS_IN_A_ROW else FIRST_BACKOFF_NS << (n_in_a_row - 1)


class _Watched:
    """One role, and what became of it so far."""

    def __init__(self, plan: RolePlan, log_path: Path) -> None:
        self.plan = plan
        self.log_path = log_path
        self.state = RoleState.IDLE
        self.handle: Handle | None = None
        self.process: ProcessId | None = None
        self.was_ready = False  # since it was first started, or ordered to
        self.was_ordered = False
        self.n_restarts = 0
        self.n_in_a_row = 0
        self.since_ns = 0  # of the state
        self.due_ns = 0  # when it is started again, or has had its time to end
        self.why = ""
        self.metrics = ""  # HOST:PORT of its exporter, and from then on the port that it keeps
        self._history: list[str] = []

    def move(self, event: RoleEvent, now_ns: int) -> None:
        pair = (self.state, event)
        assert pair in TRANSITIONS, f"{self.plan.name}: {event} in {self.state}; before: {self._history}"
        self.state = TRANSITIONS[pair]
        self.since_ns = now_ns
        self._history = [*self._history[-9:], event.value]

    def snapshot(self) -> Role:
        return Role(
            self.plan.name, self.plan.kind, self.state, self.plan.serves, str(self.log_path), self.process,
            self.n_restarts, self.why, self.metrics,
        )  # fmt: skip


class Supervisor:
    """The roles of one plan.

    Args:
        plan: What to run.
        launcher: Where to run it.
        folder: Where each role's log goes.
        client_endpoint: Where the router is to bind for clients, at its first start.
        worker_endpoint: Where it is to bind for workers.
        clock: Of back-offs and timeouts.

    Attributes:
        client_endpoint: As given, until the router has said which port it got.
        worker_endpoint: As given, until the router has said which port it got.
    """

    def __init__(
        self,
        plan: Plan,
        launcher: Launcher,
        folder: Path,
        *,
        client_endpoint: str,
        worker_endpoint: str,
        clock: Clock,
    ) -> None:
        self.client_endpoint = client_endpoint
        self.worker_endpoint = worker_endpoint
        self._launcher = launcher
        self._clock = clock
        self._ready_timeout_ns = int(plan.ready_timeout_s * SECOND)
        self._watched = [_Watched(role, folder / f"{role.name}.log") for role in plan.roles]
        self._router = self._watched[0]
        self._is_bound = False
        assert self._router.plan.kind == "router", "a plan begins with the router"

    def roles(self) -> tuple[Role, ...]:
        """Return every role as it stands."""
        return tuple(role.snapshot() for role in self._watched)

    @property
    def is_ready(self) -> bool:
        """Whether every role is ready."""
        return all(role.state is RoleState.READY for role in self._watched)

    @property
    def has_failed(self) -> bool:
        """Whether a role is given up."""
        return any(role.state is RoleState.FATAL for role in self._watched)

    @property
    def is_bound(self) -> bool:
        """Whether the router has said which ports it got."""
        return self._is_bound

    def step(self) -> bool:
        """Look at every role once, and start what is due; return whether anything changed."""
        now_ns = self._clock.now_ns()
        before = [(role.state, role.process) for role in self._watched]
        for role in self._watched:
            self._look(role, now_ns)
        return before != [(role.state, role.process) for role in self._watched]

    def wait_ns(self) -> int | None:
        """Return how long nothing is to do here unless a child ends; None for ever."""
        now_ns = self._clock.now_ns()
        waits = [
            _POLL_NS if role.state is RoleState.STARTING else max(0, role.due_ns - now_ns)
            for role in self._watched
            if role.state in (RoleState.STARTING, RoleState.WAITING, RoleState.STOPPING)
        ]
        return min(waits, default=None)

    def give_up(self, why: str) -> None:
        """Make every role FATAL that is not ready, with `why` and the end of its log; for a start."""
        now_ns = self._clock.now_ns()
        for role in self._watched:
            if role.state is RoleState.STARTING:
                assert role.handle is not None, "it was started"
                role.handle.kill()
                self._end(role, RoleEvent.GAVE_UP, _quoted(role, why), now_ns)

    def stop(self) -> None:
        """Stop the router first, so that it answers what it holds, then all workers at once."""
        try:
            _stop_all([self._router], ROUTER_STOP_S)
            _stop_all([role for role in self._watched if role is not self._router], WORKER_STOP_S)
        finally:
            for role in self._watched:  # does nothing unless the above was interrupted
                if role.handle is not None:
                    role.handle.kill()

    # --- orders ---------------------------------------------------------------------------

    def order_stop(self, name: str) -> None:
        """Tell a role to end, and do not wait: a worker drains. One that has ended stays so.

        Raises:
            ProcessError: There is no such role, or it was never started.
        """
        role, now_ns = self._named(name), self._clock.now_ns()
        if role.state is RoleState.WAITING:
            self._end(role, RoleEvent.STOP, "stopped by an operator while it waited to be started", now_ns)
        elif role.state in (RoleState.STARTING, RoleState.READY):
            assert role.handle is not None, "it was started"
            role.move(RoleEvent.STOP, now_ns)
            stop_s = ROUTER_STOP_S if role is self._router else WORKER_STOP_S
            role.due_ns = now_ns + int(stop_s * SECOND)
            role.handle.terminate()
            log.info("%s: told to stop", name)
        elif role.state is RoleState.IDLE:
            raise ProcessError(f"{name}: expected a role that was started; it waits for the router")

    def order_start(self, name: str) -> None:
        """Start a role that has ended; one that runs, or will soon, is left alone.

        Raises:
            ProcessError: There is no such role, or it is ending just now.
        """
        role = self._named(name)
        if role.state is RoleState.STOPPING:
            raise ProcessError(f"{name}: expected a role that has ended; it is stopping: try again soon")
        if role.state not in (RoleState.STOPPED, RoleState.FATAL):
            return
        role.n_in_a_row, role.was_ready, role.was_ordered, role.why = 0, False, True, ""
        log.info("%s: told to start", name)
        self._start(role, self._clock.now_ns())

    def _named(self, name: str) -> _Watched:
        for role in self._watched:
            if role.plan.name == name:
                return role
        known = ", ".join(role.plan.name for role in self._watched)
        raise ProcessError(f"{name}: expected one of {known}")

    # --- one role -------------------------------------------------------------------------

    def _look(self, role: _Watched, now_ns: int) -> None:
        if role.state in (RoleState.STARTING, RoleState.READY):
            self._watch(role, now_ns)
        elif role.state is RoleState.IDLE:
            if role is self._router or self._router.state is RoleState.READY:
                self._start(role, now_ns)
        elif role.state is RoleState.STOPPING:
            self._watch_end(role, now_ns)
        elif role.state is RoleState.WAITING and now_ns >= role.due_ns:
            role.n_restarts += 1
            self._start(role, now_ns)

    def _start(self, role: _Watched, now_ns: int) -> None:
        endpoints = {
            "{client}": self.client_endpoint,
            "{worker}": self.worker_endpoint,
            METRICS_PORT: role.metrics.rpartition(":")[2] or "0",
        }
        argv = [endpoints.get(word, word) for word in role.plan.argv]
        role.move(RoleEvent.START, now_ns)
        try:
            role.handle = self._launcher.start(role.plan.name, argv, role.log_path)
        except ProcessError as error:
            self._crashed(role, str(error), now_ns)
            return
        role.process = ProcessId.of(role.handle.pid)
        log.info("%s: started as pid %d", role.plan.name, role.handle.pid)

    def _watch(self, role: _Watched, now_ns: int) -> None:
        """See whether a role became ready, ended, or takes too long."""
        assert role.handle is not None, "it was started"
        if role.state is RoleState.READY and role.handle.poll() == 0:
            role.handle.stop(0.0)  # reaps it
            self._end(role, RoleEvent.LEFT, "ended as told, with exit code 0", now_ns)
            return
        try:
            is_ready = role.handle.check()
        except ProcessError as error:
            self._crashed(role, str(error), now_ns)
            return
        if role.state is RoleState.STARTING:
            if is_ready:
                self._announced(role, now_ns)
            elif (role.was_ready or role.was_ordered) and now_ns - role.since_ns > self._ready_timeout_ns:
                role.handle.kill()
                timeout_s = self._ready_timeout_ns / SECOND
                self._crashed(role, _quoted(role, f"was not ready again within {timeout_s:g} s"), now_ns)

    def _watch_end(self, role: _Watched, now_ns: int) -> None:
        """See whether a role that was told to end has ended, or has had its time."""
        assert role.handle is not None, "it was started"
        if role.handle.poll() is not None:
            code = role.handle.stop(0.0)  # reaps it
            why = "ended as told, with exit code 0" if code == 0 else f"ended with {code} when told to stop"
            self._end(role, RoleEvent.LEFT, why, now_ns)
        elif now_ns >= role.due_ns:
            role.handle.kill()
            self._end(role, RoleEvent.LEFT, "did not end in time when told to stop, and was killed", now_ns)

    def _announced(self, role: _Watched, now_ns: int) -> None:
        assert role.handle is not None, "it was started"
        role.move(RoleEvent.ANNOUNCED, now_ns)
        role.was_ready = True
        log.info("%s: ready", role.plan.name)
        role.metrics = str(role.handle.ready.get("metrics", ""))
        if role is self._router:
            self._is_bound = True
            self.client_endpoint = str(role.handle.ready["client"])
            self.worker_endpoint = str(role.handle.ready["worker"])

    def _crashed(self, role: _Watched, why: str, now_ns: int) -> None:
        if role.state is RoleState.READY and now_ns - role.since_ns >= GOOD_SERVICE_NS:
            role.n_in_a_row = 0
        role.n_in_a_row += 1
        wait_ns = backoff_ns(role.n_in_a_row) if role.was_ready else None
        if wait_ns is None:
            self._end(role, RoleEvent.GAVE_UP, why, now_ns)
            return
        role.due_ns = now_ns + wait_ns
        self._end(role, RoleEvent.CRASHED, why, now_ns)

    def _end(self, role: _Watched, event: RoleEvent, why: str, now_ns: int) -> None:
        role.move(event, now_ns)
        role.process = None
        role.why = why
        log.warning("%s: %s: %s", role.plan.name, role.state, why)


def _quoted(role: _Watched, what: str) -> str:
    """Say what happened to a role, with the end of its log."""
    assert role.handle is not None, "it was started"
    lines = role.handle.tail()
    ends = f"ends:\n{lines}" if lines else "is empty"
    return f"{role.plan.name} (pid {role.handle.pid}) {what}; its log ({role.log_path}) {ends}"


def _stop_all(roles: Sequence[_Watched], timeout_s: float) -> None:
    """Stop roles at once; in the log stands which had to be killed."""
    running = [role for role in roles if role.handle is not None and role.handle.poll() is None]
    with ThreadPoolExecutor(_MAX_STOPPING_AT_ONCE) as pool:
        ends = [pool.submit(role.handle.stop, timeout_s) for role in running if role.handle is not None]
    for role, end in zip(running, ends, strict=True):
        if end.result() == -signal.SIGKILL:
            log.warning("%s: did not end within %g s of SIGTERM, and was killed", role.plan.name, timeout_s)
