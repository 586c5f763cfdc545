"""`cluster scale`, `autoscale` and `apply`: how many workers run and how their router decides, on any engine.

Over ssh a cluster has the workers of its file: scaling starts and drains those. An engine that chooses the
machines gets further ones, like their siblings. Which ones is decided here, once, and so that the same number
twice changes nothing: those that ended come back first, those that came last go first. `cluster up` returns
to the file's number.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.operate.rolling import RollingOperator
from cluster.operate.supervised import SupervisedCluster
from cluster.remote import record as records
from cluster.remote.shell import RemoteError
from cluster.spec.engines import SSH
from cluster.spec.plan import MAX_WORKERS
from cluster.spec.roles import is_worker
from router.report.scaler import AS_SERVED, need_of
from router.serve.settings_file import RouterSettings
from superserve.errors import ConfigError, ProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from cluster.engines.engine import ClusterEngine, RoleSeen
    from cluster.remote.record import Record
    from cluster.spec.roles import Tuning
    from router.report.scaler import Scaler
    from superserve.status import RouterInfo

_MEMBER = re.compile(r"worker-(.+)-(\d+)")
_ASK_AGAIN_S = 0.1
_TUNED = ("policy", "margin_ms", "max_queries", "max_bytes")


@dataclass(frozen=True, slots=True)
class Change:
    """What scaling does.

    Attributes:
        start: Workers to start, each with its host; those that the record lacks are new.
        stop: Workers to drain.
    """

    start: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()


def change(record: Record, running: Collection[str], n: int) -> Change:
    """Return what makes `n` of a cluster's workers run.

    Args:
        record: The cluster.
        running: Workers that run, or are about to.
        n: How many should.

    Raises:
        ConfigError: `n` is not 1 to `MAX_WORKERS`, or more than a cluster over ssh has.
    """
    known = [(role, host.name) for host in record.hosts for role in host.roles if is_worker(role)]
    if not 1 <= n <= MAX_WORKERS:
        raise ConfigError(f"scale: expected 1 to {MAX_WORKERS} workers, got {n}")
    if record.engine == SSH and n > len(known):
        raise ConfigError(
            f"scale: expected at most the {len(known)} workers of {record.file}, got {n}: over ssh "
            f"every worker has a place in the file; add some there, and `cluster up` starts them"
        )
    there = [role for role, _ in known if role in running]
    if n <= len(there):
        return Change(stop=tuple(reversed(there[n:])))
    ended = [(role, host) for role, host in known if role not in running][: n - len(there)]
    return Change(start=(*ended, *_new(known, n - len(there) - len(ended))))


def _new(known: Sequence[tuple[str, str]], n: int) -> list[tuple[str, str]]:
    """Return further workers: each on the host that has the fewest, the first of several."""
    counts: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for role, host in known:
        counts[host] = counts.get(host, 0) + 1
        found = _MEMBER.fullmatch(role)
        numbers[host] = max(numbers.get(host, -1), int(found[2]) if found is not None else -1)
    added = []
    for _ in range(n):
        host = min(counts, key=lambda host: counts[host])
        counts[host] += 1
        numbers[host] += 1
        added.append((f"worker-{host}-{numbers[host]}", host))
    return added


def noted(record: Record, change: Change) -> Record:
    """Return the record of a cluster that is scaled: with new workers, and those that rest."""
    more: dict[str, list[str]] = {}
    slots = dict(record.slots)
    for role, host in change.start:
        if role not in record.host(host).roles:
            more.setdefault(host, []).append(role)
            sibling = next(one for one in record.host(host).roles if is_worker(one))
            slots[role] = slots.get(sibling, 1)
    hosts = tuple(replace(host, roles=(*host.roles, *more.get(host.name, ()))) for host in record.hosts)
    started = {role for role, _ in change.start}
    resting = [role for role in record.resting if role not in started]
    return replace(
        record,
        hosts=hosts,
        slots=tuple(slots.items()),
        resting=tuple(dict.fromkeys([*resting, *change.stop])),
    )


def scale(
    engine: ClusterEngine,
    n: int,
    say: Callable[[str], None],
    *,
    timeout_s: float,
    pause: Callable[[float], None] = time.sleep,
) -> Change:
    """Make `n` workers run; return what that took, once new ones are live and others have drained.

    Args:
        engine: The cluster.
        n: How many workers.
        say: Receives a line for people to read.
        timeout_s: How long new workers may take to be live.
        pause: Waits for a number of seconds, between two questions to other processes.

    Raises:
        ConfigError: The cluster cannot have that many.
        ProcessError: The router does not answer, or a worker does not start or end.
    """
    planned = change(engine.record, _running(engine), n)
    _note(engine, planned)
    operator = RollingOperator(SupervisedCluster(engine), say, pause=pause)
    if planned.start:
        operator.start([role for role, _ in planned.start], timeout_s)
    if planned.stop:
        operator.drain(planned.stop)
    return planned


def follow(
    engine: ClusterEngine,
    scaler: Scaler,
    say: Callable[[str], None],
    *,
    need: str = AS_SERVED,
    every_s: float,
    is_over: Callable[[], bool] = lambda: False,
    pause: Callable[[float], None] = time.sleep,
    now_s: Callable[[], float] = time.monotonic,
) -> None:
    """Scale a cluster by its load, until interrupted. Waits for no worker: it looks again soon.

    While the router or the engine does not answer, nothing is changed: a fleet that cannot be seen may be
    serving.

    Args:
        engine: The cluster.
        scaler: Decides.
        say: Receives a line for each change, and when the cluster cannot be seen.
        need: Which need the fleet follows, one of `router.report.scaler.NEEDS`.
        every_s: Time between two decisions.
        is_over: Whether to return.
        pause: Waits for a number of seconds.
        now_s: The clock of the cool-downs.
    """
    was_blind = False
    while not is_over():
        try:
            is_blind = not _follow_once(engine, scaler, say, need, now_s())
        except RemoteError as error:
            say(f"nothing is changed: {error}")
            is_blind = False  # the reason was said
        if is_blind and not was_blind:
            say("nothing is changed: the router does not answer")
        was_blind = is_blind
        pause(every_s)


def _follow_once(
    engine: ClusterEngine, scaler: Scaler, say: Callable[[str], None], need: str, now_s: float
) -> bool:
    """Decide once, and start and drain what that takes; return whether the router answered."""
    status = engine.router_status()
    if status is None:
        return False
    running = _running(engine)
    needed = need_of(status.workers_needed, need)
    n = scaler.decide(now_s, needed, len(running))
    if n == len(running):
        return True
    planned = change(engine.record, running, n)
    _note(engine, planned)
    say(f"{needed:.2f} GPUs needed, {status.workers_ready} take work: from {len(running)} workers to {n}")
    for role, _ in planned.start:
        engine.scale(role, 1)
    for role in planned.stop:
        engine.scale(role, 0)
    return True


def _running(engine: ClusterEngine) -> set[str]:
    """Return the workers that run or are about to.

    Raises:
        RemoteError: A host cannot be reached: what runs there is not known.
    """
    seen = engine.roles()
    for host in seen:
        if host.error:
            raise RemoteError(host.error)
    return {role.name for host in seen for role in host.roles if _counts(role)}


def _counts(role: RoleSeen) -> bool:
    return role.kind == "worker" and not role.has_ended and role.state != "STOPPING"


def _note(engine: ClusterEngine, planned: Change) -> None:
    """Keep what is about to change, before it does: an interrupted command then leaves no stranger."""
    record = noted(engine.record, planned)
    if record != engine.record:
        records.save(record)
        engine.keep(record)


# --- the router's settings ---------------------------------------------------------------------


def tune(
    engine: ClusterEngine, tuning: Tuning, *, timeout_s: float, pause: Callable[[float], None] = time.sleep
) -> list[str]:
    """Give the router other settings, and wait until they are in force; return what changed, in lines.

    Args:
        engine: The cluster.
        tuning: The settings.
        timeout_s: How long the router may take.
        pause: Waits for a number of seconds.

    Raises:
        ProcessError: The router does not answer, refuses them, or does not take them in time.
    """
    before = _info(engine)
    if before is None:
        raise ProcessError("the router does not answer, so nothing was changed: see `cluster doctor`")
    given = {name: value for name in _TUNED if (value := getattr(tuning, name)) is not None}
    wanted = RouterSettings(**given)
    engine.tune(tuning.content())
    give_up_s = time.monotonic() + timeout_s
    while True:
        now = _info(engine)
        if now is not None:
            if not _different(now, wanted) and not now.settings_error:
                return [
                    f"{name}: {_words(getattr(before, name))} -> {_words(getattr(now, name))}"
                    for name in _different(before, wanted)
                ]
            if now.settings_error and now.settings_error != before.settings_error:
                raise ProcessError(f"the router refuses them, and runs on as before: {now.settings_error}")
        if time.monotonic() > give_up_s:
            left = ", ".join(_different(now, wanted)) if now is not None else "no answer"
            raise ProcessError(f"the router did not take them within {timeout_s:g} s: {left}")
        pause(_ASK_AGAIN_S)


def _info(engine: ClusterEngine) -> RouterInfo | None:
    status = engine.router_status()
    return None if status is None else status.router


def _different(info: RouterInfo, wanted: RouterSettings) -> list[str]:
    return [name for name in _TUNED if getattr(info, name) != getattr(wanted, name)]


def _words(value: object) -> str:
    return "as measured" if value is None else str(value)
