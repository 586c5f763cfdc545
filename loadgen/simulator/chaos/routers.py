"""Chaos with several routers: worlds drawn from a seed, and what must hold over all routers together.

For each router's life the checks of `loadgen.simulator.chaos` hold: conservation, custody, one answer,
nothing expired dispatched, earliest deadline first, credit, bounds, epochs, time. For all of them together:

    one end        each query ends exactly once for its owner, whichever routers had it
    patience       while one router, one worker and the ways between them are spared, a query that can wait
                   three seconds gets its output, whatever becomes of the other routers; half a second is
                   enough if they only end, because a broken connection is noticed at once
    doubt          queries sent again on mere suspicion are at most a tenth of those sent, and 16 more
    credits        no two routers have a credit of the same GPU, whatever is lent; none holds three batches
    at rest        in the end no router that is up holds anything, its workers are where they belong, and no
                   credit is lent to a router that has gone

    python -m loadgen.simulator.chaos.routers --schedules 10000
    python -m loadgen.simulator.chaos.routers --seed 17
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gpu_worker.core.choice import CHOOSE_NS, RouterChoice
from gpu_worker.core.lending import Lender, LendingSettings
from loadgen import options
from loadgen.simulator.chaos import PROFILE, Checker, ScheduleOutcome, Tally, ViolationError, tallied
from loadgen.simulator.chaos.clients import SimQuery
from loadgen.simulator.links import FAR_NS, Trouble, Way
from loadgen.simulator.routers import SimRouter, SimWorker, World
from profiles.table import load_profile
from router.core import RouterCore
from router.policies.registry import make_policy
from router.serve.directives import results_of
from superserve.client.session import SPACING_NS, Session
from superserve.client.spread import SHARE
from superserve.clock import MS
from superserve.wire import Ping, Queries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadgen.simulator.routers import Conn
    from router.core.events import Action, Answer
    from router.core.workers import Batch

START_NS = 3_000 * MS
"""By then the processes are shared out evenly: at the start all may have joined the same router."""
PATIENT_NS = 3_000 * MS
"""A query that can wait this long outlasts three routers in a row: each takes 600 ms to be given up."""
BRIEF_NS = 500 * MS
"""The same where connections break."""
_LONG_NS = 4_000 * MS
"""Some faults last longer than any query waits."""
_HELLO_NS = 100 * MS
_REJOINED_NS = 1_200 * MS
"""After the last fault: until workers have noticed it, and belong to a router again."""
_SETTLED_NS = 4_000 * MS
_FEW, _MANY = (10, 40, 120), (120, 300)
"""Queries of a client. Credits are used where there is more to do than a router's own GPUs can."""
_ENDS = ("OK", "CANCELLED")
_GENEROUS = LendingSettings(0.001, 0.0, 1.0, 10 * MS)
"""Whatever the prices, nearly every credit moves to and fro where there is work."""
_GENEROUS_SEEDS = (3, 5, 6, 9)
"""Last digits of the seeds whose workers lend so."""
POLICIES = ("slackfit", "planfit", "maxacc")


@dataclass(frozen=True, slots=True)
class RouterFault:
    """What goes wrong, and where: instants and durations in ns from the start.

    Attributes:
        kind: kill, freeze or drain of a router; kill or freeze of a worker; or cut, a partition of a pair.
        who: `router:0`, `worker:1`, or a pair such as `client:0@1`.
        for_ns: How long; a router or worker that has ended begins again after that.
    """

    kind: str
    who: str
    at_ns: int
    for_ns: int

    def __str__(self) -> str:
        at_ms, for_ms = self.at_ns / MS, self.for_ns / MS
        return f"{self.kind} {self.who} at {at_ms:.1f} ms for {for_ms:.1f} ms"


@dataclass(frozen=True, slots=True)
class RouterSchedule:
    """The world of a seed.

    Attributes:
        gpus: GPUs of each worker process.
        rests_ns: Of each router: one may be slow.
        lending: When workers lend credits: as they do, or far more than is good.
    """

    seed: int
    n_routers: int
    gpus: tuple[int, ...]
    policy: str
    way: Way
    rests_ns: tuple[int, ...]
    lending: LendingSettings
    queries: tuple[tuple[SimQuery, ...], ...]
    faults: tuple[RouterFault, ...]

    @property
    def has_worker_faults(self) -> bool:
        """Whether worker processes end or stop."""
        return any(fault.who.startswith("worker:") and fault.kind != "cut" for fault in self.faults)

    @property
    def patient_ns(self) -> int:
        """With this much time a query gets its output, whatever becomes of the other routers."""
        is_clean = all(fault.who.startswith("router:") and fault.kind == "kill" for fault in self.faults)
        return BRIEF_NS if is_clean else PATIENT_NS


