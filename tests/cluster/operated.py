"""A cluster that does what a test says, for those commands that change or judge one role at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.engines.engine import RoleSeen
from cluster.operate.supervised import SupervisedCluster
from superserve.errors import ProcessError
from tests.clock import VirtualClock
from tests.superserve import statuses

if TYPE_CHECKING:
    from superserve.status import RouterStatus


def role(name: str, host: str = "a", **other: Any) -> RoleSeen:
    """Return a role that is well."""
    kind = "router" if name == "router" else "worker"
    return replace(RoleSeen(host, name, kind, "", "RUNNING", 100, 0, 0, f"/{name}.log", ()), **other)


class FakeCluster(SupervisedCluster):
    """Workers that take a while to end and to come back.

    Attributes:
        did: The calls, in order.
        wont: Roles that do not come back, and why.
        stuck: Roles that do not end.
        always_live: The fewest workers that were ever live.
    """

    def __init__(self, *roles: RoleSeen) -> None:
        self.name = "test"
        self.clock = VirtualClock()
        self.did: list[str] = []
        self.wont: dict[str, str] = {}
        self.stuck: set[str] = set()
        self.is_silent = False
        self._roles = {role.name: role for role in roles}
        self._due: dict[str, tuple[int, RoleSeen]] = {}
        self.always_live = len(self._live())

    def pause(self, seconds: float) -> None:
        """Advance the clock, and do what is due."""
        self.clock.advance(int(seconds * 1e9))
        for name, (due_ns, view) in list(self._due.items()):
            if self.clock.now_ns() >= due_ns:
                self._roles[name] = view
                del self._due[name]
        self.always_live = min(self.always_live, len(self._live()))

    def _live(self) -> list[str]:
        return [role.name for role in self._roles.values() if role.kind == "worker" and role.is_up]

    def roles(self) -> tuple[RoleSeen, ...]:
        """Return every role."""
        return tuple(self._roles.values())

    def status(self) -> RouterStatus | None:
        """Return a STATUS of the workers that are there."""
        if self.is_silent or not self._roles["router"].is_up:
            return None
        return statuses.status(*map(statuses.gpu, self._live()))

    def stop(self, name: str) -> None:
        """Have a role end in 0.4 s."""
        self.did.append(f"stop {name}")
        self._roles[name] = replace(self._roles[name], state="STOPPING")
        if name not in self.stuck:
            ended = replace(self._roles[name], state="STOPPED", pid=None)
            self._due[name] = (self.clock.now_ns() + 400_000_000, ended)

    def start(self, name: str) -> None:
        """Have a role be ready in 1.2 s."""
        if not self._roles[name].has_ended:
            raise ProcessError(f"{name}: runs")
        self.did.append(f"start {name}")
        starting = replace(self._roles[name], state="STARTING", pid=200)
        self._roles[name] = starting
        up = replace(starting, state="RUNNING")
        if name in self.wont:
            up = replace(starting, state="FATAL", pid=None, why=self.wont[name])
        self._due[name] = (self.clock.now_ns() + 1_200_000_000, up)
