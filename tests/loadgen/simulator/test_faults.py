"""Fault files are read, written and refused with the field at fault; faults do what they say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loadgen.simulator.faults import Fault, draw_faults, faults_json, load_faults
from loadgen.simulator.simulate import START_NS, SimSettings, Simulation, Workload, simulate
from loadgen.traces.trace import Trace, load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

CNN = load_profile("cnn-8gpu-modelled")
SLOW: dict[str, Any] = {"kind": "slow", "at_ms": 1, "peer": "worker:0", "factor": 1.3}


def written(tmp_path: Path, body: object) -> Path:
    """Return a file that holds `body` as JSON."""
    path = tmp_path / "faults.json"
    path.write_text(json.dumps(body))
    return path


@pytest.mark.parametrize("seed", range(30))
def test_faults_come_back_from_their_file(tmp_path: Path, seed: int) -> None:
    """Whatever a seed draws can be saved, and read again as it was."""
    faults = draw_faults(seed, n_processes=3, n_clients=2, duration_ns=500 * MS, n_faults=8)
    path = tmp_path / "faults.json"
    path.write_text(faults_json(faults))

    assert load_faults(path) == faults


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "slwo"}, r"faults\[0\]: kind: expected one of .*did you mean 'slow'"),
        ({"factor": "two"}, r"faults\[0\]: factor: expected a number from 0.01 to 1000, got 'two'"),
        ({"factor": None}, r"faults\[0\]: factor: missing"),
        ({"at_ms": -1}, r"faults\[0\]: at_ms: expected a number from 0"),
        ({"peer": "gpu:0"}, r"faults\[0\]: peer: expected worker:<number> or client:<number>, got 'gpu:0'"),
        ({"peer": "client:0"}, r"faults\[0\]: peer: slow befalls worker processes"),
        ({"slot": 0.5}, r"faults\[0\]: slot: expected a whole number"),
        ({"share": 1}, r"faults\[0\]: unknown key 'share': slow has"),
    ],
)
def test_a_malformed_fault_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """The error names the file, the fault, the field, and what was expected."""
    fault = {key: value for key, value in (SLOW | change).items() if value is not None}
    path = written(tmp_path, {"schema": 1, "faults": [fault]})

    with pytest.raises(ConfigError, match=said) as caught:
        load_faults(path)

    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "body", [[], {}, {"schema": 2, "faults": []}, {"schema": 1}, {"schema": 1, "faults": 3}]
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, body: object) -> None:
    """A wrong schema and a missing list have their own errors."""
    with pytest.raises(ConfigError, match=r"faults\.json: (expected|faults: expected)"):
        load_faults(written(tmp_path, body))


def test_a_fault_of_nobody_is_refused() -> None:
    """A process that does not take part cannot be killed: the error says which ones can."""
    with pytest.raises(ConfigError, match=r"peer: expected worker:0 to worker:0, got worker:3"):
        Simulation([CNN], faults=[Fault("kill", MS, "worker:3")])


def test_a_fault_of_a_gpu_that_is_not_there_is_refused() -> None:
    """A process of two GPUs has no slot 2: the error says which it has."""
    fault = Fault("slow", MS, "worker:0", None, 2.0, slot=2)

    with pytest.raises(ConfigError, match=r"slow at 1 ms: slot: worker:0 has slots 0 to 1, got 2"):
        Simulation([CNN] * 2, faults=[fault])


def test_a_frozen_process_reports_when_it_thaws() -> None:
    """Its GPU goes on, but nobody hears of it: what the only worker holds is answered after, and once."""
    trace = Trace("one", np.array([50 * MS]), 100 * MS, "made by a test")

    found = simulate(trace, [CNN], slo_ns=1_000 * MS, faults=[Fault("freeze", 52 * MS, "worker:0", 150 * MS)])

    assert found.result.queries["ok"] == 1
    assert found.run.n_duplicates == 0
    assert found.columns["answered_ns"][0] >= 202 * MS


@pytest.mark.parametrize("kind", ["kill", "vanish"])
def test_work_of_a_process_that_ends_is_done_by_another(kind: str) -> None:
    """With slack left nothing is lost, whether a send fails or only silence shows the loss."""
    trace = Trace("even", np.arange(0, 200 * MS, 10 * MS), 200 * MS, "made by a test")
    faults = [Fault(kind, 101 * MS, "worker:0")]

    found = simulate(
        trace, [CNN] * 2, slo_ns=2_000 * MS, faults=faults, settings=SimSettings(gpus_per_process=1)
    )

    assert found.result.queries["ok"] == trace.n


def test_a_revived_process_serves_again() -> None:
    """Killed and started again, the only worker of a cluster answers what comes after."""
    trace = Trace("late", np.array([700 * MS]), 800 * MS, "made by a test")
    faults = [Fault("kill", 100 * MS, "worker:0"), Fault("revive", 300 * MS, "worker:0")]

    assert simulate(trace, [CNN], faults=faults).result.queries["ok"] == 1
    assert simulate(trace, [CNN], faults=faults[:1]).result.queries["ok"] == 0


def test_online_correction_converges_when_a_gpu_throttles() -> None:
    """A GPU that slows by 30 % is known to be that slow, the others are not, and its recovery is seen."""
    trace = load_trace("poisson:rate=1500", duration_s=8.0, seed=2)
    faults = [Fault("slow", 1_000 * MS, "worker:0", 4_000 * MS, 1.3, slot=0)]
    simulation = Simulation([CNN] * 2, faults=faults)
    simulation.offer(Workload(trace))

    def after(at_ms: int) -> tuple[float, float, float]:
        """Return slowdowns: of the subnet that the first GPU runs most, of it as a whole, of the other."""
        simulation.run(START_NS + at_ms * MS)
        first, second = next(iter(simulation.core.peers.values())).workers
        return first.correction.of_subnet(CNN.row("cnn-78.25")), first.slowdown, second.slowdown

    assert after(990) == pytest.approx((1.0, 1.0, 1.0), abs=0.01)
    assert after(1_990)[0] == pytest.approx(1.3, abs=0.03)  # some 50 batches, of which half ran on it
    assert after(4_990) == pytest.approx((1.3, 1.3, 1.0), abs=0.01)
    assert after(7_990) == pytest.approx((1.0, 1.0, 1.0), abs=0.01)


@pytest.mark.parametrize("policy", ["planfit", "demandfit", "slackfit", "mincost"])
@pytest.mark.parametrize("delay_ms", [20, 80])
def test_a_stall_costs_the_queries_of_its_time_and_no_later_ones(policy: str, delay_ms: int) -> None:
    """The ways are known as longer than any slack then, and still what comes afterwards is served."""
    qps, stall_ms, slo_ms = 2_000, 100, 36
    trace = load_trace(f"poisson:rate={qps}", duration_s=3.0, seed=1)
    faults = [
        Fault("delay", 500 * MS, peer, stall_ms * MS, delay_ms * MS) for peer in ("worker:0", "client:0")
    ]

    run = simulate(
        trace, [CNN] * 8, policy=policy, slo_ns=slo_ms * MS, settings=SimSettings(), faults=faults, seed=1
    )  # fmt: skip

    lost = run.result.queries["total"] - run.result.queries["ok"]
    assert 0 < lost <= qps * (stall_ms + delay_ms + slo_ms) / 1_000 * 1.1
