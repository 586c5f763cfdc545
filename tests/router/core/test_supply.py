"""The supply that the fleet keeps, against each GPU that takes work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.core.events import DrainWorker
from router.core.workers import PeerState, WorkerState
from router.policies.planfit import PlanFit
from router.policies.supply import FULL, GpuPace
from superserve.build import COMPILED, build
from superserve.clock import MS
from tests.router.core.books import hang, run_at, slower
from tests.router.core.harness import CNN, World

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.core.workers import Worker

PLANNED = 36.0 - 1.5
"""About how long a query of 36 ms may wait and run, in milliseconds: the way takes the rest."""


def pace_of(worker: Worker, limit_ns: float) -> float:
    """Return the queries a nanosecond of a GPU that takes work, else 0."""
    if worker.machine.state is not WorkerState.READY or worker.peer.machine.state is not PeerState.LIVE:
        return 0.0
    profile, slowdown = worker.profile, worker.slowdown
    n = profile.largest_batch(0, int(limit_ns / slowdown))
    return 0.0 if n is None else n / (profile.latency_p99_ns(0, n) * slowdown)


def check(world: World) -> None:
    """Assert that the supply is the sum over the GPUs; their slowdowns may differ by the noise."""
    supply = world.core.fleet.supply
    naive = sum(pace_of(worker, supply.limit_ns) for worker in world.core.workers())
    assert supply.rate == pytest.approx(naive, rel=0.06, abs=1e-12)


def served(world: World, n: int = 10, slack_ms: float = 36.0) -> None:
    """Let some messages come and be served."""
    for _ in range(n):
        world.submit(*[slack_ms] * 4)
        world.run(5)


def make_world(*factors: int) -> World:
    """Return a world with a process of one GPU for each factor, and a first query seen."""
    world = World(make_policy=PlanFit)
    for i, factor in enumerate(factors):
        world.join(f"w{i}", CNN if factor == 1 else slower(CNN, factor))
    served(world)
    return world


def test_gpus_that_join_and_leave_are_counted_at_once() -> None:
    """The limit is half of what a query may wait; each GPU counts by its own profile."""
    world = make_world(1, 1)
    assert world.core.fleet.supply.limit_ns == pytest.approx(FULL * PLANNED * MS, rel=0.2)
    check(world)
    rate = world.core.fleet.supply.rate
    world.join("late", slower(CNN, 2))
    check(world)
    assert world.core.fleet.supply.rate > 1.2 * rate
    world.kill("late", seen=True)
    check(world)
    assert world.core.fleet.supply.rate == pytest.approx(rate, rel=0.06)


def test_a_gpu_that_drains_counts_no_more() -> None:
    """Nor when it ends the batch that it held, or a heartbeat later."""
    world = make_world(1, 1)
    world.do(DrainWorker("w1", 0))
    world.run(120)
    check(world)
    world = World(make_policy=PlanFit)
    world.join("pair", CNN, CNN)
    served(world)
    world.processes["pair"].gpus[1].factor = 2.9
    world.submit(*[400.0] * 64, min_accuracy=[80.0] * 64)  # the second GPU takes 90 ms for its batch
    world.run(8)
    world.do(DrainWorker("pair", 1))
    world.run(60)  # a heartbeat: its pace has stopped
    assert world.worker("pair", 1).outstanding
    while world.worker("pair", 1).outstanding:
        world.run(1)
        check(world)
    assert world.worker("pair", 1).machine.state is WorkerState.DRAINING


def test_a_gpu_that_overruns_counts_no_more_until_it_answers() -> None:
    """Its time is not taken either: it hangs, and what it would run is run by others."""
    world = make_world(1, 1)
    hang(world, "w1")
    world.submit(*[400.0] * 64)
    world.run(350)
    assert world.worker("w1").machine.state is WorkerState.OVERRUN
    check(world)
    assert world.core.fleet.supply.rate == pytest.approx(
        pace_of(world.worker("w0"), FULL * 380 * MS), rel=0.3
    )
    world.revive(world.processes["w1"])
    world.run(200)
    assert world.worker("w1").machine.state is WorkerState.READY
    check(world)


def test_a_gpu_found_to_be_slow_is_counted_so_before_the_next_heartbeat() -> None:
    """Its first batches take twice their profile: 20 ms later the supply knows."""
    world = World(make_policy=PlanFit)
    world.join("w0", CNN, speed=2.0)
    world.submit(36)
    rate = world.core.fleet.supply.rate
    world.run(20)
    check(world)
    assert world.core.fleet.supply.rate < 0.8 * rate


def reckonings(world: World) -> list[float]:
    """Return a list that grows by an entry whenever a GPU is reckoned."""
    found: list[float] = []

    class Counted(GpuPace):
        __slots__ = ()

        def set(self, profile: Profile, slowdown: float, limit_ns: float) -> None:
            found.append(limit_ns)
            super().set(profile, slowdown, limit_ns)

    for worker in world.core.workers():
        worker.pace.__class__ = Counted
    return found


@pytest.mark.skipif(
    build() == COMPILED, reason="counts calls by another class, which compiled objects refuse"
)
@pytest.mark.parametrize(("n_gpus", "most"), [(2, 2), (70, 0)])
def test_clients_that_differ_do_not_have_all_gpus_reckoned_each_time(n_gpus: int, most: int) -> None:
    """Two GPUs at most once in 0.2 ms, seventy in their heartbeats: by then the last patience counts."""
    world = World(make_policy=PlanFit)
    world.join("w0", *[CNN] * n_gpus)
    served(world)
    fleet, found = world.core.fleet, reckonings(world)
    now_ns = world.now_ns
    for patience_ms in (200, 20) * 50:
        fleet.fit_supply(patience_ms * MS, now_ns)
    assert len(found) <= most
    check(world)
    world.run(250)
    check(world)
    if n_gpus == 70:
        assert fleet.supply.limit_ns == FULL * 20 * MS
    fleet.fit_supply(300 * MS, world.now_ns)
    assert (fleet.supply.limit_ns == FULL * 300 * MS) == (n_gpus == 2)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_supply_is_the_sum_whatever_happens(data: st.DataObject) -> None:
    """Processes join, drain, die, hang and slow down, in any order; one heartbeat later the sums agree."""
    world = make_world(1, 1)
    n = 2
    for _ in range(data.draw(st.integers(1, 6))):
        live = sorted(world.core.peers)
        what = data.draw(st.sampled_from(["join", "drain", "die", "hang", "slow", "serve"]))
        if what == "join" or not live:
            factor = data.draw(st.sampled_from([1, 2, 6]))
            world.join(f"w{n}", CNN if factor == 1 else slower(CNN, factor))
            n += 1
            continue
        key = data.draw(st.sampled_from(live))
        if what == "drain":
            world.do(DrainWorker(key, 0))
        elif what == "die":
            world.kill(key, seen=data.draw(st.booleans()))
        elif what == "hang":
            hang(world, key)
        elif what == "slow":
            run_at(world, key, data.draw(st.sampled_from([0.7, 1.4, 2.5])))
        served(world, 4)
    world.run(1_000)  # the dead are known to be dead, and what hung has overrun
    served(world, 4)
    world.run(210)
    check(world)
    assert world.core.fleet.supply.busy(world.now_ns) == 0.0


@pytest.mark.parametrize(("way_ms", "least_ms", "most_ms"), [(0.2, 0.0, 0.2), (9.0, 2.0, 9.0)])
def test_gaps_are_measured_where_ways_are_longer_than_batches(
    way_ms: float, least_ms: float, most_ms: float
) -> None:
    """A GPU holds one batch beside the one that runs: the next comes no sooner than a report and its way."""
    world = World(make_policy=PlanFit, way_ns=round(way_ms * MS))
    world.join("w0", CNN)
    for _ in range(300):
        world.submit(*[90.0] * 4)
        world.run(2)
    gap_ms = world.core.fleet.supply.gap_ns / MS
    assert least_ms <= gap_ms <= most_ms


def test_a_gpu_that_waits_for_queries_has_no_gap() -> None:
    """It idles for 60 ms between two batches, but each was sent when its query came."""
    world = World(make_policy=PlanFit)
    world.join("w0", CNN)
    for _ in range(100):
        world.submit(36.0)
        world.run(60)
    assert world.core.fleet.supply.gap_ns == 0.0
