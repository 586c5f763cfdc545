"""The engine of clusters over ssh and of this machine: a supervisord on each host.

    with open_cluster("default") as engine:
        for host in engine.roles():
            ...
        engine.scale("worker-a-0", 0)

`SupervisorEngine` has a supervisord on each host, this machine included, and does everything through the
verbs of `cluster.host.onhost`: over ssh, or on this machine by calling them. `router_status` uses the same
way, so an operator needs no access to the router's ports.
"""

from __future__ import annotations

import base64
import contextlib
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.engines.engine import TAIL_LINES, Applied, HostSeen, RoleSeen, Stopped, absent, tail
from cluster.engines.placed.opening import open_placed
from cluster.remote import record as records
from cluster.remote.ask import ASK_S, ask
from cluster.remote.record import KnownHost, Record
from cluster.remote.shell import LocalShell, OpenSsh, RemoteError, parallel
from cluster.spec.engines import SSH
from cluster.spec.plan import python_path
from cluster.spec.roles import HERE, SETTINGS
from superserve.errors import ConfigError
from superserve.fields import read
from superserve.roles import local
from superserve.status import RouterStatus

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping, Sequence

    from cluster.engines.engine import ClusterEngine
    from cluster.remote.shell import Shell
    from cluster.spec.roles import HostPlan
    from superserve.roles.local import LocalCluster

_APPLY_S = 120.0  # roles that are replaced may take a while to end
_STOP_S = 120.0  # every role on the host may take its whole grace period


