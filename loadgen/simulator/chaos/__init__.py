"""Chaos: small worlds drawn from a seed in which things go wrong, and the promises that must hold anyway.

A schedule is a seed. It draws a cluster, clients that embed the real session, queries with their
own SLOs and floors, and faults; the real core serves them on a virtual clock, and after each pass
of the router these are checked:

    conservation   received = answered + queued + in flight, counted independently from the queries
    custody        every query in flight is in a batch that the router waits for
    one answer     the router answers no query twice, and each ends once for its owner
    no expired     no query is dispatched after its deadline
    EDF            a batch has the head, and leaves behind no earlier query that its subnet could serve
    credit         never negative, and no GPU is sent more than it can hold
    bounds         the queries and bytes held stay within the router's bounds
    epochs         nothing is sent to an earlier life of a worker, and nothing that it sends counts
    time           a query that expires in the queue is answered within 5 ms of its deadline
    an end         a second after its last deadline every query has ended, and nothing is held

    python -m loadgen.simulator.chaos --schedules 10000      what `make chaos` runs
    python -m loadgen.simulator.chaos --seed 17              one again, with its faults
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import click

from gpu_worker.core.queue import CAPACITY
from loadgen import options
from loadgen.simulator.chaos.clients import SessionClient, SimQuery
from loadgen.simulator.faults import draw_faults, faults_json
from loadgen.simulator.links import Way
from loadgen.simulator.simulate import START_NS, SimSettings, Simulation, slowed
from profiles.table import load_profile
from router.core import RouterCore
from router.core.edf import DISPATCHED, QUEUED
from router.core.events import Answer, CoreSettings, Dispatch, Finished, Pulled
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadgen.simulator.faults import Fault
    from loadgen.simulator.workers import SimProcess
    from router.core.edf import Cohort
    from router.core.events import Action, Event
    from router.core.workers import Batch

PROFILE = "cnn-8gpu-modelled"
POLICIES = ("slackfit", "planfit", "maxacc", "demandfit", "mincost", "fixed:cnn-78.25")
_SHOWN = 20
"""Most failures printed."""
_TOLD_WITHIN_NS = 5 * MS
"""How soon after its deadline a query that expires in the queue must be answered."""
_SETTLED_NS = 4_000 * MS
"""After the last deadline: six heartbeats until silent workers are dead, a second until stuck batches are
given up, and the same again for what was dispatched a second time."""


class ViolationError(AssertionError):
    """A promise that must always hold does not."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The world of a seed.

    Attributes:
        gpus: GPUs of each worker process; if negative, they are 2.5 times slower by their profile.
        breaks_ns: For each client, when its connection breaks.
    """

    seed: int
    gpus: tuple[int, ...]
    policy: str
    settings: SimSettings
    core: CoreSettings
    queries: tuple[tuple[SimQuery, ...], ...]
    breaks_ns: tuple[tuple[int, ...], ...]
    faults: tuple[Fault, ...]

    @property
    def n_queries(self) -> int:
        """Queries of all clients."""
        return sum(map(len, self.queries))

    @property
    def last_deadline_ns(self) -> int:
        """When the last of the queries is due at the latest."""
        return max(query.due_ns + query.slo_ns for mine in self.queries for query in mine)


def draw_schedule(seed: int) -> Schedule:
    """Return the schedule of a seed: tens to hundreds of queries within a second or so."""
    rng = random.Random(f"{seed}/schedule")
    n_processes, n_clients = rng.randint(1, 4), rng.randint(1, 3)
    each = rng.choice([1, 1, 2])
    settings = SimSettings(
        way=Way(rng.choice([20_000, 100_000, 1_000_000]), rng.choice([0, 50_000, 2_000_000])),
        router_rest_ns=rng.choice([0, 600_000]),
        worker_rest_ns=rng.choice([0, 600_000]),
        n_clients=n_clients,
        gpus_per_process=each,
    )
    core = CoreSettings(
        max_queries=rng.choice([20, *[200_000] * 5]), max_bytes=rng.choice([400, *[1 << 20] * 5])
    )
    duration_ns = rng.choice([50, 200, 600]) * MS
    queries = tuple(tuple(_draw_queries(rng, duration_ns)) for _ in range(n_clients))
    breaks_ns = tuple(
        (START_NS + rng.randrange(duration_ns),) if rng.random() < 0.15 else () for _ in range(n_clients)
    )
    faults = draw_faults(seed, n_processes=n_processes, n_clients=n_clients, duration_ns=duration_ns)
    return Schedule(
        seed, tuple(each * rng.choice([1, 1, -1]) for _ in range(n_processes)), rng.choice(POLICIES),
        settings, core, queries, breaks_ns, faults,
    )  # fmt: skip


def _draw_queries(rng: random.Random, duration_ns: int) -> list[SimQuery]:
    """Return one client's queries: bursts and single ones, of one SLO or of several."""
    slos_ms = rng.choice([[36.0], [18.0, 36.0, 100.0], [3.0, 36.0, 400.0]])
    floors = rng.choice([[0.0], [0.0], [0.0, 78.0], [0.0, 80.16, 99.0]])
    classes = rng.choice([[0], [0, 0, 1, 7]])
    queries: list[SimQuery] = []
    n = rng.choice([10, 40, 160])
    while len(queries) < n:
        due_ns = START_NS + rng.randrange(duration_ns)
        for _ in range(rng.choice([1, 1, 1, 4, 30])):
            cancelled_ns = rng.randrange(40 * MS) if rng.random() < 0.03 else None
            slo_ns = int(rng.choice(slos_ms) * MS)
            queries.append(SimQuery(due_ns, slo_ns, rng.choice(floors), cancelled_ns, rng.choice(classes)))
    return queries