def draw(seed: int) -> RouterSchedule:
    """Return the schedule of a seed. The last router and the first worker are spared, and the way between."""
    rng = random.Random(f"{seed}/routers")
    n_routers, n_clients = rng.randint(1, 4), rng.randint(1, 3)
    # At least one process for each router: GPUs that all belong to a router that a client cannot reach are
    # no use to that client, and no router can help it.
    n_workers = n_routers + rng.randint(0, 2)
    duration_ns = rng.choice([100, 400, 1_000]) * MS
    way = Way(rng.choice([20_000, 200_000, 2_000_000]), rng.choice([0, 50_000, 3_000_000]))
    rests_ns = tuple(rng.choice([0, 600_000, 600_000, 20 * MS]) for _ in range(n_routers))
    lending = _GENEROUS if n_routers > 1 and seed % 10 in _GENEROUS_SEEDS else LendingSettings()
    if lending is _GENEROUS:
        duration_ns = rng.choice([50, 100]) * MS
    queries = tuple(
        tuple(_queries(rng, duration_ns, _MANY if lending is _GENEROUS else _FEW)) for _ in range(n_clients)
    )
    spared = n_routers - 1
    faults = []
    both = ["kill", "freeze", "freeze", "drain", "cut worker"]
    # For the same reason no client is cut off where processes end.
    kinds = rng.choice([["kill"], [*both, "cut client", "cut client"], [*both, "worker", "worker"]])
    for _ in range(rng.randint(1, 7)):
        at_ns, for_ns = rng.randrange(duration_ns), int(10 ** rng.uniform(0.5, 3.3) * MS)
        if rng.random() < 0.15 or kinds == ["kill"]:
            for_ns = _LONG_NS
        kind = rng.choice(kinds)
        if kind == "worker" and n_workers > 1:
            which = rng.choice(["kill", "freeze"])
            faults.append(RouterFault(which, f"worker:{rng.randrange(1, n_workers)}", at_ns, for_ns))
        elif kind.startswith("cut") and n_routers > 1:
            peer = f"client:{rng.randrange(n_clients)}"
            if kind == "cut worker":
                peer = f"worker:{rng.randrange(n_workers)}"
            faults.append(RouterFault("cut", f"{peer}@{rng.randrange(spared)}", at_ns, for_ns))
        elif kind in ("kill", "freeze", "drain") and n_routers > 1:
            faults.append(RouterFault(kind, f"router:{rng.randrange(spared)}", at_ns, for_ns))
    return RouterSchedule(
        seed, n_routers, tuple(rng.randint(1, 2) for _ in range(n_workers)), rng.choice(POLICIES), way,
        rests_ns, lending, queries, tuple(faults),
    )  # fmt: skip


def _queries(rng: random.Random, duration_ns: int, numbers: Sequence[int]) -> list[SimQuery]:
    slos_ms = rng.choice([[36, 3_000], [100, 500, 3_000], [36, 500], [500, 3_000]])
    found: list[SimQuery] = []
    n = rng.choice(numbers)
    while len(found) < n:
        due_ns = START_NS + rng.randrange(duration_ns)
        for _ in range(rng.choice([1, 1, 1, 4, 20])):
            cancelled_ns = rng.randrange(40 * MS) if rng.random() < 0.03 else None
            found.append(SimQuery(due_ns, rng.choice(slos_ms) * MS, 0.0, cancelled_ns))
    return found


