"""`python -m loadgen.demo`: a burst on this machine, served twice, and every claim about it checked.

The digits supernet is searched for subnets worth serving, and these are measured on this machine's
CPU; the rates of a bursty trace follow from that profile, so that the largest subnet alone cannot
keep up on any machine. A router and one worker then serve it under SlackFit, and again with the
largest subnet alone. What came back is held against the true labels, and against the very subnets
named in the answers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gpu_worker.models import digits
from gpu_worker.models.names import DIGITS
from loadgen.live.environment import environment_of
from loadgen.live.run import RunSettings, run_trace
from loadgen.results.report import write_report
from loadgen.results.timeline import recorded
from loadgen.traces.trace import load_trace
from profiles.measuring.measure import Device, Measurement, Setting, measure_supernet, save_measurement
from profiles.table import load_profile, statistics_path
from superserve.clock import MonotonicClock
from superserve.errors import ConfigError, ProcessError, SuperServeError
from superserve.files import write_whole
from superserve.roles import local
from superserve.subnet import Subnet
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from gpu_worker.models.digits import Images
    from loadgen.results.result import RunResult
    from loadgen.results.run import Run
    from loadgen.traces.trace import Trace
    from profiles.measuring.find import Found
    from profiles.table import SubnetProfile

MS = 1_000_000
SECOND = 1_000_000_000

POLICIES = ("slackfit", "fixed:largest")
"""The two runs; their results are adaptive.json and largest.json."""

BATCH_SIZES = (8, 16, 32)
# None smaller: at the edge of a deadline SlackFit would take single queries, too slow to
# drain what waits, where 8 cost about twice one.
TOLERANCE_POINTS = 1.5
"""How far measured accuracy may lie from the profile's, where it is judged."""

SAMPLE = 50
"""Answers of each subnet that are computed again here."""

ATTAINED, NOT_ATTAINED = 0.99, 0.9
"""Adaptive serving attains the one at least, the largest subnet alone less than the other."""

_SIGMAS = 3.0
_LOAD = 1.2  # times what the largest subnet can do at its quickest
_BASE_SHARE = 0.35  # of the load, as a constant stream; the rest comes in bursts
_CV2 = 40.0  # of the bursts
_EFFORT = (12, 3)  # population and generations: accuracy is measured, each subnet in part of a second
_N_SUBNETS = 8
_ROUNDS, _BUDGET_NS = 40, 6 * SECOND
_MARGIN_MS = 10.0  # held back by the router: all processes share this machine's cores
_CLOSE = 1e-4  # relative and absolute: a batch's size moves logits by some 1e-6
_NEEDED = {"torch": "torch", "safetensors": "safetensors", "sklearn": "scikit-learn", "psutil": "psutil",
           "matplotlib": "matplotlib"}  # fmt: skip


# --- what is offered --------------------------------------------------------------------------


def capacity_qps(batch_sizes: Sequence[int], latency_ns: Sequence[float]) -> float:
    """Return the most queries a second of one subnet, at its best batch size."""
    return max(size * SECOND / ns for size, ns in zip(batch_sizes, latency_ns, strict=True))


def burst_spec(capacity: float) -> str:
    """Return the spec of a bursty trace that overloads a subnet of this capacity, queries a second."""
    mean_qps = _LOAD * capacity
    base = round(_BASE_SHARE * mean_qps)
    return f"bursty:base={base},variant={round(mean_qps) - base},cv2={_CV2:g}"


def quickest_qps(measurement: Measurement) -> float:
    """Return the capacity of the largest subnet by its least latencies.

    The medians may have been measured beside other work that is gone by the time it serves.
    """
    largest = measurement.profile.subnets[-1].name
    least_ns = [ms * MS for ms in measurement.raw[largest]["min_ms"]]
    return capacity_qps(measurement.profile.batch_sizes, least_ns)