@dataclass(slots=True)
class ScheduleOutcome:
    """The result of a schedule.

    Attributes:
        violation: What did not hold, and when; None if everything held.
        ends: How many queries ended with each outcome.
        n_redispatched: Queries that were queued a second time.
        digest: Of all directives and ends: the same seed gives the same digest.
    """

    seed: int
    violation: str | None
    ends: Counter[str]
    n_passes: int
    n_batches: int
    n_redispatched: int
    digest: str


class Watched(Protocol):
    """What a checker needs of a router: its core, the worker processes, and a call in each pass."""

    core: RouterCore
    on_pass: Callable[[int, list[Action]], None] | None

    @property
    def processes(self) -> list[SimProcess]:
        """All worker processes."""


class Checker:
    """Watches a router, and raises `ViolationError` as soon as a promise does not hold.

    Args:
        simulation: The router's.
        clients: Whose queries have to end.
        rest_ns: How long the router rests between two passes.
        has_doubles: Messages may arrive twice, so that a GPU may get a batch twice.
    """

    def __init__(
        self, simulation: Watched, clients: Sequence[SessionClient] = (), *,
        rest_ns: int, has_doubles: bool = False,
    ) -> None:  # fmt: skip
        self._simulation = simulation
        self._core = simulation.core
        self._clients = clients
        self._answered: set[tuple[int, int]] = set()
        self._has_doubles = has_doubles
        self._rest_ns = rest_ns
        self._handle = simulation.core.handle
        self._notes = array("q")
        simulation.core.handle = self._watched  # type: ignore[method-assign]  # to see every event
        simulation.on_pass = self.passed

    @property
    def digest(self) -> str:
        """Of all directives and answers so far."""
        return hashlib.sha256(self._notes.tobytes()).hexdigest()

    def _watched(self, event: Event, now_ns: int) -> None:
        """Pass an event on; what an earlier life of a worker sends must count for nothing."""
        core = self._core
        if isinstance(event, Finished | Pulled):
            peer = core.peers.get(event.peer)
            if peer is None or peer.epoch != event.message.epoch:
                before = self._known()
                self._handle(event, now_ns)
                is_same = self._known() == before
                _hold(is_same, f"epoch {event.message.epoch} is over, but its message was counted")
                return
        self._handle(event, now_ns)

    def _known(self) -> tuple[object, ...]:
        """Return the state that a worker's message changes."""
        core = self._core
        offers = [(worker.credit, worker.free_at_ns, len(worker.outstanding)) for worker in core.workers()]
        return core.n_answered, len(core.queue), core.in_flight, len(core.ledger.batches), offers

    def passed(self, now_ns: int, actions: list[Action]) -> None:
        """Check the state after a pass, and its decisions."""
        batches: list[Batch] = []
        for action in actions:
            if isinstance(action, Answer):
                self._check_answer(action, now_ns)
            elif isinstance(action, Dispatch):
                self._check_dispatch(action, now_ns)
                batches.append(action.batch)
        if batches:
            self._check_order(batches)
        self._check_counts()
        self._check_gpus()
        wake_ns = self._core.next_wake_ns()
        _hold(wake_ns is None or wake_ns > now_ns, "the next wake is not ahead: a busy loop")

    def _check_answer(self, answer: Answer, now_ns: int) -> None:
        for cohort, lo, hi in answer.stretches:
            for i in range(lo, hi):
                _hold(
                    (cohort.serial, i) not in self._answered, f"query {_name(cohort, i)} was answered twice"
                )
                self._answered.add((cohort.serial, i))
                self._note(now_ns, cohort.serial, i, answer.status)
        if answer.status is Status.EXPIRED and answer.ran is None and answer.cohort.losses is None:
            cohort, lo = answer.cohort, answer.lo
            late_ns = now_ns - max(cohort.deadlines_ns[lo], cohort.arrived_ns)
            _hold(
                late_ns <= _TOLD_WITHIN_NS + self._rest_ns,
                f"query {_name(cohort, lo)} expired in the queue, answered {late_ns / MS:.2f} ms later",
            )

    def _check_order(self, batches: list[Batch]) -> None:
        """Check that each batch of a pass has the head, and left behind no earlier query that it could take.

        A batch may skip a query whose floor lies above its subnet, and no other; unless the policy packs by
        floor: then also one whose floor lies below those that the batch takes in its place.
        """
        least: dict[int, int] = {}  # earliest deadline of the queries left, by floor
        for cohort in self._cohorts():
            for i, state in enumerate(cohort.states):
                if state == QUEUED:
                    _fold(least, cohort, i)
        for batch in reversed(batches):
            members = [(cohort, i) for cohort, lo, hi in batch.stretches for i in range(lo, hi)]
            deadlines = [cohort.deadlines_ns[i] for cohort, i in members]
            latest: dict[int, int] = {}  # deadline taken, by floor
            for (cohort, i), due_ns in zip(members, deadlines, strict=True):
                latest[_floor(cohort, i)] = max(latest.get(_floor(cohort, i), due_ns), due_ns)
            packs = batch.worker.policy.name == "planfit"
            for floor, deadline_ns in least.items():
                _hold(min(deadlines) <= deadline_ns, f"batch {batch.batch_id} passed over the head")
                rivals = [due_ns for of, due_ns in latest.items() if of <= floor or not packs]
                _hold(
                    floor > batch.subnet or max(rivals, default=0) <= deadline_ns,
                    f"batch {batch.batch_id} left behind a query that is due earlier than one of its own",
                )
            for cohort, i in members:
                _fold(least, cohort, i)

    def _check_dispatch(self, action: Dispatch, now_ns: int) -> None:
        core, batch = self._core, action.batch
        n = 0
        for cohort, lo, hi in batch.stretches:
            for i in range(lo, hi):
                deadline_ns = cohort.deadlines_ns[i]
                n += 1
                _hold(
                    deadline_ns >= now_ns,
                    f"query {_name(cohort, i)} was dispatched {(now_ns - deadline_ns) / MS:.2f} ms too late",
                )
                is_floored = cohort.floors is not None and cohort.floors[i] > batch.subnet
                _hold(not is_floored, f"query {_name(cohort, i)} was dispatched below its floor")
        _hold(n == batch.n, f"batch {batch.batch_id} says {batch.n} queries")
        peer = core.peers.get(action.peer)
        _hold(peer is not None, f"batch {batch.batch_id} went to a worker that is not there")
        assert peer is not None, "held above"
        _hold(peer.epoch == batch.worker.peer.epoch, f"batch {batch.batch_id} went to an older life")
        self._note(now_ns, batch.batch_id, batch.worker.slot, batch.subnet)

    def _check_counts(self) -> None:
        """Count every query without an answer by its own state."""
        core = self._core
        try:
            core.check()
        except AssertionError as error:
            raise ViolationError(str(error)) from error
        held = {
            (id(cohort), i)
            for batch in core.ledger.batches.values()
            for cohort, lo, hi in batch.stretches
            for i in range(lo, hi)
        }
        queued = in_flight = 0
        for cohort in self._cohorts():
            queued += cohort.states.count(QUEUED)
            in_flight += cohort.states.count(DISPATCHED)
            for i, state in enumerate(cohort.states):
                if state == DISPATCHED:
                    _hold(
                        (id(cohort), i) in held,
                        f"query {_name(cohort, i)} is in flight, but in no worker's batch",
                    )
        _hold(queued == len(core.queue), f"{queued} queries are queued, the queue says {len(core.queue)}")
        _hold(in_flight == core.in_flight, f"{in_flight} are in flight, the core says {core.in_flight}")
        _hold(
            queued + core.in_flight <= core.settings.max_queries, "more queries than --max-queries are held"
        )
        _hold(core.held_bytes <= core.settings.max_bytes, "more bytes than --max-bytes are held")

    def _cohorts(self) -> list[Cohort]:
        """Return every cohort that may have a query without an answer, including clients that have left."""
        core = self._core
        found = {cohort.serial: cohort for one in core.clients.values() for cohort in one.cohorts.values()}
        for batch in core.ledger.batches.values():
            found |= {cohort.serial: cohort for cohort, _, _ in batch.stretches}
        return list(found.values())

    def _check_gpus(self) -> None:
        for worker in self._core.workers():
            _hold(worker.credit >= 0, "credit is negative")
            _hold(worker.credit <= CAPACITY, f"credit is {worker.credit}, more than a worker offers")
        if self._has_doubles:
            return  # duplicated messages run twice
        for process in self._simulation.processes:
            for gpu in process.gpus:
                n_held = gpu.queue.n_outstanding
                _hold(n_held <= CAPACITY, f"a GPU was sent {n_held} batches at a time")

    def check_end(self) -> None:
        """Check that nothing is left once everything has come to rest."""
        core = self._core
        for client in self._clients:
            for i, query in enumerate(client.queries):
                _hold(len(query.ends) == 1, f"query {i} of client {client.number} ended so: {query.ends}")
        _hold(
            not core.queue and not core.in_flight and not core.ledger.batches,
            "the router still holds queries",
        )
        _hold(core.received == core.n_answered, f"received {core.received}, answered {core.n_answered}")
        _hold(core.held_bytes == 0, f"{core.held_bytes} bytes are held for no client")

    def _note(self, *values: int) -> None:
        self._notes.extend(values)


