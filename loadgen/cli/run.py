"""`loadgen run`: offer a trace to a live cluster, and print the outcome, each second and at the end."""

from __future__ import annotations

import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from gpu_worker.core.played import AS_PROFILED
from loadgen import options
from loadgen.cli.pace import pace_options
from loadgen.live.calibrate import SECONDS, calibrate
from loadgen.live.environment import environment_of
from loadgen.live.hosts import Head
from loadgen.live.progress import HEADER, Endings, Watch
from loadgen.live.run import Emulation, RunSettings, run_emulated, run_trace
from loadgen.live.targets import keys_of
from loadgen.oip.model import is_url
from loadgen.oip.options import check_answers, input_options, settings_of
from loadgen.oip.run import run_target
from loadgen.results.tables import check_outputs, echo, json_line, table, write, write_page
from loadgen.results.timeline import recorded
from loadgen.study.spans.remembered import RunMemory
from loadgen.traces.trace import load_trace
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpu_worker.core.played import Pace
    from gpu_worker.serve.eventlog import EventLogReport
    from loadgen.live.progress import Second
    from loadgen.oip.inputs import LabelledInputs
    from loadgen.oip.options import GivenInputs
    from loadgen.results.result import RunResult
    from loadgen.results.run import Run
    from loadgen.traces.trace import Trace

_CALIBRATED_FROM_NS = 10_000 * MS
"""A run of at least this length is calibrated first by default, because that takes some two seconds."""


@click.command("run")
@options.trace
@options.connect
@input_options
@options.keys
@options.emulate
@pace_options
@options.rate
@options.duration
@options.slo_ms
@options.policy
@options.senders
@options.payload_bytes
@options.seed
@options.json_file
@click.option(
    "--json-lines", "is_json", is_flag=True,
    help="Print a JSON object for each second and one for the result, and everything else to stderr.",
)  # fmt: skip
@options.report_file
@click.option(
    "--perfetto", "trace_path", type=options.FILE, help="Write a Chrome trace of the run's last minutes."
)
@click.option("--logs", type=options.FOLDER, help="Keep event logs here.")
@click.option("--generators", metavar="HOST:PORT,...", help="Send from the `loadgen agent` on these hosts.")
@click.option(
    "--calibrate/--no-calibrate", "is_calibrated", default=None,
    help="First send a second's worth to a null sink.  [default: if the run takes 10 s or more]",
)  # fmt: skip
@plain_errors()
def run_command(
    spec: str,
    connect: str | None,
    given: GivenInputs,
    keys: str | None,
    emulate: str | None,
    pace: Pace,
    rate: float | None,
    duration: float | None,
    slo_ms: float,
    policy: str | None,
    senders: int,
    payload_bytes: int | None,
    seed: int,
    json_path: Path | None,
    is_json: bool,
    page_path: Path | None,
    trace_path: Path | None,
    logs: Path | None,
    is_calibrated: bool | None,
    generators: str | None,
) -> None:
    """Offer a trace, print a line each second, and a table at the end.

    Ctrl-C ends it early, with the table of the trace up to there, marked as partial, and exit code 130; a
    second Ctrl-C gives up. SIGTERM, SIGHUP and a reader that closes the pipe do the same, with 143, 129 and
    141. Exit 1 if the run is invalid or an event log shows a violation.

    Longer runs are calibrated first: the same senders offer the trace's first second to a sink that answers
    at once. Any lag there is caused by this machine, not by the server.
    """
    say = partial(echo, err=is_json)
    endings = _begun()
    watch = Watch(partial(_show_second, is_json=is_json, endings=endings), endings)
    try:
        slo_ns = options.slo_ns_of(slo_ms)
        check_outputs({"--json": json_path, "--report": page_path, "--perfetto": trace_path})
        inputs, target = given.read(), given.target(connect, emulate, policy, logs, pace)
        shown = keys_of(target, keys)
        _check_generators(generators, connect, shown, is_json=is_json)
        trace = load_trace(spec, rate_qps=rate, duration_s=duration, seed=seed)
        settings = settings_of(target, inputs, payload_bytes, slo_ns, senders=senders, seed=seed, keys=shown)
        say(f"{trace.name}: {trace.n:,} queries in {trace.duration_ns / 1e9:.1f} s, SLO {slo_ms:g} ms")
        say(f"  {trace.provenance}")
        is_default = generators is None and _is_calibrated(trace, target)
        wants = is_default if is_calibrated is None else is_calibrated
        calibration = _calibration(trace, settings, say) if wants else None
        agents = () if generators is None else tuple(generators.split(","))
        memory = RunMemory(shown, is_needed=any((json_path, page_path, trace_path)))
        how = _How(watch, agents, memory.on_end, is_json=is_json)
        measured, report = _offer(trace, settings, target, how)
        endings.finish()
    except KeyboardInterrupt:
        say("Interrupted before there was anything to report")
        sys.exit(endings.exit_code)
    _show(measured, report, say)
    result = _recorded(measured, trace, settings, target, report)
    result = replace(result, lanes=memory.lanes(), calibration=calibration)
    result = _with_labels(result, measured, settings, target, inputs, say)
    if trace_path is not None:
        memory.write_trace(trace_path, say)
    if is_json:
        echo(json_line({"kind": "result", **result.to_dict(), "timeline": None}))
    _write(result, json_path, page_path, say)
    if result.partial:
        sys.exit(endings.exit_code)
    if not measured.result.valid or (report is not None and report.n_violations):
        sys.exit(1)


