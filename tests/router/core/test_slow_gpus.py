"""GPUs slower than their profile: once the router knows, it waits for them and promises what they keep."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from router.policies.demandfit import DemandFit
from router.policies.slackfit import SlackFit
from superserve.wire import Status
from tests.router.core.harness import CNN, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from profiles.table import Profile
    from router.policies import Policy

SLO_MS = 36.0
BEFORE_MS, MS_OF_LOAD = 1_500.0, 3_000.0


def poisson(world: World, rng: random.Random, *, rate_qps: float, duration_ms: float) -> list[int]:
    """Submit single queries at random instants; return their ids."""
    ids: list[int] = []
    end_ns = world.now_ns + int(duration_ms * 1e6)
    while world.now_ns < end_ns:
        world.run(rng.expovariate(rate_qps) * 1e3)
        ids += world.submit(SLO_MS)
    return ids


@pytest.mark.timeout(120)
@pytest.mark.parametrize("make_policy", [SlackFit, DemandFit])
@pytest.mark.parametrize("slower", [1.25, 1.5, 2.0])
def test_a_slow_cluster_is_late_with_nothing_once_it_is_known(
    make_policy: Callable[[Profile], Policy], slower: float
) -> None:
    """Two GPUs 1.25 to 2 times slower than their profile, at a rate that they can keep up with.

    After a second and a half at most 0.5 % of the answers are late, and 99 % of the queries are in time.
    """
    world = World(make_policy=make_policy)
    world.join("w0", CNN, CNN, speed=slower)
    rng = random.Random(5)
    poisson(world, rng, rate_qps=1_490 / slower, duration_ms=BEFORE_MS)
    ids = poisson(world, rng, rate_qps=1_490 / slower, duration_ms=MS_OF_LOAD)
    world.run(100)

    statuses = world.statuses(ids)
    assert statuses.count(Status.LATE) <= 0.005 * len(ids)
    assert statuses.count(Status.OK) >= 0.99 * len(ids)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("make_policy", [SlackFit, DemandFit])
def test_a_gpu_that_throttles_is_followed_within_some_ten_batches(
    make_policy: Callable[[Profile], Policy],
) -> None:
    """It becomes 1.5 times slower at once: of the second that follows a twentieth is late at most."""
    world = World(make_policy=make_policy)
    process = world.join("w0", CNN, CNN)
    rng = random.Random(6)
    poisson(world, rng, rate_qps=1_000, duration_ms=1_000)
    for gpu in process.gpus:
        gpu.factor = 1.5
    ids = poisson(world, rng, rate_qps=1_000, duration_ms=1_000)
    world.run(100)

    assert world.statuses(ids).count(Status.LATE) <= 0.05 * len(ids)
