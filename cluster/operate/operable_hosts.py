"""A cluster on several hosts, as `cluster.operate.operable.Operable`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from cluster.host.facts import Facts
from cluster.operate.operable import HostFacts, RoleView
from cluster.remote.shell import RemoteError, parallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.operate.fleet import RemoteFleet, RoleSeen
    from cluster.remote.record import KnownHost

UNREACHABLE = "UNREACHABLE"
"""The state of a role whose host cannot be asked."""


class HostsOperable:
    """A cluster that was started from a hosts file.

    Args:
        fleet: Its hosts, as they are reached.

    Attributes:
        name: The cluster's.
        is_local: Always False: its supervisors bound its logs.
    """

    is_local = False

    def __init__(self, fleet: RemoteFleet) -> None:
        self.name = fleet.record.name
        self._fleet = fleet

    def roles(self) -> tuple[RoleView, ...]:
        """Return every role as its supervisor sees it, or as unreachable where its host cannot be asked."""
        found: list[RoleView] = []
        for known, seen in zip(self._fleet.record.hosts, self._fleet.states(), strict=True):
            if seen.error:
                found += [_unreachable(name, known, seen.error) for name in known.roles]
            else:
                found += [_view(role) for role in seen.roles]
        return tuple(sorted(found, key=lambda role: role.kind != "router"))

    def status(self) -> dict[str, Any] | None:
        """Return the router's STATUS; None if it or its host does not answer."""
        try:
            return self._fleet.router_status()
        except RemoteError:  # the roles say why
            return None

    def stop(self, role: str) -> None:
        """Have a host's supervisor stop a role; returns when it has ended."""
        self._fleet.stop(role)

    def start(self, role: str) -> None:
        """Have a host's supervisor start a role."""
        self._fleet.start(role)

    def facts(self, roles: Sequence[RoleView]) -> tuple[HostFacts, ...]:
        """Return what is known of each host."""
        pids: dict[str, list[int]] = {}
        for role in roles:
            if role.pid is not None:
                pids.setdefault(role.host, []).append(role.pid)
        return tuple(
            parallel(self._fleet.record.hosts, lambda host: self._facts(host, pids.get(host.name, [])))
        )

    def _facts(self, host: KnownHost, pids: Sequence[int]) -> HostFacts:
        argv = [
            "env", f"PYTHONPATH={host.code}", host.interpreter, "-m", "cluster.host.facts", host.folder,
            *map(str, pids),
        ]  # fmt: skip
        before_s = time.time()
        try:
            done = self._fleet.run(host.name, argv)
        except RemoteError as error:
            return HostFacts(host.name, str(error), None, 0.0, 0.0)
        after_s = time.time()
        if done.code != 0:
            words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.code}"]
            return HostFacts(host.name, f"{host.name}: {words[0]}", None, 0.0, 0.0)
        facts = Facts(**orjson.loads(done.stdout.strip().splitlines()[-1]))
        # It looked at its clock in between, nobody knows when: the middle is wrong by half at most.
        middle_s, half_s = (before_s + after_s) / 2, (after_s - before_s) / 2
        return HostFacts(host.name, "", facts, facts.time_s - middle_s, half_s)


def _view(role: RoleSeen) -> RoleView:
    has_ended = role.state in ("STOPPED", "FATAL") or (role.state == "EXITED" and role.exit_code == 0)
    why = "" if role.is_running else "\n".join([f"exit code {role.exit_code}", *role.tail])
    return RoleView(
        role.name, role.kind, role.host, role.state, role.is_running, has_ended, role.pid, None, why, role.log
    )


def _unreachable(name: str, host: KnownHost, why: str) -> RoleView:
    kind = "router" if name == "router" else "worker"
    log = str(Path(host.folder) / f"{name}.log")
    return RoleView(name, kind, host.name, UNREACHABLE, False, False, None, None, why, log)
