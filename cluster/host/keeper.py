"""`python -m cluster.host.keeper`: the process that holds a cluster's roles on this machine.

It is nobody's child for long: in a session of its own, it outlives the command that started
it and the terminal. The roles are its children and die with it, even by SIGKILL.

Whoever starts it holds a socket to it, and hands down the other end:

    launcher -> keeper    the plan, a line; then `keep`
    keeper -> launcher    {"says": "ready" | "kept" | "failed" | "held", ...}, a line each

Until `keep` is said, the socket's end is the launcher's: a launcher that is interrupted,
killed or crashes takes everything down with it, and nothing of it stays. From then on the
keeper runs until SIGTERM, which drains and stops all, and takes orders to stop or start one role
(`cluster/host/orders.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import select
import shutil
import signal
import socket
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson

from cluster.host.folder import HeldError, hold
from cluster.host.launcher import LocalLauncher
from cluster.host.orders import OrderDesk
from cluster.host.supervisor import Supervisor
from cluster.spec.plan import Plan, endpoint
from superserve.clock import MS, SECOND, MonotonicClock
from superserve.errors import ProcessError
from superserve.roles import local
from superserve.roles.local import LocalCluster, Phase, ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger("keeper")

KEEP = b"keep\n"
KEEPER_LOG = "keeper.log"
"""The file with this process's own words, in the cluster's folder."""

_SAY_TIMEOUT_S = 5.0  # a launcher that does not read for so long is as good as gone
_MAX_PLAN_BYTES = 1 << 20


class Keeper:
    """Runs one plan until it is told to stop, or until it fails before anybody wants to keep it.

    Attributes:
        is_abandoned: Whether the launcher went away before it said `keep`.
    """

    def __init__(self, plan: Plan, folder: Path, control: socket.socket, wake_fd: int) -> None:
        self.is_abandoned = False
        self._plan = plan
        self._folder = folder
        self._control: socket.socket | None = control
        self._wake_fd = wake_fd
        self._is_stopping = False
        self._phase = Phase.STARTING
        self._clock = MonotonicClock()
        self._supervisor = Supervisor(
            plan, LocalLauncher(), folder,
            client_endpoint=endpoint(plan.options["client_port"]),
            worker_endpoint=endpoint(plan.options["worker_port"]),
            clock=self._clock,
        )  # fmt: skip
        self._desk = OrderDesk(folder, self._follow)
        me = ProcessId.of(os.getpid())
        assert me is not None, "this process runs"
        self._me = me
        self._since = datetime.now(UTC).isoformat(timespec="seconds")

    def stop(self) -> None:
        """Ask `run` to stop everything and return. Safe in a signal handler."""
        self._is_stopping = True

    def run(self) -> bool:
        """Start, watch and finally stop every role; return whether all went well."""
        local.save(self._snapshot(), self._folder)
        failure = ""
        try:
            self._desk.open()
            failure = self._start()
            if not failure:
                self._serve()
        finally:
            last = self._snapshot(Phase.FAILED)
            self._phase = Phase.STOPPING
            self._desk.close()
            self._save()
            self._supervisor.stop()
            local.forget(self._folder)
        if failure and not self.is_abandoned:
            self._say("failed", why=failure, cluster=last.to_json().decode())
        return not failure

    # --- until it is kept -----------------------------------------------------------------

    def _start(self) -> str:
        """Start every role and wait for `keep`; return what went wrong, or ""."""
        deadline_ns = self._clock.now_ns() + int(self._plan.ready_timeout_s * SECOND)
        is_told = False
        while self._phase is Phase.STARTING:
            self._step()
            if self._is_stopping:
                return "it was told to stop"
            if not is_told and self._supervisor.is_ready:
                is_told = True
                self._say("ready", cluster=self._snapshot().to_json().decode())
            elif not is_told and self._clock.now_ns() >= deadline_ns:
                self._supervisor.give_up(f"was not ready within {self._plan.ready_timeout_s:g} s")
            if self._supervisor.has_failed:
                return "not every process became ready"
            self._wait()
            if self.is_abandoned:
                return "whoever started it is gone"
        return ""

    def _hear(self) -> None:
        """Take what the launcher says: `keep`, or its end."""
        assert self._control is not None, "it is listened to"
        try:
            word = self._control.recv(len(KEEP))
        except OSError:  # it died with our words unread
            word = b""
        if word != KEEP:
            self.is_abandoned = True
            log.warning("whoever started this cluster went away before it was ready: stopping")
            return
        self._phase = Phase.RUNNING
        local.save(self._snapshot(), self._folder)
        self._say("kept")
        self._control.close()
        self._control = None

    def _say(self, word: str, **more: str) -> None:
        assert self._control is not None, "there is a launcher"
        with contextlib.suppress(OSError):  # its end is noticed where it is listened to
            self._control.sendall(orjson.dumps({"says": word, **more}) + b"\n")

    # --- from then on ---------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._is_stopping:
            self._step()
            self._wait()

    def _follow(self, order: str, role: str) -> None:
        """Follow an operator's order; ProcessError if that is impossible."""
        if self._phase is not Phase.RUNNING:
            raise ProcessError(f"the cluster is {self._phase}: expected one that runs")
        if order == "stop":
            self._supervisor.order_stop(role)
        elif order == "start":
            self._supervisor.order_start(role)
        else:
            raise ProcessError(f"an order: expected stop or start, got {order[:40]!r}")
        self._save()

    def _step(self) -> None:
        if self._supervisor.step():
            self._save()

    def _save(self) -> None:
        try:
            local.save(self._snapshot(), self._folder)
        except OSError as error:  # serving goes on; only what is said of it grows old
            log.error("the state file cannot be written: %s", error)

    def _wait(self) -> None:
        """Wait for a signal, the launcher, the end of a child, or what the supervisor waits for."""
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        for descriptor in self._desk.descriptors():
            poller.register(descriptor, select.POLLIN)
        if self._control is not None:
            poller.register(self._control, select.POLLIN)
        wait_ns = self._supervisor.wait_ns()
        heard = dict(poller.poll(None if wait_ns is None else -(-wait_ns // MS)))
        if self._wake_fd in heard:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_fd, 4096)
        if self._control is not None and self._control.fileno() in heard:
            self._hear()
        self._desk.look()

    def _snapshot(self, phase: Phase | None = None) -> LocalCluster:
        supervisor = self._supervisor
        is_bound = supervisor.is_bound
        return LocalCluster(
            self._plan.name, phase or self._phase, platform.node(), local.boot_id(), self._me, self._since,
            self._plan.options,
            supervisor.client_endpoint if is_bound else "",
            supervisor.worker_endpoint if is_bound else "",
            supervisor.roles(),
        )  # fmt: skip


@contextlib.contextmanager
def waker() -> Iterator[int]:
    """Give a descriptor that becomes readable with each signal that has a handler; main thread only."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    try:
        yield read_fd
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read_fd)
        os.close(write_fd)


def keep(plan: Plan, folder: Path, control: socket.socket) -> bool:
    """Run a plan in `folder` until SIGTERM; return whether all went well.

    Raises:
        HeldError: Another keeper has the folder.
    """
    with hold(folder), waker() as wake_fd:
        _remove_logs(folder)
        keeper = Keeper(plan, folder, control, wake_fd)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: keeper.stop())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler it would wake nobody
        log.info("keeping %r as pid %d", plan.name, os.getpid())
        went_well = keeper.run()
        log.info("everything has been stopped")
        if keeper.is_abandoned:  # nobody will ever ask what was in the logs
            shutil.rmtree(folder, ignore_errors=True)
    return went_well


def _remove_logs(folder: Path) -> None:
    """Remove the logs of an earlier life, and empty this process's own, which is open already."""
    for path in folder.glob("*.log"):
        if path.name == KEEPER_LOG:
            os.truncate(path, 0)
        else:
            path.unlink(missing_ok=True)


def _remove_unused(folder: Path) -> None:
    """Remove a folder that was made for a cluster that never was."""
    with contextlib.suppress(HeldError), hold(folder):
        if local.load(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)


def main(name: str, fd: int) -> int:
    """Read the plan from the launcher's socket, run it, and return the exit code."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    os.set_inheritable(fd, False)
    with socket.socket(fileno=fd) as control:
        control.settimeout(_SAY_TIMEOUT_S)
        folder = local.cluster_folder(name)
        text = _read_line(control)
        if not text:  # the launcher is gone already
            _remove_unused(folder)
            return 1
        plan = Plan.from_json(text)
        assert plan.name == name, "the command line names the plan's cluster"
        try:
            return 0 if keep(plan, folder, control) else 1
        except HeldError:
            control.sendall(orjson.dumps({"says": "held"}) + b"\n")
            return 1


def _read_line(control: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n") and len(text) < _MAX_PLAN_BYTES:
        try:
            chunk = control.recv(65_536)
        except OSError:
            return b""
        if not chunk:
            return b""
        text += chunk
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
