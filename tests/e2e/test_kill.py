"""A worker process dies, or stops and comes back, in mid-run: no query is lost or answered twice.

What that costs is judged by an SLO of a second and at a rate that leaves any machine idle: a query is late
because a dead worker held it, not because this machine was slow.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

from loadgen.live.run import Emulation, RunSettings, emulated, run_trace
from loadgen.results.result import OUTCOMES
from loadgen.results.run import in_time
from loadgen.traces.trace import load_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadgen.live.run import Cluster
    from loadgen.results.run import Run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROFILE = "transformer-8gpu-modelled"
RECOVERY_S = 2


class Load(NamedTuple):
    """What is offered to how many one-GPU processes, and when one of them is struck."""

    n_workers: int
    rate_qps: float
    duration_s: float
    fault_s: float
    slo_ns: int


FULL = Load(n_workers=4, rate_qps=300.0, duration_s=7.0, fault_s=2.0, slo_ns=1_000_000_000)
"""A quarter of what four such GPUs serve in batches of four, 12 ms, on the smallest subnet."""
SHORT = Load(n_workers=2, rate_qps=400.0, duration_s=2.5, fault_s=0.5, slo_ns=20_000_000_000)
"""With so much slack both always hold a batch, and what one loses the other can serve."""


def offer(load: Load, fault: Callable[[Cluster], None]) -> Run:
    """Offer a trace and do `fault` once that many seconds' queries are out."""
    trace = load_trace(f"poisson:rate={load.rate_qps:g}", duration_s=load.duration_s, seed=4)
    reached = threading.Event()
    n_before = int(load.rate_qps * load.fault_s)

    def watch(progress: dict[str, int]) -> None:
        if progress["sent"] >= n_before:
            reached.set()

    emulation = Emulation(PROFILE, load.n_workers, n_processes=load.n_workers)
    with emulated(emulation) as cluster, concurrent.futures.ThreadPoolExecutor(1) as pool:

        def strike() -> None:
            assert reached.wait(60.0), "the run never got so far"
            fault(cluster)

        striking = pool.submit(strike)
        run = run_trace(trace, RunSettings(load.slo_ns), cluster.client_endpoint, watch)
        striking.result()
    return run


def check_all_answered_once(run: Run) -> None:
    """Assert that every query was sent and has exactly one terminal answer."""
    queries = run.result.queries
    assert sum(queries[outcome] for outcome in OUTCOMES) == queries["total"]
    assert (queries["unanswered"], queries["unsent"], run.n_duplicates) == (0, 0, 0), queries


def attainment_by_second(run: Run) -> list[float]:
    """Return the share answered in time of the queries due in each second."""
    second = run.columns["due_ns"] // 1_000_000_000
    is_ok = in_time(run.columns, FULL.slo_ns)
    return [float(is_ok[second == s].mean()) for s in np.unique(second)]


def kill(cluster: Cluster) -> None:
    """SIGKILL."""
    cluster.workers[-1].kill()


def stop_and_continue(cluster: Cluster) -> None:
    """SIGSTOP, SIGCONT."""
    pid = cluster.workers[-1].pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.2)  # the fault itself: longer than the six heartbeats after which it is dead
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("fault", [kill, stop_and_continue])
def test_every_query_is_answered_once_whatever_befalls_a_worker(fault: Callable[[Cluster], None]) -> None:
    """The other worker is there for what the first one held."""
    run = offer(SHORT, fault)

    check_all_answered_once(run)
    queries = run.result.queries
    assert queries["ok"] + queries["late"] == queries["total"], queries


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_worker_costs_seconds_of_attainment_and_no_query() -> None:
    """SIGKILL: each query has one answer, and two seconds later all are in time again."""
    run = offer(FULL, kill)

    check_all_answered_once(run)
    seconds = attainment_by_second(run)
    # Progress comes four times a second: the fault came in this second or the next.
    recovered = seconds[int(FULL.fault_s) + 1 + RECOVERY_S :]
    assert len(recovered) >= 2
    assert min(recovered) > 0.99, f"attainment by second: {seconds}; ends: {run.result.queries}"


@pytest.mark.slow
@pytest.mark.alone
def test_a_stopped_worker_that_comes_back_answers_nothing_twice() -> None:
    """SIGSTOP, SIGCONT: fenced or recovered; its late answers are never counted twice."""
    run = offer(FULL, stop_and_continue)

    check_all_answered_once(run)
    seconds = attainment_by_second(run)
    assert min(seconds[-2:]) > 0.99, f"attainment by second: {seconds}; ends: {run.result.queries}"
