"""A cluster on several hosts, as its operator reaches it: how it stands, and one role at a time.

    with open_cluster("default") as fleet:
        for host in fleet.states():
            ...
        fleet.stop("worker-a-0")

Everything goes over ssh, `router_status` too: it is asked on the router's own host, so an
operator needs no way to the router's ports.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.remote import record as records
from cluster.remote.ask import ASK_S, ask
from cluster.remote.shell import OpenSsh, RemoteError, parallel
from superserve.errors import ConfigError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence

    from cluster.remote.record import KnownHost, Record
    from cluster.remote.shell import Completed, Shell

_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class RoleSeen:
    """A role as the supervisor of its host sees it.

    Attributes:
        host: The host's name.
        name: Unique in the cluster; a worker gives it to the router too.
        kind: "router" or "worker".
        serves: What it serves, in words.
        state: Supervisor's word: RUNNING, STARTING (younger than 10 s), BACKOFF (ended too soon,
            and is started again), EXITED, STOPPED, FATAL (given up).
        pid: Its process; None if it has none.
        up_s: How long that has run.
        exit_code: Of its last end.
        log: Where its log is on the host.
        tail: The log's last lines, if it is not well.
    """

    host: str
    name: str
    kind: str
    serves: str
    state: str
    pid: int | None
    up_s: int
    exit_code: int
    log: str
    tail: tuple[str, ...]

    @property
    def is_running(self) -> bool:
        """Whether it has a process that is not on its way out."""
        return self.pid is not None and self.state in ("RUNNING", "STARTING")


@dataclass(frozen=True, slots=True)
class HostSeen:
    """A host and its roles.

    Attributes:
        name: In hosts.yaml.
        error: Why it cannot be asked; "" if it was.
        supervisord: The process that watches the roles; None if it does not run.
        roles: The router first, where it is here.
    """

    name: str
    error: str
    supervisord: int | None
    roles: tuple[RoleSeen, ...]


class RemoteFleet:
    """A cluster's hosts. As every method asks them, each raises RemoteError, naming the host.

    Attributes:
        record: What is known of the cluster without asking.
    """

    def __init__(self, record: Record, shell: Shell) -> None:
        self.record = record
        self._shell = shell

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts' names."""
        return tuple(host.name for host in self.record.hosts)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles' names, the router's first."""
        return tuple(role for host in self.record.hosts for role in host.roles)

    # --- asking -------------------------------------------------------------------------------

    def states(self) -> tuple[HostSeen, ...]:
        """Return how every role stands; a host that cannot be asked says why."""
        return tuple(parallel(self.record.hosts, self._state))

    def _state(self, host: KnownHost) -> HostSeen:
        try:
            said = self.ask(host.name, "states")
        except RemoteError as error:
            return HostSeen(host.name, str(error), None, ())
        roles = tuple(
            RoleSeen(
                host.name, role["name"], role["kind"], role["serves"], role["state"], role["pid"],
                role["up_s"], role["exit"], role["log"], tuple(role["tail"]),
            )
            for role in said["roles"]
        )  # fmt: skip
        return HostSeen(host.name, "", said["supervisord"], roles)

    def router_status(self) -> dict[str, Any] | None:
        """Return the router's STATUS; None if it does not answer."""
        said = self.ask(self.record.router_host, "status", endpoint=self.record.client_endpoint)
        status: dict[str, Any] | None = said["status"]
        return status

    def log_tail(self, role: str, n_lines: int = _TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log."""
        lines: list[str] = self.ask(self.record.host_of(role).name, "tail", role=role, lines=n_lines)["lines"]
        return lines

    # --- telling ------------------------------------------------------------------------------

    def start(self, role: str) -> None:
        """Start a role that does not run; return at once."""
        self.ask(self.record.host_of(role).name, "start", role=role)

    def stop(self, role: str) -> None:
        """Stop a role by SIGTERM, and by SIGKILL if that takes long; return when it has ended."""
        self.ask(self.record.host_of(role).name, "stop", role=role)

    def signal(self, role: str, name: str) -> None:
        """Send a role a signal, such as "TERM"."""
        self.ask(self.record.host_of(role).name, "signal", role=role, signal=name)

    # --- both ---------------------------------------------------------------------------------

    def ask(self, host: str, verb: str, *, timeout_s: float = ASK_S, **asked: Any) -> dict[str, Any]:
        """Have a host do a verb of `cluster.host.onhost`, and return what it says.

        Raises:
            UnreachableError: The host cannot be reached.
            RemoteError: The verb failed there.
        """
        known = self.record.host(host)
        return ask(self._shell, known, verb, timeout_s=timeout_s, **asked)

    def run(
        self, host: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = ASK_S
    ) -> Completed:
        """Run any command on a host, to its end."""
        try:
            return self._shell.run(self.record.host(host).target, argv, stdin=stdin, timeout_s=timeout_s)
        except RemoteError as error:
            raise type(error)(f"{host}: {error}") from error

    def start_reading(self, host: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command on a host whose output the caller reads from its `stdout`, and ends."""
        return self._shell.start(self.record.host(host).target, argv)


@contextlib.contextmanager
def open_cluster(name: str) -> Iterator[RemoteFleet]:
    """Give a cluster that was started from a hosts file on this machine.

    Raises:
        ConfigError: None is known under this name.
    """
    record = records.load(name)
    if record is None:
        others = f"; known are: {', '.join(records.names())}" if records.names() else ""
        raise ConfigError(
            f"no cluster {name!r} on other hosts is known to this machine{others}; "
            f"`cluster up FILE` with its hosts file makes it known, and changes nothing that runs"
        )
    with OpenSsh(None if record.ssh_config is None else Path(record.ssh_config)) as shell:
        yield RemoteFleet(record, shell)
