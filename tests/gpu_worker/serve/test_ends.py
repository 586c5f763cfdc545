"""How batches end on an emulated GPU, to the nanosecond, and what the report of each says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gpu_worker.core.played import PlayedGpu
from gpu_worker.core.queue import MAX_OUTSTANDING
from gpu_worker.serve.emulated import emulated_gpus, outcome_of
from superserve.clock import MS, SECOND
from superserve.wire import Status
from tests.gpu_worker.serve.test_emulated import PROFILE, directive

if TYPE_CHECKING:
    from gpu_worker.core.batches import EndedBatch

OK, EXPIRED = Status.OK, Status.EXPIRED


def statuses(report: EndedBatch) -> list[int]:
    """Return how each query of a batch ended."""
    return list(report.row.statuses or bytes(report.row.n))


@pytest.mark.parametrize(("left_ns", "status"), [(-1, EXPIRED), (0, EXPIRED), (1, OK)])
def test_a_query_runs_if_any_slack_is_left_as_its_batch_starts(left_ns: int, status: Status) -> None:
    """One whose slack ends at that very instant is refused: it could only be late."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    first_ns = PROFILE.latency_ns(0, 1)
    gpu.submit(directive(1, 0, (SECOND,)), 0)
    gpu.submit(directive(2, 3, (first_ns + left_ns, SECOND)), 0)
    _, report = gpu.finish_due(SECOND)

    assert statuses(report) == [status, OK]
    assert report.n_run == (2 if status is OK else 1)
    assert report.row.waited_ns == first_ns
    assert report.row.executing_ns == PROFILE.latency_ns(3, report.n_run)


def test_the_output_is_the_row_that_ran() -> None:
    """For each query, so that a client sees what served it."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    gpu.submit(directive(1, 4, (SECOND,) * 3), 0)
    (report,) = gpu.finish_due(SECOND)

    assert np.frombuffer(report.row.output, "<i4").tolist() == [4, 4, 4]
    assert (report.subnet, report.row.n, report.n_run) == (4, 3, 3)


def test_nothing_is_reported_a_nanosecond_early() -> None:
    """Neither the first batch nor the one behind it."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    one_ns = PROFILE.latency_ns(0, 1)
    for batch_id in (1, 2):
        gpu.submit(directive(batch_id, 0, (SECOND,)), 0)

    assert [len(gpu.finish_due(k * one_ns + late_ns)) for k in (1, 2) for late_ns in (-1, 0)] == [0, 1, 0, 1]


def test_batches_run_in_the_order_they_came() -> None:
    """Of more than a router that keeps to its credit would send, too."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    for batch_id in (3, 9, 4, 7):
        gpu.submit(directive(batch_id, 0, (SECOND,)), 0)

    assert [report.row.batch_id for report in gpu.finish_due(SECOND)] == [3, 9, 4, 7]


def test_a_report_is_of_the_epoch_that_sent_the_batch() -> None:
    """No other router may receive it."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    gpu.submit(dataclasses.replace(directive(1, 0, (SECOND,)), epoch=41), 0)
    gpu.submit(dataclasses.replace(directive(2, 0, (SECOND,)), epoch=42), 0)

    assert [report.epoch for report in gpu.finish_due(SECOND)] == [41, 42]


def test_a_batch_that_is_refused_was_received() -> None:
    """The router learns that it arrived: the credit that it used is not counted as on its way."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    for batch_id in range(1, MAX_OUTSTANDING + 1):
        assert gpu.submit(directive(batch_id, 0, (SECOND,)), 0) is None
    assert gpu.submit(directive(77, 0, (SECOND,)), 0) is not None

    assert gpu.report(0).last_batch == 77


def test_a_batch_of_expired_queries_takes_no_time() -> None:
    """The next starts at the same instant."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    gpu.submit(directive(1, 5, (0, -1)), 10)
    gpu.submit(directive(2, 0, (SECOND,)), 10)
    first, second = gpu.finish_due(SECOND)

    assert statuses(first) == [EXPIRED, EXPIRED]
    assert (first.n_run, first.row.executing_ns, first.started_ns, first.ended_ns) == (0, 0, 10, 10)
    assert second.started_ns == 10


