"""Whether a cluster is well: its keeper's report, compared with its router's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from superserve.errors import NoRouterError
from superserve.net.connection import ask_status
from superserve.roles.local import ProcessId, Role, RoleState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.engines.engine import HostSeen
    from superserve.roles.local import LocalCluster
    from superserve.status import GpuStatus, RouterStatus


def seen_by(cluster: LocalCluster, seen: Sequence[HostSeen]) -> LocalCluster:
    """Return a cluster of this machine with its roles as its keeper reports them now: a file may be older.

    A keeper that does not answer is another problem (`unasked`); then the file's states are used.
    """
    if unasked(seen):
        return cluster
    roles = tuple(
        Role(
            role.name, role.kind, RoleState(role.state), role.serves, role.log,
            None if role.pid is None else ProcessId.of(role.pid), role.restarts, role.why, role.metrics,
        )
        for host in seen
        for role in host.roles
    )  # fmt: skip
    return replace(cluster, roles=roles)


def unasked(seen: Sequence[HostSeen]) -> list[str]:
    """Return why hosts cannot be reached."""
    return [host.error for host in seen if host.error]


def ask_router(cluster: LocalCluster) -> RouterStatus | None:
    """Return the router's STATUS; None if it does not answer within 2 s.

    Raises:
        ConfigError: This process cannot ask: it may open no more files or threads.
    """
    if not cluster.client_endpoint:
        return None
    try:
        return ask_status(cluster.client_endpoint)
    except NoRouterError:
        return None


def problems(cluster: LocalCluster, status: RouterStatus | None) -> list[str]:
    """Return what is wrong, a line each; nothing for a cluster that is well.

    Args:
        cluster: The keeper's report.
        status: The router's report; None if it does not answer.
    """
    lines = [
        f"{role.name}: {role.state}" + (f": {role.why}" if role.why else "")
        for role in cluster.roles
        if role.state is not RoleState.RUNNING
    ]
    if status is None:
        return [*lines, f"router: does not answer at {cluster.client_endpoint or 'any port yet'}"]
    registered = status.processes()
    for role in cluster.roles:
        if role.kind == "worker" and role.state is RoleState.RUNNING:
            lines += _unwell(role.name, registered.get(role.name, ()))
    return lines


def _unwell(name: str, found: Sequence[GpuStatus]) -> list[str]:
    """Return what the router finds wrong with a worker process that its keeper finds well."""
    if not found:
        return [f"{name}: runs, and the router does not know it"]
    states = Counter(gpu.condition for gpu in found if not gpu.is_well)
    if not states:
        return []
    words = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    return [f"{name}: of {len(found)} GPUs, the router has {words}"]
