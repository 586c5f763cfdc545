"""Stop a cluster on several hosts: the router drains first, then everything ends everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.remote import record as records
from cluster.remote.shell import RemoteError, parallel

if TYPE_CHECKING:
    from cluster.operate.fleet import RemoteFleet

_STOP_S = 120.0


@dataclass(frozen=True, slots=True)
class HostsDown:
    """What was stopped.

    Attributes:
        stopped: Each role and the process it was, by host.
        wrong: The hosts where it failed, each with the reason.
    """

    stopped: dict[str, tuple[tuple[str, int], ...]]
    wrong: dict[str, str]


def down(fleet: RemoteFleet) -> HostsDown:
    """Stop everything; return when it has ended on every host that can be reached.

    While the router drains its workers still answer what it holds. The cluster is forgotten
    once nothing of it is left; a host that cannot be reached keeps it known, for another try.
    """
    stopped: dict[str, tuple[tuple[str, int], ...]] = {}
    wrong: dict[str, str] = {}
    _stop(fleet, fleet.record.router_host, stopped, wrong, kind="router")
    hosts = [host for host in fleet.hosts if host not in wrong]
    parallel(hosts, lambda host: _stop(fleet, host, stopped, wrong))
    if not wrong:
        records.forget(fleet.record.name)
    return HostsDown({host: stopped[host] for host in fleet.hosts if host in stopped}, wrong)


def _stop(
    fleet: RemoteFleet,
    host: str,
    stopped: dict[str, tuple[tuple[str, int], ...]],
    wrong: dict[str, str],
    *,
    kind: str | None = None,
) -> None:
    try:
        said = fleet.ask(host, "down", timeout_s=_STOP_S, kind=kind)
    except RemoteError as error:
        wrong[host] = str(error)
        return
    stopped[host] = (*stopped.get(host, ()), *((name, pid) for name, pid in said["stopped"]))