def _calibration(trace: Trace, settings: RunSettings, say: Callable[[str], object]) -> dict[str, Any]:
    """Return what the senders do beside a sink, in place of the server."""
    calibration = calibrate(trace, settings)
    say(f"  {calibration.to_line()}")
    return calibration.to_dict()


def _with_labels(
    result: RunResult,
    measured: Run,
    settings: RunSettings,
    target: Emulation | str,
    inputs: LabelledInputs | None,
    say: Callable[[str], object],
) -> RunResult:
    """Return the result with how many answers were right, if the inputs have labels."""
    checked = check_answers(measured, inputs, target, settings)
    if checked is None:
        return result
    say(f"  right answers    {checked.right:,} of {checked.checked:,} in time")
    return replace(result, environment={**(result.environment or {}), "labels": checked.to_dict()})


def _recorded(
    measured: Run, trace: Trace, settings: RunSettings, target: Emulation | str, report: EventLogReport | None
) -> RunResult:
    """Return the result with its timeline, and what is needed to repeat the run."""
    if measured.result.partial:
        trace = trace.scaled(duration_s=measured.result.duration_s)
    environment = _environment(trace, settings, target, measured, report)
    return recorded(measured, trace, settings.slo_ns, environment)


def _begun() -> Endings:
    """Return the handler of signals that end the command early, active until the command ends."""
    endings = Endings()
    click.get_current_context().call_on_close(endings.end)
    endings.begin()
    return endings


def _write(
    result: RunResult, json_path: Path | None, page_path: Path | None, say: Callable[[str], object]
) -> None:
    """Write the requested files; if one cannot be written, write the other anyway."""
    try:
        if json_path is not None:
            write(json_path, result.to_json(), say)
    finally:
        if page_path is not None:
            write_page(page_path, [result], say=say)


def _check_generators(generators: str | None, connect: str | None, keys: str, *, is_json: bool) -> None:
    if generators is None:
        return
    if connect is None or is_json:
        raise ConfigError("--generators: expected --connect, as they reach it, and no --json-lines")
    if keys:
        raise ConfigError("--generators: agents are sent no keys: expected a router without")


@dataclass(frozen=True, slots=True)
class _How:
    """How a trace is offered: from where, and what happens meanwhile and at the end."""

    watch: Watch
    agents: tuple[str, ...]
    on_end: Callable[[str], None] | None
    is_json: bool


