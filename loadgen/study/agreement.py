"""Do live runs and simulations of them agree? Run both, and compare them.

    python -m loadgen.study.agreement [--maf FILE] [--duration 20]

Each trace is offered live to emulated GPUs and simulated twice: with the simulator's quiet machine, and
with the delays in the live run's own logs (`loadgen.simulator.delays`), including stalls. A difference in
the second is the model's fault, in the first mostly this machine's.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loadgen import options
from loadgen.live.run import Emulation, RunSettings, run_emulated
from loadgen.simulator.delays import load_machine
from loadgen.simulator.simulate import SimSettings, simulate
from loadgen.study.compare import MAF_QPS
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from loadgen.results.result import RunResult
    from loadgen.traces.trace import Trace

ACCURACY_POINTS = 0.2
"""Most that mean accuracies may differ by and still agree."""

ATTAINMENT = 0.001
"""Most that attainments may differ by and still agree."""

BURSTY = "bursty:base=1500,variant=5550,cv2=8"


@dataclass(frozen=True, slots=True)
class Agreement:
    """A live run and its simulations.

    Attributes:
        live: The senders' figures.
        like: Simulated with the delays of the live run's machine.
        calm: Simulated with the simulator's own delays.
    """

    live: RunResult
    like: RunResult
    calm: RunResult

    @property
    def holds(self) -> bool:
        """Whether the run and its simulation on the same machine agree."""
        attainment, accuracy = differences(self.live, self.like)
        return abs(attainment) <= ATTAINMENT and abs(accuracy) <= ACCURACY_POINTS

    def lines(self) -> list[str]:
        """Return the lines to print."""
        found = [f"{self.live.trace}, {self.live.policy}: attainment, mean accuracy, mean batch size"]
        rows = {"live": self.live, "simulated, that machine": self.like, "simulated, a calm one": self.calm}
        for name, one in rows.items():
            line = (
                f"  {name:<24} {one.slo_attainment:.5f}  {one.mean_accuracy:.3f} %  {one.batch_size_mean:.2f}"
            )
            if one is not self.live:
                attainment, accuracy = differences(self.live, one)
                line += f"   {attainment:+.5f} {accuracy:+.3f} points"
            found.append(line)
        return found


def differences(live: RunResult, simulated: RunResult) -> tuple[float, float]:
    """Return how far a simulation's attainment and mean accuracy, in points, are above the live run's."""
    return (
        (simulated.slo_attainment or 0.0) - (live.slo_attainment or 0.0),
        (simulated.mean_accuracy or 0.0) - (live.mean_accuracy or 0.0),
    )


def agreement(trace: Trace, emulation: Emulation, slo_ns: int) -> Agreement:
    """Run a trace live and simulate it; the emulation must have a folder, for the logs."""
    assert emulation.folder is not None, "logs need a folder"
    run, _ = run_emulated(trace, RunSettings(slo_ns, grace_ns=500 * MS), emulation)
    cluster = [load_profile(emulation.profile)] * emulation.n_gpus
    settings = SimSettings(gpus_per_process=emulation.n_gpus)
    like = settings.like(load_machine(emulation.folder, trace))
    found = [
        simulate(trace, cluster, policy=emulation.policy, slo_ns=slo_ns, settings=one).result
        for one in (like, settings)
    ]
    return Agreement(run.result, *found)


@click.command()
@options.maf
@click.option("--duration", type=float, default=20.0, show_default=True, help="Seconds of each run.")
@click.option("--profile", default="cnn-8gpu-modelled", show_default=True)
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True)
@click.option("--slo-ms", type=click.FloatRange(0.1, 60_000), default=36.0, show_default=True)
@plain_errors()
def main(maf: str | None, duration: float, profile: str, gpus: int, slo_ms: float) -> None:
    """Run MAF at 6,400 q/s and a bursty trace live and simulated. Exit 1 unless both agree."""
    holds = True
    maf_trace = load_trace(maf or f"maf-like:rate={MAF_QPS:g}", rate_qps=MAF_QPS, duration_s=duration)
    for trace in (maf_trace, load_trace(BURSTY, duration_s=duration)):
        with tempfile.TemporaryDirectory(prefix="superserve-") as folder:
            emulation = Emulation(profile, gpus, folder=Path(folder), record=True)
            found = agreement(trace, emulation, int(slo_ms * MS))
        for line in found.lines():
            click.echo(line)
        holds = holds and found.holds
    verdict = "agree" if holds else "do NOT agree"
    click.echo(f"live and simulated {verdict} within {ACCURACY_POINTS} points and {ATTAINMENT} of attainment")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main(prog_name="python -m loadgen.study.agreement")
