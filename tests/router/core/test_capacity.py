"""The capacity that a policy of demand counts on, seen in what it chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.core.events import DrainWorker
from router.policies.demandfit import DemandFit
from superserve.wire import Status
from tests.router.core.books import sent
from tests.router.core.harness import CNN, World

if TYPE_CHECKING:
    from tests.router.core.books import Sent


def served(world: World, n_messages: int) -> list[int]:
    """Return the ids of nine queries every four milliseconds."""
    ids = []
    for _ in range(n_messages):
        ids += world.submit(*[36.0] * 9)
        world.run(4)
    return ids


def test_gpus_that_drain_are_not_counted_on() -> None:
    """With half of four GPUs draining the others serve all in time, on smaller subnets than four would."""
    world = World(make_policy=DemandFit)
    world.join("p", CNN, CNN, CNN, CNN)
    served(world, 50)
    before = sent(world)[-10:]
    for slot in (0, 1):
        world.do(DrainWorker("p", slot))
    world.run(150)
    ids = served(world, 200)
    world.run(50)

    assert world.statuses(ids).count(Status.OK) > 0.99 * len(ids)
    assert {batch.slot for batch in sent(world)[-50:]} == {2, 3}
    assert mean_row(sent(world)[-50:]) < mean_row(before) - 1


def mean_row(batches: list[Sent]) -> float:
    """Return the mean row of the profile over batches."""
    return sum(batch.subnet for batch in batches) / len(batches)
