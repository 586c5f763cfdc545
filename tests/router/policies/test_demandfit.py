"""DemandFit: worked examples, and what holds for any demand, profile, queue and worker."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.table import load_profile
from router.policies import Choice, QueueView, Shed, WorkerView
from router.policies.demand import Demand
from router.policies.demandfit import DemandFit
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.router.core.random_profiles import profiles

if TYPE_CHECKING:
    from profiles.table import Profile

CNN = load_profile("cnn-8gpu-modelled")
IDLE = WorkerView(free_at_ns=0, allowance_ns=MS, slowdown=1.0)


def demand_of(rate_qps: float, *, slack_ms: float = 36, n_gpus: float = 8, profile: Profile = CNN) -> Demand:
    """Return a demand on this many GPUs of a profile."""
    return Demand(rate=rate_qps / 1e9, slack_ns=slack_ms * MS, capacity=n_gpus / profile.unit_cost_ns)


def chosen(
    slack_ms: float, length: int, demand: Demand, *, floor: int = 0, profile: Profile = CNN
) -> Choice | Shed | None:
    """Return the choice for an idle worker and a head with this slack left after the transport."""
    queue = QueueView(round((slack_ms + 1) * MS), floor, length, demand)
    return DemandFit(profile).choose(queue, IDLE, 0)


@pytest.mark.parametrize(
    ("rate_qps", "slack_ms", "length", "choice"),
    [
        # Hardly any demand: GPU time costs nothing, and one query gets the best subnet there is.
        (10, 30, 1, Choice(5, 1)),
        (10, 4, 1, Choice(4, 1)),  # 80.16 takes 4.779 ms at p99
        # 6,400 q/s leave 1.25 ms a query, between 78.25 (1.025) and 79.44 (1.469) in batches of 16. At the
        # set point, a quarter of 35 ms in the queue, the two are worth about the same.
        (6_400, 25, 56, Choice(4, 16)),
        (6_400, 25, 90, Choice(3, 16)),
        # An urgent head in the same cluster: a smaller batch of a good subnet, not a large one of a bad one.
        (6_400, 9.5, 56, Choice(3, 8)),
        (6_400, 9.5, 8, Choice(4, 4)),
        # A burst: need is four times what is served with care.
        (9_000, 25, 500, Choice(0, 16)),
    ],
)
def test_worked_examples(rate_qps: float, slack_ms: float, length: int, choice: Choice) -> None:
    """By hand, from the modelled profile's table."""
    assert chosen(slack_ms, length, demand_of(rate_qps)) == choice


def test_a_longer_queue_never_buys_a_dearer_query() -> None:
    """At 6,400 q/s, as the queue grows from full batches on, the time spent on a query falls."""
    costs = []
    for length in range(16, 400, 8):
        choice = chosen(24.5, length, demand_of(6_400))
        assert isinstance(choice, Choice)
        costs.append(CNN.latency_ns(choice.subnet, choice.batch_size) / choice.batch_size)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_a_feasible_head_with_a_floor_is_served_above_it() -> None:
    """Even at a price that no floor can pay: the promise comes first."""
    choice = chosen(25, 300, demand_of(14_000), floor=4)
    assert isinstance(choice, Choice)
    assert choice.subnet >= 4


def test_a_late_head_is_shed_only_in_overload() -> None:
    """At 40,000 q/s with 600 waiting, 2 ms of slack would cost the time of ten queries behind."""
    shed = chosen(2, 600, demand_of(40_000))
    # A full batch is 16 on 73.82, 7.571 ms; the worker begins at 0, and the way takes 1 ms.
    # Of what is more than a full batch for each GPU, 600 - 8 * 16, it would give up a quarter at a time.
    assert shed == Shed(before_ns=8_571_000, n=118)
    assert chosen(7.571, 600, demand_of(40_000)) == Choice(0, 16)
    assert isinstance(chosen(2, 200, demand_of(4_000)), Choice)
    assert isinstance(chosen(2, 100, demand_of(40_000)), Choice)


def test_lower_classes_give_way_before_the_head_is_late() -> None:
    """With half of its 35 ms left a head that outranks others sheds some of them; alone it is served."""
    for outranks in (True, False):
        queue = QueueView(18 * MS, 0, 600, demand_of(40_000), outranks)
        choice = DemandFit(CNN).choose(queue, IDLE, 0)
        assert choice == (Shed(before_ns=18 * MS + 1, n=118) if outranks else Choice(0, 16))


def test_slow_workers_are_given_what_they_can_do_in_time() -> None:
    """At 2.5 times the latency 25 ms are 10 ms of profiled time: no batch of 16 on 78.25, but one of 8."""
    policy, demand = DemandFit(CNN), demand_of(4_500, n_gpus=5.6)
    queue = QueueView(26 * MS, 0, 40, demand)
    assert policy.choose(queue, WorkerView(0, MS, 2.5), 0) == Choice(3, 8)


DEMANDS = st.builds(
    lambda rate, slack, gpus: Demand(rate=rate, slack_ns=slack, capacity=gpus),
    st.floats(0, 1e-2), st.floats(0, 1e9), st.floats(0, 1e-1),
)  # fmt: skip


@given(data=st.data(), profile=profiles(), demand=DEMANDS, slowdown=st.sampled_from([1.0, 0.3, 2.9]))
def test_what_is_chosen_fits_whatever_the_demand(
    data: st.DataObject, profile: Profile, demand: Demand, slowdown: float
) -> None:
    """The batch is in time, on a row at least the floor; a head that is feasible gets one or is shed."""
    ns = st.integers(0, 20_000)
    queue = QueueView(
        data.draw(st.integers(0, 80_000)),
        data.draw(st.integers(0, profile.n_subnets - 1)),
        data.draw(st.integers(1, 2_000)),
        demand,
    )
    worker = WorkerView(data.draw(ns), data.draw(st.integers(0, 500)), slowdown)
    now_ns = data.draw(ns)
    choice = DemandFit(profile).choose(queue, worker, now_ns)
    begin_ns = max(now_ns, worker.free_at_ns)
    if isinstance(choice, Choice):
        took_ns = math.floor(profile.latency_p99_ns(choice.subnet, choice.batch_size) * slowdown)
        assert begin_ns + took_ns + worker.allowance_ns <= queue.head_deadline_ns
        assert choice.subnet >= queue.head_floor
        assert choice.batch_size in profile.batch_sizes
    elif isinstance(choice, Shed):
        assert choice.before_ns > queue.head_deadline_ns
        assert choice.n >= 1
    else:
        slack_ns = queue.head_deadline_ns - begin_ns - worker.allowance_ns
        assert profile.latency_p99_ns(queue.head_floor, 1) > math.floor(slack_ns / slowdown)


def test_it_takes_no_argument() -> None:
    """There is nothing to set."""
    with pytest.raises(ConfigError, match="demandfit: expected no argument, got '3'"):
        DemandFit(CNN, "3")
