"""The paper's experiments on the modelled profiles, simulated: each one a function that returns JSON.

For what each of them is, see "Workloads" and "Results" of the SuperServe paper (NSDI '25), section 6. The
paper's policy is `slackfit`; ours, the default, is `planfit`. Baselines are every fixed subnet (Clipper+)
and `mincost` (INFaaS).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.options import DEFAULT_POLICY
from loadgen.paper.figures import ENOUGH, N_GPUS, Point, ablation, throughput_range
from loadgen.results.run import in_time
from loadgen.simulator.faults import Fault
from loadgen.simulator.simulate import WITHOUT_HOST, SimSettings, simulate
from loadgen.simulator.workloads import parse_cluster
from loadgen.study.compare import MAF_QPS, Cell, Comparison, baselines, paper_cells, to_dict
from loadgen.study.rate_search import Bounds, highest_rate
from loadgen.traces.trace import Trace, load_trace
from profiles.table import load_profile
from superserve.clock import MS, SECOND

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from loadgen.results.run import Run

CNN, TRANSFORMER = "cnn-8gpu-modelled", "transformer-8gpu-modelled"
POLICIES = ("slackfit", DEFAULT_POLICY)
"""The paper's, and this system's default."""

SLO_NS = 36 * MS
TRANSFORMER_QPS, TRANSFORMER_SLO_MS = 1_150.0, "200"
FAULTS_TRACE = "bursty:base=1500,variant=2000,cv2=2"
"""3,500 q/s in the mean, the variant stream with a CV2 of 2."""
KILL_EVERY_S, FAULTS_S, N_KILLS = 12, 60, 4
DYNAMICS_TRACE = "bursty:base=1500,variant=5500,cv2=8"
GPUS_OF_SCALING = (1, 2, 4, 8, 16, 32, 64)
PER_MESSAGE = 8
"""Queries that the paper's clients send together in its scaling experiment."""
_BIN_S = 0.25  # seven SLOs: a bin shows a burst, and still has hundreds of queries
_MAF_S, _CELL_S, _DYNAMICS_S, _RANGE_S = 120.0, 30.0, 20.0, 10.0
SCALING_S = 4.0  # short: 64 GPUs take many queries a second


@dataclass(frozen=True, slots=True)
class ExperimentEffort:
    """How much of an experiment to run.

    Attributes:
        maf: A Functions 2019 file; None uses synthetic arrivals of its shape.
        n_processes: Simulations at a time.
        n_seeds: Of each cell with drawn arrivals.
        share: Of the full durations.
        say: Receives progress.
    """

    maf: str | None
    n_processes: int
    n_seeds: int
    share: float
    say: Callable[[str], None]

    def maf_trace(self, rate_qps: float) -> str:
        """Return MAF's arrivals at a rate, or a spec of their shape."""
        return self.maf or f"maf-like:rate={rate_qps:g}"

    def compare(
        self, cells: list[Cell], duration_s: float, *, policies: tuple[str, ...] = POLICIES, n_seeds: int = 1
    ) -> dict[str, Any]:
        """Simulate policies and baselines on cells, compute the bound, and simulate without the host too."""
        rivals = baselines(parse_cluster(cells[0].cluster)[0])
        seeds, duration_s = tuple(range(n_seeds)), duration_s * self.share
        comparison = Comparison((*policies, *rivals), seeds, duration_s, True, SimSettings())
        alone = Comparison(policies, seeds, duration_s, False, WITHOUT_HOST)
        found = to_dict(comparison, comparison.run(cells, n_processes=self.n_processes, say=self.say))
        others = to_dict(alone, alone.run(cells, n_processes=self.n_processes, say=self.say))
        for cell, other in zip(found["cells"], others["cells"], strict=True):
            cell["without_host"] = other["policies"]
        return found


def maf_cnn(effort: ExperimentEffort) -> dict[str, Any]:
    """MAF at 6,400 q/s for 120 s on eight GPUs, 36 ms."""
    return effort.compare([_cell("maf", effort.maf, MAF_QPS, CNN, "36")], _MAF_S)


def maf_transformer(effort: ExperimentEffort) -> dict[str, Any]:
    """MAF at 1,150 q/s for 120 s on eight GPUs, the transformer profile, 200 ms."""
    cell = _cell("maf transformer", effort.maf, TRANSFORMER_QPS, TRANSFORMER, TRANSFORMER_SLO_MS)
    return effort.compare([cell], _MAF_S)