class SupervisorEngine:
    """A supervisord on each host of a cluster.

    Its verbs are those of `cluster.engines.engine.ClusterEngine`.

    Attributes:
        record: What is known about the cluster without asking.
    """

    def __init__(self, record: Record, shell: Shell) -> None:
        self.record = record
        self._shell = shell

    def keep(self, record: Record) -> None:
        """Replace what is known about the cluster."""
        self.record = record

    @property
    def is_here(self) -> bool:
        """Whether it is a cluster of this machine."""
        return all(host.is_here for host in self.record.hosts)

    # --- the engine's verbs -------------------------------------------------------------------

    def apply(
        self, plans: Mapping[str, HostPlan], files: Mapping[str, Mapping[str, str]], **more: Any
    ) -> dict[str, Applied]:
        """Run exactly the plans' roles, by host, with files beside them; touch only what differs."""

        def apply(name: str) -> Applied:
            plan = asdict(plans[name])
            try:
                said = self.ask(name, "apply", timeout_s=_APPLY_S, plan=plan, files=dict(files[name]), **more)
            except RemoteError as error:
                return Applied(str(error), {}, [])
            return Applied("", said["changed"], said["files"])

        return dict(zip(plans, parallel(list(plans), apply), strict=True))

    def roles(self) -> tuple[HostSeen, ...]:
        """Return the state of every role; a host that cannot be reached has an error."""
        return tuple(parallel(self.record.hosts, self._state))

    def logs(self, role: str, n_lines: int = TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log."""
        lines: list[str] = self.ask(self.record.host_of(role).name, "tail", role=role, lines=n_lines)["lines"]
        return lines

    def scale(self, role: str, n: int) -> None:
        """Start a role that does not run, or stop it: by SIGTERM, and by SIGKILL if that takes too long."""
        assert n in (0, 1), "a role is one process: `up` with another number of workers adds roles"
        self.ask(self.record.host_of(role).name, "start" if n else "stop", role=role)

    def tune(self, settings: bytes) -> None:
        """Give the routers other settings, in a file that each reads by itself."""
        text = base64.b64encode(settings).decode()
        for host in self.record.router_hosts:
            self.ask(host, "put", name=SETTINGS, content=text)

    def stop(self) -> Stopped:
        """Stop the routers, while workers still answer what they hold, then everything on all hosts."""
        stopped: dict[str, tuple[tuple[str, int], ...]] = {}
        wrong: dict[str, str] = {}
        parallel(self.record.router_hosts, lambda h: self._stop(h, stopped, wrong, kind="router"))
        others = [host for host in self.record.host_names if host not in wrong]
        parallel(others, lambda h: self._stop(h, stopped, wrong))
        return Stopped({host: stopped[host] for host in self.record.host_names if host in stopped}, wrong)

    def _stop(
        self,
        host: str,
        stopped: dict[str, tuple[tuple[str, int], ...]],
        wrong: dict[str, str],
        *,
        kind: str | None = None,
    ) -> None:
        try:
            said = self.ask(host, "down", timeout_s=_STOP_S, kind=kind)
        except RemoteError as error:
            wrong[host] = str(error)
            return
        stopped[host] = (*stopped.get(host, ()), *((name, pid) for name, pid in said["stopped"]))

    # --- asking -------------------------------------------------------------------------------

    def _state(self, host: KnownHost) -> HostSeen:
        try:
            said = self.ask(host.name, "states")
        except RemoteError as error:
            return HostSeen(host.name, str(error), None, ())
        found = {role["name"]: role for role in said["roles"]}
        roles = tuple(_seen(host, name, found.get(name)) for name in dict.fromkeys([*host.roles, *found]))
        return HostSeen(host.name, "", said["supervisord"], roles)

    def router_status(self) -> RouterStatus | None:
        """Return the router's STATUS; None if it does not answer, WireError if it cannot be read."""
        said = self.ask(self.record.router_host, "status", endpoint=self.record.client_endpoint)
        status = said["status"]
        return None if status is None else RouterStatus.from_body(status)

    def ask(self, host: str, verb: str, *, timeout_s: float = ASK_S, **asked: Any) -> dict[str, Any]:
        """Run a verb of `cluster.host.onhost` on a host, and return its answer.

        Raises:
            UnreachableError: The host cannot be reached.
            RemoteError: The verb failed there.
        """
        known = self.record.host(host)
        return ask(self._shell, known, verb, timeout_s=timeout_s, **asked)

    def follow(self, role: str, n_lines: int) -> subprocess.Popen[bytes]:
        """Start what prints the last lines of a role's log and then each new one, on its host."""
        host = self.record.host_of(role)
        return self._shell.start(host.target, tail(f"{host.folder}/{role}.log", n_lines))


def _seen(host: KnownHost, name: str, role: dict[str, Any] | None) -> RoleSeen:
    """Return a role as its keeper reports it; a role that is missing there counts as stopped."""
    if role is None:
        return absent(host, name, "STOPPED")
    return read(RoleSeen, {**role, "host": host.name}, f"{host.name}: {name}")


# --- which cluster ----------------------------------------------------------------------------


def here(name: str, cluster: LocalCluster | None = None, roles: Sequence[str] = ()) -> SupervisorEngine:
    """Return the engine of a cluster of this machine: one host, without ssh.

    Args:
        name: Of the cluster.
        cluster: As in its state file; None before there is one.
        roles: The names of its roles, if there is no file yet.
    """
    host = KnownHost(
        platform.node(), HERE, str(local.cluster_folder(name)), sys.executable, python_path(),
        tuple(roles) if cluster is None else tuple(role.name for role in cluster.roles),
    )  # fmt: skip
    ends = ("", "") if cluster is None else (cluster.client_endpoint, cluster.worker_endpoint)
    return SupervisorEngine(Record(name, "", None, host.name, *ends, "", (host,), (), (), ""), LocalShell())


@contextlib.contextmanager
def open_cluster(name: str) -> Iterator[ClusterEngine]:
    """Give a cluster that was started from a hosts file on this machine.

    Raises:
        ConfigError: This machine knows none of this name.
    """
    record = records.load(name)
    if record is None:
        others = f"; known are: {', '.join(records.names())}" if records.names() else ""
        raise ConfigError(
            f"no cluster {name!r} on other hosts is known to this machine{others}; "
            f"`cluster up FILE` with its hosts file makes it known, and changes nothing that runs"
        )
    if record.engine != SSH:
        with open_placed(record) as engine:
            yield engine
        return
    with OpenSsh(None if record.ssh_config is None else Path(record.ssh_config)) as shell:
        yield SupervisorEngine(record, shell)