def _hold(is_so: bool, what: str) -> None:
    if not is_so:
        raise ViolationError(what)


def _floor(cohort: Cohort, i: int) -> int:
    return 0 if cohort.floors is None else cohort.floors[i]


def _fold(least: dict[int, int], cohort: Cohort, i: int) -> None:
    floor = _floor(cohort, i)
    deadline_ns = cohort.deadlines_ns[i]
    least[floor] = min(least.get(floor, deadline_ns), deadline_ns)


def _name(cohort: Cohort, i: int) -> str:
    query_id = int.from_bytes(bytes(cohort.message.ids[8 * i : 8 * i + 8]), "little")
    return f"{query_id} of client {cohort.client.session - 1}"


def _run(simulation: Simulation, schedule: Schedule, clients: Sequence[SessionClient]) -> None:
    """Run until everything has happened and all is at rest, or should be."""
    until_ns = max([schedule.last_deadline_ns, *(START_NS + fault.at_ns for fault in schedule.faults)])
    limit_ns = schedule.last_deadline_ns + _SETTLED_NS
    core = simulation.core
    while True:
        simulation.run(min(until_ns, limit_ns))
        is_at_rest = not (core.queue or core.ledger.batches) and all(client.is_done for client in clients)
        if is_at_rest or until_ns >= limit_ns:
            return
        until_ns += 100 * MS