def _cell(name: str, maf: str | None, rate_qps: float, profile: str, slo_ms: str) -> Cell:
    trace, rate = (f"maf-like:rate={rate_qps:g}", None) if maf is None else (maf, rate_qps)
    return Cell(name, trace, f"{profile}:{N_GPUS}", rate, slo_ms)


def bursty(effort: ExperimentEffort) -> dict[str, Any]:
    """Nine bursty cells: a constant stream and a bursty one, by rate and CV2."""
    return effort.compare(_cells("bursty"), _CELL_S, n_seeds=effort.n_seeds)


def accelerating(effort: ExperimentEffort) -> dict[str, Any]:
    """Nine cells whose rate climbs, by final rate and speed."""
    return effort.compare(_cells("accel"), _CELL_S, n_seeds=effort.n_seeds)


def policy_space(effort: ExperimentEffort) -> dict[str, Any]:
    """Every policy at 7,050 q/s, by CV2."""
    cells = [cell for cell in _cells("bursty") if " 5550 " in f" {cell.name} "]
    policies = (*POLICIES, "maxbatch", "maxacc")
    return effort.compare(cells, _CELL_S, policies=policies, n_seeds=effort.n_seeds)


def _cells(start: str) -> list[Cell]:
    return [cell for cell in paper_cells(CNN, N_GPUS, None) if cell.name.startswith(start)]


# --- faults, over time --------------------------------------------------------------------------


def faults(effort: ExperimentEffort) -> dict[str, Any]:
    """Eight workers, of which one is killed every 12 s for 60 s, at 3,500 q/s."""
    duration_s = FAULTS_S * effort.share
    kill_every_s = KILL_EVERY_S * effort.share
    trace = load_trace(FAULTS_TRACE, duration_s=duration_s, seed=1)
    kills = [Fault("kill", int((i + 1) * kill_every_s * SECOND), f"worker:{i}") for i in range(N_KILLS)]
    settings = replace(SimSettings(), gpus_per_process=1)
    runs = {}
    for policy in POLICIES:
        found = simulate(
            trace, [load_profile(CNN)] * N_GPUS, policy=policy, slo_ns=SLO_NS, faults=kills, settings=settings
        )
        runs[policy] = fault_figures(found.run, kill_every_s)
        effort.say(f"faults, {policy}")
    return {"trace": FAULTS_TRACE, "kill_every_s": kill_every_s, "runs": runs}


def fault_figures(run: Run, kill_every_s: float) -> dict[str, Any]:
    """Return a fault run's figures: in all, between each two kills, and in bins of time."""
    due_s = run.columns["due_ns"] / SECOND
    is_ok = in_time(run.columns, SLO_NS)
    spans = []
    for i in range(N_KILLS + 1):
        held = (due_s >= i * kill_every_s) & (due_s < (i + 1) * kill_every_s)
        spans.append({"live": N_GPUS - i, **_of(run, is_ok, held)})
    return {
        "slo_attainment": run.result.slo_attainment,
        "mean_accuracy": run.result.mean_accuracy,
        "queries": dict(run.result.queries),
        "spans": spans,
        "over_time": over_time(run, 1.0),
    }


def _of(run: Run, is_ok: npt.NDArray[np.bool_], held: npt.NDArray[np.bool_]) -> dict[str, Any]:
    good = held & is_ok
    accuracy = run.columns["accuracy"][good]
    return {
        "queries": int(held.sum()),
        "attainment": float(is_ok[held].mean()) if held.any() else None,
        "accuracy": float(accuracy.mean(dtype=np.float64)) if len(accuracy) else None,
    }


# --- dynamics -----------------------------------------------------------------------------------


def dynamics(effort: ExperimentEffort) -> dict[str, Any]:
    """What is served over time at 7,000 q/s."""
    trace = load_trace(DYNAMICS_TRACE, duration_s=_DYNAMICS_S * effort.share, seed=1)
    runs = {}
    for policy in POLICIES:
        run = simulate(trace, [load_profile(CNN)] * N_GPUS, policy=policy, slo_ns=SLO_NS).run
        runs[policy] = {
            "slo_attainment": run.result.slo_attainment,
            "mean_accuracy": run.result.mean_accuracy,
            "subnet_share": dict(run.result.subnet_share),
            "over_time": over_time(run, _BIN_S),
        }
        effort.say(f"dynamics, {policy}")
    return {"trace": DYNAMICS_TRACE, "runs": runs}


