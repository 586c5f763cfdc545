"""A live run and its simulation on the same machine agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadgen.live.run import Emulation
from loadgen.simulator.delays import MachineDelays, Series, load_machine
from loadgen.simulator.simulate import SimSettings, simulate
from loadgen.study.agreement import agreement, differences
from loadgen.traces.trace import Trace, load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.calm import judged_live

if TYPE_CHECKING:
    from pathlib import Path

CNN = load_profile("cnn-8gpu-modelled")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(180)
@judged_live
def test_a_live_run_and_its_simulation_agree(tmp_path: Path) -> None:
    """Simulated on the machine that the live run met, attainment and accuracy are nearly the same.

    Wider than what `python -m loadgen.study.agreement` holds runs of 20 s to: this one is short.
    """
    # As much for each GPU as eight get of 5,000 q/s, and a quarter of the work for sender and router.
    trace = load_trace("poisson:rate=1250", duration_s=4.0, seed=1)

    found = agreement(trace, Emulation("cnn-8gpu-modelled", 2, folder=tmp_path, record=True), 36 * MS)

    attainment, accuracy = differences(found.live, found.like)
    assert abs(attainment) < 0.02, "\n".join(found.lines())
    assert abs(accuracy) < 0.4, "\n".join(found.lines())


def test_messages_take_what_they_took_at_that_moment() -> None:
    """A stall of a live run's machine makes just the queries late that met it there."""
    trace = Trace("two", np.array([10 * MS, 200 * MS]), 300 * MS, "made by a test")
    calm = Series(np.array([0]), np.array([100_000]))
    stalled = Series(np.array([0, 8 * MS, 150 * MS]), np.array([100_000, 60 * MS, 100_000]))
    machine = MachineDelays(
        calm, stalled, calm, trace.due_ns, trace.due_ns + 200_000, np.arange(0, 300 * MS, MS)
    )

    found = simulate(trace, [CNN], slo_ns=1_000 * MS, settings=SimSettings().like(machine))

    latency_ns = found.columns["answered_ns"] - trace.due_ns
    assert latency_ns[0] > 55 * MS  # what was sent at 8 ms was held until 68
    assert latency_ns[1] < 40 * MS


def test_a_folder_without_logs_is_refused(tmp_path: Path) -> None:
    """The error names the file that is missing."""
    trace = load_trace("poisson:rate=100", duration_s=1.0)

    with pytest.raises(ConfigError, match=r"router\.jsonl: expected a readable event log"):
        load_machine(tmp_path, trace)


@pytest.mark.parametrize("log", [b"", b"[]\n", b'{"schema":1}\n[1,"advance",[]]\n'])
def test_a_log_of_another_version_is_refused(tmp_path: Path, log: bytes) -> None:
    """Older logs hold reports in another shape: the error says which version is expected."""
    (tmp_path / "router.jsonl").write_bytes(log)

    with pytest.raises(ConfigError, match=r"router\.jsonl: expected a router's event log of schema 2"):
        load_machine(tmp_path, load_trace("poisson:rate=100", duration_s=1.0))
