"""`python -m loadgen.demo`: a burst on this machine, served three times, and every claim about it checked.

The demo searches the digits supernet for subnets worth serving, and measures them on this machine's CPU. The
rates of a bursty trace follow from that profile, so that on any machine the largest subnet alone cannot keep
up, and the smallest has headroom. A router and one worker then serve it under the default policy, under
SlackFit, and with the largest subnet alone. The answers are compared with the true labels, and with the
very subnets that they name.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from gpu_worker.models import digits
from gpu_worker.models.names import DIGITS
from loadgen.demo import tables
from loadgen.demo.answers import (
    SAMPLE,
    SIGMAS,
    TOLERANCE_POINTS,
    answers_of,
    joined,
    local_forward,
    recompute,
    score,
    together,
)
from loadgen.demo.live import RECORDING
from loadgen.demo.load import sized_load
from loadgen.demo.serve import DemoServing, Served, until_met
from loadgen.demo.verdict import (
    MISSED,
    DemoVerdict,
    judge_serving,
    thin_answers,
    wrong_answers,
    wrong_coverage,
)
from loadgen.live.environment import environment_of
from loadgen.options import DEFAULT_POLICY
from loadgen.results.report import write_report
from loadgen.results.timeline import recorded
from profiles.measuring.measure import Device, Measurement, Setting, measure_supernet, save_measurement
from profiles.table import load_profile
from superserve.clock import SECOND, MonotonicClock
from superserve.errors import ConfigError
from superserve.files import write_whole
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from gpu_worker.models.digits import Images
    from loadgen.demo.load import DemoLoad
    from profiles.measuring.find import Found

FILES = {DEFAULT_POLICY: "adaptive.json", "slackfit": "slackfit.json", "fixed:largest": "largest.json"}
"""Where the result of each policy's run is written."""

BATCH_SIZES = (8, 16, 32)
# No smaller one: at the edge of a deadline SlackFit would run single queries, which is too slow to
# drain the backlog, because 8 cost only about twice as much as one.

_EFFORT = (8, 2)  # population and generations: measuring a subnet's accuracy takes part of a second
_N_SUBNETS = 6
_ROUNDS, _BUDGET_NS = 40, 5 * SECOND
_PATIENCE_S = 90.0
"""After serving this long no run is repeated."""
_NEEDED = {"torch": "torch", "safetensors": "safetensors", "sklearn": "scikit-learn", "psutil": "psutil",
           "matplotlib": "matplotlib"}  # fmt: skip


def check_installed() -> None:
    """Raise ConfigError if a package that the demo needs is missing."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not installed; try: pip install 'superserve[demo]'")


def search_here(path: Path) -> Found:
    """Search the digits supernet for subnets worth serving; write their profile and statistics."""
    from gpu_worker.engines.torch_executor import Placement  # noqa: PLC0415  they import torch
    from profiles.measuring.find import Request, find_profile  # noqa: PLC0415
    from profiles.measuring.search import SearchEffort  # noqa: PLC0415

    placement = Placement(threads=1, batch_sizes=BATCH_SIZES)
    request = Request(DIGITS, placement, SearchEffort(*_EFFORT), n_subnets=_N_SUBNETS)
    found = find_profile(request, name=path.stem, clock=MonotonicClock())
    found.write(path)
    return found


def measure_here(source: str | Path, path: Path) -> Measurement:
    """Measure the subnets of a profile on one thread of this machine's CPU, and write them to `path`."""
    setting = Setting(BATCH_SIZES, _ROUNDS, _BUDGET_NS)
    measurement = measure_supernet(
        DIGITS, load_profile(source), setting, Device(), name=path.stem, clock=MonotonicClock()
    )
    save_measurement(measurement, path, source)
    return measurement


def as_payloads(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return each image's bytes, (n, n_bytes)."""
    return np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)


