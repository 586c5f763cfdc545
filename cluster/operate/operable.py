"""A running cluster, as seen by the commands that change or check one role at a time.

`Operable` and `Examinable` are what they need; `cluster.operate.supervised` implements both for any cluster
that supervisor runs.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.host.facts import Facts
    from superserve.status import RouterStatus


@dataclass(frozen=True, slots=True)
class RoleView:
    """A role, as its keeper reports it.

    Attributes:
        name: Unique in the cluster; workers also send it to the router.
        kind: "router" or "worker".
        host: The name of the host that it runs on.
        state: The keeper's state.
        is_up: Whether it runs, as far as its keeper knows.
        has_ended: Whether it has ended and will not be restarted automatically.
        pid: Its process; None if it has none.
        restarts: How often it was restarted after crashes; None if its host cannot be reached.
        why: How it last ended, with the last lines of its log; "" if it never did.
        log: The path of its log on its host.
    """

    name: str
    kind: str
    host: str
    state: str
    is_up: bool
    has_ended: bool
    pid: int | None
    restarts: int | None
    why: str
    log: str


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


class Operable(Protocol):
    """A running cluster. What cannot be done raises a SuperServeError with the reason."""

    @property
    def name(self) -> str:
        """The cluster's name."""

    def roles(self) -> tuple[RoleView, ...]:
        """Return every role in its present state, the router first."""

    def status(self) -> RouterStatus | None:
        """Return the router's STATUS; None if it does not answer."""

    def stop(self, role: str) -> None:
        """Make a role end, a worker by draining; it is not restarted. Returns before it has ended."""

    def start(self, role: str) -> None:
        """Start a role that has ended; returns before it is ready."""


class Examinable(Operable, Protocol):
    """A cluster that `cluster doctor` can check."""

    @property
    def is_local(self) -> bool:
        """Whether it is a cluster of this machine."""

    def facts(self, roles: Sequence[RoleView]) -> tuple[HostFacts, ...]:
        """Return the facts about each host, and how many files the processes of `roles` have open there."""


def chosen(roles: Sequence[RoleView], names: Iterable[str]) -> list[RoleView]:
    """Return the workers that names of workers and hosts mean, each once.

    Raises:
        ConfigError: A name means none; the error suggests the nearest ones.
    """
    workers = [role for role in roles if role.kind == "worker"]
    found: dict[str, RoleView] = {}
    for name in names:
        meant = [role for role in workers if name in (role.name, role.host)]
        if not meant:
            raise ConfigError(_no_such(name, roles, workers))
        found |= {role.name: role for role in meant}
    return [role for role in workers if role.name in found]


def _no_such(name: str, roles: Sequence[RoleView], workers: Sequence[RoleView]) -> str:
    if any(role.name == name for role in roles):
        return f"{name}: expected a worker or a host; `cluster restart --rolling --router` is for the router"
    if any(role.host == name for role in roles):
        return f"{name}: expected a host with workers; it has none"
    known = list(dict.fromkeys([*(role.name for role in workers), *(role.host for role in workers)]))
    if nearest := difflib.get_close_matches(name, known, n=3):
        return f"{name}: no such worker or host; did you mean {' or '.join(nearest)}?"
    return f"{name}: expected a worker or a host, one of {', '.join(known)}"
