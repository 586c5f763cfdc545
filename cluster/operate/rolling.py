"""Workers are drained, and restarted a few at a time, without failing a query.

A worker that drains gets no new queries, answers the ones it has, sends BYE and ends. The next one is
touched only once the router gives work to the previous one again. If that does not happen, everything
else is left running, and the error lists what runs and what does not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cluster.operate.supervised import chosen
from superserve.clock import SECOND, MonotonicClock
from superserve.errors import ConfigError, ProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from cluster.engines.engine import RoleSeen
    from cluster.operate.supervised import SupervisedCluster
    from superserve.clock import Clock

DRAIN_S = 30.0
"""How long a worker may take to end: it has 4 s to drain, and is killed soon after."""

_ASK_AGAIN_S = 0.05  # between two questions to keepers and the router


class RollingOperator:
    """Drains and restarts roles of one cluster, step by step, and reports each step.

    Args:
        cluster: The cluster.
        say: Receives a line for people to read.
        clock: The clock for timeouts.
        pause: Waits for a number of seconds, between two questions to other processes.
    """

    def __init__(
        self,
        cluster: SupervisedCluster,
        say: Callable[[str], None],
        *,
        clock: Clock | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cluster = cluster
        self._say = say
        self._clock = clock or MonotonicClock()
        self._pause = pause

    # --- operators' requests ------------------------------------------------------------------

    def drain(self, names: Iterable[str]) -> None:
        """Drain workers, or all workers of some hosts: they take no new queries, answer the rest, and end.

        Raises:
            ConfigError: A name means no worker.
            ProcessError: The router does not answer, or a worker does not end; names it.
        """
        workers = chosen(self._cluster.roles(), names)
        running = [worker for worker in workers if not worker.has_ended]
        for worker in workers:
            if worker.has_ended:
                self._say(f"{worker.name}: has ended already ({worker.state})")
        if not running:
            return
        left = self._live() - {worker.name for worker in running}
        if not left:
            self._say("warning: no worker is left after this: queries wait, and expire, until one is back")
        self._stop(running)
        self._say(f"{len(left)} left: {', '.join(sorted(left))}" if left else "no worker is left")

    def restart(self, names: Iterable[str] = (), *, at_once: int, force: bool, timeout_s: float) -> None:
        """Restart workers, all or the named ones, a few at a time; those that have ended just start.

        Args:
            names: Workers or hosts.
            at_once: How many may be away at a time.
            force: Whether the last live worker may be taken too.
            timeout_s: How long each may take to be live again.

        Raises:
            ConfigError: A name means no worker, or no live worker would be left.
            ProcessError: The router does not answer, or a worker does not come back; the others run.
        """
        roles = self._cluster.roles()
        workers = chosen(roles, names) if names else [role for role in roles if role.kind == "worker"]
        workers.sort(key=lambda worker: not worker.has_ended)  # those that come back can replace the next
        groups = [workers[i : i + at_once] for i in range(0, len(workers), at_once)]
        if not force and not self._is_safe(groups):
            raise ConfigError(_nobody_left(workers))
        self._each(groups, force, timeout_s)

    def restart_router(self, timeout_s: float) -> None:
        """Restart the router, and wait until every worker that was live is live again; several in turn.

        Of several, the next one is touched only once each has GPUs again: queries and workers of the one
        that is away are with the others.

        Raises:
            ProcessError: It does not come back, or a worker does not find it.
        """
        routers = [role for role in self._cluster.roles() if role.kind == "router"]
        before = self._well()
        for router in routers:
            self._stop([] if router.has_ended else [router])
            self._start([router], timeout_s, before)
            if len(routers) > 1:
                self._await_shares(timeout_s, min(len(routers), len(before)))

    def _await_shares(self, timeout_s: float, n: int) -> None:
        """Wait until `n` routers have GPUs."""
        begin_ns = self._clock.now_ns()
        while True:
            status = self._cluster.status()
            shares = () if status is None else status.routers or ()
            if sum(share.gpus > 0 for share in shares) >= n:
                return
            if (self._clock.now_ns() - begin_ns) / SECOND > timeout_s:
                alone = ", ".join(share.endpoint for share in shares if not share.gpus)
                raise ProcessError(f"{alone}: no worker has moved there within {timeout_s:g} s")
            self._pause(_ASK_AGAIN_S)

    def start_ended(self, timeout_s: float) -> list[str]:
        """Start every role that has ended; return their names once they are live."""
        ended = [role for role in self._cluster.roles() if role.has_ended]
        router = [role for role in ended if role.kind == "router"]
        others = [role for role in ended if role.kind not in ("router", "worker")]
        for group in (router, [role for role in ended if role.kind == "worker"], others):
            if group:
                self._start(group, timeout_s, [role.name for role in group if role.kind == "worker"])
        return [role.name for role in ended]

    def start(self, names: Sequence[str], timeout_s: float) -> None:
        """Start roles that have ended, or are new to the engine; return once the router gives them work.

        Raises:
            ProcessError: One has ended again, or the router does not within `timeout_s` seconds.
        """
        roles = {role.name: role for role in self._cluster.roles()}
        self._start([roles[name] for name in names], timeout_s, names)

    # --- steps --------------------------------------------------------------------------------

    def _is_safe(self, groups: Sequence[Sequence[RoleSeen]]) -> bool:
        """Return whether another live worker is left whenever a group is away, if all come back."""
        there = self._live()
        for group in groups:
            names = {worker.name for worker in group}
            if not there - names and not all(worker.has_ended for worker in group):
                return False
            there |= names
        return True

    def _each(self, groups: Sequence[Sequence[RoleSeen]], force: bool, timeout_s: float) -> None:
        done: list[str] = []
        for i, group in enumerate(groups):
            names = [worker.name for worker in group]
            taken = [worker for worker in group if not worker.has_ended]
            later = [worker.name for rest in groups[i + 1 :] for worker in rest]
            try:
                if taken and not force and not self._live() - set(names):
                    raise ProcessError(f"{', '.join(names)}: no other worker is live just now")
                self._stop(taken)
                self._start(group, timeout_s, names)
            except ProcessError as error:
                raise ProcessError(f"{error}\n{_so_far(done, later)}") from error
            except KeyboardInterrupt:
                again = f"`cluster restart {' '.join(names)}` starts what has ended of them"
                raise ProcessError(
                    f"interrupted at {', '.join(names)}: {again}\n{_so_far(done, later)}"
                ) from None
            done += names

    def _stop(self, roles: Sequence[RoleSeen]) -> None:
        """Make roles end, and wait until they have and the router has forgotten them."""
        begin_ns = self._clock.now_ns()
        for role in roles:
            self._cluster.stop(role.name)
        waiting = {role.name: role for role in roles}
        while waiting:
            now = {role.name: role for role in self._cluster.roles()}
            known = self._known() if any(role.kind == "worker" for role in waiting.values()) else set()
            took_s = (self._clock.now_ns() - begin_ns) / SECOND
            for name in [name for name in waiting if now[name].has_ended and name not in known]:
                word = "drained" if waiting.pop(name).kind == "worker" else "stopped"
                self._say(f"{name}: {word} in {took_s:.1f} s")
            if waiting and took_s > DRAIN_S:
                raise ProcessError(f"{', '.join(waiting)}: expected to end within {DRAIN_S:g} s, still there")
            if waiting:
                self._pause(_ASK_AGAIN_S)

    def _start(self, roles: Sequence[RoleSeen], timeout_s: float, workers: Collection[str]) -> None:
        """Start roles, and wait until the router gives work to `workers`.

        Raises:
            ProcessError: One has ended again, or the router does not within `timeout_s` seconds.
        """
        begin_ns = self._clock.now_ns()
        for role in roles:
            self._cluster.start(role.name)
        names = {role.name for role in roles}
        while True:
            now = {role.name: role for role in self._cluster.roles()}
            for role in (now[name] for name in names):
                if role.has_ended:
                    raise ProcessError(f"{role.name}: did not come back ({role.state}): {role.why}")
            there = self._well()
            took_s = (self._clock.now_ns() - begin_ns) / SECOND
            if all(now[name].is_up for name in names) and there.issuperset(workers):
                for name in sorted(names):
                    where = now[name].place or f"pid {now[name].pid}"
                    self._say(f"{name}: live again after {took_s:.1f} s, as {where}")
                return
            if took_s > timeout_s:
                absent = sorted(
                    (names | set(workers)) - there - {role.name for role in roles if role.kind == "router"}
                )
                absent = absent or [role.name for role in roles]
                raise ProcessError(f"{', '.join(absent)}: not live again within {timeout_s:g} s")
            self._pause(_ASK_AGAIN_S)

    def _live(self) -> set[str]:
        status = self._cluster.status()
        if status is None:
            raise ProcessError(
                "the router does not answer, and nothing can drain without it: see `cluster doctor`"
            )
        return status.well()

    def _well(self) -> set[str]:
        """Return the workers that are well; none while the router does not answer."""
        status = self._cluster.status()
        return set() if status is None else status.well()

    def _known(self) -> set[str]:
        """Return the workers that the router has not forgotten."""
        status = self._cluster.status()
        return set() if status is None else set(status.processes())


def _nobody_left(workers: Sequence[RoleSeen]) -> str:
    names = ", ".join(worker.name for worker in workers)
    return (
        f"{names}: expected another live worker beside those taken at once, or --force: without one "
        f"queries wait, and expire, until it is back"
    )


def _so_far(done: Sequence[str], later: Sequence[str]) -> str:
    """Return what was done and what was not touched, in words."""
    words = [f"restarted before: {', '.join(done) or 'none'}"]
    if later:
        words.append(f"not touched: {', '.join(later)}")
    return "; ".join(words)