def _offer(
    trace: Trace, settings: RunSettings, target: Emulation | str, how: _How
) -> tuple[Run, EventLogReport | None]:
    """Offer a trace from here, or from agents if there are any."""
    if not how.is_json and not how.agents:
        echo(HEADER)
    if isinstance(target, Emulation):
        return run_emulated(trace, settings, target, watch=how.watch, on_end=how.on_end)
    if is_url(target):
        return run_target(trace, settings, target, how.watch), None
    if how.agents:
        run = _offer_across(trace, settings, target, how.agents, how.watch)
    else:
        run = run_trace(trace, settings, target, watch=how.watch)
    if how.on_end is not None:
        how.on_end(target)
    return run, None


def _is_calibrated(trace: Trace, target: Emulation | str) -> bool:
    """Return whether a run is calibrated by default: long, to a router, and its first second has queries."""
    return (
        not is_url(target)
        and trace.duration_ns >= _CALIBRATED_FROM_NS
        and int(trace.due_ns[0]) < SECONDS * 1e9
    )


def _offer_across(
    trace: Trace, settings: RunSettings, endpoint: str, agents: tuple[str, ...], watch: Watch
) -> Run:
    """Offer a trace from several hosts, and print their progress each second."""
    said_s = 0.0

    def on_progress(total: dict[str, int]) -> None:
        nonlocal said_s
        if (now_s := time.monotonic()) >= said_s + 1.0:
            said_s = now_s
            if not echo("".join(f"  {what} {n:>10,}" for what, n in total.items())):
                watch.stop.set()

    with watch.endings.gently():
        return Head(agents, watch.stop).run(trace, settings, endpoint, on_progress)


def _show_second(second: Second, *, is_json: bool, endings: Endings) -> None:
    """Print a second at once, for a reader of the pipe; end the run when that reader has left."""
    if not echo(json_line(second.to_dict()) if is_json else second.to_line()):
        endings.signals.append(signal.SIGPIPE)
        endings.stop.set()


def _environment(
    trace: Trace, settings: RunSettings, target: Emulation | str, measured: Run, report: EventLogReport | None
) -> dict[str, Any]:
    """Return what is needed to repeat this run, and what its own checks found."""
    cluster = str(target)
    if isinstance(target, Emulation):
        cluster = f"private: {target.n_gpus} emulated GPUs of {target.profile}"
        if target.pace != AS_PROFILED:
            cluster += f", {target.pace.speed:g} times as fast, {target.pace.drift:+.0%} a minute"
    cpu_us = 1e6 * measured.router_cpu_s / measured.result.queries["total"]
    return environment_of(
        trace=trace.provenance,
        cluster=cluster,
        senders=settings.n_senders,
        payload_bytes=settings.payload_bytes,
        seed=settings.seed,
        router_cpu_us_per_query=None if math.isnan(cpu_us) else round(cpu_us, 1),
        duplicates=measured.n_duplicates,
        event_logs=None if report is None else report.to_text().splitlines(),
        violations=None if report is None else report.n_violations,
    )


def _show(measured: Run, report: EventLogReport | None, say: Callable[[str], object]) -> None:
    for line in table(measured.result):
        say(line)
    if not math.isnan(measured.router_cpu_s):
        each_us = 1e6 * measured.router_cpu_s / measured.result.queries["total"]
        say(f"  router CPU       {each_us:.1f} us a query")
    for one in measured.result.generators or ():
        lost = "  LOST: a gap" if one["lost"] else ""
        say(
            f"  generator        {one['generator']}: {one['queries']:,} queries, "
            f"started within {one['start_error_ms']:.3f} ms of the instant{lost}"
        )
    if measured.n_duplicates:
        say(f"  DUPLICATES       {measured.n_duplicates} answers beyond a query's first")
    for status, reason in measured.reasons.items():
        say(f"  {status.lower():<16} e.g. {reason}")
    if report is not None:
        say(report.to_text())
