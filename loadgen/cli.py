"""`loadgen`: offer a trace to a router, open loop, and report honestly what came of it."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadgen.compare_cli import compare_command
from loadgen.environment import environment_of
from loadgen.plots import check_installed
from loadgen.report import load_runs
from loadgen.run import Emulation, RunSettings, run_emulated, run_trace
from loadgen.search_cli import search_command
from loadgen.simulate_cli import simulate_command
from loadgen.tables import check_writable, table, write, write_page
from loadgen.targets import payload_bytes_of, target_of
from loadgen.timeline import recorded
from loadgen.trace import load_trace
from loadgen.trace_cli import trace_group
from superserve.errors import ConfigError, SuperServeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_worker.eventlog import EventLogReport
    from loadgen.run import Run
    from loadgen.trace import Trace

MS = 1_000_000
_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group()
def cli() -> None:
    """Open-loop load for SuperServe: latency counts from the instant a query was due."""


@cli.command()
@click.option("--trace", "spec", required=True, help="A trace file, or a spec such as poisson:rate=2000.")
@click.option(
    "--connect", metavar="HOST:PORT", help="Of a router.  [default: the cluster running on this machine]"
)
@click.option("--emulate", metavar="PROFILE:N", help="Start a private router and N emulated GPUs instead.")
@click.option("--rate", type=float, help="Scale the trace to this mean rate, queries per second.")
@click.option("--duration", type=float, help="Squeeze or cut the trace to so many seconds.")
@click.option("--slo-ms", type=float, default=36.0, show_default=True, help="From due to deadline.")
@click.option("--policy", help="Policy of the private router.  [default: slackfit]")
@click.option("--senders", type=click.IntRange(1, 64), default=1, show_default=True, help="Sender processes.")
@click.option(
    "--payload-bytes", type=click.IntRange(0, 64 << 20), help="[default: what the model takes, or 64]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the arrivals that are drawn.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result."
)
@click.option("--report", "page_path", type=_FILE, help="Write a page about it, as HTML.")
@click.option("--logs", type=_FOLDER, help="Keep event logs here.")
def run(
    spec: str,
    connect: str | None,
    emulate: str | None,
    rate: float | None,
    duration: float | None,
    slo_ms: float,
    policy: str | None,
    senders: int,
    payload_bytes: int | None,
    seed: int,
    json_path: Path | None,
    page_path: Path | None,
    logs: Path | None,
) -> None:
    """Offer a trace and print a table. Exits 1 if the run is invalid or an event log shows a violation."""
    try:
        if not 0 < slo_ms <= 86_400_000:
            raise ConfigError(f"--slo-ms: expected milliseconds above 0 and up to a day, got {slo_ms}")
        if json_path is not None:
            check_writable(json_path, "--json")
        if page_path is not None:
            check_installed()
            check_writable(page_path, "--report")
        target = target_of(connect, emulate, policy, logs)
        trace = load_trace(spec, rate_qps=rate, duration_s=duration, seed=seed)
        if payload_bytes is None:
            payload_bytes = payload_bytes_of(target)
        settings = RunSettings(int(slo_ms * MS), senders, payload_bytes, seed=seed)
        click.echo(f"{trace.name}: {trace.n:,} queries in {trace.duration_ns / 1e9:.1f} s, SLO {slo_ms:g} ms")
        click.echo(f"  {trace.provenance}")
        live = _live(trace)
        if isinstance(target, Emulation):
            measured, report = run_emulated(trace, settings, target, live)
        else:
            measured, report = run_trace(trace, settings, target, live), None
        if sys.stdout.isatty():
            click.echo("\r" + " " * 78 + "\r", nl=False)
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    _show(measured, report)
    environment = _environment(trace, settings, target, measured, report)
    result = recorded(measured, trace, settings.slo_ns, environment)
    if json_path is not None:
        write(json_path, result.to_json())
    if page_path is not None:
        write_page(page_path, [result])
    if not measured.result.valid or (report is not None and report.n_violations):
        sys.exit(1)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=_FILE, required=True, help="The page, as HTML.")
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Make the page of one saved run, or one that compares several."""
    try:
        check_installed()
        results, labels = load_runs(runs)
        check_writable(output, "--output")
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    write_page(output, results, labels)


def _environment(
    trace: Trace, settings: RunSettings, target: Emulation | str, measured: Run, report: EventLogReport | None
) -> dict[str, Any]:
    """Return what it takes to make this run again, and what its own checks found."""
    cluster = str(target)
    if isinstance(target, Emulation):
        cluster = f"private: {target.n_gpus} emulated GPUs of {target.profile}"
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


def _live(trace: Trace) -> Callable[[dict[str, int]], None]:
    """Return what prints the live line: on a terminal only, twice a second at most."""
    began_s = last_s = time.monotonic()

    def show(total: dict[str, int]) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if not sys.stdout.isatty() or now_s - last_s < 0.5:
            return
        last_s = now_s
        waiting = total["sent"] - total["answered"]
        line = f"{now_s - began_s:6.1f} s  {total['sent']:,} of {trace.n:,} sent, {waiting:,} outstanding"
        click.echo(f"\r{line:<78}", nl=False)

    return show


def _show(measured: Run, report: EventLogReport | None) -> None:
    for line in table(measured.result):
        click.echo(line)
    if not math.isnan(measured.router_cpu_s):
        each_us = 1e6 * measured.router_cpu_s / measured.result.queries["total"]
        click.echo(f"  router CPU       {each_us:.1f} us a query")
    if measured.n_duplicates:
        click.echo(f"  DUPLICATES       {measured.n_duplicates} answers beyond a query's first")
    for status, reason in measured.reasons.items():
        click.echo(f"  {status.lower():<16} e.g. {reason}")
    if report is not None:
        click.echo(report.to_text())


cli.add_command(simulate_command)
cli.add_command(compare_command)
cli.add_command(search_command)
cli.add_command(trace_group)
