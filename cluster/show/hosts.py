"""What the commands print about a cluster on several hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.remote import preflight
from cluster.show import tables as show
from cluster.spec.plan import name_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.engines.engine import HostSeen, RoleSeen, Stopped
    from cluster.operate.hosts_up import HostsUp
    from cluster.remote.preflight import HostFinding
    from cluster.remote.record import Record
    from superserve.status import RouterStatus


def findings(found: Sequence[HostFinding]) -> list[str]:
    """Return the preflight table, and below it what is wrong and what is worth knowing."""
    lines = [
        *(line for finding in found for line in finding.wrong),
        *(f"note: {line}" for finding in found for line in finding.notes),
    ]
    return [
        show.table(preflight.COLUMNS, [finding.cells for finding in found]),
        *(["", *lines] if lines else []),
    ]


def processes(done: HostsUp) -> str:
    """Return the table of what runs after `up`: each role, and what this call did to it."""
    rows = []
    for host in done.seen:
        changed = done.changed.get(host.name, {})
        for role in host.roles:
            did = changed.get(role.name, "left alone")
            rows.append((host.name, role.name, _process(role), role.state, did, role.serves))
    return show.table(("host", "role", _process_head(done.seen), "state", "this call", "serves"), rows)


def removals(done: HostsUp) -> list[str]:
    """Return lines about roles that this call stopped for good."""
    lines = [
        f"{host}: stopped {role}, which the file no longer asks for"
        for host, changed in done.changed.items()
        for role, did in changed.items()
        if did == "stopped"
    ]
    for host, roles in done.removed.items():
        lines.append(f"{host}: no longer in the file; stopped {', '.join(roles) or 'nothing: nothing ran'}")
    return lines


def roles(seen: Sequence[HostSeen], status: RouterStatus | None) -> str:
    """Return the table of `cluster status`: the reports of keepers and router on each role."""
    registered = {} if status is None else status.processes()
    rows = []
    for host in seen:
        if host.error:
            rows.append((host.name, "-", "-", "UNREACHABLE", *("-",) * 6))
        for role in host.roles:
            work = show.work(registered.get(role.name, ()))
            up = "-" if role.has_ended or _process(role) == "-" else _duration(role.up_s)
            rows.append((host.name, role.name, _process(role), role.state, up, role.serves, *work))
    columns = (
        "host", "role", _process_head(seen), "state", "up", "serves", "registered", "batches", "queries",
        "slowdown",
    )  # fmt: skip
    return show.table(columns, rows)


def stopped(record: Record, done: Stopped) -> list[str]:
    """Return lines about what was stopped, and where that failed."""
    lines = []
    for host, roles_there in done.stopped.items():
        words = ", ".join(f"{role} (pid {pid})" if pid else role for role, pid in roles_there)
        lines.append(f"{host}: stopped {words}" if words else f"{host}: nothing ran")
    lines += [f"{why}; what runs there still runs" for why in done.wrong.values()]
    if done.wrong:
        again = f"cluster down{name_option(record.name)}"
        lines.append(f"cluster {record.name!r} is not down on {', '.join(done.wrong)}: try `{again}` again")
    else:
        lines.append(f"cluster {record.name!r} is down: no process of it is left")
    return lines


def what_next(record: Record, status: RouterStatus) -> list[str]:
    """Return what to type next, and how a program connects."""
    return show.next_lines(
        record.name, record.client_endpoint, status, record.profile, has_keys=bool(record.keys)
    )


def _process(role: RoleSeen) -> str:
    """Return a role's process in the words of its engine: a number, or "job 12 on n3"."""
    return role.place or ("-" if role.pid is None else str(role.pid))


def _process_head(seen: Sequence[HostSeen]) -> str:
    return "place" if any(role.place for host in seen for role in host.roles) else "pid"


def _duration(seconds: int) -> str:
    """Return a duration in its two largest units: "3 d 4 h", "12 s"."""
    for unit, size, smaller, smaller_size in (
        ("d", 86_400, "h", 3_600),
        ("h", 3_600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // smaller_size} {smaller}"
    return f"{seconds} s"
