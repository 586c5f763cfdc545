"""RouterCore in seeded storms of deaths, hangs, late answers and cancels; every step is checked."""

from __future__ import annotations

import random

import pytest

from router.core.events import CoreSettings, DrainWorker
from router.policies.demandfit import DemandFit
from router.policies.planfit import PlanFit
from router.policies.slackfit import SlackFit
from superserve.clock import MS
from superserve.wire import Status
from tests.router.core.harness import CNN, World

STEPS = 60


def storm(seed: int) -> World:
    """Run one seeded storm to its end and return its world; the world asserts as it goes."""
    rng = random.Random(seed)
    settings = CoreSettings(max_queries=rng.choice([30, 300, 200_000]), max_bytes=rng.choice([800, 1 << 20]))
    of_demand: type[DemandFit] | type[PlanFit] = PlanFit if seed % 3 == 0 else DemandFit
    policy: type[SlackFit | DemandFit | PlanFit] = of_demand if rng.random() < 0.5 else SlackFit
    world = World(settings, make_policy=policy, way_ns=rng.choice([20_000, 200_000, 1_500_000]))
    n_processes = rng.randint(1, 4)
    for k in range(n_processes):
        world.join(f"p{k}", *[CNN] * rng.randint(1, 2), speed=rng.choice([0.8, 1.0, 1.0, 3.0]))
    ids: list[int] = []
    for _ in range(STEPS):
        _one_thing(world, rng, ids)
        world.run(rng.choice([0.01, 0.3, 1, 5, 5, 20, 150]))
    if not any(p.alive for p in world.processes.values()):
        world.join("last", CNN)
    world.run(2_500)
    return world


def _one_thing(world: World, rng: random.Random, ids: list[int]) -> None:
    what = rng.random()
    key = rng.choice(list(world.processes))
    process = world.processes[key]
    if what < 0.6 or not ids:
        slacks = [
            rng.choice([-1, 1, 3, 8, 20, 36, 36, 200]) + rng.random() for _ in range(rng.randint(1, 40))
        ]
        if rng.random() < 0.7:
            slacks = [slacks[0]] * len(slacks)
        floors = [rng.choice([0.0, 78.25, 80.16, 99.0]) for _ in slacks] if rng.random() < 0.2 else None
        classes = [rng.choice([0, 0, 1, 255]) for _ in slacks] if rng.random() < 0.2 else None
        ids += world.submit(*slacks, min_accuracy=floors, priority=classes)
    elif what < 0.68:
        world.cancel(*rng.sample(ids, min(len(ids), 5)))
    elif what < 0.74:
        again = sorted(set(rng.sample(ids, min(len(ids), 8))))
        again = [i for i in again if ("client", i) not in world.answers]
        if again:
            world.submit(*[30.0] * len(again), ids=again, resubmitted=True)
    elif what < 0.8 and process.alive:
        world.kill(key, seen=rng.random() < 0.5)
    elif what < 0.86 and not process.alive and key not in world.core.peers:
        world.join(key, *[g.profile for g in process.gpus])
    elif what < 0.9:
        gpu = rng.choice(process.gpus)
        gpu.factor = rng.choice([1.0, 6.0, 60.0])
    elif what < 0.93:
        rng.choice(process.gpus).hang()
    elif what < 0.95 and process.alive:
        rng.choice(process.gpus).statuses = rng.choice([None, Status.FAILED])
    elif what < 0.97 and key in world.core.peers:
        world.do(DrainWorker(key, rng.choice([None, 0])))


@pytest.mark.parametrize(
    "base", [pytest.param(base, marks=[pytest.mark.slow] * (base >= 60)) for base in range(0, 200, 20)]
)
def test_every_query_of_a_storm_is_answered_exactly_once(base: int) -> None:
    """Whatever dies, hangs or answers late, each query gets one answer, by its deadline if it never ran."""
    for seed in range(base, base + 20):
        try:
            world = storm(seed)
            assert world.answers.keys() == world.sent.keys()
            assert world.core.n_answered == world.core.received
            assert world.core.held_bytes == 0
            assert not world.core.ledger.batches
            assert len(world.core.queue) == world.core.in_flight == 0
            for query, answer in world.answers.items():
                if answer.status in (Status.EXPIRED, Status.INFEASIBLE):
                    late_ns = world.answered_ns[query] - max(world.sent[query], world.now_ns - 10**12)
                    assert late_ns <= 5 * MS or answer.cohort.message.resubmitted or answer.cohort.losses
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
