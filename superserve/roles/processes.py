"""Start a role on this machine, wait until it is ready, stop it.

A role (router, worker, sender) is a separate Python process. Four promises hold between it
and the process that starts it:

- **It announces when it is ready.** The parent passes the write end of a pipe, whose number is
  in `SUPERSERVE_READY_FD`. The child calls `announce_ready({...})` once it can serve: one line
  of JSON, then the pipe is closed. A child that ends, closes the pipe or stays silent before
  that is a `ProcessError` that quotes the end of its log.
- **It dies with its parent.** The child calls `die_with_parent()` first of all: the kernel
  then kills it when its parent ends, even by SIGKILL. To the kernel the parent is the
  *thread* that started the child: when that thread ends, so does the child. So start roles
  from a thread that outlives them, usually the main one.
- **Ctrl-C does not reach it.** A terminal signals every process of its foreground group. A
  role has its own session, so only the parent receives the signal, and stops its roles in
  order.
- **Nothing is left behind.** `ProcessGroup` stops what it started, last first, however
  the block ends.

In a role:

    die_with_parent()
    ...bind, connect, load...
    announce_ready({"endpoint": endpoint})

In its parent:

    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        group.wait_ready(timeout_s=10.0)
        group.start("worker", ["-m", "gpu_worker", "--connect", router.ready["endpoint"]])
        group.wait_ready(timeout_s=60.0)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superserve.errors import ProcessError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import NoReturn, Self

NOTIFY_VARIABLE = "NOTIFY_SOCKET"
"""Environment variable of systemd: the socket on which a unit of `Type=notify` announces that it is ready."""

READY_FD_VARIABLE = "SUPERSERVE_READY_FD"
"""Environment variable: the file descriptor on which a role announces that it is ready."""

PARENT_PID_VARIABLE = "SUPERSERVE_PARENT_PID"
"""Environment variable: the process that started a role and that the role must not outlive."""

STOP_TIMEOUT_S = 5.0
"""Seconds that a role has to end after SIGTERM, unless its caller passes another limit."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_MAX_READY_BYTES = 65_536  # an endpoint and a few names take hundreds
_TAIL_BYTES = 16_384  # twenty lines of a long traceback
_TAIL_LINES = 200  # of which 20 are shown, without the steps of tracebacks
_TRACE = "Traceback (most recent call last)"
# The end of a child usually shows as the end of its pipe. A grandchild that holds the
# pipe open hides it, so exit codes are checked this often too.
_POLL_MS = 100
_CLEAN_EXITS = (0, -signal.SIGTERM)  # our SIGTERM kills a role that has no handler yet


