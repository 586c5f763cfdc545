"""What the core does for policies that see demand, and only for them."""

from __future__ import annotations

import pytest

from router.core.lanes import LaneQueue
from router.policies.demandfit import DemandFit
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.harness import CNN, World


def test_only_policies_that_ask_are_shown_demand() -> None:
    """SlackFit's queue and view are what they were."""
    plain, seeing = World(), World(make_policy=DemandFit)
    for world in (plain, seeing):
        world.join("p", CNN)
    assert plain.core.model.demand is None
    assert not isinstance(plain.core.queue, LaneQueue)
    assert seeing.core.model.demand is not None
    assert isinstance(seeing.core.queue, LaneQueue)


def test_capacity_follows_the_workers() -> None:
    """Each GPU counts by its profile and slowdown; one that is gone or drains counts for nothing."""
    world = World(make_policy=DemandFit)
    world.join("quick", CNN, CNN)
    world.join("slow", CNN, speed=2.0)
    demand = world.core.model.demand
    assert demand is not None
    assert demand.capacity == pytest.approx(3 / CNN.unit_cost_ns)
    for _ in range(300):
        world.submit(*[60.0] * 30)
        world.run(8)
    assert demand.capacity == pytest.approx(2.5 / CNN.unit_cost_ns, rel=0.1)
    world.kill("quick", seen=True)
    assert demand.capacity == pytest.approx(0.5 / CNN.unit_cost_ns, rel=0.2)


def test_a_batch_passes_over_a_floor_that_it_does_not_reach() -> None:
    """Every third query asks for 78 %: the others share batches of a smaller subnet all the same."""
    world = World(make_policy=DemandFit)
    world.join("p", CNN)
    ids = []
    for _ in range(60):
        ids += world.submit(*[36.0] * 9, min_accuracy=[78.0, 0.0, 0.0] * 3)
        world.run(10)
    world.run(100)
    assert world.statuses(ids).count(Status.OK) > 0.99 * len(ids)
    small = [d.batch.n for d in world.dispatches() if d.batch.subnet < CNN.row("cnn-78.25")]
    assert sum(small) / len(small) > 4  # where a batch ended before each third query it would be 2


def test_what_waits_for_the_first_worker_keeps_its_terms() -> None:
    """Floors and classes of queries that came before any worker are known once one is there."""
    world = World(make_policy=DemandFit)
    ids = world.submit(
        *[200.0] * 6, min_accuracy=[0.0, 80.16, 0.0, 0.0, 99.0, 0.0], priority=[0, 0, 9, 0, 0, 0]
    )
    world.run(5)
    world.join("p", CNN)
    world.run(190)
    assert world.statuses(ids) == [Status.OK] * 4 + [Status.INVALID] + [Status.OK]
    assert all(
        d.batch.subnet == 5
        for d in world.dispatches()
        if any(lo <= 1 < hi for _, lo, hi in d.batch.stretches)
    )


def test_what_is_shed_is_told_why_at_once() -> None:
    """In overload the answer comes before the deadline, and says that too many wait."""
    world = World(make_policy=DemandFit)
    world.join("p", CNN)
    ids = []
    for _ in range(120):
        ids += world.submit(*[36.0] * 9)
        world.run(1)
    world.run(100)
    shed = [i for i in ids if world.status(i) is Status.OVERLOADED]
    assert len(shed) > len(ids) / 2
    for i in shed:
        assert world.answered_ns["client", i] < world.sent["client", i]
        assert "more queries wait than the smallest subnet serves" in world.answers["client", i].reason
    n_ok = world.statuses(ids).count(Status.OK)
    assert n_ok > 0.9 * 16 / (7.35 * MS) * 150 * MS * 0.9
