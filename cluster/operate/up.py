"""Start a cluster on this machine: a keeper, held by this process until everything is ready."""

from __future__ import annotations

import base64
import contextlib
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.host import folder as folders
from cluster.host.config import KEEP, KEEPER_LOG, KEPT, tail_of
from cluster.operate.engine import here
from cluster.operate.health import ask_router, problems, seen_by
from cluster.operate.rolling import RollingOperator
from cluster.operate.supervised import SupervisedCluster
from cluster.remote.shell import RemoteError
from cluster.spec.plan import differences, name_option, python_path
from cluster.spec.roles import ROUTERS_FILE, HostPlan, routers_file, timing
from superserve.errors import ConfigError, ProcessError
from superserve.net.connection import ask_status
from superserve.roles import local
from superserve.roles.local import Liveness, LocalCluster, Phase, RoleState

if TYPE_CHECKING:
    from typing import NoReturn, Self

    from cluster.operate.engine import SupervisorEngine
    from cluster.spec.plan import Plan
    from superserve.status import RouterStatus

_STOP_S = 30.0  # beyond the time that roles may take to stop
_REGISTERED_S = 10.0  # workers announce themselves once they are registered, so this takes a moment
_ASK_AGAIN_S = 0.03
_TAIL_LINES = 20


class StartError(ProcessError):
    """A cluster was not ready in time, or was interrupted; everything has been stopped.

    Attributes:
        cluster: Its state then; None if unknown.
    """

    def __init__(self, message: str, cluster: LocalCluster | None = None) -> None:
        super().__init__(message)
        self.cluster = cluster


@dataclass(frozen=True, slots=True)
class Up:
    """A cluster that runs.

    Attributes:
        cluster: As in its state file, with its roles as its keeper reports them.
        status: The router's report.
        is_new: Whether it was started now.
        tidied: The cluster of a dead keeper under this name, whose remains were removed.
        restarted: The roles that had ended, for example by a drain, and were started again.
    """

    cluster: LocalCluster
    status: RouterStatus
    is_new: bool
    tidied: LocalCluster | None = None
    restarted: tuple[str, ...] = ()


def up(plan: Plan) -> Up:
    """Run the plan's cluster on this machine; return when every worker is registered.

    Raises:
        StartError: It did not become ready, or was interrupted; nothing of it runs.
        ConfigError: A cluster with this name runs that differs, or is being started or stopped.
        ProcessError: A cluster with this name runs, and a role that had ended does not come back.
    """
    folder = local.cluster_folder(plan.name)
    tidied = folders.tidy(folder)
    there = local.load(folder)
    if there is not None:
        return _already(there, plan)
    cluster, status = _start(plan, folder)
    return Up(cluster, status, is_new=True, tidied=tidied)


def _already(there: LocalCluster, plan: Plan) -> Up:
    """Return the running cluster, if it is the requested one."""
    if there.liveness() is Liveness.ELSEWHERE:
        raise ConfigError(
            f"the cluster {there.name!r} {local.remains(there)}; choose another --name, or remove "
            f"{local.cluster_folder(there.name)} if that machine is gone"
        )
    if there.phase is not Phase.RUNNING:
        raise ConfigError(
            f"the cluster {there.name!r} is {there.phase} (keeper pid {there.keeper.pid}), by another "
            f"command: try again when that has ended"
        )
    if different := differences(there.options, plan.options):
        lines = "\n  ".join(different)
        raise ConfigError(
            f"the cluster {there.name!r} runs already, and differs:\n  {lines}\n"
            f"stop it first with `cluster down{name_option(there.name)}`, or start this one beside it with "
            f"`cluster up --name OTHER`"
        )
    restarted = _start_ended(there, plan)
    there = seen_by(there, here(there.name, there).roles())
    status = ask_router(there)
    if status is None or problems(there, status):
        raise ConfigError(
            f"the cluster {there.name!r} runs already, and is not well: see "
            f"`cluster status{name_option(there.name)}`; restart it with `cluster down` and `cluster up`"
        )
    return Up(there, status, is_new=False, restarted=restarted)