# --- what came back ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """How well the answers of one subnet read the digits.

    Attributes:
        name: The subnet's.
        n: Answers scored.
        n_right: Those whose largest logit is at the true label.
        profiled: The profile's accuracy, percent.
    """

    name: str
    n: int
    n_right: int
    profiled: float

    @property
    def measured(self) -> float | None:
        """Percent of the answers that are right; None without any."""
        return 100 * self.n_right / self.n if self.n else None

    @property
    def is_judged(self) -> bool:
        """Whether there are enough answers for the tolerance to mean something."""
        return self.n >= enough(self.profiled)

    @property
    def is_off(self) -> bool:
        """Whether it is judged, and lies outside the tolerance."""
        return self.is_judged and abs((self.measured or 0.0) - self.profiled) > TOLERANCE_POINTS

    def interval(self) -> tuple[float, float]:
        """Return the accuracies, in percent, that these answers leave plausible at 3 sigma.

        Source: the score interval for a binomial share, Wilson (1927).
        """
        if not self.n:
            return 0.0, 100.0
        z2, share = _SIGMAS**2 / self.n, self.n_right / self.n
        middle = (share + z2 / 2) / (1 + z2)
        reach = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
        return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def enough(accuracy: float) -> int:
    """Return how many answers make 3 binomial sigmas fit into the tolerance.

    Payloads are drawn with replacement from the very images that the profile's accuracy was
    counted on, so the answers are that many independent draws: a subnet that is what it says
    falls outside the tolerance once in 370 times at this number, and more rarely above it.

    Args:
        accuracy: Percent.
    """
    share, tolerance = accuracy / 100, TOLERANCE_POINTS / 100
    n = _SIGMAS**2 * share * (1 - share) / tolerance**2
    return max(1, math.ceil(n * (1 - 1e-12)))  # not one more for a rounding error


def score(
    rows: npt.NDArray[np.integer[Any]],
    predicted: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    subnets: Sequence[tuple[str, float]],
) -> list[Score]:
    """Score answers by subnet.

    Args:
        rows: The subnet that each answer names, shape (n,).
        predicted: The digit that each answer reads, shape (n,).
        labels: The digit that was shown, shape (n,).
        subnets: Name and accuracy (percent) of each row.
    """
    n = np.bincount(rows, minlength=len(subnets))
    n_right = np.bincount(rows[predicted == labels], minlength=len(subnets))
    return [
        Score(name, int(n[row]), int(n_right[row]), accuracy) for row, (name, accuracy) in enumerate(subnets)
    ]


@dataclass(frozen=True, slots=True)
class DemoComparison:
    """Answers of one subnet beside a local forward of the same images.

    Attributes:
        name: The subnet's.
        n: Answers compared.
        n_same: Those that the subnet itself gives here, within 1e-4.
        n_telling: Those that no neighbouring subnet gives: only they show which subnet ran.
    """

    name: str
    n: int
    n_same: int
    n_telling: int

    @property
    def is_proof(self) -> bool:
        """Whether every answer is this subnet's and could not have been a neighbour's."""
        return self.n == self.n_same == self.n_telling


def compare(
    name: str,
    answers: npt.NDArray[np.float32],
    own: npt.NDArray[np.float32],
    neighbours: Sequence[npt.NDArray[np.float32]],
) -> DemoComparison:
    """Compare the logits that came back, (n, classes), with those of the subnet and its neighbours."""
    could_be_theirs = np.any([_is_close(own, neighbour) for neighbour in neighbours], axis=0)
    n_telling = len(answers) - int(could_be_theirs.sum())
    return DemoComparison(name, len(answers), int(_is_close(answers, own).sum()), n_telling)


def _is_close(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isclose(a, b, rtol=_CLOSE, atol=_CLOSE).all(axis=1), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class ServedAnswers:
    """The answers of a run whose output was kept, shape (n, ...): subnet rows, images, logits."""

    rows: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]  # index into the held-out set
    logits: npt.NDArray[np.float32]  # (n, classes)
    n_left_out: int = 0  # answers whose output is all zeros, as no logits of an image are


def answers_of(run: Run) -> ServedAnswers:
    """Take the answers out of a run's columns.

    Raises:
        ConfigError: It brought no outputs.
    """
    columns = run.columns
    if "outputs" not in columns:
        raise ConfigError("no query of the run was answered with an output")
    has_output = np.flatnonzero(columns["status"] <= Status.LATE)
    # Nothing but zeros: logits of a real image never are, so this output was not kept.
    kept = has_output[columns["outputs"][has_output].any(axis=1)]
    logits = np.ascontiguousarray(columns["outputs"][kept]).view(np.float32)
    rows = columns["subnet"][kept].astype(np.int64)
    return ServedAnswers(rows, columns["payload"][kept], logits, len(has_output) - len(kept))


def wrong_coverage(answers: ServedAnswers) -> list[str]:
    """Return a line if any answer came without an output: of real logits, not all are zero."""
    n, n_out = len(answers.rows) + answers.n_left_out, answers.n_left_out
    if not n_out:
        return []
    return [f"outputs: expected one with every answer, got none with {n_out:,} of {n:,}"]


def sample(rows: npt.NDArray[np.int64], row: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the indices of up to `SAMPLE` answers of one subnet, drawn without replacement."""
    found = np.flatnonzero(rows == row)
    return np.sort(rng.choice(found, min(SAMPLE, len(found)), replace=False))