def judge_answers(runs: Sequence[Served], images: Images, profile: Path) -> DemoVerdict:
    """Print how the answers compare with labels and local forward passes; return what is wrong."""
    answers = joined([answers_of(served.run) for served in runs])
    predicted = answers.logits.argmax(axis=1)
    subnets = runs[0].run.subnets
    scores = score(answers.rows, predicted, images.labels[answers.images], subnets)
    names = [name for name, _ in subnets]
    comparisons = recompute(answers, images.pixels, names, local_forward(profile, names))
    policies = " and ".join(served.policy for served in runs)
    click.echo(
        f"\nLabels that came back under {policies}, against the true ones (within\n"
        f"{TOLERANCE_POINTS} points where {SIGMAS:g} binomial sigmas of that many answers are less):"
    )
    scores.append(together(scores))
    _say(tables.score_lines(scores))
    click.echo(
        f"\nUp to {SAMPLE} outputs of each subnet, computed again here on that subnet and its neighbours:"
    )
    _say(tables.comparison_lines(comparisons))
    wrong = wrong_coverage(answers) + wrong_answers(scores, comparisons)
    return DemoVerdict(tuple(wrong), tuple(thin_answers(scores)))


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)


def profiled(out: Path) -> Measurement:
    """Search and measure the subnets, writing searched.json and profile.json under `out`."""
    click.echo("Searching the digits supernet for subnets worth serving (some 15 s) ...")
    found = search_here(out / "searched.json")
    click.echo(
        f"  {found.n_judged} subnets judged, {found.profile.n_subnets} pareto ones kept\n"
        "Measuring these on one thread of this machine's CPU (some 10 s) ..."
    )
    measurement = measure_here(out / "searched.json", out / "profile.json")
    _say(tables.profile_lines(measurement.profile.subnets, measurement.profile.batch_sizes))
    return measurement


def write_results(out: Path, runs: Sequence[Served], load: DemoLoad, seed: int) -> None:
    """Write each run's result and the page of all, and print them side by side."""
    environment = environment_of(
        trace=load.trace.provenance, seed=seed, cluster="one worker, the digits supernet"
    )
    results = [recorded(served.run, load.trace, load.slo_ns, environment) for served in runs]
    for served, result in zip(runs, results, strict=True):
        write_whole(out / FILES[served.policy], result.to_json())
    write_report(out / "report.html", results)
    click.echo("\nThe same queries, served under each policy:")
    _say(tables.side_by_side(results))


def demo(out: Path, seconds: float, slo_ms: float | None, seed: int) -> DemoVerdict:
    """Measure, serve under each policy, check; write the results under `out` and return what is wrong.

    Raises:
        SuperServeError: A package is missing, or a process did not start or died.
    """
    check_installed()
    out.mkdir(parents=True, exist_ok=True)
    measurement = profiled(out)
    load = sized_load(measurement, seconds=seconds, slo_ms=slo_ms, seed=seed)
    click.echo()
    _say(load.lines())
    _, images = digits.held_out_halves()  # those that the profile's accuracies were measured on
    serving = DemoServing(load, as_payloads(images.pixels), out / "profile.json")
    give_up_s = time.monotonic() + _PATIENCE_S  # on a slow machine the search took that long already
    runs = [
        until_met(partial(serving.serve, policy), missed, may_repeat=lambda: time.monotonic() < give_up_s)
        for policy, missed in MISSED.items()
    ]
    write_results(out, runs, load, seed)
    verdict = judge_serving(runs)
    return verdict + judge_answers(runs[:-1], images, out / "profile.json")


@click.command()
@click.option(
    "--out", default=Path("out/demo"), show_default=True, type=click.Path(file_okay=False, path_type=Path),
    help="Where the profile and the results are written.",
)  # fmt: skip
@click.option("--seconds", type=click.FloatRange(1, 3600), default=10.0, show_default=True, help="Of trace.")
@click.option(
    "--slo-ms", type=click.FloatRange(10, 10_000),
    help="[default: 150, or ten full batches of the largest subnet]",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the arrivals.")
@plain_errors(OSError)
def cli(out: Path, seconds: float, slo_ms: float | None, seed: int) -> None:
    """Serve a burst on this machine, adaptively and not, and check the answers."""
    verdict = demo(out, seconds, slo_ms, seed)
    written = ["searched.json", "profile.json", *FILES.values(), "report.html"]
    if (out / RECORDING).exists():
        written.append(RECORDING)
    click.echo(f"\nWritten: {', '.join(str(out / name) for name in written)}")
    _say(verdict.lines())
    if not verdict.failures and not verdict.warnings:
        click.echo("Every check held: deadlines met in the burst, and each answer by the subnet it names.")
    click.echo(
        "Next: .venv/bin/loadgen run --trace poisson:rate=2000 --duration 10 --emulate cnn-8gpu-modelled:8\n"
        "      make test"
    )
    sys.exit(verdict.exit_code)
