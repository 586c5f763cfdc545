"""What is wrong with a running cluster, and what to type: one function for each check, on what was seen.

A check yields nothing if all is well. `wrong` is what an operator should fix; a `note` is worth
knowing and acceptable.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cluster.spec.plan import name_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cluster.engines.engine import RoleSeen
    from cluster.operate.supervised import HostFacts
    from superserve.status import RouterStatus

SLOW = 1.25
"""From this ratio of measured to profiled latency on, a profile no longer describes a device."""

MANY_RESTARTS = 3  # one may be an accident; three have a cause that stays
LEAST_FREE_BYTES = 500 << 20  # of the disk: logs and an update's wheel still fit
MOST_LOG_BYTES = 1 << 30  # more than rotation leaves; it would fill a small disk
LEAST_FILES = 1_024  # the usual soft limit: with less, even a few peers fail
FULL = 0.8
"""From this share of its limit of open files on, a process will soon run out."""

CLOCK_S = 1.0  # deadlines never cross hosts, but comparing logs needs clocks that agree

# Counters of STATUS that are normally 0: what each counts.
COUNTED = {
    "malformed": "messages that could not be decoded",
    "results_dropped": "answers whose client could not take them",
    "workers_lost": "worker processes that fell silent",
    "handshake_failures": "connections whose keys did not fit",
    "unauthenticated_frames": "messages of peers without a listed key",
    "revoked_frames": "messages of peers whose key was revoked",
}


class Verdict(StrEnum):
    """The result of a check."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        check: The check's name.
        verdict: Its result.
        text: What was seen.
        fix: What to type or do; "" if nothing is needed.
        more: The reason, from a process's last output; "" if it does not help.
    """

    check: str
    verdict: Verdict
    text: str
    fix: str = ""
    more: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """A cluster, as it was seen.

    Attributes:
        name: Its name.
        is_local: Whether it is one of this machine.
        roles: As their keepers report, the router first.
        status: The router's STATUS; None if it does not answer.
        before: The STATUS of about a second earlier; None if there is none.
        hosts: The facts about each host.
    """

    name: str
    is_local: bool
    roles: tuple[RoleSeen, ...]
    status: RouterStatus | None
    before: RouterStatus | None
    hosts: tuple[HostFacts, ...]

    def command(self, words: str) -> str:
        """Return a command of `cluster` for this cluster, to type."""
        verb, _, rest = words.partition(" ")
        return f"`cluster {verb}{name_option(self.name)}{' ' if rest else ''}{rest}`"


def examine(seen: Seen) -> list[Finding]:
    """Return the findings of every check, in order; a check without problems has one: that all is well."""
    findings: list[Finding] = []
    for name, check, well in CHECKS:
        if name in OF_HOSTS and not seen.hosts:
            continue
        found = list(check(seen))
        findings += found or [Finding(name, Verdict.OK, well(seen))]
    return findings


# --- processes --------------------------------------------------------------------------------


def _reachable(seen: Seen) -> Iterator[Finding]:
    for host in seen.hosts:
        if host.error:
            fix = f"try `ssh` to it; what runs there still runs; {seen.command('status')} later"
            yield Finding("hosts", Verdict.WRONG, host.error, fix)


def _router(seen: Seen) -> Iterator[Finding]:
    router = seen.roles[0]
    if seen.status is None:
        words = f"does not answer; its process is {router.state}"
        fix = (
            seen.command("restart --router")
            if router.has_ended or router.is_up
            else "wait: it is being restarted"
        )
        yield Finding("router", Verdict.WRONG, f"router: {words}", fix)
        return
    for share in seen.status.routers or ():
        if not share.answers:
            fix = f"wait: it is being restarted; or {seen.command('restart --router')}"
            yield Finding("router", Verdict.WRONG, f"router at {share.endpoint}: does not answer", fix)
        elif not share.gpus and seen.status.workers_ready:
            fix = "wait a few seconds: workers move to routers that have fewer GPUs"
            yield Finding("router", Verdict.WRONG, f"router at {share.endpoint}: has no GPUs", fix)
    if seen.status.router.draining:
        fix = f"wait until it has ended, then {seen.command('restart --router')}"
        yield Finding("router", Verdict.WRONG, "router: drains, and refuses queries", fix)


def _roles(seen: Seen) -> Iterator[Finding]:
    away = {host.host for host in seen.hosts if host.error}
    for role in seen.roles:
        if role.is_up or role.host in away:  # unreachable hosts have a finding of their own
            continue
        words = f"{role.name}: {role.state}"
        again = "restart --router" if role.kind == "router" else f"restart {role.name}"
        if role.state in ("STOPPED", "EXITED"):
            fix = seen.command(again)
        elif role.has_ended:
            more = seen.command(f"logs {role.name}")
            fix = f"fix what its last lines report ({more} has more), then {seen.command(again)}"
        else:
            fix = f"wait: it restarts automatically; watch {seen.command(f'logs -f {role.name}')}"
        yield Finding("processes", Verdict.WRONG, words, fix, role.why)


def _registered(seen: Seen) -> Iterator[Finding]:
    if seen.status is None:
        return
    known, there = seen.status.processes(), seen.status.well()
    for role in seen.roles:
        if role.kind != "worker" or not role.is_up or role.name in there:
            continue
        fix = f"{seen.command(f'logs {role.name}')}, then {seen.command(f'restart {role.name}')}"
        if role.name not in known:
            yield Finding(
                "registered", Verdict.WRONG, f"{role.name}: runs, and the router does not know it", fix
            )
            continue
        states = Counter(f"{gpu.process}, {gpu.state}" for gpu in known[role.name])
        words = "; ".join(f"{n} {state}" for state, n in sorted(states.items()))
        yield Finding("registered", Verdict.WRONG, f"{role.name}: of its GPUs, the router has {words}", fix)


def _restarts(seen: Seen) -> Iterator[Finding]:
    for role in seen.roles:
        if role.restarts:
            verdict = Verdict.WRONG if role.restarts >= MANY_RESTARTS else Verdict.NOTE
            times = "once" if role.restarts == 1 else f"{role.restarts} times"
            words = f"{role.name}: crashed and was restarted {times}"
            yield Finding("restarts", verdict, words, seen.command(f"logs {role.name}"), role.why)


def _versions(seen: Seen) -> Iterator[Finding]:
    if seen.status is None:
        return
    ours = seen.status.router.version
    for name, found in sorted(seen.status.processes().items()):
        theirs = found[0].version
        if theirs != ours:
            words = f"{name}: runs {theirs or 'an unknown version'}, the router {ours or 'an unknown one'}"
            fix = f"{seen.command('restart --rolling --router')} runs what is installed now on all"
            yield Finding("versions", Verdict.WRONG, words, fix)


# --- work -------------------------------------------------------------------------------------


def _speed(seen: Seen) -> Iterator[Finding]:
    if seen.status is None:
        return
    for name, found in sorted(seen.status.processes().items()):
        slowest = max(found, key=lambda gpu: gpu.slowdown)
        if slowest.slowdown > SLOW:
            words = f"{name}: {slowest.slowdown:.2f} times as slow as in the profile {slowest.profile}"
            fix = "see what else uses that device (nvidia-smi, top); if it stays so: `profiles measure` there"
            yield Finding("speed", Verdict.WRONG, words, fix)


def _load(seen: Seen) -> Iterator[Finding]:
    if seen.status is None:
        return
    needed, ready = seen.status.workers_needed, seen.status.workers_ready
    fix = "add GPUs to the cluster, or send less; `cluster top` shows how it goes"
    waiting = f"{seen.status.queue.length:,} queries wait"
    if needed.at_least > ready:
        words = f"{needed.at_least:.1f} GPUs needed at the lowest accuracy, {ready} take work; {waiting}"
        yield Finding("load", Verdict.WRONG, words, fix)
    elif needed.as_served > ready:
        words = f"{needed.as_served:.1f} GPUs needed as now served, {ready} take work; {waiting}"
        yield Finding("load", Verdict.NOTE, words, fix)


def _counted(seen: Seen) -> Iterator[Finding]:
    if seen.status is None:
        return
    now = seen.status.counts
    then = (seen.before or seen.status).counts
    for key, words in COUNTED.items():
        n, more = now.get(key, 0), now.get(key, 0) - then.get(key, 0)
        if more > 0:
            text = f"{n:,} {words}, {more:,} more within a second"
            yield Finding("counters", Verdict.WRONG, text, seen.command("logs router"))
        elif n:
            yield Finding(
                "counters", Verdict.NOTE, f"{n:,} {words}, none just now", seen.command("logs router")
            )


# --- hosts ------------------------------------------------------------------------------------


def _clocks(seen: Seen) -> Iterator[Finding]:
    for host in seen.hosts:
        if abs(host.clock_s) - host.clock_error_s > CLOCK_S:
            words = f"{host.host}: its clock is {host.clock_s:+.1f} s off this machine's"
            fix = "`timedatectl set-ntp true` there; deadlines do not depend on it, comparing logs does"
            yield Finding("clocks", Verdict.NOTE, words, fix)


def _files(seen: Seen) -> Iterator[Finding]:
    names = {(role.host, str(role.pid)): role.name for role in seen.roles}
    for host in seen.hosts:
        for pid, (n_open, limit) in (host.facts.open_files if host.facts else {}).items():
            name = names.get((host.host, pid), pid)
            if n_open > FULL * limit or limit < LEAST_FILES:
                words = f"{name}: has {n_open:,} files open and may have {limit:,}"
                fix = f"`ulimit -n 65536` where it is started from, then {seen.command(f'restart {name}')}"
                yield Finding("files", Verdict.WRONG, words, fix)


def _disks(seen: Seen) -> Iterator[Finding]:
    for host in seen.hosts:
        if host.facts and host.facts.free_bytes < LEAST_FREE_BYTES:
            words = f"{host.host}: {host.facts.free_bytes >> 20} MiB are left where the logs are"
            yield Finding(
                "disks", Verdict.WRONG, words, "make room: `du -xh --max-depth=2 ~ | sort -h | tail`"
            )


def _logs(seen: Seen) -> Iterator[Finding]:
    for host in seen.hosts:
        if host.facts and host.facts.log_bytes > MOST_LOG_BYTES:
            words = f"{host.host}: {host.facts.log_bytes >> 20} MiB of logs"
            fix = f"`truncate -s 0 {host.facts.largest_log}` empties the largest"
            yield Finding("logs", Verdict.WRONG if seen.is_local else Verdict.NOTE, words, fix)


# --- the text of a check that found nothing ------------------------------------------------------


def _unknown_without_status(words: Callable[[RouterStatus], str]) -> Callable[[Seen], str]:
    return lambda seen: "not known: the router does not answer" if seen.status is None else words(seen.status)


def _load_words(status: RouterStatus) -> str:
    needed, ready = status.workers_needed.as_served, status.workers_ready
    return f"{status.queue.length:,} queries wait; {needed:.1f} GPUs needed, {ready} take work"


def _least_free(seen: Seen) -> str:
    free = [host.facts.free_bytes for host in seen.hosts if host.facts]
    return f"{min(free, default=0) / 1e9:.0f} GB left at least"


def _log_words(seen: Seen) -> str:
    return f"{sum(host.facts.log_bytes for host in seen.hosts if host.facts) / 1e6:.1f} MB of logs"


OF_HOSTS = ("hosts", "clocks", "files", "disks", "logs")
"""Checks of the hosts themselves: engines that choose the machines look after those."""

CHECKS: Sequence[tuple[str, Callable[[Seen], Iterator[Finding]], Callable[[Seen], str]]] = (
    ("hosts", _reachable, lambda seen: f"reached: {', '.join(host.host for host in seen.hosts)}"),
    ("router", _router, _unknown_without_status(lambda s: f"answers at {s.router.client_endpoint}")),
    ("processes", _roles, lambda seen: f"all {len(seen.roles)} are up"),
    ("registered", _registered, _unknown_without_status(lambda s: f"GPUs that take work: {s.workers_ready}")),
    ("restarts", _restarts, lambda _: "no crash was seen"),
    ("versions", _versions, _unknown_without_status(lambda s: f"{s.router.version} on all")),
    ("speed", _speed, _unknown_without_status(lambda _: f"no GPU is {SLOW} times as slow as its profile")),
    ("load", _load, _unknown_without_status(_load_words)),
    ("counters", _counted, _unknown_without_status(lambda _: "nothing malformed, dropped or refused")),
    ("clocks", _clocks, lambda _: f"within {CLOCK_S:g} s of this machine's"),
    ("files", _files, lambda _: "limits of open files are far"),
    ("disks", _disks, _least_free),
    ("logs", _logs, _log_words),
)
"""Each check's name, its function, and its text if it found nothing."""