def recompute(
    answers: ServedAnswers,
    pixels: npt.NDArray[np.float32],
    names: Sequence[str],
    forward: Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]],
) -> list[DemoComparison]:
    """Compute a sample of every subnet's answers again, on that subnet and on its neighbours."""
    rng = np.random.default_rng(0)
    comparisons = []
    for row, name in enumerate(names):
        chosen = sample(answers.rows, row, rng)
        if not len(chosen):
            continue
        shown = pixels[answers.images[chosen]]
        neighbours = [forward(near, shown) for near in (row - 1, row + 1) if 0 <= near < len(names)]
        comparisons.append(compare(name, answers.logits[chosen], forward(row, shown), neighbours))
    return comparisons


# --- what must hold ---------------------------------------------------------------------------


def wrong_serving(adaptive: RunResult, largest: RunResult) -> list[str]:
    """Return what is wrong with the two runs' attainments, a line each."""
    wrong = [
        f"the run under {result.policy} does not count: {'; '.join(result.invalid_because)}"
        for result in (adaptive, largest)
        if not result.valid
    ]
    attained, alone = adaptive.slo_attainment or 0.0, largest.slo_attainment or 0.0
    if attained < ATTAINED:
        hint = " (disturbed: other work kept this machine from it)" if adaptive.disturbed else ""
        wrong.append(f"adaptive attainment: expected at least {ATTAINED}, got {attained:.4f}{hint}")
    if alone >= NOT_ATTAINED:
        wrong.append(f"attainment of the largest subnet: expected below {NOT_ATTAINED}, got {alone:.4f}")
    return wrong


def wrong_answers(scores: Sequence[Score], comparisons: Sequence[DemoComparison]) -> list[str]:
    """Return what is wrong with the labels and outputs that came back, a line each."""
    wrong = [
        f"labels of {one.name}: expected {one.profiled:.2f} % right within {TOLERANCE_POINTS} points, "
        f"got {one.measured:.2f} % of {one.n:,}"
        for one in scores
        if one.is_off
    ]
    if not any(one.is_judged for one in scores):
        wrong.append("labels: no subnet answered enough queries to be judged; try more --seconds")
    for one in comparisons:
        if one.n_same < one.n:
            wrong.append(f"outputs of {one.name}: {one.n - one.n_same} of {one.n} are not that subnet's")
        if one.n_telling < one.n:
            wrong.append(
                f"outputs of {one.name}: {one.n - one.n_telling} of {one.n} could be a neighbour's: no proof"
            )
    return wrong