def run_schedule(seed: int, make_core: Callable[..., RouterCore] = RouterCore) -> ScheduleOutcome:
    """Run the schedule of a seed and check it; never raises for a broken promise.

    Args:
        seed: The schedule's.
        make_core: Builds the core; tests pass mutants.
    """
    schedule = draw_schedule(seed)
    fast = load_profile(PROFILE)
    slow = slowed(fast, 2.5)
    cluster = [slow if n < 0 else fast for n in schedule.gpus for _ in range(abs(n))]
    simulation = Simulation(
        cluster, policy=schedule.policy, seed=seed, faults=schedule.faults, settings=schedule.settings,
        core=schedule.core, make_core=make_core,
    )  # fmt: skip
    clients = []
    for number, (queries, breaks_ns) in enumerate(zip(schedule.queries, schedule.breaks_ns, strict=True)):
        client = SessionClient(simulation, number, queries, breaks_ns)
        clients.append(client)
        client.connected(simulation.join(client))
    has_doubles = any(fault.kind == "duplicate" for fault in schedule.faults)
    checker = Checker(simulation, clients, rest_ns=schedule.settings.router_rest_ns, has_doubles=has_doubles)
    violation = None
    try:
        _run(simulation, schedule, clients)
        checker.check_end()
    except AssertionError as error:  # a violation, or the core's own
        at_ms = (simulation.now_ns - START_NS) / MS
        violation = f"{at_ms:.3f} ms: {error or type(error).__name__}"
    ends = Counter(end for client in clients for query in client.queries for end in query.ends)
    core = simulation.core
    return ScheduleOutcome(
        seed, violation, ends, simulation.n_passes, core.n_batches, core.n_redispatched, checker.digest
    )


