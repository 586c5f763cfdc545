"""A worker process dies, or stops and comes back, in mid-run: no query is lost or answered twice."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

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

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(120)]

SLO_NS = 60_000_000
N_WORKERS = 8
DURATION_S = 8.0
FAULT_S = 3.0
RATE_QPS = 1_600.0
"""60 % of what eight such GPUs serve in batches of four, 12 ms, on the smallest subnet."""
PROFILE = "transformer-8gpu-modelled"
RECOVERY_S = 2


def offer(fault: Callable[[Cluster], None]) -> Run:
    """Offer a trace to eight one-GPU processes and do `fault` once that many seconds' queries are out."""
    trace = load_trace(f"poisson:rate={RATE_QPS:g}", duration_s=DURATION_S, seed=4)
    reached = threading.Event()
    n_before = int(RATE_QPS * FAULT_S)

    def watch(progress: dict[str, int]) -> None:
        if progress["sent"] >= n_before:
            reached.set()

    emulation = Emulation(PROFILE, N_WORKERS, n_processes=N_WORKERS)
    with emulated(emulation) as cluster, concurrent.futures.ThreadPoolExecutor(1) as pool:

        def strike() -> None:
            assert reached.wait(60.0), "the run never got so far"
            fault(cluster)

        striking = pool.submit(strike)
        run = run_trace(trace, RunSettings(SLO_NS), cluster.client_endpoint, watch)
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
    is_ok = in_time(run.columns, SLO_NS)
    return [float(is_ok[second == s].mean()) for s in np.unique(second)]


def test_a_killed_worker_costs_seconds_of_attainment_and_no_query() -> None:
    """SIGKILL: each query has one answer, and two seconds later attainment is above 0.99 again."""

    def kill(cluster: Cluster) -> None:
        cluster.workers[3].kill()

    run = offer(kill)

    check_all_answered_once(run)
    seconds = attainment_by_second(run)
    # Progress comes four times a second: the fault came in this second or the next.
    recovered = seconds[int(FAULT_S) + 1 + RECOVERY_S :]
    assert len(recovered) >= 2
    assert min(recovered) > 0.99, f"attainment by second: {seconds}; ends: {run.result.queries}"


def test_a_stopped_worker_that_comes_back_answers_nothing_twice() -> None:
    """SIGSTOP, SIGCONT: fenced or recovered; its late answers are never counted twice."""

    def stop_and_continue(cluster: Cluster) -> None:
        pid = cluster.workers[3].pid
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.2)  # the fault itself: longer than the six heartbeats after which it is dead
        os.kill(pid, signal.SIGCONT)

    run = offer(stop_and_continue)

    check_all_answered_once(run)
    seconds = attainment_by_second(run)
    assert min(seconds[-2:]) > 0.99, f"attainment by second: {seconds}; ends: {run.result.queries}"