def test_gpus_of_one_process_end_each_in_its_own_time() -> None:
    """Each look reports all that have ended by then, of whichever GPU, and nothing else."""
    gpus = emulated_gpus(PROFILE, 3)
    for slot, subnet in enumerate((5, 0, 2)):
        gpus.submit(directive(slot + 1, subnet, (SECOND,), slot=slot), 0)
        gpus.submit(directive(slot + 11, subnet, (SECOND,), slot=slot), 0)
    ends = sorted(
        (k * PROFILE.latency_ns(subnet, 1), slot + 1 + 10 * (k - 1))
        for slot, subnet in enumerate((5, 0, 2))
        for k in (1, 2)
    )
    seen = []
    while (due_ns := gpus.next_event_ns()) is not None:
        assert gpus.finish_due(due_ns - 1) == []
        seen += [(report.ended_ns, report.row.batch_id) for report in gpus.finish_due(due_ns)]

    assert seen == ends
    assert gpus.is_idle()


def test_one_late_look_reports_all_that_has_ended() -> None:
    """Of every GPU, and of each both batches."""
    gpus = emulated_gpus(PROFILE, 3)
    for batch_id in range(1, 7):
        gpus.submit(directive(batch_id, 0, (SECOND,), slot=batch_id % 3), 0)

    assert sorted(report.row.batch_id for report in gpus.finish_due(SECOND)) == [1, 2, 3, 4, 5, 6]
    assert gpus.is_idle()


def test_what_an_older_epoch_began_is_reported_to_no_router() -> None:
    """It goes on, and its GPU is free only after it; but its queries have been given to others."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    gpu.submit(directive(1, 0, (SECOND,)), 0)
    gpu.forget_held()
    (report,) = gpu.finish_due(SECOND)

    assert (report.epoch, report.row.batch_id, report.n_run) == (None, 1, 1)


def test_credit_is_what_two_batches_leave() -> None:
    """One that runs and one that waits are all that it asks for; each that ends makes room for one."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    one_ns = PROFILE.latency_ns(0, 1)
    seen = [gpu.report(0)[:3]]
    for batch_id in (1, 2, 3):
        gpu.submit(directive(batch_id, 0, (SECOND,)), 0)
        seen.append(gpu.report(0)[:3])
    for k in (1, 2, 3):
        gpu.finish_due(k * one_ns)
        seen.append(gpu.report(k * one_ns)[:3])

    # credit, held, running
    assert seen == [(2, 0, 0), (1, 0, 1), (0, 1, 1), (0, 2, 1), (0, 1, 1), (1, 0, 1), (2, 0, 0)]


def test_the_router_hears_which_batch_runs_and_since_when() -> None:
    """The batch and for how long it has run; none once it is idle, and none of an epoch that is over."""
    gpu = PlayedGpu(PROFILE, outcome_of)
    assert gpu.report(5 * MS)[3:] == (0, 0, 0)
    gpu.submit(directive(1, 5, (SECOND,) * 16), 0)
    gpu.submit(directive(2, 3, (SECOND,) * 4), 0)
    long_ns = PROFILE.latency_ns(5, 16)

    assert gpu.report(10 * MS)[3:] == (2, 1, 10 * MS)
    gpu.finish_due(long_ns)
    assert gpu.report(long_ns + MS)[3:] == (2, 2, MS)
    gpu.forget_held()
    assert gpu.report(long_ns + MS)[3:] == (0, 0, 0)
    gpu.finish_due(SECOND)
    assert gpu.report(SECOND) == (2, 0, 0, 0, 0, 0)
