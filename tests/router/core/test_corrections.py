"""GPUs that are slower than their profile: what the core learns is what it decides by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from router.core.estimates import Correction
from router.core.workers import WorkerState
from router.policies.demandfit import DemandFit
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.books import books_of, earliness, hang, run_at, sent, slower
from tests.router.core.harness import CNN, Gpu, World
from tests.router.core.test_core import make_world

if TYPE_CHECKING:
    from router.core.events import Dispatch

OK, LATE = Status.OK, Status.LATE


def taught(speed: float, *, n_gpus: int = 1) -> World:
    """Return a world that has seen its GPUs run some sixty batches at `speed` times their profile."""
    world = World()
    world.join("w0", *[CNN] * n_gpus, speed=speed)
    for _ in range(60 * n_gpus):
        world.submit(*[100.0] * 16)
        world.run(60 / n_gpus)
    return world


@pytest.mark.parametrize("speed", [1.5, 2.0])
def test_a_slow_gpu_is_given_its_next_batch_no_earlier_than_a_sound_one(speed: float) -> None:
    """When it really is about to be free, not when its profile predicts it."""
    world = taught(speed)
    early = earliness(world)
    for _ in range(30):
        world.submit(*[100.0] * 16)
        world.run(20)

    assert len(early) >= 10
    assert max(early) <= MS


@pytest.mark.parametrize("speed", [1.5, 2.5])
def test_what_a_slow_gpu_is_given_ends_in_time(speed: float) -> None:
    """Once it is known, batches are smaller and none that it takes is late."""
    world = taught(speed)
    ids = []
    for _ in range(40):
        ids += world.submit(*[36.0] * 4)
        world.run(30)

    assert world.statuses(ids).count(LATE) == 0
    assert world.statuses(ids).count(OK) >= 0.9 * len(ids)


def test_one_slow_subnet_is_corrected_before_the_whole_gpu_is() -> None:
    """Where only the most accurate subnet runs slow, it is given less, and nothing is late for long."""
    world = World()
    world.join("w0", CNN)

    def slow_at_the_top(_dispatch: Dispatch, _gpu: Gpu) -> None:
        run_at(world, "w0", 2.5 if sent(world)[-1].subnet == CNN.n_subnets - 1 else 1.0)

    world.on_dispatch = slow_at_the_top
    first = world.submit_spaced(36, n=10, gap_ms=40)
    ids = []
    for _ in range(20):
        ids += world.submit(*[36.0] * 16)
        world.run(60)

    assert OK in world.statuses(first)
    assert world.statuses(ids).count(LATE) == 0
    assert world.statuses(ids).count(OK) > 0.9 * len(ids)


def test_a_head_that_only_the_usual_way_lets_in_is_served() -> None:
    """With the worst way allowed for nothing fits; with the median of it something does: it is tried."""
    world = make_world()
    world.way_ns, usual_ns = 1_400_000, world.way_ns
    world.submit(36)
    world.run(20)
    world.way_ns = usual_ns
    worker = world.worker("w0")
    assert worker.transport.bound_ns() > 2_700_000 > 1_000_000 > worker.transport.median_ns
    (query,) = world.submit(3.5)
    world.run(10)

    assert world.status(query) is OK


def test_a_head_that_not_even_the_usual_way_lets_in_is_refused() -> None:
    """At once, with what the slack is, what the subnet of its floor takes and what the way takes."""
    world = make_world()
    (query, served) = world.submit(5.1, 5.3, min_accuracy=[80.16, 80.16])  # alone 4.779 ms, the way 0.4

    answer = world.answers["client", query]
    assert answer.status is Status.INFEASIBLE
    assert answer.reason == (
        "slack 5.10 ms once a worker is free; cnn-80.16 alone takes 4.78 ms and the way 2.10 ms"
    )
    assert [batch.n for batch in sent(world)] == [1]
    world.run(10)
    assert world.status(served) is OK


def test_a_batch_just_within_its_limit_is_no_overrun() -> None:
    """Three times the p99, the way and the grace: until then the worker keeps its credit."""
    world = make_world()
    hang(world, "w0")
    world.submit(400)
    (batch,) = sent(world)
    p99_ns = CNN.latency_p99_ns(batch.subnet, 1)
    # Expected to begin half a median round trip from now; the bound of the first way is 1 ms.
    limit_ns = 200_000 + 3 * p99_ns + MS + 10 * MS
    world.run((limit_ns - 1) / MS)
    assert world.worker("w0").machine.state is WorkerState.READY
    world.run(0.01)
    assert world.worker("w0").machine.state is WorkerState.OVERRUN


def test_a_gpu_known_to_be_slow_is_given_as_many_times_longer() -> None:
    """Ten times its profile is no overrun on a GPU that always takes ten times its profile."""
    world = taught(8.0)
    redispatched = books_of(world).redispatched
    for _ in range(5):
        world.submit(900)
        world.run(500)

    assert books_of(world).redispatched == redispatched
    assert world.worker("w0").machine.state is WorkerState.READY


def test_a_waiting_batch_does_not_overrun_while_another_runs() -> None:
    """Its time begins when the one before it has ended, though that takes almost three times its profile."""
    world = make_world()
    run_at(world, "w0", 2.8)
    first = world.submit(*[900.0] * 16)  # 88 ms, 31 by its profile
    world.run(25)
    run_at(world, "w0", 1.0)
    second = world.submit(900)  # expected to begin at 31 ms; its limit is 26 ms
    world.run(200)

    assert len(world.dispatches()) == 2
    assert books_of(world).redispatched == 0
    assert world.statuses(first + second) == [OK] * 17


def test_failures_teach_nothing_of_a_gpus_speed() -> None:
    """A model that raises at once is not a quick GPU: what comes after is still given its profiled time."""
    world = make_world()
    gpu = world.processes["w0"].gpus[0]
    run_at(world, "w0", 0.3)
    gpu.statuses = Status.FAILED
    for _ in range(30):
        world.submit(*[36.0] * 16)
        world.run(40)
    run_at(world, "w0", 1.0)
    gpu.statuses = None
    ids = world.submit(*[25.0] * 16)
    world.run(40)

    assert world.statuses(ids) == [OK] * 16


def test_a_faster_gpu_is_not_refused_for_the_slow_ones() -> None:
    """A head is doomed only where no worker is quick enough, under either kind of policy."""
    for policy in (DemandFit, None):
        world = World() if policy is None else World(make_policy=policy)
        world.join("slow", slower(CNN, 20))
        world.join("quick", CNN)
        ids = world.submit_spaced(10, n=6, gap_ms=15)
        assert world.statuses(ids) == [OK] * 6


def test_all_slow_workers_doom_a_head_at_once() -> None:
    """Where the quickest answer takes 29 ms, a slack of 20 ms is refused on arrival, with that figure."""
    world = World()
    world.join("slow", slower(CNN, 20))
    (query,) = world.submit(20)

    assert world.status(query) is Status.INFEASIBLE
    assert "the quickest answer takes 29.44 ms" in world.answers["client", query].reason


@pytest.mark.parametrize("ratio", [1.3, 1.6, 2.4])
def test_the_first_batch_of_a_slow_gpu_tells_of_all_its_subnets(ratio: float) -> None:
    """Within a fifteenth: a batch that another subnet runs next is in time."""
    correction = Correction(6)
    correction.measure(5, ratio)

    assert all(0.93 * ratio < correction.of_subnet(row) <= ratio for row in range(6))


def test_a_stall_of_the_first_batch_is_forgotten_with_the_next() -> None:
    """Of the first two the quicker one counts, as stalls make batches only longer."""
    correction = Correction(6)
    correction.measure(5, 3.0)
    assert correction.overall > 2.0
    correction.measure(5, 1.0)

    assert all(correction.of_subnet(row) < 1.05 for row in range(6))


@pytest.mark.parametrize("n_before", [0, 4])
def test_one_slow_batch_is_a_hiccup(n_before: int) -> None:
    """A batch that took three times its profile costs no later query its accuracy, once one more was sound.

    Of the first batch of all, which is all that is known of the GPU, that takes this one more, and the batch
    behind it is two subnets smaller; later none.
    """
    world = make_world()
    world.submit_spaced(60, n=n_before, gap_ms=30)
    run_at(world, "w0", 3.0)
    world.submit(60)
    world.run(30)
    run_at(world, "w0", 1.0)
    world.submit_spaced(60, n=2, gap_ms=30)

    rows = [batch.subnet for batch in sent(world)]
    best = CNN.n_subnets - 1
    assert rows[:n_before] + rows[n_before + 2 :] == [best] * (n_before + 1)
    assert rows[n_before + 1] >= (best if n_before else best - 2)


def test_a_stall_of_the_first_batch_does_not_refuse_what_fits_for_long() -> None:
    """3 ms are enough for a sound GPU and not for one twice as slow: refused, until it has eased."""
    world = make_world()
    run_at(world, "w0", 10.0)
    world.submit(500)
    world.run(50)
    run_at(world, "w0", 1.0)
    refused = world.submit(3.2)
    world.run(350)  # three heartbeats
    served = world.submit_spaced(2.6, n=5, gap_ms=20)

    assert world.statuses(refused) == [Status.INFEASIBLE]
    assert world.statuses(served) == [OK] * 5
