"""A cluster that supervisor runs, on this machine or several, as `cluster.operate.operable.Operable`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.host.facts import Facts
from cluster.operate.operable import HostFacts, RoleView
from cluster.remote.shell import RemoteError, parallel
from superserve.errors import ProcessError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.operate.engine import RoleSeen, SupervisorEngine
    from cluster.remote.record import KnownHost
    from superserve.status import RouterStatus

UNREACHABLE = "UNREACHABLE"
"""The state of a role whose host cannot be reached."""


class SupervisedCluster:
    """A cluster, as its keepers and its router report it.

    Args:
        engine: Reaches its hosts.

    Attributes:
        name: The cluster's.
        is_local: Whether it is a cluster of this machine.
    """

    def __init__(self, engine: SupervisorEngine) -> None:
        self.name = engine.record.name
        self.is_local = engine.is_here
        self._engine = engine

    def roles(self) -> tuple[RoleView, ...]:
        """Return every role as its keeper reports it, or as unreachable if its host is."""
        found: list[RoleView] = []
        for known, seen in zip(self._engine.record.hosts, self._engine.roles(), strict=True):
            if seen.error:
                found += [_unreachable(name, known, seen.error) for name in known.roles]
            elif self.is_local and seen.supervisord is None:
                raise ProcessError(f"cluster {self.name!r}: it ended meanwhile")
            else:
                found += [_view(role) for role in seen.roles]
        return tuple(sorted(found, key=lambda role: role.kind != "router"))

    def status(self) -> RouterStatus | None:
        """Return the router's STATUS; None if it or its host does not answer."""
        try:
            return self._engine.router_status()
        except RemoteError:  # the roles contain the reason
            return None

    def stop(self, role: str) -> None:
        """Make a host's keeper stop a role."""
        self._engine.scale(role, 0)

    def start(self, role: str) -> None:
        """Make a host's keeper start a role."""
        self._engine.scale(role, 1)

    def facts(self, roles: Sequence[RoleView]) -> tuple[HostFacts, ...]:
        """Return the facts about each host."""
        pids: dict[str, list[int]] = {}
        for role in roles:
            if role.pid is not None:
                pids.setdefault(role.host, []).append(role.pid)
        return tuple(
            parallel(self._engine.record.hosts, lambda host: self._facts(host, pids.get(host.name, [])))
        )

    def _facts(self, host: KnownHost, pids: Sequence[int]) -> HostFacts:
        before_s = time.time()
        try:
            said = self._engine.ask(host.name, "facts", pids=list(pids))
        except RemoteError as error:
            return HostFacts(host.name, str(error), None, 0.0, 0.0)
        after_s = time.time()
        files = {pid: (int(n), int(most)) for pid, (n, most) in said.pop("open_files").items()}
        facts = Facts(**said, open_files=files)
        # The host read its clock at some point in between: the middle is off by at most half.
        middle_s, half_s = (before_s + after_s) / 2, (after_s - before_s) / 2
        return HostFacts(host.name, "", facts, facts.time_s - middle_s, half_s)


def _view(role: RoleSeen) -> RoleView:
    why = "" if role.is_running and not role.restarts else role.why
    return RoleView(
        role.name, role.kind, role.host, role.state, role.is_running, role.has_ended, role.pid,
        role.restarts, why, role.log,
    )  # fmt: skip


def _unreachable(name: str, host: KnownHost, why: str) -> RoleView:
    kind = "router" if name == "router" else "worker"
    log = str(Path(host.folder) / f"{name}.log")
    return RoleView(name, kind, host.name, UNREACHABLE, False, False, None, None, why, log)