# --- what is printed --------------------------------------------------------------------------


def profile_lines(subnets: Sequence[SubnetProfile], batch_sizes: Sequence[int]) -> list[str]:
    """Return the measured profile as a small table."""
    first, last = batch_sizes[0], batch_sizes[-1]
    lines = [f"  {'subnet':<22}{'accuracy':>10}{f'batch {first}':>12}{f'batch {last}':>12}{'at best':>14}"]
    for one in subnets:
        qps = capacity_qps(batch_sizes, one.latency_ns)
        lines.append(
            f"  {one.name:<22}{one.accuracy:>8.2f} %{one.latency_ns[0] / MS:>9.2f} ms"
            f"{one.latency_ns[-1] / MS:>9.2f} ms{qps:>10,.0f} q/s"
        )
    return lines


def side_by_side(results: Sequence[RunResult]) -> list[str]:
    """Return one table of runs of the same trace, a column each."""
    rows = [("policy", *(result.policy for result in results))]
    rows.append(("SLO attainment", *(_figure(result.slo_attainment, ".4f") for result in results)))
    rows.append(("mean accuracy", *(_figure(result.mean_accuracy, ".2f", " %") for result in results)))
    rows.append(("goodput", *(f"{result.goodput_qps:,.0f} q/s" for result in results)))
    for name in ("p50", "p99"):
        cells = (_figure(result.latency_ms[name], ".1f", " ms") for result in results)
        rows.append((f"latency {name}", *cells))
    rows.append(("batch size, mean", *(_figure(result.batch_size_mean, ".1f") for result in results)))
    for name in results[0].subnet_share:
        cells = (f"{result.subnet_share.get(name, 0.0):.1%}" for result in results)
        rows.append((f"  {name}", *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(results) + 1)]
    return [
        f"  {row[0]:<24}"
        + "".join(f"{cell:>{width + 4}}" for cell, width in zip(row[1:], widths, strict=True))
        for row in rows
    ]


def score_lines(scores: Sequence[Score]) -> list[str]:
    """Return the table of labels scored by subnet."""
    lines = [f"  {'subnet':<22}{'answers':>9}{'right':>10}{'profile':>10}{'difference':>12}"]
    for one in scores:
        if one.measured is None:
            lines.append(f"  {one.name:<22}{0:>9}  served no query")
            continue
        low, high = one.interval()
        words = "within" if not one.is_off else "OFF"
        if not one.is_judged:
            words = f"too few to judge (needs {enough(one.profiled):,}): {low:.1f} to {high:.1f} %"
        lines.append(
            f"  {one.name:<22}{one.n:>9,}{one.measured:>8.2f} %{one.profiled:>8.2f} %"
            f"{one.measured - one.profiled:>+12.2f}  {words}"
        )
    return lines


def comparison_lines(comparisons: Sequence[DemoComparison]) -> list[str]:
    """Return the table of answers computed again."""
    return [
        f"  {one.name:<22}{one.n_same:>4} of {one.n} are its own, {one.n_telling} of them nobody else's"
        for one in comparisons
    ]


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


# --- the demo itself --------------------------------------------------------------------------


def check_installed() -> None:
    """Raise ConfigError if a package that the demo needs is missing."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not installed; try: pip install 'superserve[demo]'")


def search_here(path: Path) -> Found:
    """Search the digits supernet for subnets worth serving, and write their profile, and their statistics."""
    from gpu_worker.engines.torch_executor import Placement  # noqa: PLC0415  they import torch
    from profiles.measuring.find import Request, find_profile  # noqa: PLC0415
    from profiles.measuring.search import SearchEffort  # noqa: PLC0415

    placement = Placement(threads=1, batch_sizes=BATCH_SIZES)
    request = Request(DIGITS, placement, SearchEffort(*_EFFORT), n_subnets=_N_SUBNETS)
    found = find_profile(request, name=path.stem, clock=MonotonicClock())
    found.write(path)
    return found


def measure_here(source: str | Path, path: Path) -> Measurement:
    """Measure the subnets of a profile on one thread of this machine's CPU, and write theirs to `path`."""
    setting = Setting(BATCH_SIZES, _ROUNDS, _BUDGET_NS)
    measurement = measure_supernet(
        DIGITS, load_profile(source), setting, Device(), name=path.stem, clock=MonotonicClock()
    )
    save_measurement(measurement, path, source)
    return measurement


