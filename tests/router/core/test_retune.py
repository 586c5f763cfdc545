"""Other settings for a core that serves: what waits is not lost, and a policy that fails changes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from router.core.events import CoreSettings, Retuned
from router.core.lanes import LaneQueue
from router.policies.registry import make_policy
from router.policies.slackfit import SlackFit
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Status
from tests.router.core.harness import CNN, World

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.policies import Choice, Policy, QueueView, WorkerView


def retuned(policy: str, **settings: int) -> Retuned:
    """Return an event with a shipped policy and some other settings."""
    return Retuned(policy, partial(make_policy, policy), replace(CoreSettings(), **settings))


def in_force(world: World) -> set[str]:
    """Return the policies of all GPUs."""
    return {worker.policy.name for worker in world.core.workers()}


@pytest.mark.parametrize("begin", ["slackfit", "planfit"])
@pytest.mark.parametrize("then", ["maxacc", "planfit", "demandfit", "slackfit"])
def test_a_policy_is_replaced_with_queries_in_every_state(begin: str, then: str) -> None:
    """Of floors and classes too, waiting and in flight: each is answered once, as the world asserts."""
    world = World(make_policy=partial(make_policy, begin))
    world.join("w0", CNN, CNN)
    ids: list[int] = []
    for _ in range(3):
        ids += world.submit(*[400.0] * 40, priority=[0, 1] * 20)
        ids += world.submit(*[400.0] * 4, min_accuracy=[78.0] * 4)
        world.run(1)
    assert len(world.core.queue) > 20
    waiting = len(world.core.queue)

    world.do(retuned(then))

    assert in_force(world) == {then}
    sees = then in ("planfit", "demandfit")
    assert isinstance(world.core.queue, LaneQueue) == sees
    assert (world.core.model.demand is not None) == sees
    assert len(world.core.queue) + world.core.in_flight >= waiting
    ids += world.submit(*[400.0] * 40)
    world.run(500)
    assert set(world.statuses(ids)) == {Status.OK}


def test_a_worker_that_joins_later_is_given_the_policy_in_force() -> None:
    """And a core that no worker has joined yet takes another one too."""
    world = World()
    world.do(retuned("maxacc"))
    world.join("w0", CNN)
    assert in_force(world) == {"maxacc"}
    world.do(retuned("planfit"))
    world.join("w1", CNN)
    assert in_force(world) == {"planfit"}


def test_bounds_hold_for_what_arrives_from_now_on() -> None:
    """A lower one refuses, a higher one admits again; what waits stays."""
    world = World()
    first = world.submit(*[900.0] * 10)
    world.do(retuned("slackfit", max_queries=12))
    second = world.submit(*[900.0] * 5)
    assert world.statuses(second) == [None, None, *[Status.OVERLOADED] * 3]
    world.do(retuned("slackfit", max_queries=1_000, max_bytes=150))
    (third,) = world.submit(900.0, payload=b"x" * 100)
    assert world.status(third) == Status.OVERLOADED
    world.join("w0", CNN)
    world.run(500)
    assert world.statuses([*first, *second[:2]]) == [Status.OK] * 12


def test_a_margin_is_that_of_the_next_decision() -> None:
    """Slack that is not held back any more buys accuracy."""
    world = World(CoreSettings().with_margin(12 * MS))
    world.join("w0", CNN)
    chosen = []
    for margin_ns in (12 * MS, 0):
        world.do(Retuned("slackfit", partial(make_policy, "slackfit"), CoreSettings().with_margin(margin_ns)))
        world.submit(30)
        world.run(100)
        chosen.append(world.dispatches()[-1].batch.subnet)
    assert chosen[0] < chosen[1]


def test_what_cannot_be_built_changes_nothing() -> None:
    """The core serves on with the policy and the bounds that it had."""

    def refuse(_profile: Profile) -> Policy:
        raise ConfigError("it has no such subnet")

    world = World(make_policy=partial(make_policy, "planfit"))
    world.join("w0", CNN)
    ids = world.submit(*[200.0] * 20)
    before = world.core.settings
    with pytest.raises(ConfigError, match="no such subnet"):
        world.do(Retuned("fixed:x", refuse, replace(before, max_queries=1)))
    assert (in_force(world), world.core.settings) == ({"planfit"}, before)
    world.run(300)
    assert set(world.statuses(ids)) == {Status.OK}


def test_a_policy_sees_nothing_of_what_an_earlier_one_asked_for() -> None:
    """Demand is no longer counted, so what the earlier one was shown of it is old."""
    seen = []

    class Plain(SlackFit):
        def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | None:
            seen.append(queue.demand)
            return super().choose(queue, worker, now_ns)

    world = World(make_policy=partial(make_policy, "planfit"))
    world.join("w0", CNN)
    world.submit(*[200.0] * 20)
    world.run(300)
    world.do(Retuned("plain", Plain, CoreSettings()))
    world.submit(*[200.0] * 20)
    world.run(300)
    assert set(seen) == {None}


def test_what_waits_tells_a_policy_that_sees_demand_how_patient_queries_are() -> None:
    """A policy that took them for impatient would refuse them as late before the next ones come."""
    world = World(make_policy=partial(make_policy, "slackfit"))
    world.join("w0", CNN)
    ids = world.submit(*[400.0] * 200)
    world.run(1)
    world.do(retuned("planfit"))
    demand = world.core.model.demand
    assert demand is not None
    while not demand.slack_ns:
        world.run(1)
    assert demand.slack_ns == pytest.approx(400 * MS)
    world.run(500)
    assert set(world.statuses(ids)) == {Status.OK}