class RoleProcess:
    """A role running on this machine, and the only handle its parent needs.

    As a context manager it stops the role at the end of the block.

    Attributes:
        name: Its name in errors and logs, such as "worker-3".
        ready: What the role announced when it became ready; empty until then.
        log_path: The file with the role's stdout and stderr.
    """

    def __init__(
        self,
        name: str,
        popen: subprocess.Popen[bytes],
        *,
        ready_fd: int,
        log_path: Path,
        log_start: int,
        owns_log: bool,
    ) -> None:
        self.name = name
        self.ready: dict[str, Any] = {}
        self.log_path = log_path
        self._popen = popen
        self._ready_fd: int | None = ready_fd
        self._ready_bytes = b""
        self._is_ready = False
        self._log_start = log_start
        self._owns_log = owns_log
        self._last_tail: str | None = None

    @property
    def pid(self) -> int:
        """The operating system's number for it; may be reused once it has ended."""
        return self._popen.pid

    @property
    def is_ready(self) -> bool:
        """Whether it has announced itself; it may have ended since."""
        return self._is_ready

    def poll(self) -> int | None:
        """Return its exit code, -N if signal N ended it, None while it runs."""
        return self._popen.poll()

    def check(self) -> bool:
        """Return whether it has announced itself, without waiting.

        For a parent with its own loop; `wait_ready` waits.

        Raises:
            ProcessError: It has ended, or can no longer announce itself; the error quotes its log.
        """
        if self._ready_fd is not None and _readable([self._ready_fd], 0):
            self._read_ready()
        self._fail_if_ended("while it was needed" if self._is_ready else "before it was ready")
        return self._is_ready

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask it to end (SIGTERM), kill it after `timeout_s` seconds (SIGKILL), and reap it.

        Does nothing to a role that has ended. A temporary log is removed if the role
        ended properly (exit code 0, or by our SIGTERM), and kept otherwise.

        Returns:
            Its exit code, -N if signal N ended it.
        """
        if self.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._kill_session()
        return self._ended(keep_log=self._popen.returncode not in _CLEAN_EXITS)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM), and do not wait: for a parent with its own loop."""
        if self.poll() is None:
            self._popen.terminate()

    def kill(self) -> int:
        """End it at once (SIGKILL), with every process in its session, and reap it.

        For injected faults and after a timeout: a temporary log is removed, `tail()`
        still works. Does nothing to a role that has ended.

        Returns:
            Its exit code, -9 unless it had ended before.
        """
        exit_code = self.poll()
        if exit_code is None:
            self._kill_session()
        return self._ended(keep_log=exit_code not in (None, *_CLEAN_EXITS))

    def tail(self, n_lines: int = 20) -> str:
        """Return the last `n_lines` lines of its log, of at most 16 KiB; "" if it is empty."""
        text = self._last_tail if self._last_tail is not None else self._read_tail()
        return "\n".join(text.splitlines()[-n_lines:])

    def _read_tail(self) -> str:
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                # A log given by the caller may contain the lines of an earlier process.
                log.seek(max(self._log_start, size - _TAIL_BYTES))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def _wrote(self) -> bool:
        with contextlib.suppress(OSError):
            return self.log_path.stat().st_size > self._log_start
        return False

    def _kill_session(self) -> None:
        # Not reaped yet, so the number still belongs to this child and its group. If SIGCHLD
        # is ignored the kernel reaps, and the group may be gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def _ended(self, *, keep_log: bool) -> int:
        """Release the pipe and the log of a role that has been reaped."""
        self._close_ready_fd()
        if self._owns_log and not (keep_log and self._wrote()):
            self._last_tail = self._read_tail()
            self.log_path.unlink(missing_ok=True)
        self._owns_log = False  # removed, or kept as evidence
        exit_code = self._popen.returncode
        assert exit_code is not None, f"{self.name} was not reaped"
        return exit_code

    def _close_ready_fd(self) -> None:
        if self._ready_fd is not None:
            os.close(self._ready_fd)
            self._ready_fd = None

    def _read_ready(self) -> bool:
        """Read the pipe; return whether the role is ready.

        Raises:
            ProcessError: The pipe ended first, or does not hold one JSON object.
        """
        assert self._ready_fd is not None
        chunk = os.read(self._ready_fd, _MAX_READY_BYTES)
        self._ready_bytes += chunk
        if len(self._ready_bytes) > _MAX_READY_BYTES:
            self._fail(f"said more than {_MAX_READY_BYTES} bytes when ready")
        # Wait for the newline, not for the pipe's end: a grandchild may hold the pipe open.
        if self._ready_bytes.endswith(b"\n"):
            self.ready = self._parse_ready()
            self._is_ready = True
            self._close_ready_fd()
            return True
        if not chunk:
            self._fail_silent()
        return False

    def _parse_ready(self) -> dict[str, Any]:
        try:
            said = json.loads(self._ready_bytes)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            self._fail(f"said {self._ready_bytes[:80]!r} when ready, expected one JSON object")
        return said

    def _fail_silent(self) -> NoReturn:
        """Fail a role that closed its pipe without an announcement."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)  # its pipe closed, so it is probably ending: get the exit code
        self._fail_if_ended("before it was ready")
        self._fail("closed its pipe without saying that it is ready")

    def _fail_if_ended(self, when: str) -> None:
        exit_code = self.poll()
        if exit_code is not None:
            self._fail(f"ended with {_describe_exit(exit_code)} {when}")

    def _fail(self, what: str) -> NoReturn:
        """Kill and reap it if need be, keep its log, and raise ProcessError."""
        if self.poll() is None:
            self._kill_session()
        self._ended(keep_log=True)
        lines = _without_traces(self.tail(_TAIL_LINES))
        log = f"its log ({self.log_path}) ends:\n{lines}" if lines else self._without_a_word()
        raise ProcessError(f"{self.name} (pid {self.pid}) {what}; {log}")

    def _without_a_word(self) -> str:
        folder = self.log_path.parent
        with contextlib.suppress(OSError):
            if os.statvfs(folder).f_bavail == 0:
                return f"it wrote nothing, as no space is left in {folder}"
        return "it wrote nothing to its log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _without_traces(text: str) -> str:
    """Return the last lines of a log without the steps of tracebacks; the log keeps them."""
    kept: list[str] = []
    is_trace = False
    for line in text.splitlines():
        if line.startswith(_TRACE):
            is_trace = True
        elif not (is_trace and line[:1] in ("", " ")):
            is_trace = False
            kept.append(line)
    return "\n".join(kept[-20:])


def start(
    name: str, argv: Sequence[str], *, log_path: Path | None = None, env: Mapping[str, str] | None = None
) -> RoleProcess:
    """Start a role in its own session and return without waiting for it.

    Call it from a thread that outlives the role (see the module's docstring), and stop
    what it returns, or use it as a context manager.

    Args:
        name: Its name in errors and of the temporary log.
        argv: The arguments after the Python interpreter, such as ("-m", "router").
        log_path: The file to append its stdout and stderr to; a temporary file if None.
        env: Environment variables to set in addition to this process's own.

    Raises:
        ProcessError: The log could not be opened or the process not started.
    """
    try:
        with contextlib.ExitStack() as undo:
            process = _start(name, argv, log_path=log_path, env=env or {}, undo=undo)
            undo.pop_all()
    except OSError as error:
        raise ProcessError(f"{name} could not be started: {error}") from error
    return process


def _start(
    name: str,
    argv: Sequence[str],
    *,
    log_path: Path | None,
    env: Mapping[str, str],
    undo: contextlib.ExitStack,
) -> RoleProcess:
    path = log_path or _temporary_log(name, undo)
    ready_fd, child_fd = os.pipe()
    undo.callback(os.close, ready_fd)
    try:
        popen, log_start = _spawn(argv, path, child_fd, _child_environment(env, child_fd))
    finally:
        os.close(child_fd)  # only the child may hold it, so that its end closes the pipe
    return RoleProcess(
        name, popen, ready_fd=ready_fd, log_path=path, log_start=log_start, owns_log=log_path is None
    )


def _spawn(
    argv: Sequence[str], log_path: Path, child_fd: int, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], int]:
    """Return the child, and the offset in the log where its lines begin."""
    with log_path.open("ab") as log:
        log_start = log.tell()
        popen = subprocess.Popen(
            [sys.executable, "-P", *argv],  # ignore modules in the user's folder: see superserve.plugins
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(child_fd,),
            env=environment,
            start_new_session=True,
        )
    return popen, log_start


def _child_environment(env: Mapping[str, str], child_fd: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",  # a killed role cannot flush, and its last lines are the important ones
        **env,
        READY_FD_VARIABLE: str(child_fd),
        PARENT_PID_VARIABLE: str(os.getpid()),
    }


def _temporary_log(name: str, undo: contextlib.ExitStack) -> Path:
    descriptor, path = tempfile.mkstemp(prefix=f"superserve-{name}-", suffix=".log")
    os.close(descriptor)
    undo.callback(os.unlink, path)
    return Path(path)


def wait_ready(process: RoleProcess, timeout_s: float) -> dict[str, Any]:
    """Wait until the role announces itself; return what it announced.

    A role that does not is killed, and its temporary log kept.

    Raises:
        ProcessError: It ended, or did not announce itself within `timeout_s` seconds;
            the error names the role, its exit code and the last lines of its log.
    """
    _wait_all_ready([process], timeout_s)
    if not process.is_ready:  # its caller stopped it, so there is no pipe to wait on
        process._fail_if_ended("before it was ready")
    return process.ready


def _wait_all_ready(processes: Sequence[RoleProcess], timeout_s: float) -> None:
    """Wait for all at once, so that the first to fail is reported.

    That one is killed; the caller stops the others.
    """
    waiting = {p._ready_fd: p for p in processes if p._ready_fd is not None}
    deadline = time.monotonic() + timeout_s
    while waiting:
        left_ms = max(0, round((deadline - time.monotonic()) * 1_000))
        readable = _readable(waiting, min(left_ms, _POLL_MS))
        for fd in readable:
            if waiting[fd]._read_ready():
                del waiting[fd]
        if waiting and (not readable or left_ms == 0):
            _fail_if_hopeless(list(waiting.values()), timeout_s, is_time_up=left_ms == 0)


def _readable(fds: Iterable[int], wait_ms: int) -> list[int]:
    poller = select.poll()  # select() stops at descriptor 1,023
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(wait_ms)]


def _fail_if_hopeless(waiting: Sequence[RoleProcess], timeout_s: float, *, is_time_up: bool) -> None:
    for process in waiting:
        process._fail_if_ended("before it was ready")
    if is_time_up:
        others = ", ".join(process.name for process in waiting[1:])
        waiting[0]._fail(f"was not ready within {timeout_s:g} s" + (f" (nor: {others})" if others else ""))


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"exit code {exit_code} ({signal.Signals(-exit_code).name})"
    return f"exit code {exit_code}"


class ProcessGroup:
    """Roles that live and die together: started in order, stopped in reverse order.

    At the end of the block every role is stopped, the last one first, however the block
    ended. A second Ctrl-C while they stop kills those that are left.
    """

    def __init__(self) -> None:
        self._processes: list[RoleProcess] = []

    @property
    def processes(self) -> tuple[RoleProcess, ...]:
        """The roles in the order they were started, ended ones too."""
        return tuple(self._processes)

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> RoleProcess:
        """Start a role as `processes.start` does; the group stops it."""
        process = start(name, argv, log_path=log_path, env=env)
        self._processes.append(process)
        return process

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every role started so far is ready, for at most `timeout_s` seconds in all.

        Raises:
            ProcessError: One ended or stayed silent; the first to fail is reported.
        """
        _wait_all_ready(self._processes, timeout_s)

    def check(self) -> None:
        """Raise ProcessError if a role has ended; the error names it and quotes its log."""
        for process in self._processes:
            process._fail_if_ended("while it was needed")

    def stop(self) -> None:
        """Stop every role, the last one first; do nothing to those that have ended."""
        try:
            for process in reversed(self._processes):
                process.stop()
        finally:
            # A no-op unless the loop above was interrupted.
            for process in reversed(self._processes):
                process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def announce_ready(info: Mapping[str, Any]) -> None:
    """Report to the process that started this role, or to systemd, that it can serve now.

    Does nothing in a process that you started by hand, and nothing the second time.

    Args:
        info: Facts for the parent, such as the endpoint; JSON values, under 64 KiB.
    """
    _notify_systemd(os.environ.pop(NOTIFY_VARIABLE, ""))
    fd = os.environ.pop(READY_FD_VARIABLE, None)  # popped: no grandchild may announce in our place
    if fd is None or not fd.isdecimal():
        return
    line = json.dumps(dict(info)).encode() + b"\n"
    # A parent that has closed the pipe has given up on this role and is about to kill it.
    with contextlib.suppress(BrokenPipeError), os.fdopen(int(fd), "wb") as pipe:
        pipe.write(line)


def _notify_systemd(path: str) -> None:
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path  # @ stands for Linux's abstract names
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notified:
        try:
            notified.sendto(b"READY=1", address)
        except OSError as error:  # the role serves all the same; the unit would end by its start's time limit
            print(f"{NOTIFY_VARIABLE}={path}: {error.strerror}", file=sys.stderr)  # noqa: T201


def die_with_parent() -> None:
    """Make the kernel kill this role when the thread that started it ends.

    Call it before anything slow. Does nothing in a process that you started by hand.

    Raises:
        SystemExit: The parent was gone before this was called.
        OSError: The kernel refused.
    """
    parent_pid = os.environ.pop(PARENT_PID_VARIABLE, None)  # popped: a grandchild has another parent
    if parent_pid is None or not parent_pid.isdecimal():
        return
    # The parent stops it by SIGTERM, and may itself run where that is ignored or blocked: both are inherited.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    # The parent may have ended before the call above; then the kernel would never kill this role.
    if os.getppid() != int(parent_pid):
        raise SystemExit(f"process {parent_pid}, which started this one, is gone")