@contextlib.contextmanager
def serving(policy: str, profile: Path) -> Iterator[str]:
    """Have a cluster on this machine serve by `profile`; give its client endpoint, and stop it at the end.

    Its state lies beside the profile, so that it is nobody's but the demo's, and the next
    demo finds one that this demo could not stop because it was killed.

    Raises:
        ProcessError: It did not start or stop; quotes what `cluster` said.
    """
    state = profile.parent / "cluster"
    if local.names(state):
        _cluster(state, "down")
    try:
        _cluster(
            state, "up", "--policy", policy, "--margin-ms", str(_MARGIN_MS), "--device", "cpu",
            "--supernet", "digits", "--profile", str(profile), "--ready-timeout-s", "120",
        )  # fmt: skip
        yield local.running(state).client_endpoint
    finally:
        _cluster(state, "down")
    shutil.rmtree(state)  # the logs of a cluster that did what it should


def _cluster(state: Path, verb: str, *options: str) -> None:
    """Run `cluster` for the demo's own cluster; ProcessError, with what it said, if it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cluster", verb, "--name", "demo", *options],
        env={**os.environ, local.STATE_VARIABLE: str(state)}, text=True, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise ProcessError(f"cluster {verb}: exit code {done.returncode}:\n{done.stdout.rstrip()}")


def offer(policy: str, trace: Trace, profile: Path, settings: RunSettings) -> Run:
    """Serve the trace under one policy, saying now and then how far it is."""
    click.echo(f"Serving it under {policy}: starting a router and a worker ...")
    with serving(policy, profile) as endpoint:
        return run_trace(trace, settings, endpoint, _progress(trace))


def _progress(trace: Trace) -> Callable[[dict[str, int]], None]:
    """Return what prints a line every 5 seconds."""
    began_s = time.monotonic()
    next_s = began_s + 5.0

    def show(total: dict[str, int]) -> None:
        nonlocal next_s
        now_s = time.monotonic()
        if now_s < next_s:
            return
        next_s = now_s + 5.0
        waiting = total["sent"] - total["answered"]
        click.echo(f"  {now_s - began_s:4.0f} s  {total['sent']:,} of {trace.n:,} sent, {waiting:,} waiting")

    return show


def as_payloads(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return each image's bytes, (n, n_bytes)."""
    return np.ascontiguousarray(pixels).reshape(len(pixels), -1).view(np.uint8)


