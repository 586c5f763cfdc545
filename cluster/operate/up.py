"""Start a cluster on this machine: a keeper, and a hold on it until everything is ready."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cluster.host import folder as folders
from cluster.host.keeper import KEEP, KEEPER_LOG
from cluster.operate.health import ask_router, problems
from cluster.operate.operable import LocalOperable
from cluster.operate.rolling import RollingOperator
from cluster.spec.plan import differences, name_option
from superserve.errors import ConfigError, ProcessError
from superserve.net.connection import ask_status
from superserve.roles import local
from superserve.roles.local import Liveness, LocalCluster, Phase
from superserve.roles.processes import PARENT_PID_VARIABLE, READY_FD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import NoReturn

    from cluster.spec.plan import Plan

_STOP_S = 30.0  # a keeper that stops needs half of it at most
_REGISTERED_S = 10.0  # workers announce themselves when they are registered: a moment will do
_ASK_AGAIN_S = 0.05
_TAIL_BYTES = 8_192


class StartError(ProcessError):
    """A cluster was not ready in time, or was interrupted; everything has been stopped.

    Attributes:
        cluster: How it stood then; None if that is unknown.
    """

    def __init__(self, message: str, cluster: LocalCluster | None = None) -> None:
        super().__init__(message)
        self.cluster = cluster


@dataclass(frozen=True, slots=True)
class Up:
    """A cluster that runs.

    Attributes:
        cluster: What its state file says.
        status: What its router says.
        is_new: Whether it was started now.
        tidied: What a dead keeper had left under this name, and is gone now.
        restarted: The roles that had ended, by a drain say, and were started again.
    """

    cluster: LocalCluster
    status: dict[str, Any]
    is_new: bool
    tidied: LocalCluster | None = None
    restarted: tuple[str, ...] = ()


def up(plan: Plan) -> Up:
    """Have the plan's cluster run on this machine; return when every worker is registered.

    Raises:
        StartError: It did not become ready, or was interrupted; nothing of it runs.
        ConfigError: One runs under this name that differs, or that is being started or stopped.
        ProcessError: One runs under this name, and a role that had ended does not come back.
    """
    folder = local.cluster_folder(plan.name)
    tidied = folders.tidy(folder)
    there = local.load(folder)
    if there is not None:
        return _already(there, plan)
    cluster, status = _start(plan, folder)
    return Up(cluster, status, is_new=True, tidied=tidied)


def _already(there: LocalCluster, plan: Plan) -> Up:
    """Return the cluster that runs, if it is what is asked for."""
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
    restarted = _start_ended(plan)
    there = local.load(local.cluster_folder(plan.name)) or there
    status = ask_router(there)
    if status is None or problems(there, status):
        raise ConfigError(
            f"the cluster {there.name!r} runs already, and is not well: see "
            f"`cluster status{name_option(there.name)}`; start it anew with `cluster down` and `cluster up`"
        )
    return Up(there, status, is_new=False, restarted=restarted)


def _start_ended(plan: Plan) -> tuple[str, ...]:
    """Start what was drained or given up; return the names of those roles.

    Raises:
        ProcessError: One of them does not come back; the others run.
    """
    try:
        operator = RollingOperator(LocalOperable(plan.name), lambda _: None)
        return tuple(operator.start_ended(plan.ready_timeout_s))
    except ProcessError as error:
        raise ProcessError(f"the cluster {plan.name!r} runs, but not all that had ended: {error}") from error


# --- the hold on a keeper ---------------------------------------------------------------------


class _Hold:
    """A keeper that is not kept yet: whatever ends this process ends it too."""

    def __init__(
        self, keeper: subprocess.Popen[bytes], control: socket.socket, log_path: Path, log_start: int
    ) -> None:
        self._keeper = keeper
        self._control = control
        self._log_path = log_path
        self._log_start = log_start
        self._heard = b""

    def say(self, line: bytes) -> None:
        """Send a line; a keeper that is gone is noticed when it is listened to."""
        with contextlib.suppress(OSError):
            self._control.sendall(line)

    def hear(self, word: str, timeout_s: float) -> dict[str, Any]:
        """Return the keeper's next words, which are to be `word`.

        Raises:
            StartError: It failed, ended or was silent for so long.
            ConfigError: Another keeper has the folder.
        """
        said = self._line(timeout_s)
        if said["says"] == "held":
            raise ConfigError("this cluster is being started or stopped by another command: try again later")
        if said["says"] == "failed":
            cluster = LocalCluster.from_json(said["cluster"].encode(), "the keeper's last words")
            raise StartError(f"{said['why']}; everything has been stopped", cluster)
        assert said["says"] == word, f"expected {word}, the keeper said {said['says']}"
        return said

    def _line(self, timeout_s: float) -> dict[str, Any]:
        self._control.settimeout(timeout_s)
        while not self._heard.endswith(b"\n"):
            try:
                chunk = self._control.recv(1 << 20)
            except TimeoutError:
                self._lost(f"said nothing for {timeout_s:g} s")
            except OSError:
                chunk = b""
            if not chunk:
                self._lost("ended without a word")
            self._heard += chunk
        line, self._heard = self._heard, b""
        said: dict[str, Any] = orjson.loads(line)
        return said

    def _lost(self, what: str) -> NoReturn:
        with contextlib.suppress(OSError), self._log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(min(self._log_start, size), size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip()
            raise StartError(f"the keeper {what}; its log ({self._log_path}) ends:\n{lines}")
        raise StartError(f"the keeper {what}; it left no log ({self._log_path})")

    def end(self) -> None:
        """Make sure that it ends, kept or not, and wait for that.

        Interrupted, it ends the wait and not the keeper, which has been told by then.
        """
        self._control.close()
        self._keeper.terminate()
        try:
            self._keeper.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


@contextlib.contextmanager
def _held(plan: Plan, folder: Path) -> Iterator[_Hold]:
    """Start a keeper; it ends with the block if the block fails, whatever was said to it."""
    log_path = folder / KEEPER_LOG
    mine, its = socket.socketpair()
    with mine:
        with its:
            keeper, log_start = _spawn(plan.name, its.fileno(), log_path)
        hold = _Hold(keeper, mine, log_path, log_start)
        try:
            yield hold
        except BaseException:
            hold.end()
            raise
    keeper.returncode = 0  # it is nobody's child from now on, and not to be waited for


def _spawn(name: str, fd: int, log_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Return a keeper in a session of its own, and where in its log its words begin."""
    folders.make(log_path.parent)
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_THE_KEEPERS}
    try:
        with log_path.open("ab") as log:
            log_start = log.tell()
            keeper = subprocess.Popen(
                [sys.executable, "-m", "cluster.host.keeper", name, str(fd)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=(fd,),
                env={**environment, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise StartError(f"the keeper could not be started: {error}") from error
    return keeper, log_start


_NOT_THE_KEEPERS = (READY_FD_VARIABLE, PARENT_PID_VARIABLE)


def _start(plan: Plan, folder: Path) -> tuple[LocalCluster, dict[str, Any]]:
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _held(plan, folder) as hold:
            hold.say(plan.to_json() + b"\n")
            said = hold.hear("ready", plan.ready_timeout_s + _STOP_S)
            cluster = LocalCluster.from_json(said["cluster"].encode(), "the keeper's words")
            status = _registered(cluster)
            hold.say(KEEP)
            hold.hear("kept", _STOP_S)
    except KeyboardInterrupt:
        raise StartError("interrupted; everything has been stopped, and nothing was left behind") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
    kept = local.load(folder)
    if kept is None:
        raise StartError("somebody stopped it as soon as it was ready")
    return kept, status


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _registered(cluster: LocalCluster) -> dict[str, Any]:
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
