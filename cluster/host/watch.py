"""`python -P -m cluster.host.watch [FD]`: the keeper, which is supervisord as a parent for roles.

It runs in the folder of a cluster on its host, started by `cluster.host.onhost` in a new session, and
outlives the command and the terminal. The roles are its children and die with it, even by SIGKILL:
each asks the kernel for that, and finds its parent's number in the environment
(`superserve.roles.processes.die_with_parent`). Here and in `watched.py` is what supervisor does not do:

- **Until it is kept.** FD is a socket to the command that starts a cluster of this machine. Until
  `keep` comes over it, its end, for any reason, takes everything down and leaves nothing.
- **Order.** SIGTERM stops the gateway first, then the router, which answers what it holds, then all workers
  at once.
- **Its traces.** For a cluster of this machine it writes the state file, by which clients find the
  router; at its end it removes everything except the logs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisor.medusa import asyncore_25 as asyncore  # type: ignore[import-untyped]  # it ships no types
from supervisor.poller import PollPoller  # type: ignore[import-untyped]  # it ships no types
from supervisor.states import ProcessStates, SupervisorStates  # type: ignore[import-untyped]
from supervisor.supervisord import Supervisor  # type: ignore[import-untyped]  # it ships no types

from cluster.host.config import CONFIG, KEEP, KEPT, PLAN, SOCKET
from cluster.host.folder import HeldError, clean, hold
from cluster.host.watched import READY_FD, WatchedOptions, WatchedProcess
from cluster.spec.roles import HostPlan
from superserve.fields import read_file
from superserve.roles import local
from superserve.roles.local import LocalCluster, Phase, ProcessId, Role, RoleState
from superserve.roles.processes import PARENT_PID_VARIABLE, READY_FD_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAST_WAIT_S = 0.01  # at 0 the loop would spin on a process that is due and not handled yet
_SAY_S = 5.0  # a launcher that does not read for this long counts as gone


class Hearer:
    """A descriptor in supervisor's loop: calls `hear` when there is something to read."""

    def __init__(self, fd: int, hear: Callable[[], object]) -> None:
        self._fd = fd
        self._hear = hear
        self._is_open = True
        asyncore.socket_map[fd] = self

    def readable(self) -> bool:
        """Return whether the loop still watches it."""
        return self._is_open

    def writable(self) -> bool:
        """Return False: nothing is ever written."""
        return False

    def handle_read_event(self) -> None:
        """Read what has arrived."""
        self._hear()

    def handle_error(self) -> None:
        """Stop watching; supervisor calls this if `hear` has raised."""
        self.stop()

    def stop(self) -> None:
        """Stop watching; the caller closes the descriptor."""
        self._is_open = False
        asyncore.socket_map.pop(self._fd, None)


class Keeper(Supervisor):  # type: ignore[misc]  # supervisor ships no types
    """A host's roles, until SIGTERM or, before `keep`, until its launcher has gone.

    Attributes:
        is_abandoned: Whether the launcher went away before it sent `keep`.
    """

    stop_groups: list[Any] | None

    def __init__(self, options: WatchedOptions, plan: HostPlan, control: socket.socket | None) -> None:
        super().__init__(options)
        self.is_abandoned = False
        self._plan = plan
        self._control = control
        self._hearer = None if control is None else Hearer(control.fileno(), self._hear)
        self._since = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self._saved: tuple[object, ...] = ()
        me = ProcessId.of(os.getpid())
        assert me is not None, "this process runs"
        self._me = me

    # --- supervisor's loop --------------------------------------------------------------------

    def tick(self, now: float | None = None) -> None:
        """Update the state file; called once in each pass of the loop."""
        super().tick(now)
        self.save()

    def ordered_stop_groups_phase_1(self) -> None:
        """Stop the roles that come first; supervisor would start with the last, one at a time."""
        left = self.stop_groups or []
        first = min((group.config.priority for group in left), default=0)
        for group in left:
            if group.config.priority == first:
                group.stop_all()

    def ordered_stop_groups_phase_2(self) -> None:
        """Forget the roles that have ended."""
        self.stop_groups = [group for group in self.stop_groups or [] if group.get_unstopped_processes()]

    def wait_s(self) -> float:
        """Return how long there is nothing to do unless a descriptor becomes readable."""
        now_s = time.time()
        waits = [
            process.delay - now_s
            for process in self._processes()
            if process.state in (ProcessStates.BACKOFF, ProcessStates.STOPPING)
        ]
        return max(_LEAST_WAIT_S, min(waits, default=1.0))

    # --- the launcher -------------------------------------------------------------------------

    def _hear(self) -> None:
        """Read the launcher's message: `keep`, or its end."""
        assert self._control is not None, "it is listened to"
        assert self._hearer is not None, "it is listened to"
        try:
            word = self._control.recv(len(KEEP))
        except OSError:
            word = b""
        self._hearer.stop()
        if word == KEEP:
            self._hearer = None
            self.save()
            with contextlib.suppress(OSError):
                self._control.sendall(KEPT)
        else:
            self.is_abandoned = True
            self.options.logger.info("the command that starts this went away: everything is stopped")
            self.options.mood = SupervisorStates.SHUTDOWN
        self._control.close()

    # --- reports ------------------------------------------------------------------------------

    def seen(self) -> list[dict[str, Any]]:
        """Return the state of each role."""
        return [process.seen() for process in self._processes()]

    def _processes(self) -> list[WatchedProcess]:
        groups = self.process_groups.values()
        return [process for group in groups for process in group.processes.values()]

    def save(self) -> None:
        """Write the state file of a cluster of this machine, if anything in it has changed."""
        if self._plan.local is None:
            return
        # Called in every pass, and each line that a role writes causes one: so check cheaply first.
        now = (self._phase(), *((p.state, p.pid, p.restarts) for p in self._processes()))
        if now == self._saved:
            return
        self._saved = now
        try:
            local.save(self._snapshot(self._plan.local), Path.cwd())
        except OSError as error:  # serving goes on; only the state file becomes outdated
            words = f"the state file cannot be written: {error}"
            self.options.logger.critical(words)

    def _phase(self) -> Phase:
        if self.options.mood < SupervisorStates.RUNNING:
            return Phase.STOPPING
        return Phase.STARTING if self._hearer else Phase.RUNNING

    def _snapshot(self, about: dict[str, Any]) -> LocalCluster:
        seen = {role["name"]: role for role in self.seen()}
        roles = tuple(
            Role(
                role.name, role.kind, RoleState(seen[role.name]["state"]), role.serves,
                str(Path.cwd() / f"{role.name}.log"), _process(seen[role.name]["pid"]),
                seen[role.name]["restarts"], seen[role.name]["why"], seen[role.name]["metrics"],
            )
            for role in self._plan.roles
            if role.name in seen
        )  # fmt: skip
        return LocalCluster(
            about["name"], self._phase(), platform.node(), local.boot_id(), self._me, self._since,
            about["options"], about["client_endpoint"], about["worker_endpoint"], roles,
        )  # fmt: skip


