"""The paper's experiments that run live: real processes, emulated GPUs, messages on loopback."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_worker.serve.eventlog import check_logs
from loadgen.live.run import Emulation, RunSettings, emulated, run_emulated, run_trace
from loadgen.paper.experiments import (
    CNN,
    FAULTS_S,
    FAULTS_TRACE,
    KILL_EVERY_S,
    N_KILLS,
    SLO_NS,
    fault_figures,
)
from loadgen.paper.figures import N_GPUS
from loadgen.results.calm import await_calm
from loadgen.study.compare import MAF_QPS
from loadgen.traces.trace import load_trace
from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadgen.live.run import Cluster
    from loadgen.paper.experiments import ExperimentEffort
    from loadgen.results.run import Run
    from loadgen.traces.trace import Trace

BURSTY_CELLS = {
    "bursty 2950 cv2 4": "bursty:base=1500,variant=2950,cv2=4",
    "bursty 4900 cv2 8": "bursty:base=1500,variant=4900,cv2=8",
}
"""The two cells that run live, a moderate and a hard one."""

ATTEMPTS = 2
"""A run that was invalid or disturbed is made once more; the page reports both."""

_MAF_S, _BURSTY_S = 120.0, 30.0
_CALM_NS = 2 * MS  # a sleeper's p99 delay on a machine that is not busy


def maf_live(effort: ExperimentEffort, policy: str) -> dict[str, Any]:
    """MAF at 6,400 q/s for 120 s on eight emulated GPUs."""
    trace = load_trace(
        effort.maf_trace(MAF_QPS), rate_qps=None if effort.maf is None else MAF_QPS,
        duration_s=_MAF_S * effort.share,
    )  # fmt: skip
    return _repeated(partial(_offered, trace, policy), effort, f"live MAF, {policy}")


def bursty_live(effort: ExperimentEffort, policy: str) -> dict[str, Any]:
    """Two bursty cells on eight emulated GPUs."""
    found = {}
    for name, spec in BURSTY_CELLS.items():
        trace = load_trace(spec, duration_s=_BURSTY_S * effort.share)
        found[name] = _repeated(partial(_offered, trace, policy), effort, f"live {name}, {policy}")
    return found


def _offered(trace: Trace, policy: str) -> dict[str, Any]:
    run, report = run_emulated(trace, RunSettings(SLO_NS), Emulation(CNN, N_GPUS, policy))
    return {**_figures(run), "violations": report.n_violations}


def _repeated(once: Callable[[], dict[str, Any]], effort: ExperimentEffort, what: str) -> dict[str, Any]:
    """Return the first run that is neither invalid nor disturbed, or the last, with the others attached."""
    set_aside: list[dict[str, Any]] = []
    while True:
        await_calm(_CALM_NS)
        found = once()
        effort.say(
            f"{what}: attainment {found['slo_attainment']:.5f}, accuracy {found['mean_accuracy']:.3f} %"
            f"{'' if found['valid'] else ', INVALID'}{', disturbed' if found['disturbed'] else ''}"
        )
        spoiled = not found["valid"] or found["disturbed"]
        if not spoiled or len(set_aside) + 1 >= ATTEMPTS:
            return {**found, "set_aside": set_aside}
        set_aside.append(found)


def _figures(run: Run) -> dict[str, Any]:
    result = run.result
    return {
        "slo_attainment": result.slo_attainment,
        "mean_accuracy": result.mean_accuracy,
        "offered_qps": result.offered_qps,
        "duration_s": result.duration_s,
        "queries": dict(result.queries),
        "latency_ms": dict(result.latency_ms),
        "send_lag_ms": dict(result.send_lag_ms),
        "noise_p99_9_ms": None if run.noise_p99_9_ns is None else run.noise_p99_9_ns / MS,
        "subnet_share": dict(result.subnet_share),
        "duplicates": run.n_duplicates,
        "valid": result.valid,
        "invalid_because": list(result.invalid_because),
        "disturbed": result.disturbed,
    }


# --- faults -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kills:
    """Kills worker processes of a cluster in order, when a run's progress passes their instants.

    Attributes:
        after: For each kill, the number of queries sent by then.
        n_killed: How many have been killed.
    """

    cluster: Cluster
    after: tuple[int, ...]
    n_killed: int = 0

    def watch(self, progress: dict[str, int]) -> None:
        """Take a run's progress, and SIGKILL what is due, in a thread, because it waits for the end."""
        while self.n_killed < len(self.after) and progress["sent"] >= self.after[self.n_killed]:
            worker = self.cluster.workers[self.n_killed]
            self.n_killed += 1
            threading.Thread(target=worker.kill).start()


def faults_live(effort: ExperimentEffort, policy: str) -> dict[str, Any]:
    """Eight worker processes at 3,500 q/s, one of them killed by SIGKILL every 12 s for 60 s."""
    trace = load_trace(FAULTS_TRACE, duration_s=FAULTS_S * effort.share, seed=1)
    once = partial(_with_kills, trace, KILL_EVERY_S * effort.share, policy)
    return _repeated(once, effort, f"live faults, {policy}")


def _with_kills(trace: Trace, kill_every_s: float, policy: str) -> dict[str, Any]:
    instants_ns = [int((i + 1) * kill_every_s * 1e9) for i in range(N_KILLS)]
    after = tuple(int((trace.due_ns < instant).sum()) for instant in instants_ns)
    with tempfile.TemporaryDirectory(prefix="superserve-") as name:
        emulation = Emulation(CNN, N_GPUS, policy, n_processes=N_GPUS, folder=Path(name))
        with emulated(emulation) as cluster:
            kills = Kills(cluster, after)
            run = run_trace(trace, RunSettings(SLO_NS), cluster.client_endpoint, kills.watch)
        report = check_logs(cluster.event_logs[kills.n_killed :])  # a killed process's log may end anywhere
    assert kills.n_killed == N_KILLS, "progress is reported to the end"
    figures = {**_figures(run), **fault_figures(run, kill_every_s)}
    return {**figures, "kill_every_s": kill_every_s, "violations": report.n_violations}
