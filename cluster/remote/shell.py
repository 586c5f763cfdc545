"""Commands on hosts: on this machine, or by the OpenSSH client, with your configuration and agents.

Nothing is asked at a terminal (BatchMode): a host that wants a password, or whose key is unknown,
is an error that quotes ssh's own message. Connections are shared for the duration of one of our
commands (ControlMaster), and closed with it.

    SUPERSERVE_SSH_CONFIG    a configuration file for `ssh -F`, instead of the user's
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from cluster.spec.roles import HERE
from superserve.errors import ConfigError, SuperServeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from cluster.spec.roles import Target


CONFIG_VARIABLE = "SUPERSERVE_SSH_CONFIG"
"""Environment variable: the file for `ssh -F`, if hosts.yaml names none."""

CONNECT_TIMEOUT_S = 10
"""How long a host may take to answer the first time."""

_LOGIN_S = 60.0  # over several jump hosts, on busy machines
_SSH_FAILED = 255  # ssh(1): the remote command's exit status, or this if an error occurred
_PERSIST_S = 60  # only for a command that was killed: otherwise it closes its connections
_MAX_AT_ONCE = 32  # ssh processes on this machine, a thread for each
# Every handshake behind a jump host is the jump host's too, and OpenSSH's sshd drops some of those that
# arrive while ten others are in progress (MaxStartups 10:30:100).
_MAX_HANDSHAKES = 6
_MAX_TRIES = 6  # with the pauses below 3 to 6 s, in which sshd ends other handshakes
_FIRST_PAUSE_S = 0.2  # twice as long each further time, minus a random part of up to half
# ssh's messages if a server, or a jump host, dropped the connection before the login.
_TURNED_AWAY = (
    "kex_exchange_identification", "banner exchange", "Connection closed by", "Connection reset by",
)  # fmt: skip
_MAX_SOCKET_BYTES = 107  # of a unix socket's path: the size of sun_path, without its end
T = TypeVar("T")
H = TypeVar("H")


class RemoteError(SuperServeError):
    """A host cannot be reached, or a command on it failed; the message does not name the host."""


class UnreachableError(RemoteError):
    """No command can be run on the host at all; the message is ssh's."""


@dataclass(frozen=True, slots=True)
class Completed:
    """The result of a command on a host: its exit code and its output."""

    code: int
    stdout: bytes
    stderr: str


