"""PlanFit: worked examples, properties of every choice, and what its plan promises."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from profiles.table import Profile, SubnetProfile, load_profile
from router.policies import Choice, QueueView, Shed, WorkerView
from router.policies.demand import Demand
from router.policies.due import UNIT, Due, weights_of
from router.policies.planfit import _SLOP, PlanFit
from router.policies.supply import FULL, GpuPace, Supply
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Status
from tests.router.core.books import numbers
from tests.router.core.harness import World
from tests.router.core.random_profiles import profiles
from tests.router.policies.test_due import Terms

CNN = load_profile("cnn-8gpu-modelled")
BEST = CNN.n_subnets - 1
NOW_NS = 5_000 * MS
WAY_NS = MS


def supply_of(n_gpus: int, patience_ns: float, profile: Profile = CNN, slowdown: float = 1.0) -> Supply:
    """Return the supply of so many GPUs, all idle."""
    supply = Supply()
    supply.limit_ns = FULL * patience_ns
    paces = [GpuPace() for _ in range(n_gpus)]
    for pace in paces:
        pace.set(profile, slowdown, supply.limit_ns)
    supply.restate(paces)
    return supply


def demand_of(rate_qps: float, slack_ms: float = 36.0, *, spike: int = 0) -> Demand:
    """Return a demand that has had this rate for a second, and a spike a patience or two ago."""
    demand = Demand()
    at_ns, step_ns = NOW_NS - 1_000 * MS, 2 * MS
    n = max(1, round(rate_qps * step_ns / 1e9))
    slack_ns = round(slack_ms * MS)
    while at_ns < NOW_NS:
        demand.arrived([slack_ns] * n, at_ns)
        demand.settle(at_ns)
        at_ns += step_ns
        if spike and NOW_NS - at_ns == 200 * MS:
            demand.arrived([slack_ns] * spike, at_ns)
    demand.settle(NOW_NS)
    demand.surge.advance(NOW_NS)
    return demand


def view_of(
    slacks_ms: list[float], demand: Demand, supply: Supply, *, floors: list[int] | None = None
) -> QueueView:
    """Return a queue whose queries have so much slack left after the way."""
    due = Due(weights_of(CNN.least_costs_ns()))
    deadlines_ns = [NOW_NS + WAY_NS + round(slack * MS) for slack in slacks_ms]
    due.add(Terms(deadlines_ns, floors), 0, len(slacks_ms))
    head = min(range(len(slacks_ms)), key=deadlines_ns.__getitem__)
    floor = floors[head] if floors else 0
    return QueueView(deadlines_ns[head], floor, len(slacks_ms), demand, False, due, supply)


def idle(doubt: float = 1.0, slowdown: float = 1.0) -> WorkerView:
    """Return a worker that can begin now."""
    return WorkerView(NOW_NS, WAY_NS, slowdown, doubt)


def chosen(queue: QueueView, worker: WorkerView | None = None) -> Choice | Shed | None:
    """Return what is chosen now."""
    return PlanFit(CNN).choose(queue, worker or idle(), NOW_NS)


# --- what each rule does ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 8])
def test_an_idle_cluster_serves_the_most_accurate_subnet_that_fits(length: int) -> None:
    """Time costs nothing where there is plenty: all slack goes into accuracy, down to the tightest head."""
    for slack_ms in (34.0, 20.0, 9.0, 5.0, 4.0, 2.5):
        queue = view_of([slack_ms] * length, demand_of(50), supply_of(8, 35 * MS))
        choice = chosen(queue)
        assert isinstance(choice, Choice)
        if length == 1:
            assert choice.subnet == CNN.most_accurate(1, round(slack_ms * MS))
        assert choice.subnet >= (BEST if slack_ms >= 9 else 0)


def test_a_longer_queue_is_served_on_smaller_subnets() -> None:
    """At one rate, from a short queue to one that only the smallest subnet serves in time."""
    rows = []
    for length in (16, 60, 120, 240, 360, 480):
        choice = chosen(view_of([30.0] * length, demand_of(3_000), supply_of(8, 35 * MS)))
        assert isinstance(choice, Choice)
        rows.append(choice.subnet)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] >= 4
    assert rows[-1] == 0


def test_a_batch_leaves_the_rest_of_the_queue_its_time() -> None:
    """One GPU, 32 queries due in 20 ms: 16 of them must end within 20 - 7.571 ms."""
    choice = chosen(view_of([20.0] * 32, demand_of(10), supply_of(1, 35 * MS)))
    assert isinstance(choice, Choice)
    assert CNN.latency_p99_ns(choice.subnet, choice.batch_size) <= round(12.429 * MS)
    # Without the second half the same batch may be as long as the slack.
    alone = chosen(view_of([20.0] * 8, demand_of(10), supply_of(1, 35 * MS)))
    assert isinstance(alone, Choice)
    assert CNN.latency_p99_ns(alone.subnet, 8) > round(12.429 * MS)


def test_other_gpus_serve_what_one_leaves() -> None:
    """The same queue on eight GPUs: the others have time for the rest, so that this batch may be long."""
    queue = view_of([20.0] * 32, demand_of(10), supply_of(8, 35 * MS))
    choice = chosen(queue)
    assert isinstance(choice, Choice)
    assert choice.subnet > 2
    # All of them busy until the deadline: as if this one were alone.
    assert queue.supply is not None
    busy = supply_of(1, 35 * MS)
    others = [GpuPace() for _ in range(7)]
    for pace in others:
        pace.set(CNN, 1.0, busy.limit_ns)
        busy.note(pace, NOW_NS + 21 * MS)
    busy.rate *= 8
    choice = chosen(view_of([20.0] * 32, demand_of(10), busy))
    assert isinstance(choice, Choice)
    assert CNN.latency_p99_ns(choice.subnet, choice.batch_size) <= round(12.429 * MS)


def test_a_surge_that_was_seen_finds_room() -> None:
    """After a spike of 400 on eight GPUs no batch is so long that the next one would not fit."""
    calm = chosen(view_of([34.0] * 16, demand_of(300), supply_of(8, 35 * MS)))
    warned = chosen(view_of([34.0] * 16, demand_of(300, spike=400), supply_of(8, 35 * MS)))
    assert isinstance(calm, Choice)
    assert isinstance(warned, Choice)
    takes_ns = [CNN.latency_p99_ns(one.subnet, one.batch_size) for one in (calm, warned)]
    assert takes_ns[1] < 0.6 * takes_ns[0]


def test_what_came_at_once_may_grow_by_a_fifth() -> None:
    """After 300 at once a GPU takes 12.8 ms; if they were to grow by 0.6 it would take 7.8 ms."""
    choice = chosen(view_of([34.0] * 16, demand_of(300, spike=300), supply_of(8, 35 * MS)))
    assert isinstance(choice, Choice)
    assert 7.9 * MS < CNN.latency_p99_ns(choice.subnet, choice.batch_size) <= 12.8 * MS


def test_a_gpu_that_was_never_measured_gets_short_batches() -> None:
    """It may be 2.5 times slower than its profile: its batch would still be in time then."""
    queue = view_of([30.0] * 8, demand_of(300), supply_of(8, 35 * MS))
    for doubt in (2.5, 1.54):
        choice = chosen(queue, idle(doubt))
        assert isinstance(choice, Choice)
        assert doubt * CNN.latency_p99_ns(choice.subnet, choice.batch_size) <= 30 * MS
    trusted = chosen(queue)
    assert isinstance(trusted, Choice)
    assert CNN.latency_p99_ns(trusted.subnet, trusted.batch_size) > 12 * MS


def test_doubt_does_not_refuse_what_fits() -> None:
    """A head that only the smallest subnet can answer is served on it, measured or not."""
    queue = view_of([1.6], demand_of(300), supply_of(8, 35 * MS))
    assert chosen(queue, idle(2.5)) == Choice(0, 1)
    # Nor does it make batches of two, which end in 2 ms: four take 2.7 of the 5 ms that there are.
    queue = view_of([5.0] * 4, demand_of(8_000), supply_of(8, 35 * MS))
    assert chosen(queue, idle(2.5)) == Choice(0, 4)


def test_a_head_with_a_floor_takes_those_of_such_floors_along() -> None:
    """Where the price buys row 1 and the head asks for 5: those above 1 first, as many as there are."""
    n = 240
    floors = [BEST if i % 8 == 0 else 0 for i in range(n)]
    queue = view_of([25.0] * n, demand_of(6_000), supply_of(8, 35 * MS), floors=floors)
    choice = chosen(queue)
    assert isinstance(choice, Choice)
    assert choice.subnet == BEST
    assert choice.first_above is not None
    assert choice.first_above < BEST
    # A head without a floor in the same queue is served by deadline.
    floors[0] = 0
    queue = view_of([24.9, *[25.0] * (n - 1)], demand_of(6_000), supply_of(8, 35 * MS), floors=floors)
    choice = chosen(queue)
    assert isinstance(choice, Choice)
    assert choice.first_above is None
    assert choice.subnet < BEST


def test_few_late_queries_are_no_overload() -> None:
    """Three are due in 2.9 ms, ten in 20, and the rate looks high: the smallest subnet still serves all."""
    demand = demand_of(10)
    demand.arrived([16 * MS] * 60, NOW_NS)
    demand.settle(NOW_NS + MS)
    queue = view_of([2.9] * 3 + [24.0] * 10, demand, supply_of(1, 9 * MS))
    assert isinstance(chosen(queue), Choice)
    # A hundred more are an overload: not even the smallest subnet serves them.
    queue = view_of([2.9] * 3 + [24.0] * 110, demand, supply_of(1, 9 * MS))
    assert isinstance(chosen(queue), Shed)


def test_a_lone_spike_has_the_time_that_its_slack_allows() -> None:
    """16 come each 40 ms on one GPU, as often before: 18.5 ms are enough for a batch of 16.9."""
    demand = Demand()
    for at_ns in range(NOW_NS - 2_400 * MS, NOW_NS + 1, MS):
        if (NOW_NS - at_ns) % (40 * MS) == 0:
            demand.arrived([20 * MS] * 16, at_ns)
        if at_ns < NOW_NS:
            demand.settle(at_ns)

    choice = chosen(view_of([18.5] * 16, demand, supply_of(1, 18.5 * MS)))

    assert choice == Choice(3, 16)


@pytest.mark.parametrize(("short_ms", "kind"), [(60, Shed), (8, Choice)])
def test_heads_are_let_go_only_if_those_that_follow_have_more_time(short_ms: int, kind: type) -> None:
    """In 2 ms there is time for two. Of 60 ms such a head has grown old; of 8 all are soon like it."""
    demand = demand_of(300, 60.0)
    demand.arrived([short_ms * MS] * 20, NOW_NS)
    demand.settle(NOW_NS + MS)

    queue = view_of([2.0] * 4 + [30.0] * 60, demand, supply_of(8, 35 * MS))

    assert isinstance(chosen(queue, idle(4.0)), kind)
    assert isinstance(chosen(queue, idle(3.0)), Choice)


def test_while_queries_are_let_go_no_time_is_spent_on_accuracy() -> None:
    """For a patience after a shed the smallest subnet serves, though the queue alone would pay for more."""
    policy, demand = PlanFit(CNN), demand_of(300)
    calm = view_of([30.0] * 16, demand, supply_of(8, 35 * MS))
    jam = view_of([3.0] * 3 + [24.0] * 600, demand, supply_of(8, 35 * MS))

    def row(after_ms: int) -> int:
        worker = WorkerView(NOW_NS + after_ms * MS, WAY_NS, 1.0, 1.0)
        later = replace(calm, head_deadline_ns=calm.head_deadline_ns + after_ms * MS)
        choice = policy.choose(later, worker, NOW_NS + after_ms * MS)
        assert isinstance(choice, Choice)
        return choice.subnet

    assert row(0) > 0
    assert isinstance(policy.choose(jam, idle(), NOW_NS), Shed)
    assert [row(after_ms) > 0 for after_ms in (0, 30, 40)] == [False, False, True]


@pytest.mark.parametrize(("short_ms", "kind"), [(8, Choice), (200, Shed)])
def test_a_short_query_that_has_just_come_is_not_late(short_ms: int, kind: type) -> None:
    """In overload 6 ms fit no full batch. Of 8 ms that is nearly all; of 200 it is a head that has waited."""
    demand = demand_of(8_000)
    demand.arrived([short_ms * MS] * 200, NOW_NS)
    demand.settle(NOW_NS + MS)

    queue = view_of([6.0] * 40 + [30.0] * 600, demand, supply_of(8, 35 * MS))

    assert isinstance(chosen(queue), kind)


@pytest.mark.parametrize(("n", "kind"), [(300, Choice), (365, Shed)])
def test_in_overload_a_plan_that_just_holds_is_not_trusted(n: int, kind: type) -> None:
    """Three are late for a full batch; 300 or 365 are due in 24 ms, of 380 that eight GPUs serve at best."""
    demand = demand_of(10)
    demand.arrived([36 * MS] * 3_000, NOW_NS - MS)
    demand.settle(NOW_NS + MS)
    assert isinstance(chosen(view_of([2.9] * 3 + [24.0] * n, demand, supply_of(8, 35 * MS))), kind)


def test_a_spike_that_is_too_large_is_served_while_batches_are_nearly_full() -> None:
    """140 are due in 6 ms, less than a full batch takes: eight go, since few are left to serve."""
    spike = demand_of(10, spike=600)
    spike.arrived([36 * MS] * 600, NOW_NS - 2 * MS)
    spike.settle(NOW_NS)
    assert chosen(view_of([6.0] * 140, spike, supply_of(8, 35 * MS))) == Choice(0, 8)
    # In time for one or two only: refused. And so are all that are late where enough others wait.
    late = chosen(view_of([2.2] * 140 + [20.0] * 40, spike, supply_of(8, 35 * MS)))
    assert isinstance(late, Shed)
    assert late.before_ns == NOW_NS + WAY_NS + CNN.latency_p99_ns(0, 4)
    queued = chosen(view_of([6.0] * 140 + [30.0] * 900, spike, supply_of(8, 35 * MS)))
    assert isinstance(queued, Shed)
    assert queued.before_ns == NOW_NS + WAY_NS + CNN.latency_p99_ns(0, 16)


def budget_ns(queue: QueueView) -> float:
    """Return the GPU time that the price counts on for a query."""
    policy = PlanFit(CNN)
    policy.choose(queue, idle(), NOW_NS)
    return policy._outlook.budget_ns


@pytest.mark.parametrize(("share", "is_longer"), [(0.6, True), (0.69, True), (0.95, False)])
def test_the_queue_may_grow_further_where_no_overload_is_near(share: float, is_longer: bool) -> None:
    """At 60 % of what eight GPUs serve the price asks for less than without; at 95 % for as much."""
    supply = supply_of(8, 35 * MS)
    queue = view_of([24.0] * 20, demand_of(share * supply.rate * 1e9), supply)

    with_growth = budget_ns(queue)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.policies.planfit._PATIENT", 0.0)
        assert (with_growth > 1.02 * budget_ns(queue)) is is_longer


def test_after_a_pause_less_is_asked_for() -> None:
    """Nothing came for 5 ms: what waits gets the time that more would have taken."""
    supply, found = supply_of(8, 35 * MS), []
    for pause_ms in (0, 5):
        demand = Demand()
        for i in range(2_000):
            demand.arrived([36 * MS] * 4, NOW_NS - (2_000 - i) * MS // 2 - pause_ms * MS)
            demand.settle(NOW_NS - (2_000 - i) * MS // 2 - pause_ms * MS)
        demand.settle(NOW_NS)
        found.append(budget_ns(view_of([24.0] * 20, demand, supply)))

    assert found[1] > 1.5 * found[0]


# --- ways that take long ----------------------------------------------------------------------


def test_a_batch_is_no_shorter_than_its_turnaround() -> None:
    """Where 8 ms pass until the next batch comes, eight queries occupy the GPU for as long as sixteen."""
    queue = view_of([12.0] * 16, demand_of(2_000), supply_of(2, 35 * MS))
    assert chosen(queue) == Choice(2, 8)
    assert chosen(queue, replace(idle(), turnaround_ns=8 * MS)) == Choice(0, 16)


def test_many_gpus_too_fill_a_turnaround() -> None:
    """Three queries on eight GPUs: two of them are cheaper in 3 ms, but not where the third waits for 8."""
    queue = view_of([14.0] * 3, demand_of(9_000), supply_of(8, 35 * MS))
    assert chosen(queue) == Choice(3, 2)
    assert chosen(queue, replace(idle(), turnaround_ns=8 * MS)) == Choice(2, 4)


def test_a_long_turnaround_leaves_the_others_less() -> None:
    """150 are due in 14 ms. Seven others serve nearly all, but not if each idles for 7 ms of them."""
    queue = view_of([14.0] * 150, demand_of(10), supply_of(8, 35 * MS))
    assert chosen(queue) == Choice(2, 16)
    assert chosen(queue, replace(idle(), turnaround_ns=7 * MS)) == Choice(0, 16)


def test_a_pressed_batch_is_as_short_as_can_be() -> None:
    """Nothing fits the slack with the worst way: 4.8 ms with the usual one are not for accuracy."""
    queue = view_of([4.8], demand_of(50), supply_of(8, 35 * MS))
    assert chosen(queue) == Choice(BEST, 1)
    assert chosen(queue, replace(idle(), is_pressed=True)) == Choice(0, 1)


def test_idle_gaps_make_time_dearer() -> None:
    """GPUs that idle for 3 ms between batches serve 30 % less, and so does the price say."""
    rows, units_ns = [], []
    for gap_ms in (0, 3):
        supply = supply_of(8, 35 * MS)
        for _ in range(3_000):
            supply.idled(gap_ms * MS, 8 * MS)
        policy = PlanFit(CNN)
        choice = policy.choose(view_of([30.0] * 120, demand_of(6_000), supply), idle(), NOW_NS)
        assert isinstance(choice, Choice)
        rows.append(choice.subnet)
        units_ns.append(policy._outlook.unit_ns)
    assert rows[1] < rows[0]
    assert units_ns[1] - units_ns[0] == pytest.approx(3 * MS / 16, rel=0.01)


def test_what_comes_behind_a_batch_may_begin_late() -> None:
    """Six are due in 5 ms: four and then two take 4.54 ms, if the two begin in time; all at once 4.31."""
    assert chosen(view_of([5.0] * 6, demand_of(10), supply_of(1, 13 * MS))) == Choice(0, 8)
    assert chosen(view_of([5.0] * 4, demand_of(10), supply_of(1, 13 * MS))) == Choice(2, 4)


def test_a_head_is_not_refused_for_the_sake_of_none() -> None:
    """140 are due in 1.9 ms and nothing behind them: their time serves two of them, and no others."""
    spike = demand_of(10, spike=600)
    spike.arrived([36 * MS] * 600, NOW_NS - 2 * MS)
    spike.settle(NOW_NS)
    assert chosen(view_of([1.9] * 140, spike, supply_of(8, 35 * MS))) == Choice(0, 2)
    behind = view_of([1.9] * 140 + [20.0] * 40, spike, supply_of(8, 35 * MS))
    assert isinstance(chosen(behind), Shed)


def test_without_demand_a_worker_plans_as_if_it_were_alone() -> None:
    """It knows its own queue and slack: one query gets the best subnet, many the smallest."""
    for length, choice in ((1, Choice(BEST, 1)), (400, Choice(0, 16))):
        queue = QueueView(NOW_NS + 31 * MS, 0, length, None)
        assert chosen(queue) == choice


def test_it_takes_no_argument() -> None:
    """There is nothing to set."""
    with pytest.raises(ConfigError, match="planfit: expected no argument, got '3'"):
        PlanFit(CNN, "3")


# --- whatever it sees -------------------------------------------------------------------------


@st.composite
def situations(draw: st.DrawFn) -> tuple[Profile, QueueView, WorkerView, int]:
    """Draw a profile, a queue with demand, due and supply, a worker and an instant."""
    profile = draw(profiles())
    now_ns = draw(st.integers(0, 20_000))
    deadlines_ns = draw(st.lists(st.integers(0, 80_000), min_size=1, max_size=12))
    floors = draw(st.lists(st.integers(0, profile.n_subnets - 1), min_size=12, max_size=12))
    copies = draw(st.sampled_from([1, 1, 5, 60]))
    due = Due(weights_of(profile.least_costs_ns()))
    for _ in range(copies):
        due.add(Terms(deadlines_ns, floors), 0, len(deadlines_ns))
    head = min(range(len(deadlines_ns)), key=deadlines_ns.__getitem__)
    demand = Demand(rate=draw(st.floats(0, 1e-2)), slack_ns=draw(st.floats(0, 1e9)))
    for n in draw(st.lists(st.integers(1, 50), max_size=3)):
        demand.arrived([draw(st.integers(-5, 10**8))] * n, now_ns)
    demand.settle(now_ns)
    slowdown = draw(st.sampled_from([1.0, 0.3, 2.9]))
    supply = supply_of(draw(st.integers(0, 4)), draw(st.floats(0, 1e6)), profile, slowdown)
    for until_ns in draw(st.lists(st.integers(0, 60_000), max_size=3)):
        pace = GpuPace()
        pace.set(profile, 1.0, supply.limit_ns)
        supply.note(pace, until_ns)
    view = QueueView(
        deadlines_ns[head], floors[head], copies * len(deadlines_ns), demand, draw(st.booleans()), due, supply
    )
    worker = WorkerView(
        draw(st.integers(0, 20_000)), draw(st.integers(0, 500)), slowdown, draw(st.floats(1.0, 2.5))
    )
    return profile, view, worker, now_ns


@given(situation=situations())
def test_what_is_chosen_fits_whatever_the_outlook(
    situation: tuple[Profile, QueueView, WorkerView, int],
) -> None:
    """In time at p99 on this worker, from the head's floor up, in a profiled size; what fits is served."""
    profile, queue, worker, now_ns = situation

    choice = PlanFit(profile).choose(queue, worker, now_ns)

    begin_ns = max(now_ns, worker.free_at_ns)
    slack_ns = queue.head_deadline_ns - begin_ns - worker.allowance_ns
    if isinstance(choice, Choice):
        took_ns = math.floor(profile.latency_p99_ns(choice.subnet, choice.batch_size) * worker.slowdown)
        assert took_ns <= slack_ns
        assert queue.head_floor <= choice.subnet < profile.n_subnets
        assert choice.batch_size in profile.batch_sizes
        assert choice.first_above is None or 0 <= choice.first_above <= choice.subnet
        assert type(choice.subnet) is type(choice.batch_size) is int
    elif isinstance(choice, Shed):
        assert choice.before_ns > queue.head_deadline_ns
        assert choice.n >= 1
        assert type(choice.before_ns) is type(choice.n) is int
    else:
        assert profile.latency_p99_ns(queue.head_floor, 1) > math.floor(slack_ns / worker.slowdown)