class ManyClient:
    """One application with a session on several routers: the loop of `superserve.client.link`.

    Args:
        world: Where it is.
        number: Which client it is.
        queries: What it submits.
        make_session: Builds the session; tests pass broken ones.
    """

    def __init__(
        self, world: World, number: int, queries: tuple[SimQuery, ...],
        make_session: Callable[..., Session[SimQuery]],
    ) -> None:  # fmt: skip
        self.number = number
        self.queries = queries
        self.n_sent = self.n_doubted = 0
        self.session = make_session(
            contextlib.nullcontext(), "no router", max_outstanding=1 << 20, max_bytes=1 << 40,
            start=number / 7,
        )  # fmt: skip
        n = len(world.routers)
        for _ in range(n - 1):
            self.session.add_router()
        self._world = world
        self._conns: list[Conn | None] = [None] * n
        self._hello_ns = [0] * n
        self._next_send_ns = 0
        self._at_ns = FAR_NS
        self._is_doubting = False
        for query in queries:
            world.later(query.due_ns, partial(self._submit, query))

    # --- connections ----------------------------------------------------------------------

    def reach(self, i: int, now_ns: int) -> None:
        """Connect to a router that is up, and greet it."""
        if self._conns[i] is None and self._world.routers[i].is_up:
            self._conns[i] = self._world.connect(f"client:{self.number}", i)
            self._hello(i, now_ns)

    def cut(self, i: int) -> None:
        """A router has died: the connection breaks, and the client notices at once."""
        conn, self._conns[i] = self._conns[i], None
        if conn is not None:
            conn.is_open = False
            self._lose(i, self._world.now_ns)

    def _hello(self, i: int, now_ns: int) -> None:
        conn = self._conns[i]
        if conn is not None:
            self._hello_ns[i] = now_ns + _HELLO_NS
            router = self._world.routers[i]
            self._to(i, partial(router.client_hello, self, conn))

    def _lose(self, i: int, now_ns: int) -> None:
        if self.session.spread.routes[i].epoch is not None:
            self.session.lost(i)
        self._look(now_ns)

    def _to(self, i: int, act: Callable[[int], None]) -> None:
        conn, router = self._conns[i], self._world.routers[i]
        if conn is not None:
            self._world.carry(conn.way_in, conn, lambda now_ns: router.take(act, conn, now_ns))

    # --- what it receives -----------------------------------------------------------------

    def heard(self, i: int, now_ns: int) -> None:
        """Take any message of a router as a sign of life."""
        self.session.spread.routes[i].hear(now_ns)
        self._look(now_ns)

    def welcomed(self, i: int, life: int, n_gpus: int, now_ns: int) -> None:
        """A router is there, or is another one."""
        epoch = 1_000 * i + life
        route = self.session.spread.routes[i]
        if route.epoch != epoch:
            if route.epoch is not None:
                self.session.lost(i)
            self.session.welcomed(epoch, i)
        route.gpus = n_gpus
        self.heard(i, now_ns)

    def told_gpus(self, i: int, n_gpus: int, now_ns: int) -> None:
        """A router has more or fewer GPUs."""
        self.session.spread.routes[i].gpus = n_gpus
        self.heard(i, now_ns)

    def told_drain(self, i: int, now_ns: int) -> None:
        """A router takes no more work."""
        self.session.spread.routes[i].is_draining = True
        self.heard(i, now_ns)

    def told_bye(self, i: int, now_ns: int) -> None:
        """A router ends, or does not know this client."""
        self._lose(i, now_ns)

    def answered(self, i: int, life: int, answer: Answer, now_ns: int) -> None:
        """Take an answer."""
        for results in results_of(life, [answer]):
            for _, queries in self.session.answered(results, now_ns, i):
                for query in queries:
                    if query is not None:
                        query.ends.append(answer.status.name)
        self.heard(i, now_ns)

    # --- what it does ---------------------------------------------------------------------

    def _submit(self, query: SimQuery, now_ns: int) -> None:
        query.submitted_ns = now_ns
        query.deadline_ns = now_ns + query.slo_ns
        self.session.submit(query)
        if query.cancelled_after_ns is not None:
            self._world.later(now_ns + query.cancelled_after_ns, partial(self._cancel, query))
        self._look(now_ns)

    def _cancel(self, query: SimQuery, now_ns: int) -> None:
        if self.session.cancel(query)[0]:
            query.ends.append("CANCELLED")
            self._look(now_ns)

    def _look(self, now_ns: int) -> None:
        """Do what `SessionLink` does in a turn, and plan the next one."""
        session = self.session
        if session.spread.is_many:
            asked, dead = session.beat(now_ns)
            for i in asked:
                conn = self._conns[i]
                if conn is not None:
                    self._to(i, partial(self._world.routers[i].from_client, self, conn, Ping(now_ns)))
            for i in dead:
                session.lost(i)
        for i, route in enumerate(session.spread.routes):
            if route.epoch is None and now_ns >= self._hello_ns[i]:
                self._hello(i, now_ns)
        heard_ns = max(route.heard_ns for route in session.spread.routes)
        for query, _ in session.expired(now_ns, heard_ns):
            query.ends.append("UNANSWERED")
        if session.wants_ping:
            session.wants_ping = False
            for i, conn in enumerate(self._conns):
                if conn is not None:
                    self._to(i, partial(self._world.routers[i].from_client, self, conn, Ping(now_ns)))
        if session.has_outbound and now_ns >= self._next_send_ns:
            self._send(now_ns)
        self._plan(now_ns)

    def _send(self, now_ns: int) -> None:
        self._next_send_ns = now_ns + SPACING_NS
        for i, message in self.session.outbound_to(now_ns):
            conn = self._conns[i]
            if conn is None:
                self.session.lost(i)
                continue
            if isinstance(message, Queries):
                self.n_sent += message.n
            self._to(i, partial(self._world.routers[i].from_client, self, conn, message))

    def _plan(self, now_ns: int) -> None:
        session = self.session
        due = [session.next_wake_ns(), session.spread.next_beat_ns()]
        if session.has_outbound:
            due.append(self._next_send_ns)
        if not self.is_done:
            away = [i for i, route in enumerate(session.spread.routes) if route.epoch is None]
            due += [self._hello_ns[i] for i in away if self._conns[i] is not None]
        at_ns = max(now_ns + MS, min([at for at in due if at is not None], default=FAR_NS))
        if at_ns < FAR_NS and (at_ns < self._at_ns or self._at_ns <= now_ns):
            self._at_ns = at_ns
            self._world.later(at_ns, self._woken)

    def _woken(self, now_ns: int) -> None:
        if now_ns == self._at_ns:
            self._at_ns = FAR_NS
            self._look(now_ns)

    @property
    def is_done(self) -> bool:
        """Whether each of its queries was submitted and has ended."""
        return all(query.ends for query in self.queries)


