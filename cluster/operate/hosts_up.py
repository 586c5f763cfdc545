"""Run a cluster on several hosts: check, prepare, start what differs, wait until all is ready.

Ready means registered with the router: a process that lives may still be loading its model, or may
not find its router. Every step can be repeated, and `up` after an interrupted `up` completes it:
the record is written before anything is started.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.operate.engine import SupervisorEngine
from cluster.operate.hosts_health import unready
from cluster.remote import preflight
from cluster.remote import record as records
from cluster.remote.ask import ask
from cluster.remote.record import KnownHost, Record
from cluster.remote.shell import RemoteError, parallel
from cluster.spec.roles import ROUTERS_FILE, is_router
from superserve.errors import ProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cluster.engines.engine import ClusterEngine, HostSeen
    from cluster.remote.preflight import HostFinding
    from cluster.remote.shell import Shell
    from cluster.remote.wheel import Wheel
    from cluster.spec.hostplan import HostsPlan
    from cluster.spec.roles import Wanted
    from superserve.status import RouterStatus

_ASK_AGAIN_S = 0.5  # each question is a command over SSH on every host
_APPLY_S = 120.0  # roles that are replaced may take STOP_S each to end


class PreflightError(ProcessError):
    """Nothing was started: the router's host, or under `--rollback` any host, cannot take part."""


@dataclass(slots=True)
class HostsUp:
    """The result of `up`, filled in as it goes.

    Attributes:
        name: Of the cluster.
        findings: What was found on each host.
        changed: What was done to each role, by host and role; without the roles that were left alone.
        sent: Files that were sent again or removed, including keys, by host; without those left alone.
        removed: What was stopped on hosts that are no longer in the file, by host.
        wrong: What went wrong, one or a few lines each, naming the host.
        seen: The states at the end.
        status: The router's STATUS at the end.
        rolled_back: Whether what was started has been taken down again.
    """

    name: str
    findings: list[HostFinding]
    changed: dict[str, dict[str, str]] = field(default_factory=dict)
    sent: dict[str, list[str]] = field(default_factory=dict)
    removed: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seen: tuple[HostSeen, ...] = ()
    status: RouterStatus | None = None
    rolled_back: bool = False


def up(
    shell: Shell,
    plan: HostsPlan,
    wheel: Wheel,
    *,
    ready_timeout_s: float,
    rollback: bool,
    on_preflight: Callable[[HostsUp], None] = lambda _: None,
) -> HostsUp:
    """Run the plan; return what was done, and what is wrong.

    Args:
        shell: The way to the hosts.
        plan: What runs where.
        wheel: The package to run it with.
        ready_timeout_s: How long the workers may take to register, counted from their start.
        rollback: Whether to take down what this call started if anything goes wrong.
        on_preflight: Called once with the findings, before anything is started.

    Raises:
        PreflightError: Nothing was started.
    """
    done = HostsUp(plan.name, preflight.look(shell, plan.name, plan.wanted, wheel))
    done.wrong += [line for finding in done.findings for line in finding.wrong]
    on_preflight(done)
    _check(plan, done.findings, rollback=rollback)
    able = [want for want, found in zip(plan.wanted, done.findings, strict=True) if not found.wrong]
    known = _prepare(shell, plan, able, wheel, done)
    before = records.load(plan.name)
    _remember(plan, known, before, done)
    _apply(shell, plan, known, before, done)
    if not (rollback and done.wrong):
        fleet = SupervisorEngine(_record(plan, known, done), shell)
        await_ready(fleet, dict(plan.slots), done, ready_timeout_s)
    if rollback and done.wrong:
        _undo(shell, known, before, done)
    return done


def _check(plan: HostsPlan, findings: Sequence[HostFinding], *, rollback: bool) -> None:
    unable = [finding.name for finding in findings if finding.wrong]
    if plan.router_host in unable:
        raise PreflightError(f"nothing was started: {plan.router_host}, the router's host, cannot take part")
    looking = [finding for want, finding in zip(plan.wanted, findings, strict=True) if want.router]
    if looking and all(finding.lacks_router for finding in looking if finding.folder):
        raise PreflightError("nothing was started: no worker beyond the router's host would find the router")
    if unable and rollback:
        raise PreflightError(f"nothing was started: {', '.join(unable)} cannot take part")


def _prepare(
    shell: Shell, plan: HostsPlan, able: Sequence[Wanted], wheel: Wheel, done: HostsUp
) -> list[KnownHost]:
    """Put the package on the hosts that lack it; return those that now have it."""
    found = {finding.name: finding for finding in done.findings}

    def prepare(want: Wanted) -> KnownHost | str:
        finding = found[want.name]
        interpreter = finding.interpreter
        if finding.needs_install:
            try:
                interpreter = preflight.install(shell, plan.name, want, wheel)
            except RemoteError as error:
                return str(error)
        code = f"{finding.folder}/code/{wheel.hash}"
        return KnownHost(want.name, want.target, finding.folder, interpreter, code, want.roles)

    prepared = parallel(able, prepare)
    done.wrong += [host for host in prepared if isinstance(host, str)]
    return [host for host in prepared if isinstance(host, KnownHost)]