class Shell(Protocol):
    """Runs commands on hosts; tests use their own."""

    def run(self, target: Target, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        """Run a command to its end.

        Raises:
            UnreachableError: The host cannot be reached, or refuses the login.
            RemoteError: The command took longer than `timeout_s`.
        """
        ...

    def start(self, target: Target, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command; the caller reads its output from the pipe `stdout`."""
        ...


class LocalShell:
    """Commands on this machine: a cluster of one host needs no ssh to itself."""

    def run(self, target: Target, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        """Run a command to its end; see `Shell.run`."""
        assert target == HERE, "another host is reached by ssh"
        try:
            done = subprocess.run(
                list(argv), input=stdin, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RemoteError(f"did not end within {timeout_s:g} s: {shlex.join(argv)[:200]}") from error
        except OSError as error:
            raise UnreachableError(f"{argv[0]}: {error.strerror}") from error
        return Completed(done.returncode, done.stdout, done.stderr.decode(errors="replace").strip())

    def start(self, target: Target, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command; the caller reads its output while it runs; see `Shell.start`."""
        assert target == HERE, "another host is reached by ssh"
        return subprocess.Popen(list(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


class OpenSsh:
    """The `ssh` command; as a context manager it closes its connections at the end of the block.

    Attributes:
        config: The file for `ssh -F`; None for the user's own.
    """

    def __init__(self, config: Path | None = None) -> None:
        given = os.environ.get(CONFIG_VARIABLE)
        self.config = config or (Path(given) if given else None)
        self._folder: Path | None = None
        self._masters: set[Target] = set()
        self._doors: dict[Target, threading.Lock] = {}
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)

    def __enter__(self) -> Self:
        if shutil.which("ssh") is None:
            raise ConfigError("ssh: expected the OpenSSH client on the PATH, as `openssh-client` installs it")
        if self.config is not None and not self.config.is_file():
            raise ConfigError(f"{self.config}: expected a configuration file of ssh")
        # 0700, and short: %C is 40 characters, and ssh appends 17 more while it connects.
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        base = base if len(base) + len("/ss-12345678/") + 58 < _MAX_SOCKET_BYTES else "/tmp"  # noqa: S108
        self._folder = Path(tempfile.mkdtemp(prefix="ss-", dir=base if Path(base).is_dir() else None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._folder is not None, "the block was entered"
        parallel(sorted(self._masters, key=repr), self._close)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close(self, target: Target) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*self._argv(target, "-O", "exit")], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=5, check=False,
            )  # fmt: skip

    def _argv(self, target: Target, *options: str) -> list[str]:
        assert self._folder is not None, "a connection is used inside the block"
        return [
            "ssh",
            *(() if self.config is None else ("-F", str(self.config))),
            "-o", "BatchMode=yes",
            "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}",
            "-o", "ServerAliveInterval=5",
            "-o", "ServerAliveCountMax=3",
            "-o", "ControlMaster=auto",
            "-o", f"ControlPath={self._folder}/%C",
            "-o", f"ControlPersist={_PERSIST_S}",
            "-o", "LogLevel=ERROR",
            "-T",
            *(() if target.port is None else ("-p", str(target.port))),
            *(() if target.user is None else ("-l", target.user)),
            *options,
            "--",
            target.address,
        ]  # fmt: skip

    def run(self, target: Target, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Completed:
        """Run a command to its end; see `Shell.run`."""
        self._connect(target)
        return self._run(target, argv, stdin, timeout_s)

    def _connect(self, target: Target) -> None:
        """Open a connection to a host that its commands share: a few handshakes at once, with retries.

        Retrying is safe here, and not later: no command has begun yet.
        """
        with self._doors.setdefault(target, threading.Lock()):
            pause_s = _FIRST_PAUSE_S
            for left in reversed(range(_MAX_TRIES)):
                if target in self._masters:
                    return
                try:
                    with self._handshakes:
                        self._run(target, ["true"], b"", _LOGIN_S)
                    self._masters.add(target)
                except UnreachableError as error:
                    if not left or not any(words in str(error) for words in _TURNED_AWAY):
                        raise
                    time.sleep(random.uniform(pause_s / 2, pause_s))
                    pause_s *= 2

    def _run(self, target: Target, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Completed:
        # In our process group, so that Ctrl-C at a terminal ends the command too.
        # A file, not a pipe: the process of the shared connection keeps its stderr open, and a pipe
        # would not end before that process does.
        with tempfile.TemporaryFile() as errors:
            try:
                done = subprocess.run(
                    [*self._argv(target), shlex.join(argv)], input=stdin, stdout=subprocess.PIPE,
                    stderr=errors, timeout=timeout_s, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise RemoteError(f"did not end within {timeout_s:g} s: {shlex.join(argv)[:200]}") from error
            errors.seek(0)
            words = errors.read().decode(errors="replace").strip()
        if done.returncode == _SSH_FAILED:
            said = _cause(words).removeprefix("ssh: ") or "the connection was lost"
            raise UnreachableError(f"ssh: {said}")
        return Completed(done.returncode, done.stdout, words)

    def start(self, target: Target, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command; the caller reads its output while it runs; see `Shell.start`."""
        self._connect(target)
        return subprocess.Popen(
            [*self._argv(target), shlex.join(argv)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip


def _cause(words: str) -> str:
    """Return ssh's reason: its last line, unless a jump host could not connect further."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    of_jump = [line for line in lines if "open failed: " in line]
    return (of_jump or lines or [""])[-1]


def parallel(items: Sequence[H], work: Callable[[H], T]) -> list[T]:
    """Return the result of `work` for each item, in order; many at once, each in a thread."""
    if not items:
        return []
    with ThreadPoolExecutor(min(len(items), _MAX_AT_ONCE)) as pool:
        return list(pool.map(work, items))
