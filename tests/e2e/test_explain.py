"""`superserve explain` on a running router and on its event log: the same story."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from loadgen.live.run import Emulation, RunSettings, emulated, run_trace
from loadgen.study.explain.causes import Why
from superserve.clock import MS
from tests.loadgen.study.explain.flown import spike
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e


def explain(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "superserve", "explain", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def body(*words: str) -> Any:
    """Run the command and return its JSON."""
    done = explain(*words, "--json", "--no-changes")
    assert done.returncode == 0, done.stderr
    return orjson.loads(done.stdout)


def test_a_running_router_and_its_log_tell_the_same(tmp_path: Path) -> None:
    """A spike on two GPUs: the worst query has one story, live, saved and from the event log."""
    emulation = Emulation("cnn-8gpu-modelled", 2, "fixed:cnn-80.16", folder=tmp_path, record=True)
    saved = tmp_path / "saved"
    with emulated(emulation) as cluster:
        run = run_trace(spike(200), RunSettings(36 * MS), cluster.client_endpoint)
        live = body("live", "--connect", cluster.client_endpoint, "--save", str(saved))
        name = f"{live['client']}:{live['query']}"
        wrong = explain("live", "999999", "--connect", cluster.client_endpoint)

    assert run.result.queries["ok"] < 200
    assert live["cause"] in {why.value for why in Why} - {Why.IN_TIME, Why.UNKNOWN}
    assert live["status"] != "ok"
    assert sum(part["ms"] for part in live["parts"]) == pytest.approx(live["latency_ms"])
    assert body(str(saved), name) == live
    assert body(str(tmp_path), name) == live
    assert wrong.returncode == 1
    assert "query 999999: not among the 300 of the record" in wrong.stderr
    shown = explain(str(tmp_path), name)
    assert "with 1 GPU more" in shown.stdout, shown.stderr