def _start_ended(there: LocalCluster, plan: Plan) -> tuple[str, ...]:
    """Start roles that were drained or given up; return their names.

    Raises:
        ProcessError: One of them does not come back; the others run.
    """
    try:
        operator = RollingOperator(SupervisedCluster(here(there.name, there)), lambda _: None)
        return tuple(operator.start_ended(plan.ready_timeout_s))
    except ProcessError as error:
        raise ProcessError(f"the cluster {plan.name!r} runs, but not all that had ended: {error}") from error


# --- the hold on a keeper ---------------------------------------------------------------------


class _Ports:
    """Free ports of loopback, reserved until a role binds them.

    A bound socket that does not listen keeps its port from processes that ask for any free port, but not from
    a role that binds this very port: both set SO_REUSEADDR. The keeper holds the sockets for as long as it
    runs, so that a restarted router finds its ports free.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def take(self) -> int:
        """Return a free port."""
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        self._sockets.append(held)
        return int(held.getsockname()[1])

    def descriptors(self) -> list[int]:
        """Return the sockets that hold the ports."""
        return [held.fileno() for held in self._sockets]

    def close(self) -> None:
        """Close them in this process."""
        for held in self._sockets:
            held.close()


class _Hold:
    """A keeper that is not kept yet: however this process ends, the keeper ends too.

    As a context manager it starts the keeper; a block that fails ends it.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.engine: SupervisorEngine = here(plan.name, roles=[role.name for role in plan.roles])
        self._plan = plan
        self._folder = folder
        self._control, self._its = socket.socketpair()
        self._is_ours = False
        self._files: dict[str, str] = {}

    def __enter__(self) -> Self:
        ports = _Ports()
        try:
            roles, clients, workers = self._plan.placed(ports.take, str(self._folder))
            client, worker = ",".join(clients), ",".join(workers)
            if len(clients) > 1:
                content = routers_file(clients, workers)
                self._files[ROUTERS_FILE] = base64.b64encode(content).decode()
            about = {
                "name": self._plan.name, "options": self._plan.options, "client_endpoint": client,
                "worker_endpoint": worker,
            }  # fmt: skip
            patience = replace(timing(), ready_timeout_s=self._plan.ready_timeout_s)
            plan = HostPlan(
                str(self._folder), sys.executable, python_path(), roles, cwd=str(Path.cwd()),
                timing=patience, local=about,
            )  # fmt: skip
            self._started(self.engine, plan, ports)
            self._is_ours = True
        except BaseException:
            self._end()
            raise
        finally:
            ports.close()
            self._its.close()
        return self

    def _started(self, engine: SupervisorEngine, plan: HostPlan, ports: _Ports) -> None:
        (host,) = engine.record.host_names
        try:
            engine.ask(
                host, "apply", plan=asdict(plan), files=self._files, hold=self._its.fileno(),
                kept_open=ports.descriptors(),
            )  # fmt: skip
        except RemoteError as error:
            words = str(error).removeprefix(f"{host}: ")
            if "by another command" in words:
                raise ConfigError(f"{words}: try again later") from error
            raise StartError(words) from error

    def keep(self) -> None:
        """Release the keeper; StartError if it has ended meanwhile."""
        self._control.settimeout(_STOP_S)
        with contextlib.suppress(OSError):
            self._control.sendall(KEEP)
            if self._control.recv(len(KEPT)) == KEPT:
                self._control.close()
                return
        raise StartError("it was stopped as soon as it was ready")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._end()
        self._control.close()

    def _end(self) -> None:
        """Make sure that the keeper ends, and wait for it; an interrupt ends only the wait.

        A keeper that another command has started meanwhile is left alone, and so are its files. A keeper of
        ours that has not answered yet ends by itself, because its socket has no peer any more.
        """
        there = local.load(self._folder) if self._is_ours else None
        stop_s = timing().router_stop_s + timing().worker_stop_s + _STOP_S
        if there is not None:
            there.keeper.signal(signal.SIGTERM)
            folders.end([there.keeper], wait_s=stop_s)
        self._control.close()
        if self._is_ours:
            folders.tidy_unowned(self._folder)