@dataclass(slots=True)
class Tally:
    """The results of many schedules.

    Attributes:
        program: The module that plays one of them again.
    """

    program: str = "loadgen.simulator.chaos"
    n: int = 0
    n_passes: int = 0
    n_batches: int = 0
    n_redispatched: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[ScheduleOutcome] = field(default_factory=list)
    digest: str = ""

    def add(self, outcome: ScheduleOutcome) -> None:
        """Add one result."""
        self.n += 1
        self.n_passes += outcome.n_passes
        self.n_batches += outcome.n_batches
        self.n_redispatched += outcome.n_redispatched
        self.ends += outcome.ends
        self.digest = hashlib.sha256((self.digest + outcome.digest).encode()).hexdigest()
        if outcome.violation is not None:
            self.failures.append(outcome)

    def lines(self) -> list[str]:
        """Return the lines to print."""
        ends = ", ".join(f"{name} {n:,}" for name, n in self.ends.most_common())
        failed = [
            f"seed {one.seed} FAILED at {one.violation}\n  replay: python -m {self.program} --seed {one.seed}"
            for one in self.failures[:_SHOWN]
        ]
        work = f"{self.n_passes:,} passes checked, {self.n_batches:,} batches"
        return [
            *failed,
            f"{self.n:,} schedules: {self.n - len(self.failures):,} hold, {len(self.failures):,} fail",
            f"  {work}, {self.n_redispatched:,} queries dispatched again",
            f"  {sum(self.ends.values()):,} queries: {ends}",
            f"  digest {self.digest}",
        ]


def run_schedules(first: int, n: int, *, n_processes: int = 1) -> Tally:
    """Run `n` schedules from seed `first` on, in `n_processes`; the tally does not depend on their number."""
    return tallied(Tally(), run_schedule, range(first, first + n), n_processes)


def tallied(tally: Tally, run: Callable[[int], ScheduleOutcome], seeds: range, n_processes: int) -> Tally:
    """Add how the schedule of each seed went to a tally, in the seeds' order, and return it."""
    if n_processes == 1:
        for seed in seeds:
            tally.add(run(seed))
        return tally
    with ProcessPoolExecutor(n_processes) as pool:
        for outcome in pool.map(run, seeds, chunksize=50):
            tally.add(outcome)
    return tally


@click.command()
@click.option(
    "--schedules", type=click.IntRange(1), default=10_000, show_default=True, help="How many seeds."
)
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The first seed.")
@click.option("--seed", type=click.IntRange(0), help="Run only this seed, and print its faults.")
@options.processes
def main(schedules: int, first: int, seed: int | None, processes: int | None) -> None:
    """Run fault schedules and check the promises. Exit 1 if one does not hold."""
    began_s = time.monotonic()
    if seed is not None:
        click.echo(faults_json(draw_schedule(seed).faults), nl=False)
        tally = run_schedules(seed, 1)
    else:
        n_processes = processes or len(os.sched_getaffinity(0))
        tally = run_schedules(first, schedules, n_processes=n_processes)
    for line in tally.lines():
        click.echo(line)
    click.echo(f"  {time.monotonic() - began_s:.1f} s")
    sys.exit(1 if tally.failures else 0)