def run_schedule(
    seed: int,
    make_session: Callable[..., Session[SimQuery]] = Session,
    make_choice: Callable[..., RouterChoice] = RouterChoice,
    make_core: Callable[..., RouterCore] = RouterCore,
    make_lender: Callable[..., Lender[Batch]] = Lender,
) -> ScheduleOutcome:
    """Run the schedule of a seed and check it; never raises for a broken promise."""
    schedule = draw(seed)
    profile = load_profile(PROFILE)
    troubles: dict[str, tuple[Trouble, ...]] = {}
    for fault in schedule.faults:
        if fault.kind == "cut":
            from_ns = START_NS + fault.at_ns
            trouble = Trouble(from_ns, from_ns + fault.for_ns, is_cut=True)
            troubles[fault.who] = (*troubles.get(fault.who, ()), trouble)
    world = World(seed, schedule.way, troubles)
    checkers: list[tuple[SimRouter, RouterCore, Checker]] = []

    def watch(router: SimRouter) -> None:
        # A router that is stopped answers when it goes on.
        stopped_ns = sum(
            fault.for_ns for fault in schedule.faults
            if fault.kind == "freeze" and fault.who == f"router:{router.number}"
        )  # fmt: skip
        checker = Checker(router, rest_ns=router.rest_ns + stopped_ns)
        router.on_pass = partial(_passed, world, checker)
        checkers.append((router, router.core, checker))

    for i, rest_ns in enumerate(schedule.rests_ns):
        build = partial(make_core, partial(make_policy, schedule.policy))
        world.routers.append(SimRouter(world, i, build, rest_ns, watch))
    clients = [ManyClient(world, number, mine, make_session) for number, mine in enumerate(schedule.queries)]
    for number, n in enumerate(schedule.gpus):
        lender = partial(make_lender, settings=schedule.lending)
        worker = SimWorker(world, number, [profile] * n, make_choice, lender)
        worker.is_visiting = schedule.lending is _GENEROUS
        world.workers.append(worker)
    everybody: list[Any] = list(clients)
    for router in world.routers:
        router.serve(everybody)
    for worker in world.workers:
        worker.begin(0)
    for fault in schedule.faults:
        if fault.kind != "cut":
            _plan(world, fault)
    violation = None
    try:
        _run(schedule, world, clients)
        _check_end(schedule, world, clients)
        for router, core, checker in checkers:
            if router.is_up and router.core is core:
                checker.check_end()
    except AssertionError as error:
        violation = f"{(world.now_ns - START_NS) / MS:.3f} ms: {error or type(error).__name__}"
    ends = Counter(end for client in clients for query in client.queries for end in query.ends)
    cores = [core for _, core, _ in checkers]
    digest = "".join(checker.digest for _, _, checker in checkers)
    return ScheduleOutcome(
        seed, violation, ends, len(cores), sum(core.n_batches for core in cores),
        sum(query.n_sends > 0 for client in clients for query in client.queries), digest,
    )  # fmt: skip


def _passed(world: World, checker: Checker, now_ns: int, actions: list[Action]) -> None:
    """Check a router's pass, and where all credits are after it."""
    checker.passed(now_ns, actions)
    for worker in world.workers:
        for slot, holders in enumerate(worker.credits_at()):
            if len(holders) > 1:
                raise ViolationError(f"routers {holders} have a credit of {worker.name}, slot {slot}")


