"""DemandFit's constants and corrections, each by an example in which nothing else decides."""

from __future__ import annotations

import pytest

from router.policies import Choice, QueueView, Shed, WorkerView
from router.policies.demandfit import DemandFit
from superserve.clock import MS
from tests.router.policies.test_demandfit import CNN, chosen, demand_of


def test_three_queries_do_not_pay_for_a_batch_of_four() -> None:
    """Those in a padded batch share its cost: here a smaller, fuller one is worth more."""
    assert chosen(12, 3, demand_of(3_000)) == Choice(5, 2)
    assert chosen(12, 4, demand_of(3_000)) == Choice(5, 4)


def test_of_batches_worth_the_same_the_larger_is_run() -> None:
    """Where time costs nothing, two queries on the best subnet together are no worse than one."""
    assert chosen(7, 3, demand_of(10)) == Choice(5, 2)


def test_a_burst_after_silence_is_served_by_its_queue() -> None:
    """The rate is not known yet, but five hundred wait: that alone makes time as dear as it gets."""
    assert chosen(15, 500, demand_of(10)) == Choice(0, 16)


def test_a_batch_slightly_longer_than_the_slack_still_sets_the_price() -> None:
    """Up to a quarter longer than the head's slack: else each fluctuation of it would move the price."""
    assert chosen(20, 200, demand_of(10)) == Choice(3, 16)


def test_batches_longer_than_the_patience_do_not_set_the_price() -> None:
    """A head with all of its slack left is not served as if every query had as much."""
    assert chosen(34, 90, demand_of(3_000)) == Choice(5, 16)
    assert chosen(25, 20, demand_of(4_500)) == Choice(5, 8)


@pytest.mark.parametrize("slack_ms", [4, 7, 9.5])
def test_a_slow_worker_sheds_by_its_own_time(slack_ms: float) -> None:
    """At 2.5 times the latency a full batch is one of 8, 4.307 ms by the profile: what it takes is 10.8."""
    queue = QueueView(round((slack_ms + 1) * MS), 0, 500, demand_of(3_000))

    assert DemandFit(CNN).choose(queue, WorkerView(0, MS, 2.5), 0) == Shed(before_ns=11_767_500, n=109)


def test_without_demand_the_queue_and_the_slack_decide() -> None:
    """A worker that knows of no arrivals serves one query as well as it can, and many in full batches."""
    for length, choice in ((1, Choice(5, 1)), (400, Choice(0, 16))):
        queue = QueueView(31 * MS, 0, length, None)
        assert DemandFit(CNN).choose(queue, WorkerView(0, MS, 1.0), 0) == choice
