"""PlanFit keeps time for queries that can wait less than others, as many as have come at once before."""

from __future__ import annotations

import pytest

from router.policies import Choice
from router.policies.demand import Demand
from router.policies.supply import GpuPace
from superserve.clock import MS
from tests.router.policies.test_planfit import BEST, CNN, NOW_NS, chosen, idle, supply_of, view_of

PATIENT_MS = 100


def mixed(*, n_short: int, short_ms: int = 14, ago_ms: int = 200) -> Demand:
    """Return a demand of a second of patient queries, and of short ones that came at once, some time ago."""
    demand = Demand()
    for ms in range(1_000):
        at_ns = NOW_NS - (1_000 - ms) * MS
        if ms % 20 == 0:
            demand.arrived([PATIENT_MS * MS], at_ns)
        if n_short and ms == 1_000 - ago_ms:
            demand.arrived([short_ms * MS] * n_short, at_ns)
        demand.settle(at_ns)
    demand.settle(NOW_NS)
    return demand


def takes_ms(demand: Demand, *, n_gpus: int = 1, n_queued: int = 4, slowdown: float = 1.0) -> float:
    """Return how long the batch for some patient queries takes on a GPU of those, all idle."""
    queue = view_of([90.0] * n_queued, demand, supply_of(n_gpus, 90 * MS))
    choice = chosen(queue, idle(slowdown=slowdown))
    assert isinstance(choice, Choice)
    return slowdown * CNN.latency_p99_ns(choice.subnet, choice.batch_size) / MS


def test_a_batch_of_patient_queries_ends_in_time_for_short_ones() -> None:
    """One GPU, 16 that have 13 ms once the way is deducted, and take 7.6: 5 ms are left, not the 90."""
    alone = takes_ms(mixed(n_short=0))
    beside = takes_ms(mixed(n_short=16))

    assert alone > 9
    assert CNN.latency_p99_ns(0, 4) <= beside * MS <= 13 * MS - CNN.latency_p99_ns(0, 16)
    # Eight GPUs have time for them and for that.
    assert takes_ms(mixed(n_short=16), n_gpus=8) > beside


@pytest.mark.parametrize(("n_short", "row"), [(4, 5), (8, 5), (10, 4), (12, 3), (16, 0)])
def test_the_more_came_at_once_the_shorter_is_a_batch(n_short: int, row: int) -> None:
    """Of 13 ms, 2.5 are lost to batches that do not end with it, and 0.57 to 0.76 are kept for each query."""
    assert takes_ms(mixed(n_short=n_short), n_queued=1) == pytest.approx(
        CNN.latency_p99_ns(row, 1) / MS, 0.02
    )


def test_a_slow_gpu_keeps_as_much_more() -> None:
    """A GPU that takes half longer has so much less of the 13 ms to give away."""
    demand, slow = mixed(n_short=12), 1.5
    assert takes_ms(demand, n_queued=1, slowdown=slow) / slow < takes_ms(demand, n_queued=1)


def test_of_several_gpus_one_takes_a_share() -> None:
    """Half again its part of what is left: the others are there for the rest."""
    demand, queued = mixed(n_short=4), [90.0] * 16
    choice = chosen(view_of(queued, demand, supply_of(2, 90 * MS)))
    assert choice == Choice(BEST, 4)
    assert chosen(view_of(queued, mixed(n_short=0), supply_of(2, 90 * MS))) == Choice(BEST, 16)


def test_what_others_run_and_what_is_due_takes_of_it_too() -> None:
    """Batches on other GPUs and short queries that wait already leave less to this batch."""
    queued, demand = [90.0] * 4, mixed(n_short=16)
    assert chosen(view_of(queued, demand, supply_of(4, 90 * MS))) == Choice(BEST, 4)
    busy = supply_of(4, 90 * MS)
    for _ in range(3):
        pace = GpuPace()
        pace.set(CNN, 1.0, busy.limit_ns)
        busy.note(pace, NOW_NS + 12 * MS)
    assert chosen(view_of(queued, demand, busy)) == Choice(0, 4)
    # Most of the short ones that ever came wait, and as many more may come: all of them go at once.
    assert chosen(view_of([12.9] * 8 + [90.0], mixed(n_short=10), supply_of(1, 90 * MS))) == Choice(0, 8)


def test_a_class_that_has_not_come_for_long_asks_for_nothing() -> None:
    """Less than half a query within its patience is left of what has come."""
    demand = mixed(n_short=16)
    demand.classes[(14 * MS).bit_length()].surge._mosts = [0.4] * 4
    assert takes_ms(demand, n_queued=16) == takes_ms(mixed(n_short=0), n_queued=16) > 13


def test_what_is_as_patient_as_the_mean_needs_no_reserve_of_its_own() -> None:
    """The reserve for a surge, over the patience, is for those."""
    assert takes_ms(mixed(n_short=3, short_ms=80)) == takes_ms(mixed(n_short=0))


def test_the_most_that_came_is_kept_and_forgotten() -> None:
    """What has just come is not expected again at once; in between it is; after ten seconds it is not."""
    demand = mixed(n_short=16, ago_ms=1)
    surge = demand.classes[(14 * MS).bit_length()].surge
    assert surge.most == 16
    assert surge.expected() == (0, 0, 0)
    surge.advance(NOW_NS + 100 * MS)
    assert surge.expected() == pytest.approx((16, 16, 16), 0.02)
    for ms in range(200, 11_000, 100):
        surge.advance(NOW_NS + ms * MS)
    assert surge.most < 7


def test_queries_of_one_message_count_each_for_their_own_class() -> None:
    """Three short ones among five count as three of their class, and the others as two."""
    demand = Demand()
    demand.arrived([14 * MS, 100 * MS, 13 * MS, 12 * MS, 99 * MS], NOW_NS)
    assert {bits: kind.n for bits, kind in demand.classes.items()} == {24: 3, 27: 2}
    demand.arrived([14 * MS, 100 * MS, 13 * MS, 12 * MS, 99 * MS], NOW_NS)
    assert {bits: kind.surge.most for bits, kind in demand.classes.items()} == {24: 6, 27: 4}


def test_a_class_is_as_hasty_as_those_that_came_last() -> None:
    """14 ms and 9 ms fall into one class; the mean of the last dozens is what counts, by messages' least."""
    demand = Demand()
    for ms in range(200):
        demand.arrived([14 * MS] * 2, ms * MS)
        demand.settle(ms * MS)
    (one,) = demand.classes.values()
    assert one.own_ns == pytest.approx(14 * MS, rel=0.01)
    demand.arrived([9 * MS], 200 * MS)
    demand.settle(200 * MS)
    assert 13.5 * MS < one.own_ns < 14 * MS
    for ms in range(201, 400):
        demand.arrived([16 * MS, 9 * MS], ms * MS)
        demand.settle(ms * MS)
    assert one.own_ns == pytest.approx(9 * MS, rel=0.01)
    # Beside others each counts for itself.
    for ms in range(400, 600):
        demand.arrived([100 * MS, 16 * MS, 12 * MS], ms * MS)
        demand.settle(ms * MS)
    assert one.own_ns == pytest.approx(14 * MS, rel=0.01)
