"""A running cluster, as those commands see it that change or judge one role at a time.

`Operable` and `Examinable` are what they need; `cluster.operate.supervised` is both for any cluster that
supervisor runs.
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
    """A role as whoever watches it says.

    Attributes:
        name: Unique in the cluster; workers give it to the router too.
        kind: "router" or "worker".
        host: The name of the host that it runs on.
        state: The watcher's own word.
        is_up: Whether it runs, as far as its watcher can tell.
        has_ended: Whether it has ended and will not be started again by itself.
        pid: Its process; None if it has none.
        restarts: How often it was started again after crashes; None if its host cannot be asked.
        why: What ended it last, with the last lines of its log; "" if nothing did.
        log: Where its log is on its host.
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
    """What a host of a cluster is like.

    Attributes:
        host: Its name.
        error: Why it cannot be asked; "" if it was.
        facts: What it said; None if it cannot be asked.
        clock_s: How far its clock is ahead of this machine's, in seconds.
        clock_error_s: By how much that may be wrong.
    """

    host: str
    error: str
    facts: Facts | None
    clock_s: float
    clock_error_s: float


class Operable(Protocol):
    """A running cluster. What cannot be asked or told raises a SuperServeError that says so."""

    @property
    def name(self) -> str:
        """The cluster's name."""

    def roles(self) -> tuple[RoleView, ...]:
        """Return every role as it stands, the router first."""

    def status(self) -> RouterStatus | None:
        """Return the router's STATUS; None if it does not answer."""

    def stop(self, role: str) -> None:
        """Have a role end, a worker by draining; it is not started again. Returns before it has."""

    def start(self, role: str) -> None:
        """Have a role that has ended start; returns before it is ready."""


class Examinable(Operable, Protocol):
    """One that `cluster doctor` can look at."""

    @property
    def is_local(self) -> bool:
        """Whether it is one of this machine."""

    def facts(self, roles: Sequence[RoleView]) -> tuple[HostFacts, ...]:
        """Return what each host is like, and how many files the processes of `roles` have open there."""


def chosen(roles: Sequence[RoleView], names: Iterable[str]) -> list[RoleView]:
    """Return the workers that names of workers and hosts stand for, each once.

    Raises:
        ConfigError: A name stands for none; says which are near.
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
