"""Hosts for a test: network namespaces with own addresses and an own sshd each.

A namespace more is the operator's, and holds the bridge that joins them all: nothing is in
the machine's own network, so runs beside each other need no addresses of their own. Files are
shared, so each host has a state folder of its own, set by its sshd. What a killed run has left
is removed by the next one, which knows it by the number in its namespaces' names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest

from tests import warm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 120.0  # reached only when something is broken
_PREFIX = "ssnet"
_SSHD = "/usr/sbin/sshd"
_ASK_EVERY_S = 0.05
_PORT = 22


class Net:
    """A few hosts, an operator beside them, and commands of either.

    Attributes:
        folder: Everything that the run writes.
        hosts: The hosts' names: "a", "b", ...
        ssh_config: The file for `ssh -F`.
        env: Variables of every command, besides.
    """

    def __init__(self, hosts: tuple[str, ...]) -> None:
        self.hosts = hosts
        self.folder = Path(tempfile.mkdtemp(prefix="ss", dir="/tmp"))
        self.ssh_config = self.folder / "ssh_config"
        self.env: dict[str, str] = {}
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}
        self._id = f"{_PREFIX}-{os.getpid()}-{self.folder.name[2:]}"

    # --- names --------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        """Return a host's address."""
        return f"10.77.0.{self.hosts.index(host) + 1}"

    def state(self, host: str) -> Path:
        """Return a host's state folder; the operator's is that of "op"."""
        return self.folder / host

    def namespace(self, host: str) -> str:
        """Return the name of a host's namespace; the operator's is that of "op"."""
        return f"{self._id}-{host}"

    # --- life ---------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the namespaces, the wires between them, and a server of ssh in each host."""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._add("op")
        self._in("op", "ip", "link", "add", "br0", "type", "bridge")
        self._in("op", "ip", "addr", "add", "10.77.0.100/24", "dev", "br0")
        self._in("op", "ip", "link", "set", "br0", "up")
        for host in self.hosts:
            self._add(host)
            self._wire(host)
        self._keys()
        for host in self.hosts:
            self.start_sshd(host)

    def close(self) -> None:
        """End every process of the run, and remove everything it made."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for sshd in self._sshd.values():
            sshd.kill()
            sshd.wait()
        for host in ("op", *self.hosts):
            remove_namespace(self.namespace(host))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add(self, host: str) -> None:
        self.state(host).mkdir(mode=0o700)
        _call("ip", "netns", "add", self.namespace(host))
        self._in(host, "ip", "link", "set", "lo", "up")

    def _wire(self, host: str) -> None:
        i = self.hosts.index(host)
        self._in(
            "op", "ip", "link", "add", f"v{i}", "type", "veth",
            "peer", "name", "eth0", "netns", self.namespace(host),
        )  # fmt: skip
        self._in("op", "ip", "link", "set", f"v{i}", "master", "br0", "up")
        self._in(host, "ip", "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._in(host, "ip", "link", "set", "eth0", "up")

    def _keys(self) -> None:
        for name in ("user", "stranger", *self.hosts):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / f"{name}.key"))
        known = [
            f"{self.address(host)} {(self.folder / f'{host}.key.pub').read_text()}" for host in self.hosts
        ]
        (self.folder / "known_hosts").write_text("".join(known))
        self.ssh_config.write_text(self._ssh_config("user"))

    def _ssh_config(self, key: str) -> str:
        return (
            f"Host *\n  IdentityFile {self.folder / f'{key}.key'}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder / 'known_hosts'}\n  GlobalKnownHostsFile /dev/null\n"
            f"  StrictHostKeyChecking yes\n"
        )

    def strangers_config(self, host: str) -> Path:
        """Return a configuration of ssh that offers `host` a key which it does not know."""
        path = self.folder / "strangers_config"
        first = f"Host {self.address(host)}\n  IdentityFile {self.folder / 'stranger.key'}\n"
        last = self._ssh_config("user").replace("Host *", f"Host * !{self.address(host)}", 1)
        shared = "".join(f"  {line.strip()}\n" for line in last.splitlines()[2:])
        path.write_text(first + shared + last)
        return path

    def start_sshd(self, host: str, *more: str, max_startups: str = "100") -> None:
        """Start a host's server of ssh, with lines for its configuration; return when it listens."""
        config = self.folder / f"{host}.sshd"
        config.write_text(
            f"ListenAddress {self.address(host)}\nPort {_PORT}\n"
            f"HostKey {self.folder / f'{host}.key'}\n"
            f"AuthorizedKeysFile {self.folder / 'user.key.pub'}\nUsePAM no\nStrictModes no\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
            f"PidFile {self.folder / f'{host}.pid'}\nMaxStartups {max_startups}\n"
            f"SetEnv SUPERSERVE_STATE={self.state(host)}\n" + "".join(f"{line}\n" for line in more)
        )
        with (self.folder / f"{host}.sshd.log").open("wb") as log:
            self._sshd[host] = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(host), _SSHD, "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        log_path = self.folder / f"{host}.sshd.log"
        self.until(lambda: "Server listening" in log_path.read_text())

    def stop_sshd(self, host: str) -> None:
        """End a host's server of ssh, and every session of it."""
        for pid in _call("ip", "netns", "pids", self.namespace(host)).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(int(pid)).name().startswith("sshd"):
                    os.kill(int(pid), signal.SIGKILL)
        self._sshd.pop(host).wait()

    # --- commands -----------------------------------------------------------------------------

    def start(self, *argv: str, host: str = "op") -> subprocess.Popen[str]:
        """Start a command of the operator, or of a host."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace(host), *argv], env=self._env(host), cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def cluster(self, *args: str, host: str = "op") -> tuple[int, str]:
        """Run `python -m cluster ...`; return its exit code and all that it printed."""
        return self._warm("cluster", *args, host=host)

    def loadgen(self, *args: str, host: str = "op") -> tuple[int, str]:
        """Run `python -m loadgen ...`; return its exit code and all that it printed."""
        return self._warm("loadgen", *args, host=host)

    def _warm(self, module: str, *args: str, host: str) -> tuple[int, str]:
        return warm.run(module, *args, env=self._env(host), timeout_s=WAIT_S, namespace=self.namespace(host))

    def _env(self, host: str) -> dict[str, str]:
        return {
            **os.environ, "SUPERSERVE_STATE": str(self.state(host)), "PYTHONPATH": str(ROOT),
            "SUPERSERVE_SSH_CONFIG": str(self.ssh_config), "COLUMNS": "200",
            **self.env,
        }  # fmt: skip

    def run(self, *argv: str, host: str = "op") -> tuple[int, str]:
        """Run a command to its end; return its exit code and all that it printed."""
        with self.start(*argv, host=host) as command:
            try:
                output, _ = command.communicate(timeout=WAIT_S)
            except subprocess.TimeoutExpired:
                command.kill()
                output, _ = command.communicate()
                raise AssertionError(f"{argv} did not end within {WAIT_S:g} s: {output}") from None
        return command.returncode, output

    def _in(self, host: str, *argv: str) -> None:
        _call("ip", "netns", "exec", self.namespace(host), *argv)

    # --- what is left -------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Return every process of the run that `cluster` started on a host, whoever its parent is."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            state = process.environ().get("SUPERSERVE_STATE", "")
            is_python = "python" in process.name()
        except psutil.Error:  # ended, or a zombie
            return False
        return is_python and Path(state) in [self.state(host) for host in self.hosts]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so that other processes bring about."""
        give_up_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < give_up_s, f"not within {WAIT_S:g} s: {self.processes()}"
            time.sleep(_ASK_EVERY_S)


def _call(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def remove_namespace(name: str) -> None:
    """Remove a namespace and kill what is in it, if it is there."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in pids.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def sweep() -> None:
    """Remove the namespaces of runs that were killed."""
    names = [line.split()[0] for line in _call("ip", "netns", "list").splitlines() if line.strip()]
    for name in names:
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == _PREFIX and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            remove_namespace(name)
            folder = rest.partition("-")[2].rpartition("-")[0]
            shutil.rmtree(f"/tmp/ss{folder}", ignore_errors=True)


def why_not() -> str:
    """Return why this machine cannot have such hosts; "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if lacking := [name for name in ("ip", "ssh", "ssh-keygen", _SSHD) if shutil.which(name) is None]:
        return f"{', '.join(lacking)}: not installed; Debian has iproute2 and openssh-server"
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    remove_namespace(probe)
    return "" if done.returncode == 0 else f"ip netns add: {done.stderr.strip()}"


@contextlib.contextmanager
def net(*hosts: str) -> Iterator[Net]:
    """Give hosts; skip the test, with the reason, where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    sweep()
    here = Net(hosts)
    try:
        here.open()
        yield here
    finally:
        here.close()