def _run(schedule: RouterSchedule, world: World, clients: list[ManyClient]) -> None:
    """Run until everything has happened and all is at rest, or should be."""
    over_ns = START_NS + max([fault.at_ns + fault.for_ns for fault in schedule.faults], default=0)
    last_ns = max(query.due_ns + query.slo_ns for mine in schedule.queries for query in mine)
    until_ns = over_ns + _REJOINED_NS
    limit_ns = max(last_ns, until_ns) + _SETTLED_NS
    while True:
        world.run(until_ns)
        cores = [router.core for router in world.routers if router.is_up]
        is_idle = not any(core.queue or core.ledger.batches for core in cores)
        if until_ns >= limit_ns or (is_idle and all(client.is_done for client in clients)):
            return
        until_ns += 100 * MS


def _plan(world: World, fault: RouterFault) -> None:
    kind, number = fault.who.split(":")
    who: Any = (world.routers if kind == "router" else world.workers)[int(number)]
    at_ns = START_NS + fault.at_ns
    if fault.kind == "freeze":
        world.later(at_ns, partial(who.freeze, fault.for_ns))
        return
    world.later(at_ns, who.die if fault.kind == "kill" else who.drain)
    world.later(at_ns + fault.for_ns, who.begin)


def _check_end(schedule: RouterSchedule, world: World, clients: list[ManyClient]) -> None:
    """Check what must hold over all routers once everything has come to rest."""
    # Its worker may have died twice.
    ends = (*_ENDS, "WORKER_LOST") if schedule.has_worker_faults else _ENDS
    for client in clients:
        for i, query in enumerate(client.queries):
            name = f"query {i} of client {client.number}"
            if len(query.ends) != 1:
                raise ViolationError(f"{name} ended so: {query.ends}")
            if query.slo_ns >= schedule.patient_ns and query.ends[0] not in ends:
                raise ViolationError(
                    f"{name} could wait {query.slo_ns // MS} ms, and ended as {query.ends[0]}"
                )
        spread = client.session.spread
        bound = SHARE * client.n_sent + 17
        if spread.n_doubted > bound:
            raise ViolationError(
                f"client {client.number} sent {spread.n_doubted} of {client.n_sent} queries again in doubt"
            )
    joined = _joined(world)
    if any(worker.process.is_alive and not joined[worker.name] for worker in world.workers):
        # It may be on its way from one to another, and tries a third if the greeted one says nothing.
        world.run(world.now_ns + CHOOSE_NS)
        joined = _joined(world)
    for worker in world.workers:
        # Two at most: it has just moved, and its old router has not read the BYE.
        if not worker.process.is_alive:
            continue
        if worker.lender.strays():
            raise ViolationError(f"{worker.name} has lent credits to nobody: slots {worker.lender.strays()}")
        if joined[worker.name] not in (1, 2):
            raise ViolationError(f"{worker.name} belongs to {joined[worker.name]} routers in the end")


def _joined(world: World) -> Counter[str]:
    """Return to how many routers each worker belongs, by name."""
    return Counter(
        peer.name
        for router in world.routers
        if router.is_up
        for peer in router.core.peers.values()
        if not peer.is_guest
    )


def run_schedules(first: int, n: int, *, n_processes: int = 1) -> Tally:
    """Run `n` schedules from seed `first` on, in `n_processes`."""
    tally = Tally("loadgen.simulator.chaos.routers")
    return tallied(tally, run_schedule, range(first, first + n), n_processes)


@click.command()
@click.option(
    "--schedules", type=click.IntRange(1), default=10_000, show_default=True, help="How many seeds."
)
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The first seed.")
@click.option("--seed", type=click.IntRange(0), help="Run only this seed, and print its faults.")
@options.processes
def main(schedules: int, first: int, seed: int | None, processes: int | None) -> None:
    """Run fault schedules of several routers and check the promises. Exit 1 if one does not hold."""
    began_s = time.monotonic()
    if seed is not None:
        for fault in draw(seed).faults:
            click.echo(f"  {fault}")
        tally = run_schedules(seed, 1)
    else:
        tally = run_schedules(first, schedules, n_processes=processes or len(os.sched_getaffinity(0)))
    for line in tally.lines():
        click.echo(line)
    click.echo(f"  {time.monotonic() - began_s:.1f} s")
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main(prog_name="python -m loadgen.simulator.chaos.routers")
