"""A running cluster, as seen by the commands that change or check one role at a time."""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.engines.engine import absent
from cluster.host.facts import Facts
from cluster.operate.engine import SupervisorEngine
from cluster.remote.shell import RemoteError, parallel
from superserve.errors import ConfigError, ProcessError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.engines.engine import ClusterEngine, RoleSeen
    from cluster.remote.record import KnownHost
    from superserve.status import RouterStatus

UNREACHABLE = "UNREACHABLE"
"""The state of a role whose host cannot be reached."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts about a host of a cluster.

    Attributes:
        host: Its name.
        error: Why it cannot be reached; "" if it was.
        facts: Its answer; None if it cannot be reached.
        clock_s: How far its clock is ahead of this machine's, in seconds.
        clock_error_s: How far off that value may be.
    """

    host: str
    error: str
    facts: Facts | None
    clock_s: float
    clock_error_s: float


class SupervisedCluster:
    """A cluster, as its keepers and its router report it; what cannot be done raises a SuperServeError.

    Args:
        engine: Reaches its hosts.

    Attributes:
        name: The cluster's.
        is_local: Whether it is a cluster of this machine.
    """

    def __init__(self, engine: ClusterEngine) -> None:
        self.name = engine.record.name
        self.is_local = isinstance(engine, SupervisorEngine) and engine.is_here
        self._engine = engine

    def roles(self) -> tuple[RoleSeen, ...]:
        """Return every role as its keeper reports it, or as unreachable if its host is."""
        found: list[RoleSeen] = []
        for known, seen in zip(self._engine.record.hosts, self._engine.roles(), strict=True):
            if seen.error:
                found += [absent(known, name, UNREACHABLE, seen.error) for name in known.roles]
            elif self.is_local and seen.supervisord is None:
                raise ProcessError(f"cluster {self.name!r}: it ended meanwhile")
            else:
                found += seen.roles
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

    def facts(self, roles: Sequence[RoleSeen]) -> tuple[HostFacts, ...]:
        """Return the facts about each host, and how many files the processes of `roles` have open there.

        None of an engine that chooses the machines: it looks after those itself.
        """
        engine = self._engine
        if not isinstance(engine, SupervisorEngine):
            return ()
        pids: dict[str, list[int]] = {}
        for role in roles:
            if role.pid is not None:
                pids.setdefault(role.host, []).append(role.pid)
        return tuple(
            parallel(engine.record.hosts, lambda host: _facts(engine, host, pids.get(host.name, [])))
        )


def _facts(engine: SupervisorEngine, host: KnownHost, pids: Sequence[int]) -> HostFacts:
    before_s = time.time()
    try:
        said = engine.ask(host.name, "facts", pids=list(pids))
    except RemoteError as error:
        return HostFacts(host.name, str(error), None, 0.0, 0.0)
    after_s = time.time()
    files = {pid: (int(n), int(most)) for pid, (n, most) in said.pop("open_files").items()}
    facts = Facts(**said, open_files=files)
    # The host read its clock at some point in between: the middle is off by at most half.
    middle_s, half_s = (before_s + after_s) / 2, (after_s - before_s) / 2
    return HostFacts(host.name, "", facts, facts.time_s - middle_s, half_s)


def chosen(roles: Sequence[RoleSeen], names: Iterable[str]) -> list[RoleSeen]:
    """Return the workers that names of workers and hosts mean, each once.

    Raises:
        ConfigError: A name means none; the error suggests the nearest ones.
    """
    workers = [role for role in roles if role.kind == "worker"]
    found: dict[str, RoleSeen] = {}
    for name in names:
        meant = [role for role in workers if name in (role.name, role.host)]
        if not meant:
            raise ConfigError(_no_such(name, roles, workers))
        found |= {role.name: role for role in meant}
    return [role for role in workers if role.name in found]


def _no_such(name: str, roles: Sequence[RoleSeen], workers: Sequence[RoleSeen]) -> str:
    if any(role.name == name for role in roles):
        return f"{name}: expected a worker or a host; `cluster restart --rolling --router` is for the router"
    if any(role.host == name for role in roles):
        return f"{name}: expected a host with workers; it has none"
    known = list(dict.fromkeys([*(role.name for role in workers), *(role.host for role in workers)]))
    if nearest := difflib.get_close_matches(name, known, n=3):
        return f"{name}: no such worker or host; did you mean {' or '.join(nearest)}?"
    return f"{name}: expected a worker or a host, one of {', '.join(known)}"
