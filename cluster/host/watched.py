"""One role under supervisor: when it is ready, and what follows when it ends.

    STOPPED -start-> STARTING -announced-> RUNNING -crashed-> BACKOFF -due-> STARTING ...
                        +------gave up-----> FATAL <--gave up----+
                                         RUNNING -exit code 0-> EXITED
    RUNNING, STARTING -stop-> STOPPING -ended-> STOPPED        BACKOFF -stop-> STOPPED
    STOPPED, EXITED, FATAL -start-> STARTING

Supervisor regards a process as started once it has lived for some seconds, and restarts for ever what
lived longer than that. Here a role announces when it is ready (`announce_ready`). One that ends before it
was ever ready is FATAL at once, because the same fault would end it again. One that crashes after a good
start is restarted after half a second, and after twice as long each further time, at most five times in
a row; a minute of good service resets that (`Timing` has the figures).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supervisor.options import ProcessConfig, ServerOptions  # type: ignore[import-untyped]  # no types
from supervisor.process import Subprocess  # type: ignore[import-untyped]  # it ships no types
from supervisor.states import ProcessStates, getProcessStateDescription  # type: ignore[import-untyped]

from cluster.host.config import tail_of

if TYPE_CHECKING:
    from cluster.spec.roles import Timing

READY_FD = 3
"""The descriptor of the pipe on which a role announces that it is ready."""

_MAX_READY_BYTES = 65_536  # what a pipe holds; a role announces hundreds of bytes
_MANY = 1_000_000  # restarts are bounded here, not by supervisor
_TAIL_LINES = 20  # they go into the reason for a crash: enough for a traceback


class ReadyPipe:
    """The keeper's end of a role's pipe, in supervisor's loop."""

    closed = False  # supervisor reads it; the descriptor stays open until its role has ended

    def __init__(self, process: WatchedProcess, fd: int) -> None:
        self.fd = fd
        self._process = process
        self._text = b""
        self._is_done = False

    def readable(self) -> bool:
        """Return whether anything may still arrive."""
        return not self._is_done

    def writable(self) -> bool:
        """Return False: nothing is ever written."""
        return False

    def handle_read_event(self) -> None:
        """Read the role's announcement; its newline makes the role ready."""
        chunk = os.read(self.fd, _MAX_READY_BYTES)
        self._text += chunk
        self._is_done = not chunk or self._text.endswith(b"\n") or len(self._text) > _MAX_READY_BYTES
        if self._text.endswith(b"\n"):
            self._process.announced(self._text)

    def handle_error(self) -> None:
        """Stop watching: a role that cannot announce itself will not be ready in time."""
        self._is_done = True


