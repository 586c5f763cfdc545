"""Whether a cluster on several hosts is well: its keepers' reports, compared with its router's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.engines.engine import HostSeen, RoleSeen
    from cluster.remote.record import Record
    from superserve.status import RouterStatus


def problems(record: Record, seen: Sequence[HostSeen], status: RouterStatus | None) -> list[str]:
    """Return what is wrong, one or a few lines each; nothing for a cluster that is well."""
    left_out = [f"{name}: takes no part since the last `cluster up`: {why}" for name, why in record.left_out]
    awake = tuple(replace(host, roles=_awake(record, host)) for host in seen)
    return [*left_out, *(line.text for line in unready(awake, status, dict(record.slots)))]


def _awake(record: Record, host: HostSeen) -> tuple[RoleSeen, ...]:
    """Return a host's roles without those that `cluster scale` has stopped."""
    return tuple(role for role in host.roles if not (role.has_ended and role.name in record.resting))


@dataclass(frozen=True, slots=True)
class Unready:
    """Why a role is not ready, and whether waiting longer is useless."""

    text: str
    is_final: bool


def unready(
    seen: Sequence[HostSeen], status: RouterStatus | None, n_slots: Mapping[str, int]
) -> list[Unready]:
    """Return why roles are not ready, the router's first.

    Args:
        seen: The keepers' reports.
        status: The router's report; None if it does not answer.
        n_slots: How many GPUs each worker must register.
    """
    lines = [Unready(host.error, is_final=True) for host in seen if host.error]
    registered = {} if status is None else status.processes()
    for role in (role for host in seen for role in host.roles):
        # Other roles without a process are about to be restarted.
        if role.has_ended:
            lines.append(Unready(ended(role), is_final=True))
        elif role.kind == "router" and status is None:
            lines.append(Unready(_no_answer(role), is_final=False))
        elif role.kind == "worker":
            ready = sum(gpu.is_well for gpu in registered.get(role.name, ()))
            if ready < n_slots.get(role.name, 1):
                words = f"{role.host}: {role.name} ({role.state}) did not register with the router"
                words += f": {role.why}" if role.why else ""
                lines.append(Unready(words, is_final=False))
    return lines if status is None else [*lines, *_silent(seen, status)]


def _silent(seen: Sequence[HostSeen], status: RouterStatus) -> list[Unready]:
    """Return which of several routers do not answer: the others' STATUS is there all the same."""
    n = sum(role.kind == "router" and not role.has_ended for host in seen for role in host.roles)
    shares = status.routers or ()
    n_answering = sum(share.answers for share in shares) if shares else 1
    if n_answering >= n:
        return []
    ends = ", ".join(share.endpoint for share in shares if not share.answers) or "one that has no place yet"
    return [Unready(f"{n_answering} of {n} routers answer, and not {ends}", is_final=False)]


def _no_answer(role: RoleSeen) -> str:
    return f"{role.host}: {role.name} did not answer" + (f": {role.why}" if role.why else "")


def ended(role: RoleSeen) -> str:
    """Return how a role ended, with the last lines of its log."""
    words = f"{role.host}: {role.name} is {role.state}"
    if role.state == "EXITED":
        words += f" with exit code {role.exit_code}"
    if not role.tail:
        return words
    return "\n".join([f"{words}; the end of {role.log}:", *(f"    {line}" for line in role.tail)])
