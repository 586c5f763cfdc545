"""A run's figures follow from its columns, and a run ends whatever happens to the router."""

from __future__ import annotations

import concurrent.futures
import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.live.coordinator import Offering, deal, merge
from loadgen.live.records import COLUMNS, UNANSWERED, SenderPlan
from loadgen.live.run import Emulation, RunSettings, emulated, run_emulated, run_trace, summarise
from loadgen.results.result import OUTCOMES, load_run
from loadgen.results.run import in_time
from loadgen.traces.trace import Trace, load_trace
from superserve.errors import ConfigError
from superserve.wire import Status
from tests.superserve.client.fakes import FakeRouter

if TYPE_CHECKING:
    from pathlib import Path


MS = 1_000_000
SLO_NS = 36 * MS
EMULATION = Emulation("cnn-8gpu-modelled", 4, n_processes=2)


@st.composite
def columns(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    """Draw possible outcomes of a few queries."""
    n = draw(st.integers(1, 12))
    due_ns = np.sort(np.array(draw(st.lists(st.integers(0, 999 * MS), min_size=n, max_size=n)), np.int64))
    made: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for due in due_ns.tolist():
        end = draw(st.sampled_from((*Status, UNANSWERED, None)))
        sent = -1 if end is None else due + draw(st.integers(0, 9 * MS))
        has_answer = end is not None and end != UNANSWERED
        answered = sent + draw(st.integers(0, 99 * MS)) if has_answer else -1
        subnet = draw(st.integers(0, 1))
        values = (sent, answered, UNANSWERED if end is None else end, subnet, 4, 70.0 + 10 * subnet, 0, 0)
        for name, value in zip(COLUMNS, values, strict=True):
            made[name].append(value)
    types = {"status": np.uint8, "subnet": np.uint16, "batch_size": np.uint16, "accuracy": np.float32}
    return {name: np.array(made[name], types.get(name, np.int64)) for name in COLUMNS} | {"due_ns": due_ns}


@given(made=columns())
def test_every_query_counts_once_and_only_what_came_in_time_is_ok(
    made: dict[str, np.ndarray[Any, Any]],
) -> None:
    """Attainment is over all queries, unsent ones too; the router's OK does not make an answer one."""
    trace = Trace("drawn", made["due_ns"], 1_000 * MS, "drawn")
    result = summarise(trace, SLO_NS, "fake", made, [("small", 70.0), ("large", 80.0)], None)

    queries = result.queries
    assert sum(queries[outcome] for outcome in OUTCOMES) == queries["total"] == trace.n
    is_ok = [
        status in (Status.OK, Status.LATE) and answered - due <= SLO_NS
        for status, answered, due in zip(made["status"], made["answered_ns"], made["due_ns"], strict=True)
    ]
    assert queries["ok"] == sum(is_ok) == in_time(made, SLO_NS).sum()
    assert result.slo_attainment == sum(is_ok) / trace.n
    assert queries["unsent"] == (made["sent_ns"] < 0).sum()
    assert queries["unsent"] == 0 or not result.valid
    if any(is_ok):
        assert result.mean_accuracy == pytest.approx(made["accuracy"][np.array(is_ok)].mean())
    else:
        assert result.mean_accuracy is None
    shares = sum(result.subnet_share.values())
    assert shares == pytest.approx(1.0) or not (made["status"] <= Status.LATE).any()


@pytest.mark.parametrize(("n", "n_senders"), [(1, 1), (1, 4), (7, 3), (12, 4), (5, 8)])
def test_what_the_senders_saw_is_put_back_into_the_traces_order(
    tmp_path: Path, n: int, n_senders: int
) -> None:
    """The trace is dealt out query by query and gathered the same way, instants from the start."""
    start_ns = 10**15
    due_ns = np.arange(n, dtype=np.int64) * 3
    trace = Trace("steps", due_ns, 3 * n, "made for a test")
    payloads = np.arange(20, dtype=np.uint8).reshape(5, 4)
    schedule = Offering(trace, n_senders, payloads)
    plans = deal(SenderPlan("", SLO_NS, keep_outputs=True, folder=str(tmp_path)), schedule)
    for plan in plans:
        due = np.load(plan.path("due"))
        for name in COLUMNS:
            np.save(plan.path(name), due + start_ns)
        never = np.where(due == 3, -1, due + start_ns)
        np.save(plan.path("answered_ns"), never)
        np.save(plan.path("outputs"), payloads[np.load(plan.path("pick"))])

    merged = merge(plans, schedule, start_ns)
    assert merged["due_ns"].tolist() == merged["sent_ns"].tolist() == due_ns.tolist()
    assert merged["answered_ns"].tolist() == [-1 if due == 3 else due for due in due_ns]
    assert (merged["outputs"] == payloads[merged["payload"]]).all()


@pytest.mark.e2e
def test_a_run_accounts_for_every_query_and_no_gpu_cheats(tmp_path: Path) -> None:
    """Two senders, two worker processes: counts sum, logs agree with them, the file loads."""
    trace = load_trace("poisson:rate=300", duration_s=1.5, seed=1)
    run, report = run_emulated(trace, RunSettings(SLO_NS, 2), EMULATION)

    queries = run.result.queries
    assert sum(queries[outcome] for outcome in OUTCOMES) == queries["total"] == trace.n
    assert (queries["unanswered"], queries["unsent"], run.n_duplicates) == (0, 0, 0)
    assert report.n_violations == 0
    # A batch that overran is run again elsewhere; the first answer counts.
    assert report.n_queries >= queries["ok"] + queries["late"] > 0
    has_output = run.columns["status"] <= Status.LATE
    assert (run.columns["sent_ns"] >= run.columns["due_ns"]).all()
    assert (run.columns["answered_ns"] >= run.columns["sent_ns"]).all()
    assert (run.columns["executing_ns"][has_output] > 0).all()
    assert run.router_cpu_s > 0
    path = tmp_path / "run.json"
    path.write_text(run.result.to_json())
    assert load_run(path).queries == queries


@pytest.mark.e2e
def test_a_router_killed_in_mid_run_leaves_a_result() -> None:
    """What the senders saw counts: every query is answered, unanswered or unsent."""
    trace = load_trace("constant:rate=300", duration_s=2.0)
    reached = threading.Event()
    with emulated(EMULATION) as cluster, concurrent.futures.ThreadPoolExecutor(1) as pool:

        def watch(total: dict[str, int]) -> None:
            if total["sent"] >= 100:
                reached.set()

        def kill() -> None:
            assert reached.wait(30.0)
            assert cluster.router is not None
            cluster.router.kill()

        killing = pool.submit(kill)
        settings = RunSettings(SLO_NS, grace_ns=100 * MS)
        run = run_trace(trace, settings, cluster.client_endpoint, watch)
        killing.result()
    queries = run.result.queries

    assert sum(queries[outcome] for outcome in OUTCOMES) == queries["total"] == trace.n
    assert queries["unsent"] > 0
    assert queries["ok"] + queries["late"] > 0
    assert not run.result.valid
    assert math.isnan(run.router_cpu_s)


def test_a_run_against_nobody_is_a_clear_error() -> None:
    """Before any sender is started."""
    fake = FakeRouter()
    fake.close()
    trace = load_trace("constant:rate=10", duration_s=1.0)

    with pytest.raises(ConfigError, match=f"no router answers at {fake.endpoint}"):
        run_trace(trace, RunSettings(SLO_NS), fake.endpoint)