def local_forward(
    profile: str | Path, names: Sequence[str]
) -> Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Return a forward of the same supernet in this process: a row of `names` and images to logits."""
    from gpu_worker.engines.torch_executor import Placement, TorchExecutor  # noqa: PLC0415  it imports torch

    rows = {row.name: row for row in load_profile(profile).subnets}
    subnets = [Subnet(name, rows[name].control) for name in names]
    executor = TorchExecutor.load(
        DIGITS, subnets, statistics=statistics_path(profile), placement=Placement(threads=1)
    )
    return executor.execute


def judge_answers(run: Run, images: Images, profile: Path) -> list[str]:
    """Print how the answers compare with labels and local forwards; return what is wrong."""
    answers = answers_of(run)
    predicted = answers.logits.argmax(axis=1)
    scores = score(answers.rows, predicted, images.labels[answers.images], run.subnets)
    names = [name for name, _ in run.subnets]
    comparisons = recompute(answers, images.pixels, names, local_forward(profile, names))
    click.echo(
        f"\nLabels that came back, against the true ones (within {TOLERANCE_POINTS} points where\n"
        f"{_SIGMAS:g} binomial sigmas of so many answers are less than that):"
    )
    _say(score_lines(scores))
    click.echo(
        f"\nUp to {SAMPLE} outputs of each subnet, computed again here on that subnet and its neighbours:"
    )
    _say(comparison_lines(comparisons))
    return wrong_coverage(answers) + wrong_answers(scores, comparisons)


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)


def demo(out: Path, seconds: float, slo_ms: float, seed: int) -> list[str]:
    """Measure, serve twice, check; write the results under `out` and return what is wrong.

    Raises:
        SuperServeError: A package is missing, or a process did not start or died.
    """
    check_installed()
    out.mkdir(parents=True, exist_ok=True)
    click.echo("Searching the digits supernet for subnets worth serving (some 30 s) ...")
    found = search_here(out / "searched.json")
    click.echo(
        f"  {found.n_judged} subnets judged, {found.profile.n_subnets} pareto ones kept\n"
        "Measuring these on one thread of this machine's CPU (some 10 s) ..."
    )
    measurement = measure_here(out / "searched.json", out / "profile.json")
    _say(profile_lines(measurement.profile.subnets, measurement.profile.batch_sizes))
    _, images = digits.held_out_halves()  # those that the profile's accuracies were counted on
    quickest = quickest_qps(measurement)
    trace = load_trace(burst_spec(quickest), duration_s=seconds, seed=seed)
    click.echo(
        f"\nA bursty trace: {trace.n:,} queries in {seconds:g} s, SLO {slo_ms:g} ms. Its mean of "
        f"{trace.mean_qps:,.0f} q/s is\n{trace.mean_qps / quickest:.2f} times what the largest subnet "
        f"does at its quickest; its peak is {trace.peak_qps(0.1):,.0f} q/s over 0.1 s."
    )
    settings = RunSettings(int(slo_ms * MS), payloads=as_payloads(images.pixels), keep_outputs=True)
    runs = [offer(policy, trace, out / "profile.json", settings) for policy in POLICIES]
    environment = environment_of(trace=trace.provenance, seed=seed, cluster="one worker, the digits supernet")
    adaptive, largest = (recorded(run, trace, settings.slo_ns, environment) for run in runs)
    for result, name in ((adaptive, "adaptive"), (largest, "largest")):
        write_whole(out / f"{name}.json", result.to_json())
    write_report(out / "report.html", [adaptive, largest])
    click.echo("\nThe same queries, served twice:")
    _say(side_by_side((adaptive, largest)))
    return [*wrong_serving(adaptive, largest), *judge_answers(runs[0], images, out / "profile.json")]


@click.command()
@click.option(
    "--out", default=Path("out/demo"), show_default=True, type=click.Path(file_okay=False, path_type=Path),
    help="Where the profile and the results are written.",
)  # fmt: skip
@click.option("--seconds", type=click.FloatRange(1, 3600), default=20.0, show_default=True, help="Of trace.")
@click.option("--slo-ms", type=click.FloatRange(10, 10_000), default=150.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the arrivals.")
def cli(out: Path, seconds: float, slo_ms: float, seed: int) -> None:
    """Serve a burst on this machine, adaptively and not, and check what came back."""
    try:
        wrong = demo(out, seconds, slo_ms, seed)
    except (SuperServeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    written = ("searched.json", "profile.json", "adaptive.json", "largest.json", "report.html")
    click.echo(f"\nWritten: {', '.join(str(out / name) for name in written)}")
    for line in wrong:
        click.echo(f"FAILED: {line}")
    if not wrong:
        click.echo("Every check held: deadlines met in the burst, and each answer by the subnet it names.")
    click.echo(
        "Next: .venv/bin/loadgen run --trace poisson:rate=2000 --duration 10 --emulate cnn-8gpu-modelled:8\n"
        "      make test"
    )
    sys.exit(1 if wrong else 0)
