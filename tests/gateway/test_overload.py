"""A deadline is a promise: under overload what cannot be served is refused by its deadline, not later."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from loadgen.live.run import RunSettings
from loadgen.oip.run import run_target
from loadgen.simulator.workloads import slowed
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS, SECOND
from superserve.roles.processes import ProcessGroup
from superserve.wire import Status

if TYPE_CHECKING:
    from pathlib import Path

SLO_NS = 1_000 * MS
"""What a slow machine adds to an answer, tens of milliseconds, is little of it."""
RATE_QPS, SECONDS = 130, 4.0
SLOWER = 50.0
SERVED_QPS = 44
"""What a GPU that is so much slower does at most: 16 queries of the smallest subnet in 50 x 7.35 ms."""
REFUSALS = {Status.EXPIRED, Status.INFEASIBLE, Status.OVERLOADED}


@pytest.mark.e2e
@pytest.mark.slow
def test_refusals_come_by_the_deadline(tmp_path: Path) -> None:
    """Three times what one slow GPU serves: each query has one answer, and refusals do not wait in line.

    Served in order, the last query would have its answer eight seconds after its deadline; a refusal comes
    within one. So many queries a second are few for any machine: cores are idle, and the GPU is emulated.
    """
    profile = tmp_path / "slow.json"
    profile.write_bytes(slowed(load_profile("cnn-8gpu-modelled"), SLOWER).to_json())
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        group.wait_ready(30)
        group.start(
            "worker",
            ["-m", "gpu_worker", "--connect", router.ready["worker"], "--emulate", str(profile),
             "--gpus", "1"],
        )  # fmt: skip
        gateway = group.start(
            "gateway",
            ["-m", "gateway", "--connect", router.ready["client"], "--http-port", "0", "--model", "m"],
        )
        group.wait_ready(30)
        url = gateway.ready["http"]
        _await_ready(url)
        trace = load_trace(f"poisson:rate={RATE_QPS}", duration_s=SECONDS, seed=1)
        run = run_target(trace, RunSettings(SLO_NS), f"{url}/v2/models/m/infer")

    columns, queries = run.columns, run.result.queries
    assert queries["unanswered"] + queries["unsent"] == run.n_duplicates == 0, run.reasons
    has_output = columns["status"] <= Status.LATE
    statuses = {Status(status) for status in columns["status"][~has_output]}
    assert statuses <= REFUSALS, run.reasons
    # The GPU computes for the run and for one SLO after it.
    assert 0 < has_output.sum() <= SERVED_QPS * (SECONDS + SLO_NS / SECOND) * 1.1, queries
    late_ns = (columns["answered_ns"] - columns["due_ns"])[~has_output] - SLO_NS
    assert late_ns.max() <= SLO_NS, f"{late_ns.max() / MS:.1f} ms after its deadline; {queries}"


def _await_ready(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                return
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
