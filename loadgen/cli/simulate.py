"""`loadgen simulate`: serve a trace on a simulated cluster, with the core that also serves live."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loadgen import options
from loadgen.cli.pace import pace_options
from loadgen.live.environment import environment_of
from loadgen.results.tables import check_outputs, echo, table, write, write_page
from loadgen.results.timeline import recorded
from loadgen.simulator.delays import load_machine
from loadgen.simulator.faults import draw_faults, faults_json, load_faults
from loadgen.simulator.simulate import SimSettings, simulate
from loadgen.simulator.workloads import mixed_workload, parse_cluster, parse_floor, parse_slos
from loadgen.traces.trace import load_trace
from router.policies.registry import make_policy
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_worker.core.played import Pace
    from loadgen.results.result import RunResult
    from loadgen.simulator.faults import Fault
    from loadgen.simulator.simulate import Simulated, Workload


@click.command("simulate")
@options.trace
@click.option(
    "--emulate", required=True, metavar="PROFILE:N[,PROFILE:N...]",
    help="The GPUs; PROFILE*2.5 is a device that takes 2.5 times as long.",
)  # fmt: skip
@pace_options
@options.rate
@options.duration
@click.option(
    "--slo-ms", default="36", show_default=True, metavar="MS[:WEIGHT],...", help="One SLO, or a mix of them."
)
@click.option("--floor", metavar="ACCURACY[:SHARE]", help="An accuracy floor for a share of the queries.")
@options.policy
@options.seed
@click.option("--faults", "faults_path", type=options.FILE, help="A fault file: see docs/simulator.md.")
@click.option("--fault-seed", type=click.IntRange(0), help="Draw faults from this seed instead.")
@click.option("--save-faults", type=options.FILE, help="Write the faults to a file that --faults reads.")
@click.option(
    "--actuation-ms", type=click.FloatRange(0, 60_000), default=0.0, show_default=True,
    help="How long a change of subnet takes.",
)  # fmt: skip
@click.option(
    "--like", "like_folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Delay messages as in the live run that left its logs here.",
)  # fmt: skip
@click.option("--clients", type=click.IntRange(1, 10_000), default=1, show_default=True, help="That send.")
@click.option(
    "--gpus-per-process", type=click.IntRange(1, 4096), default=8, show_default=True,
    help="GPUs of one worker process; faults affect a process.",
)  # fmt: skip
@options.json_file
@options.report_file
@plain_errors()
def simulate_command(
    spec: str,
    emulate: str,
    pace: Pace,
    rate: float | None,
    duration: float | None,
    slo_ms: str,
    floor: str | None,
    policy: str | None,
    seed: int,
    faults_path: Path | None,
    fault_seed: int | None,
    save_faults: Path | None,
    actuation_ms: float,
    like_folder: Path | None,
    clients: int,
    gpus_per_process: int,
    json_path: Path | None,
    page_path: Path | None,
) -> None:
    """Serve a trace with the core that serves live, on a virtual clock, and print a table.

    Equal options give equal results, byte for byte: compare the digest.
    """
    check_outputs({"--json": json_path, "--report": page_path, "--save-faults": save_faults})
    policy = policy or options.DEFAULT_POLICY
    cluster = parse_cluster(emulate)
    for profile in {id(profile): profile for profile in cluster}.values():
        make_policy(policy, profile)
    settings = SimSettings(
        actuation_ns=int(actuation_ms * MS), n_clients=clients, gpus_per_process=gpus_per_process,
        pace=pace,
    )  # fmt: skip
    trace = load_trace(spec, rate_qps=rate, duration_s=duration, seed=seed)
    if like_folder is not None:
        settings = settings.like(load_machine(like_folder, trace))
    workload = mixed_workload(
        trace, parse_slos(slo_ms), None if floor is None else parse_floor(floor), seed=seed
    )
    n_processes = -(-len(cluster) // gpus_per_process)
    faults = _faults(
        faults_path, fault_seed, n_processes=n_processes, n_clients=clients, duration_ns=trace.duration_ns
    )
    echo(f"{trace.name}: {trace.n:,} queries in {trace.duration_ns / 1e9:.1f} s, {emulate}")
    echo(f"  {trace.provenance}")
    began_s = time.monotonic()
    found = simulate(workload, cluster, policy=policy, seed=seed, faults=faults, settings=settings)
    took_s = time.monotonic() - began_s
    _show(found, trace.duration_ns / 1e9, took_s, faults)
    if save_faults is not None:
        write(save_faults, faults_json(faults))
    if json_path is not None or page_path is not None:
        result = _recorded(found, workload, emulate, seed, faults)
        if json_path is not None:
            write(json_path, result.to_json())
        if page_path is not None:
            write_page(page_path, [result])


def _faults(
    path: Path | None, seed: int | None, *, n_processes: int, n_clients: int, duration_ns: int
) -> tuple[Fault, ...]:
    if path is not None and seed is not None:
        raise ConfigError("--faults and --fault-seed: expected one of them, got both")
    if path is not None:
        return load_faults(path)
    if seed is None:
        return ()
    return draw_faults(seed, n_processes=n_processes, n_clients=n_clients, duration_ns=duration_ns)


def _show(found: Simulated, duration_s: float, took_s: float, faults: Sequence[Fault]) -> None:
    for line in table(found.result):
        echo(line)
    echo(f"  accuracy/query   {found.accuracy_per_query:.4f} %, summed over those in time, of all")
    for fault in faults[:20]:
        fields = fault.to_dict()
        kind, at_ms, peer = fields.pop("kind"), fields.pop("at_ms"), fields.pop("peer")
        more = ", ".join(f"{name} {value:g}" for name, value in fields.items())
        echo(f"  fault            {at_ms:.1f} ms: {kind} {peer}{': ' if more else ''}{more}")
    if len(faults) > 20:
        echo(f"  faults           {len(faults) - 20} more")
    for status, reason in found.run.reasons.items():
        echo(f"  {status.lower():<16} e.g. {reason}")
    echo(f"  directives       {found.n_batches:,} in {found.n_passes:,} passes of the router")
    echo(f"  digest           {found.digest}")
    echo(f"  simulated        {duration_s:.1f} s in {took_s:.1f} s: {duration_s / took_s:.1f} x real time")


def _recorded(
    found: Simulated, workload: Workload, emulate: str, seed: int, faults: Sequence[Fault]
) -> RunResult:
    """Return the result with everything that its file keeps; it is marked as simulated."""
    environment = environment_of(
        trace=workload.trace.provenance, cluster=f"simulated: {emulate}", seed=seed, digest=found.digest,
        faults=[fault.to_dict() for fault in faults], duplicates=found.run.n_duplicates,
    )  # fmt: skip
    result = recorded(found.run, workload.trace, workload.slo_ns, environment)
    return replace(result, trace=f"{result.trace} (simulated)")