def over_time(run: Run, bin_s: float) -> dict[str, list[float | None]]:
    """Return a run in bins of `bin_s` seconds: rate, attainment, accuracy and batch size of each."""
    columns = run.columns
    place = (columns["due_ns"] / (bin_s * SECOND)).astype(np.int64)
    is_ok = in_time(columns, SLO_NS)
    found: dict[str, list[float | None]] = {
        "at_s": [],
        "qps": [],
        "attainment": [],
        "accuracy": [],
        "batch": [],
    }
    for i in range(int(place.max()) + 1):
        held = place == i
        one = _of(run, is_ok, held)
        sizes = columns["batch_size"][held & is_ok]
        found["at_s"].append(i * bin_s)
        found["qps"].append(one["queries"] / bin_s)
        found["attainment"].append(one["attainment"])
        found["accuracy"].append(one["accuracy"])
        found["batch"].append(float(sizes.mean()) if len(sizes) else None)
    return found


# --- scaling ------------------------------------------------------------------------------------


def scaling(effort: ExperimentEffort) -> dict[str, Any]:
    """The highest constant rate with an attainment of 0.999, by the number of GPUs.

    The paper serves one small model, ResNet-18; this serves the profile's smallest subnet alone.
    """
    profile = load_profile(CNN)
    policies = (f"fixed:{profile.subnets[0].name}", *POLICIES)
    size = profile.max_batch_size
    full_qps = size * SECOND / profile.latency_ns(0, size)
    points = []
    for n_gpus in GPUS_OF_SCALING:
        for policy in policies:

            def holds(rate_qps: float, n_gpus: int = n_gpus, policy: str = policy) -> bool:
                trace = _in_eights(rate_qps, SCALING_S * effort.share)
                settings = replace(SimSettings(), n_clients=max(1, n_gpus // 8))
                found = simulate(
                    trace, [profile] * n_gpus, policy=policy, slo_ns=SLO_NS, settings=settings
                ).result
                return (found.slo_attainment or 0.0) >= ENOUGH

            bounds = Bounds(
                start_qps=0.95 * full_qps * n_gpus, highest_qps=1.1 * full_qps * n_gpus, tolerance=0.03,
                lowest_qps=100.0, max_probes=5,
            )  # fmt: skip
            points.append({"gpus": n_gpus, "policy": policy, "rate_qps": highest_rate(holds, bounds)})
        effort.say(f"scaling, {n_gpus} GPUs")
    return {"per_gpu_qps": full_qps, "attainment": ENOUGH, "points": points}


def _in_eights(rate_qps: float, duration_s: float) -> Trace:
    """Return a constant rate whose queries come eight at a time."""
    n = max(1, int(rate_qps * duration_s / PER_MESSAGE))
    starts = (np.arange(n) * (PER_MESSAGE * SECOND / rate_qps)).astype(np.int64)
    due_ns = np.repeat(starts, PER_MESSAGE)
    words = f"constant {rate_qps:g} q/s, {PER_MESSAGE} at a time"
    return Trace(words, due_ns, max(int(duration_s * SECOND), int(due_ns[-1]) + 1), words)


# --- the two that loadgen.paper.figures has -----------------------------------------------------------


def actuation(effort: ExperimentEffort) -> dict[str, Any]:
    """What an actuation delay costs on MAF."""
    trace = effort.maf_trace(MAF_QPS)
    points: list[Point] = []
    for policy in POLICIES:
        points += ablation(load_profile(CNN), trace, duration_s=_MAF_S / 2 * effort.share, policy=policy)
        effort.say(f"actuation delay, {policy}")
    return {"points": [asdict(point) for point in points], "duration_s": _MAF_S / 2 * effort.share}


def rate_range(effort: ExperimentEffort) -> dict[str, Any]:
    """Accuracy by constant rate, up to the highest that holds."""
    profile = load_profile(CNN)
    policies = (*POLICIES, *(f"fixed:{subnet.name}" for subnet in profile.subnets))
    points = list(throughput_range(profile, duration_s=_RANGE_S * effort.share, policies=policies))
    effort.say("throughput range")
    return {"points": [asdict(point) for point in points], "attainment": ENOUGH}