def _process(pid: int | None) -> ProcessId | None:
    return None if pid is None else ProcessId.of(pid)


class QuickPoller(PollPoller):  # type: ignore[misc]  # supervisor ships no types
    """Wakes when a restart or a kill is due; supervisor would only check once a second."""

    keeper: Keeper | None = None

    def poll(self, timeout: float) -> Any:
        """Wait for descriptors, at most `timeout` seconds."""
        return super().poll(timeout if self.keeper is None else min(timeout, self.keeper.wait_s()))


class KeeperRpc:
    """The answer to `superserve.roles()` on supervisor's socket, in addition to supervisor's own calls."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def roles(self) -> str:
        """Return the state of each role, as JSON: XML-RPC has no null."""
        return json.dumps(self._keeper.seen())


def make_rpc(supervisord: Keeper, **_: object) -> KeeperRpc:
    """Return the interface; supervisord.conf names this function."""
    return KeeperRpc(supervisord)


class ForgivingStream:
    """This process's stderr: a file, whose disk may be full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write if that is possible."""
        with contextlib.suppress(OSError):
            os.write(self._stream.fileno(), text.encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def fileno(self) -> int:
        """Return the descriptor."""
        return int(self._stream.fileno())


def run(plan: HostPlan, control: socket.socket | None) -> Keeper:
    """Run a plan's roles until asked to stop; return the keeper, whose roles have all ended."""
    os.environ[PARENT_PID_VARIABLE] = str(os.getpid())
    os.environ[READY_FD_VARIABLE] = str(READY_FD)
    options = WatchedOptions(plan.timing, Path(SOCKET))
    options.poller.close()
    options.poller = QuickPoller(options)
    options.realize(["--nodaemon", "--silent", "--configuration", CONFIG], doc=__doc__)
    options.first, options.test = True, False
    keeper = Keeper(options, plan, control)
    options.poller.keeper = keeper
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # A signal during the loop's wait must end the wait: on its own, Python would resume it.
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    Hearer(woken, functools.partial(os.read, woken, 4_096))
    with contextlib.suppress(asyncore.ExitNow):
        keeper.main()
    options.close_httpservers()
    with contextlib.suppress(OSError):
        options.close_logger()
    return keeper


def main(fd: int | None) -> int:
    """Run the roles of the plan in the current folder; return the exit code."""
    folder = Path.cwd()
    sys.stdout = sys.stderr = ForgivingStream(sys.stderr)
    control = None
    if fd is not None:
        os.set_inheritable(fd, False)
        control = socket.socket(fileno=fd)
        control.settimeout(_SAY_S)
    try:
        with hold(folder):
            keeper = run(
                read_file(HostPlan, json.loads(Path(PLAN).read_text(encoding="utf-8")), PLAN), control
            )
            clean(folder)
            if keeper.is_abandoned:  # nothing will ever read its logs
                shutil.rmtree(folder, ignore_errors=True)
    except HeldError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else None))
