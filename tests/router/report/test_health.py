"""Live, ready, and meeting SLOs now: each says yes only for a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.report.health import attainment, ready, slo
from superserve.status import EndCounts
from tests.superserve.statuses import ended, info, status

if TYPE_CHECKING:
    from superserve.status import RouterSummary


def summary(*, n_ready: int = 2, draining: bool = False, **answered: int) -> RouterSummary:
    """Return a summary by which health is judged."""
    return status(router=info(draining=draining), workers_ready=n_ready, recent=ended(**answered))


def test_ready_takes_a_gpu_that_takes_work_and_a_router_that_takes_queries() -> None:
    """No worker is not ready, nor is a router that drains, whatever workers it has."""
    assert ready(summary()) == (True, "2 GPUs take work")
    assert ready(summary(n_ready=0)) == (False, "no GPU takes work")
    assert ready(summary(draining=True)) == (False, "the router is draining")


def test_the_slo_is_met_by_what_ended_lately_and_never_rounded_up() -> None:
    """99 of 100 are enough; one less of 10,000 is not, and does not read as if it were."""
    assert slo(summary(ok=99, late=1)).is_well
    below = slo(summary(ok=98_999, expired=1_001))

    assert below == (False, "attainment 0.9899 over the last 10 s, expected 0.99")


def test_where_nothing_ended_the_slo_is_met_by_who_could_meet_it() -> None:
    """An idle router with workers is well; one without is not, though it missed nothing."""
    assert slo(summary(cancelled=7)).is_well
    assert not slo(summary(n_ready=0)).is_well


def test_attainment_leaves_out_what_clients_cancelled() -> None:
    """A query that nobody wants any more was not missed; nothing ended is not 100 %."""
    assert attainment(EndCounts(ok=3, late=1, cancelled=96)) == 0.75
    nothing = attainment(EndCounts(cancelled=5))
    assert nothing != nothing  # NaN