UNEVEN = Profile(
    "uneven", "none", "none", "modelled", "", {}, "2026-01-02", (1, 2),
    (
        SubnetProfile("s0", None, 50.0, None, (200, 1_100), (200, 1_100)),
        SubnetProfile("s1", None, 51.0, None, (600, 1_900), (600, 1_900)),
    ),
)  # fmt: skip
"""A profile on which two queries together cost more than one after the other."""
STEEP = replace(
    UNEVEN, batch_sizes=(1, 2, 3), subnets=(SubnetProfile("s0", None, 50.0, None, (1, 2, 11), (1, 2, 11)),)
)
"""Three together cost far more than two and one."""


@example(profile=UNEVEN, length=4, slack=1.84, floor=0)
@example(profile=STEEP, length=9, slack=2.3, floor=0)
@given(profile=profiles(), length=st.integers(1, 40), slack=st.floats(0.2, 4.0), floor=st.integers(0, 5))
def test_no_batch_is_worth_more(profile: Profile, length: int, slack: float, floor: int) -> None:
    """Alone, without a limit but the plan: no size and row on the hull that keep it are worth more."""
    policy, floor = PlanFit(profile), min(floor, profile.n_subnets - 1)
    slack_ns = round(slack * profile.latency_p99_ns(profile.n_subnets - 1, profile.max_batch_size))
    queue = QueueView(slack_ns, floor, length)
    choice = policy.choose(queue, WorkerView(0, 0, 1.0), 0)
    limit_ns = min(0.75 * slack_ns, 1.25 * slack_ns)
    limit = max(0, sum(one <= limit_ns for one in policy.limits_ns) - 1)
    price = policy.prices[limit].at(slack_ns / length)
    full = profile.largest_batch(0, slack_ns // 2) or policy.sizes[0].size

    def worth(size: int, row: int) -> float:
        n = min(size, length)
        takes_ns = profile.latency_p99_ns(row, size)
        takes_ns += (length - n) // full * profile.latency_p99_ns(0, full)
        rest = (length - n) % full
        takes_ns += profile.latency_p99_ns(0, rest) if rest else 0
        # What comes behind the batch may begin late.
        slop_ns = _SLOP * profile.latency_p99_ns(0, full) if length > n else 0.0
        if takes_ns + slop_ns > slack_ns:
            return -math.inf
        return profile.subnets[row].accuracy - price / n * profile.latency_ns(row, size)

    best = -math.inf
    for one in policy.sizes:
        fit = [row for row in range(profile.n_subnets) if worth(one.size, row) > -math.inf]
        # Of those that lie below the hull only the last that fits is looked at.
        best = max([best, *[worth(one.size, row) for row in fit if row in one.hull or row == fit[-1]]])
    if isinstance(choice, Choice) and choice.first_above is None and best > -math.inf:
        found = worth(choice.batch_size, choice.subnet)
        assert found == pytest.approx(best, rel=1e-6, abs=1e-6)


# --- the plan's promise -----------------------------------------------------------------------

SMALLEST_MS = [CNN.latency_p99_ns(0, n) / MS for n in range(1, 17)]
ERROR_MS = 4.3
"""How much earlier all must be due for the plan to count on it: two of its buckets of 2.1 ms."""


def can_be_served(n_gpus: int, slacks_ms: list[float]) -> bool:
    """Return whether any batches of the smallest subnet, in order of deadline, meet every deadline."""
    due_ms = sorted(slacks_ms)

    @lru_cache(None)
    def rest(i: int, free_ms: tuple[float, ...]) -> bool:
        if i == len(due_ms):
            return True
        for size in CNN.batch_sizes:
            n = min(size, len(due_ms) - i)
            end_ms = free_ms[0] + SMALLEST_MS[n - 1]
            if end_ms <= due_ms[i] and rest(i + n, tuple(sorted((*free_ms[1:], end_ms)))):
                return True
        return False

    return rest(0, (0.0,) * n_gpus)


def attained(n_gpus: int, slacks_ms: list[float]) -> tuple[int, float]:
    """Return how many queries that arrive together PlanFit answers in time, and their mean row.

    Through the core, with exact timings: messages take no time, GPUs are measured and as profiled.
    """
    world = World(numbers(margin_ns=0), make_policy=PlanFit, way_ns=0)
    world.join("w", *[CNN] * n_gpus)
    for worker in world.core.workers():
        for _ in range(20):
            worker.measure(0, MS, MS)
        for _ in range(256):
            worker.transport.add(0)
    world.submit(36.0)
    world.run(300)  # until it is known that little comes
    n_before = len(world.dispatches())
    ids = world.submit(*slacks_ms)
    world.run(max(slacks_ms) + 50)
    batches = [action.batch for action in world.dispatches()[n_before:]]
    rows = sum(batch.n * batch.subnet for batch in batches) / len(ids)
    return world.statuses(ids).count(Status.OK), rows


INSTANCES = st.one_of(
    st.builds(lambda slack, n: [slack] * n, st.integers(80, 600), st.integers(1, 60)),
    st.lists(st.sampled_from([90, 140, 333, 700]), min_size=2, max_size=60),
    st.lists(st.integers(50, 1_000), min_size=1, max_size=60),
)
"""Slacks in tenths of a millisecond."""


@settings(max_examples=60, deadline=None)
@given(n_gpus=st.integers(1, 3), tenths=INSTANCES)
def test_what_the_smallest_subnet_can_serve_is_served(n_gpus: int, tenths: list[int]) -> None:
    """Whatever it spends on better subnets: what some schedule of the smallest one serves is."""
    slacks_ms = [tenth / 10 for tenth in tenths]
    if can_be_served(n_gpus, [slack - ERROR_MS for slack in slacks_ms]):
        n_ok, _ = attained(n_gpus, slacks_ms)
        assert n_ok == len(slacks_ms)


@pytest.mark.parametrize(
    ("n_gpus", "slacks_ms"),
    [
        (1, [15.2] * 18),  # the middle of the head's bucket is a millisecond too late
        (1, [6.74] * 7 + [25.3] * 10),  # three due in 2.9 ms are no overload
        (2, [36.0] * 39),
        (2, [11.1] * 11),
        (3, [13.1] * 27),
    ],
)
def test_queues_that_once_lost_a_query(n_gpus: int, slacks_ms: list[float]) -> None:
    """Each was found by chance, and serves all of its queries since, above the smallest subnet."""
    n_ok, row = attained(n_gpus, slacks_ms)
    assert n_ok == len(slacks_ms)
    assert row > 0.2


def test_work_is_in_units() -> None:
    """The policy divides by them: a query without a floor is one query."""
    due = Due(weights_of(CNN.least_costs_ns()))
    due.add(Terms([NOW_NS] * 7, None), 0, 7)
    assert due.total == 7 * UNIT
