"""RouterCore on integers: order, what is refused at the head, and which worker gets it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from router.policies.planfit import PlanFit
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.harness import CNN, Gpu, World
from tests.router.core.test_core import make_world

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.core.events import Dispatch
    from router.core.workers import Worker
    from router.policies import Choice, QueueView, Shed, WorkerView

OK, LATE, EXPIRED, INFEASIBLE = Status.OK, Status.LATE, Status.EXPIRED, Status.INFEASIBLE


def slower(profile: Profile, factor: int) -> Profile:
    """Return the same subnets on a device that is this many times slower."""
    subnets = tuple(
        dataclasses.replace(
            subnet,
            latency_ns=tuple(factor * ns for ns in subnet.latency_ns),
            latency_p99_ns=tuple(factor * ns for ns in subnet.latency_p99_ns),
        )
        for subnet in profile.subnets
    )
    return dataclasses.replace(profile, name="slow", subnets=subnets)


def test_dispatch_is_earliest_deadline_first() -> None:
    """Deadlines that arrive in any order leave in their own; the world checks each directive."""
    world = make_world()
    ids = world.submit(*[60 + (37 * k) % 101 for k in range(120)])
    world.run(300)

    order = [i for d in world.dispatches() for c, lo, hi in d.batch.stretches for i in c.deadlines_ns[lo:hi]]
    assert order == sorted(order)
    assert None not in world.statuses(ids)
    assert world.statuses(ids).count(OK) > 60


def test_what_cannot_be_met_is_infeasible_on_arrival() -> None:
    """Less slack than the smallest subnet needs alone is refused in the same step, with both figures."""
    world = make_world()
    hopeless, late, fine = world.submit(1.2, -5, 36)

    assert world.statuses([hopeless, late, fine]) == [INFEASIBLE, INFEASIBLE, None]
    assert "quickest answer takes" in world.answers["client", hopeless].reason


def test_what_becomes_hopeless_in_the_queue_is_infeasible_then() -> None:
    """Behind a worker that hangs a query is refused once no subnet can meet it, before its deadline."""
    world = make_world()
    world.processes["w0"].gpus[0].hang()
    world.submit(*[36.0] * 64)
    (query,) = world.submit(20)
    world.run(20)

    assert world.status(query) is INFEASIBLE
    assert world.answered_ns["client", query] < world.sent["client", query]


def test_without_workers_a_query_expires_at_its_deadline() -> None:
    """No worker is there: EXPIRED within a nanosecond of the deadline, with the reason."""
    world = World()
    (query,) = world.submit(10)
    world.run(50)

    assert world.status(query) is EXPIRED
    assert world.answered_ns["client", query] == world.sent["client", query] + 1
    assert "no worker is connected" in world.answers["client", query].reason


def test_nothing_is_sent_long_before_a_worker_is_free() -> None:
    """At most dispatch_ahead and the transport before the GPU is really free; then it does not idle."""
    world = make_world(2)
    early: list[int] = []

    def measure(dispatch: Dispatch, gpu: Gpu) -> None:
        worker: Worker = dispatch.batch.worker
        ahead_ns = world.core.settings.dispatch_ahead_ns + worker.transport.median_ns
        early.append(gpu.free_at_ns(world.now_ns, world.way_ns) - world.now_ns - ahead_ns)

    world.on_dispatch = measure
    for _ in range(40):
        world.submit(*[36.0] * 12)
        world.run(5)
    world.run(50)

    assert len(early) > 20
    assert max(early) <= MS // 2  # what the estimate of the way may be off


def test_a_head_too_tight_for_a_slow_gpu_goes_to_a_fast_one() -> None:
    """Of unequal GPUs the one that can meet the deadline gets the query, though the other is idle longer."""
    world = World()
    world.join("slow", slower(CNN, 8))
    world.run(1)
    world.join("fast", CNN)
    tight = world.submit_spaced(8, n=3, gap_ms=10)

    assert world.statuses(tight) == [OK] * 3
    assert {dispatch.peer for dispatch in world.dispatches()} == {"fast"}


def test_a_head_waits_for_the_fast_gpu_without_a_busy_loop() -> None:
    """While the fast GPU is busy and the slow one too slow, no wake is due at once."""
    world = World()
    world.join("slow", slower(CNN, 8))
    world.join("fast", CNN)
    ids = [i for _ in range(8) for i in world.submit(*[12.5] * 4)]
    world.run(100)

    assert None not in world.statuses(ids)
    assert world.statuses(ids).count(OK) >= 16


@pytest.mark.parametrize(("late_ns", "lead_ns"), [(0, 200_000), (700_000, 800_000), (3 * MS, 2 * MS)])
def test_a_router_decides_as_far_ahead_as_it_comes_late(late_ns: int, lead_ns: int) -> None:
    """A fifth of a millisecond where it is punctual; its lateness and a little; two milliseconds at most."""
    world = World()
    world.late_ns = late_ns
    world.join("w0", CNN)
    for _ in range(400):
        world.submit(*[200.0] * 24)  # so many that a queue waits for the GPU, whatever comes next
        world.run(8.0)

    worker = world.worker("w0")
    assert world.core.slack.decide_ns(worker) == worker.free_at_ns - worker.transport.median_ns - lead_ns


class Watcher(PlanFit):
    """Keeps what it is shown of the worker, decision by decision."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.seen: list[WorkerView] = []

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | Shed | None:
        """Keep a copy, and decide as PlanFit does."""
        self.seen.append(dataclasses.replace(worker))
        return super().choose(queue, worker, now_ns)


def test_a_policy_sees_the_turnaround_and_whether_it_is_pressed() -> None:
    """A head that the worst way leaves nothing, and the usual one enough, is asked about twice."""
    policy = Watcher(CNN)
    world = World(make_policy=lambda _: policy)
    world.join("w", CNN)
    for _ in range(40):
        world.submit(36.0)
        world.run(40)
    assert not any(view.is_pressed for view in policy.seen)
    assert policy.seen[-1].turnaround_ns == world.worker("w").transport.median_ns > 0
    policy.seen.clear()
    alone_ms = CNN.latency_p99_ns(0, 1) / MS
    (id_,) = world.submit(alone_ms + 0.8)
    world.run(40)
    calm, pressed = policy.seen
    assert not calm.is_pressed
    assert pressed.is_pressed
    assert pressed.allowance_ns < calm.allowance_ns
    assert world.status(id_) is OK