def _start(plan: Plan, folder: Path) -> tuple[LocalCluster, RouterStatus]:
    # What the user has ignored, as nohup does SIGHUP, stays ignored.
    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in heard}
    try:
        with _Hold(plan, folder) as hold:
            cluster = _ready(hold.engine, plan, folder)
            status = _registered(cluster)
            hold.keep()
    except KeyboardInterrupt:
        folders.forget_unused(folder)
        raise StartError("interrupted; everything has been stopped, and nothing was left behind") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return replace(cluster, phase=Phase.RUNNING), status


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _ready(engine: SupervisorEngine, plan: Plan, folder: Path) -> LocalCluster:
    """Return the cluster once every role has announced that it is ready.

    Raises:
        StartError: One was given up, or was not ready in time, or the keeper ended.
    """
    give_up_s = time.monotonic() + plan.ready_timeout_s
    while True:
        (host,) = engine.roles()
        there = local.load(folder)
        if host.error:
            raise StartError(f"{host.error}; everything has been stopped", there)
        if host.supervisord is None or there is None or there.phase is not Phase.STARTING:
            raise _ended(folder, there)
        cluster = seen_by(there, (host,))
        states = [role.state for role in cluster.roles]
        if all(state is RoleState.RUNNING for state in states):
            return cluster
        if RoleState.FATAL in states:
            raise StartError("not every process became ready; everything has been stopped", cluster)
        if time.monotonic() > give_up_s:
            late = _given_up(cluster, f"was not ready within {plan.ready_timeout_s:g} s")
            raise StartError("not every process became ready; everything has been stopped", late)
        time.sleep(_ASK_AGAIN_S)  # between two questions to another process


def _ended(folder: Path, there: LocalCluster | None) -> StartError:
    """Return the error for a keeper that ended, or is ending, before it was kept."""
    path = folder / KEEPER_LOG
    lines = tail_of(path, _TAIL_LINES)
    if there is not None and there.phase is Phase.STARTING:
        return StartError(f"the keeper ended unexpectedly; its log ({path}) ends:\n" + "\n".join(lines))
    return StartError("it was asked to stop; everything has been stopped")


def _given_up(cluster: LocalCluster, why: str) -> LocalCluster:
    """Return the cluster with every role that is not ready as FATAL, with `why` and the end of its log."""
    roles = []
    for role in cluster.roles:
        if role.state is not RoleState.RUNNING:
            lines = "\n".join(tail_of(role.log, _TAIL_LINES))
            pid = "" if role.process is None else f" (pid {role.process.pid})"
            ends = f"ends:\n{lines}" if lines else "is empty"
            words = f"{role.name}{pid} {why}; its log ({role.log}) {ends}"
            role = replace(role, state=RoleState.FATAL, process=None, why=role.why or words)
        roles.append(role)
    return replace(cluster, roles=tuple(roles))


def _registered(cluster: LocalCluster) -> RouterStatus:
    """Return the router's STATUS once it shows every worker ready.

    Raises:
        StartError: It did not within 10 s.
    """
    deadline_s = time.monotonic() + _REGISTERED_S
    while True:
        status = ask_status(cluster.client_endpoint, timeout_s=_REGISTERED_S)
        wrong = problems(cluster, status)
        if not wrong:
            return status
        if time.monotonic() > deadline_s:
            raise StartError("; ".join(wrong) + "; everything has been stopped", cluster)
        time.sleep(_ASK_AGAIN_S)  # between two questions to another process