def _record(plan: HostsPlan, known: Sequence[KnownHost], done: HostsUp) -> Record:
    names = {host.name for host in known}
    out = [want for want in plan.wanted if want.name not in names]
    why = {finding.name: finding.wrong[0] for finding in done.findings if finding.wrong}
    left_out = tuple((want.name, why.get(want.name, "it could not be prepared")) for want in out)
    return Record(
        plan.name, plan.file, plan.ssh_config, plan.router_host, plan.client_endpoint, plan.worker_endpoint,
        plan.profile, tuple(known), plan.slots, left_out, plan.keys,
    )  # fmt: skip


def _remember(plan: HostsPlan, known: list[KnownHost], before: Record | None, done: HostsUp) -> None:
    """Record where the cluster is about to be; stop it on hosts that have left the file.

    A host of the file that cannot take part now may run roles of an earlier `up`: it stays in the
    record, so that `down` names it.
    """
    record = _record(plan, known, done)
    wanted = {want.name for want in plan.wanted}
    old = () if before is None else before.hosts
    absent = tuple(h for h in old if h.name in wanted and h.name not in {k.name for k in known})
    gone = [host for host in old if host.name not in wanted]
    records.save(replace(record, hosts=(*known, *absent, *gone)))
    done.changed |= {host.name: {} for host in known}


def _unlist(
    engine: SupervisorEngine, plan: HostsPlan, before: Record | None, files: Mapping[str, Mapping[str, str]]
) -> None:
    """Give the routers that stay their new list before others drain: so no client turns to one of those."""
    wanted = {role.name for roles in plan.roles for role in roles}
    if before is None or not any(is_router(name) and name not in wanted for name in before.role_names):
        return
    staying = [name for name in engine.record.router_hosts if name in before.router_hosts]

    def put(name: str) -> None:
        # Where there is none yet, or the host does not answer, `apply` does it, or says why not.
        with contextlib.suppress(RemoteError, KeyError):
            engine.ask(name, "put", name=ROUTERS_FILE, content=files[name][ROUTERS_FILE])

    parallel(staying, put)


def _apply(
    shell: Shell, plan: HostsPlan, known: Sequence[KnownHost], before: Record | None, done: HostsUp
) -> None:
    """Make each host run exactly its roles, all at once, and hosts that left the file none."""
    record = records.load(plan.name)
    assert record is not None, "it was written just now"
    wanted = {want.name for want in plan.wanted}
    gone = [host for host in record.hosts if host.name not in wanted]

    plans = {host.name: plan.plan_of(host.name, host.folder, host.interpreter, host.code) for host in known}
    files = {host.name: plan.files_of(host.name) for host in known}
    engine = SupervisorEngine(_record(plan, known, done), shell)
    _unlist(engine, plan, before, files)
    for name, applied in engine.apply(plans, files).items():
        if applied.error:
            done.wrong.append(applied.error)
            continue
        done.changed[name] = applied.changed
        if applied.files:
            done.sent[name] = applied.files
    still_there = _leave(shell, gone, done)
    staying = tuple(host for host in record.hosts if host.name in wanted)
    records.save(replace(record, hosts=(*staying, *still_there)))


def _leave(shell: Shell, gone: Sequence[KnownHost], done: HostsUp) -> list[KnownHost]:
    """Stop everything on hosts that are no longer in the file; return those where that failed."""
    still_there = []
    for host in gone:
        try:
            said = ask(shell, host, "down", timeout_s=_APPLY_S)
        except RemoteError as error:
            done.wrong.append(f"{error}; it is no longer in the file, and may still run its roles")
            still_there.append(host)
        else:
            done.removed[host.name] = [name for name, _ in said["stopped"]]
    return still_there


# --- readiness --------------------------------------------------------------------------------


def await_ready(fleet: ClusterEngine, slots: Mapping[str, int], done: HostsUp, timeout_s: float) -> None:
    """Wait until every worker is registered, one is given up, or time is up; record what is wrong.

    Args:
        fleet: The cluster.
        slots: How many GPUs each worker must register, by its name.
        done: Gets the states, the router's STATUS and what is wrong.
        timeout_s: How long to wait.
    """
    give_up_s = time.monotonic() + timeout_s
    while True:
        done.seen = fleet.roles()
        done.status = _status(fleet)
        wrong = unready(done.seen, done.status, slots)
        if not wrong:
            return
        is_hopeless = all(line.is_final for line in wrong)
        if is_hopeless or time.monotonic() > give_up_s:
            done.wrong += [
                line.text if line.is_final else f"{line.text} within {timeout_s:g} s" for line in wrong
            ]
            return
        time.sleep(_ASK_AGAIN_S)


def _status(fleet: ClusterEngine) -> RouterStatus | None:
    try:
        return fleet.router_status()
    except RemoteError:  # `states` contains the reason
        return None


# --- rollback ---------------------------------------------------------------------------------


def _undo(shell: Shell, known: Sequence[KnownHost], before: Record | None, done: HostsUp) -> None:
    """Return each host, and the record, to what there was before this call."""
    touched = [host for host in known if done.changed.get(host.name)]

    def undo(host: KnownHost) -> str | None:
        try:
            ask(shell, host, "undo", timeout_s=_APPLY_S)
        except RemoteError as error:
            return f"{error}; what was started there may still run"
        return None

    failed = [line for line in parallel(touched, undo) if line is not None]
    done.wrong += failed
    done.rolled_back = True
    if failed:  # keep the record, so that `down` finds the cluster
        return
    if before is None:
        records.forget(done.name)
    else:
        records.save(before)