class WatchedProcess(Subprocess):  # type: ignore[misc]  # supervisor ships no types
    """A role's process, and what has happened to it so far.

    Attributes:
        restarts: How often it was restarted after crashes.
        why: How it last ended, with the end of its log; "" if it never did.
        metrics: Where it serves /metrics, HOST:PORT; "" if it does not.
        was_ready: Whether it was ever ready since its first start, or since an operator's.
    """

    def __init__(self, config: ProcessConfig, timing: Timing) -> None:
        super().__init__(config)
        self.restarts = 0
        self.why = ""
        self.metrics = ""
        self.was_ready = False
        self._timing = timing
        self._was_ordered = False
        self._n_in_a_row = 0
        self._began_s = self._ready_s = 0.0
        self._is_late = False
        self._pipe: ReadyPipe | None = None
        self._child_fd = -1
        self._log_start = 0

    # --- its start ----------------------------------------------------------------------------

    def spawn(self) -> int | None:
        """Start it; return its process, or None if that failed."""
        if self.state == ProcessStates.BACKOFF:
            self.restarts += 1
        else:  # for the first time, or on an operator's request: forget earlier crashes
            self._was_ordered = bool(self.laststart)
            self.was_ready, self._n_in_a_row, self.why = False, 0, ""
        self._is_late = False
        self._began_s = time.monotonic()
        self._log_start = _size(self.config.stdout_logfile)
        mine, self._child_fd = os.pipe()
        try:
            pid: int | None = super().spawn()
        finally:
            os.close(self._child_fd)
        if not pid:
            os.close(mine)
            self._crashed(f"{self.config.name} could not be started: {self.spawnerr}")
            return None
        self._pipe = ReadyPipe(self, mine)
        self.dispatchers[mine] = self._pipe
        return pid

    def _prepare_child_fds(self) -> None:
        """Pass the child its output and the pipe, and no other descriptor of this process."""
        os.dup2(self._child_fd, READY_FD) if self._child_fd != READY_FD else os.set_inheritable(
            READY_FD, True
        )
        os.dup2(self.pipes["child_stdin"], 0)
        os.dup2(self.pipes["child_stdout"], 1)
        os.dup2(self.pipes["child_stdout"], 2)
        os.closerange(READY_FD + 1, self.config.options.minfds)

    def announced(self, text: bytes) -> None:
        """Record that it is ready, and what it announced."""
        if self.state != ProcessStates.STARTING:
            return
        with contextlib.suppress(ValueError, AttributeError):
            self.metrics = str(json.loads(text).get("metrics", ""))
        self.was_ready = True
        self._ready_s = time.monotonic()
        self.backoff, self.delay = 0, 0
        self.change_state(ProcessStates.RUNNING)

    def transition(self) -> None:
        """Do what is due; called after each round of the loop."""
        if self.state != ProcessStates.STARTING:
            super().transition()
        elif self._is_overdue():
            self._is_late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def _is_overdue(self) -> bool:
        # `up` waits for a first start, and its user sets the limit.
        is_bounded = (self.was_ready or self._was_ordered) and not self._is_late
        return is_bounded and time.monotonic() - self._began_s > self._timing.ready_timeout_s

    # --- its end ------------------------------------------------------------------------------

    def finish(self, pid: int, status: int) -> None:
        """Classify its end: requested, by itself, or a crash."""
        was_running = self.state == ProcessStates.RUNNING
        super().finish(pid, status)
        if self._pipe is not None:
            os.close(self._pipe.fd)
            self._pipe = None
        code = os.waitstatus_to_exitcode(status)
        self.exitstatus = code
        if self.state == ProcessStates.STOPPED:
            self.why = _told(code)
        elif was_running and code == 0:
            self.why = "ended as asked, with exit code 0"
        elif self._is_late:
            self._crashed(self._quoted(pid, f"was not ready again within {self._timing.ready_timeout_s:g} s"))
        else:
            if was_running and time.monotonic() - self._ready_s >= self._timing.good_service_s:
                self._n_in_a_row = 0
            when = "while it was needed" if was_running else "before it was ready"
            self._crashed(self._quoted(pid, f"ended with {described(code)} {when}"))

    def _crashed(self, why: str) -> None:
        self.why = why
        self._n_in_a_row += 1
        self.change_state(ProcessStates.BACKOFF)
        if not self.was_ready or self._n_in_a_row > self._timing.most_restarts:
            self.give_up()
            return
        wait_s = self._timing.first_backoff_s * 2 ** (self._n_in_a_row - 1)
        # If `delay` is more than `backoff` seconds away, supervisor concludes that the clock was set back.
        self.delay, self.backoff = time.time() + wait_s, math.ceil(wait_s)

    def _quoted(self, pid: int, what: str) -> str:
        log = Path(self.config.stdout_logfile).absolute()
        lines = "\n".join(tail_of(log, _TAIL_LINES, start=self._log_start))
        return f"{self.config.name} (pid {pid}) {what}; its log ({log}) " + (
            f"ends:\n{lines}" if lines else "is empty"
        )

    def seen(self) -> dict[str, Any]:
        """Return its state, as JSON."""
        # Supervisor reports a process that it has not looked at yet as STOPPED.
        state = self.state if self.laststart else ProcessStates.STARTING
        return {
            "name": self.config.name, "state": getProcessStateDescription(state),
            "pid": self.pid or None, "up_s": int(time.monotonic() - self._began_s) if self.pid else 0,
            "exit": self.exitstatus or 0, "restarts": self.restarts, "why": self.why,
            "metrics": self.metrics,
        }  # fmt: skip


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _told(code: int) -> str:
    if code == 0:
        return "ended as asked, with exit code 0"
    if code == -signal.SIGKILL:
        return "did not end in time when asked to stop, and was killed"
    return f"ended with {described(code)} when asked to stop"


def described(code: int) -> str:
    """Return an exit code in words; -N if signal N ended the process."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"exit code {code} ({signal.Signals(-code).name})"
    return f"exit code {code}"


class WatchedConfig(ProcessConfig):  # type: ignore[misc]  # supervisor ships no types
    """A program of supervisor whose process is a role."""

    timing: Timing

    def make_process(self, group: Any = None) -> WatchedProcess:
        """Return a process that has not been started."""
        process = WatchedProcess(self, self.timing)
        process.group = group
        return process


class WatchedOptions(ServerOptions):  # type: ignore[misc]  # supervisor ships no types
    """Supervisor's configuration, read in the folder of the cluster, with roles for programs."""

    def __init__(self, timing: Timing, socket: Path) -> None:
        super().__init__()
        self._timing = timing
        self._socket = socket

    def processes_from_section(self, parser: Any, section: str, group_name: str, klass: Any = None) -> Any:  # noqa: ARG002  supervisor's own
        """Return a section's programs, each a `WatchedConfig`."""
        found = super().processes_from_section(parser, section, group_name, WatchedConfig)
        for config in found:
            config.timing = self._timing
            config.startsecs, config.startretries = 0, _MANY  # `WatchedProcess` decides this instead
            waits_s = (self._timing.gateway_stop_s, self._timing.router_stop_s, self._timing.worker_stop_s)
            config.stopwaitsecs = waits_s[min(config.priority, len(waits_s) - 1)]
        return found

    def openhttpservers(self, supervisord: Any) -> None:
        """Listen at a relative path: an absolute one may exceed the length of a socket's address."""
        for config in self.server_configs:
            config["file"] = str(self._socket)
        super().openhttpservers(supervisord)

    def make_logger(self) -> None:
        """Open this process's log; writing to it may fail without harm, as on a full disk."""
        super().make_logger()
        for handler in self.logger.handlers:
            handler.emit = _forgiving(handler.emit)


def _forgiving(emit: Any) -> Any:
    def attempt(record: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            emit(record)

    return attempt
