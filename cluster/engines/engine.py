"""What every engine can do, and what it reports: the verbs behind the commands of `cluster`.

    ssh           a supervisord on each host             cluster/operate/engine.py
    slurm         a job for each role                    cluster/engines/placed/slurm.py
    ray           a detached actor for each role         cluster/engines/placed/ray_engine.py
    kubernetes    a StatefulSet or Deployment a role     cluster/engines/placed/kubernetes_engine.py

No verb determines how or where a process is started. What each reports is plain data: hosts of hosts.yaml,
and their roles in supervisor's words (`superserve.roles.local.RoleState`), whatever keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cluster.spec.roles import is_router
from superserve.fields import KEY

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

    from cluster.remote.record import KnownHost, Record
    from cluster.spec.roles import HostPlan
    from superserve.status import RouterStatus

TAIL_LINES = 15
"""How many lines of a log `ClusterEngine.logs` returns if it is not asked for another number."""


@dataclass(frozen=True, slots=True)
class RoleSeen:
    """A role, as the keeper on its host reports it.

    Attributes:
        host: The host's name.
        name: Unique in the cluster; a worker also sends it to the router.
        kind: "router" or "worker".
        serves: What it serves, in words.
        state: Supervisor's state, one of `superserve.roles.local.RoleState`.
        pid: Its process; None if it has none, or an engine that names it otherwise: see `place`.
        up_s: How long that has run.
        exit_code: Of its last end, -N if signal N ended it.
        log: The path of its log on the host.
        tail: The log's last lines, if it is not well.
        restarts: How often it was restarted after crashes.
        why: How it last ended, with the end of its log, or why it does not run yet; "" if there is nothing to
            say.
        metrics: Where it serves /metrics, HOST:PORT; "" if it does not.
        place: What and where it is, in the engine's words: "job 12 on n3"; "" if pid and host tell.
    """

    host: str
    name: str
    kind: str
    serves: str
    state: str
    pid: int | None
    up_s: int
    exit_code: int = field(metadata={KEY: "exit"})
    log: str
    tail: tuple[str, ...]
    restarts: int = 0
    why: str = ""
    metrics: str = ""
    place: str = ""

    @property
    def is_up(self) -> bool:
        """Whether it is ready."""
        return self.state == "RUNNING"

    @property
    def has_ended(self) -> bool:
        """Whether it has ended and will not be restarted automatically."""
        return self.state in ("STOPPED", "EXITED", "FATAL")


@dataclass(frozen=True, slots=True)
class HostSeen:
    """A host and its roles.

    Attributes:
        name: In hosts.yaml.
        error: Why it cannot be reached; "" if it was.
        supervisord: The keeper's process; None if it does not run, or the engine has none.
        roles: The router first, if it is on this host.
    """

    name: str
    error: str
    supervisord: int | None
    roles: tuple[RoleSeen, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` did on a host.

    Attributes:
        error: Why it failed; "" if it did not.
        changed: What was done to each role; without the roles that were left alone.
        files: Files that were sent again or removed.
    """

    error: str
    changed: dict[str, str]
    files: list[str]


@dataclass(frozen=True, slots=True)
class Stopped:
    """What `stop` did.

    Attributes:
        stopped: Each role and the process it was, by host; 0 for a process that the engine does not number.
        wrong: The hosts where it failed, each with the reason.
    """

    stopped: dict[str, tuple[tuple[str, int], ...]]
    wrong: dict[str, str]


class ClusterEngine(Protocol):
    """What starts, shows and stops the roles of a cluster.

    Each verb raises RemoteError, naming the host or the role, if it cannot be done.
    """

    @property
    def record(self) -> Record:
        """What is known about the cluster without asking."""
        ...

    def keep(self, record: Record) -> None:
        """Replace what is known about the cluster: it was scaled."""
        ...

    def apply(
        self, plans: Mapping[str, HostPlan], files: Mapping[str, Mapping[str, str]]
    ) -> dict[str, Applied]:
        """Run exactly the plans' roles, by host, with files beside them; touch only what differs."""
        ...

    def roles(self) -> tuple[HostSeen, ...]:
        """Return the state of every role; a host that cannot be reached has an error."""
        ...

    def logs(self, role: str, n_lines: int = TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log."""
        ...

    def scale(self, role: str, n: int) -> None:
        """Run a role once, or, with 0, drain it and let it end. Does not wait for either."""
        ...

    def tune(self, settings: bytes) -> None:
        """Give every router other settings, in a file that it reads by itself. Does not wait for that."""
        ...

    def stop(self) -> Stopped:
        """Stop the routers, while workers still answer what they hold, then everything."""
        ...

    def router_status(self) -> RouterStatus | None:
        """Return the router's STATUS; None if it does not answer, WireError if it cannot be read."""
        ...

    def follow(self, role: str, n_lines: int) -> subprocess.Popen[bytes]:
        """Start what prints the last lines of a role's log and then each new one.

        The caller reads its output from `stdout`, and ends it.
        """
        ...


def absent(host: KnownHost, name: str, state: str, why: str = "") -> RoleSeen:
    """Return a role that no keeper reports."""
    kind = "router" if is_router(name) else "worker"
    log = str(Path(host.folder) / f"{name}.log")
    return RoleSeen(host.name, name, kind, "", state, None, 0, 0, log, (), why=why)


def tail(path: str, n_lines: int) -> list[str]:
    """Return a command that prints the last lines of a log, and then each new one."""
    # -F: the log is rotated when it has grown, and starts again.
    return ["tail", "-n", str(n_lines), "-F", path]
