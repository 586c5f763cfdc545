"""`loadgen compare`: policies side by side on the same queries, simulated or live."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from loadgen import options
from loadgen.cli.pace import pace_options
from loadgen.cli.troubles import trouble_options
from loadgen.live.environment import environment_of
from loadgen.results.tables import check_outputs, echo, write
from loadgen.simulator.simulate import SimSettings
from loadgen.simulator.workloads import parse_cluster
from loadgen.study.beside import HEAD, Beside, beside, simulated_beside
from loadgen.study.compare import (
    Cell,
    Comparison,
    baselines,
    contender,
    headline_lines,
    lines,
    paper_cells,
    to_dict,
)
from loadgen.study.compare_live import LiveRun, compare_live
from loadgen.study.verdict import markdown, verdict_lines, verdicts
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_worker.core.played import Pace
    from loadgen.cli.troubles import Troubles
    from loadgen.study.compare import CellResult


@click.command("compare")
@click.option(
    "--simulate", "is_simulated", is_flag=True, help="Use a virtual clock, not this machine's processes."
)
@click.option(
    "--policy", "policies", multiple=True, default=("slackfit",), show_default=True, metavar="NAME[@SPEED]",
    help="mincost@0.8 is mincost on GPUs that are 0.8 times as fast as the others'.",
)  # fmt: skip
@click.option("--baselines", "with_baselines", is_flag=True, help="Add every fixed subnet and mincost.")
@click.option(
    "--trace", "traces", multiple=True,
    help="A file or spec; several give a cell each.  [default: the paper's cells]",
)  # fmt: skip
@options.maf
@click.option("--cell", "chosen", multiple=True, metavar="TEXT", help="Only cells whose name contains this.")
@click.option("--emulate", default="cnn-8gpu-modelled:8", show_default=True, metavar="PROFILE:N[,...]")
@pace_options
@click.option("--rate", type=float, help="Mean rate of the given traces.")
@click.option(
    "--duration", type=float, help="Seconds of each cell.  [default: all of a recorded trace, else 30]"
)
@click.option("--slo-ms", default="36", show_default=True, metavar="MS[:WEIGHT],...")
@click.option("--floor", metavar="ACCURACY[:SHARE]", help="A floor for the given traces.")
@trouble_options
@click.option("--seeds", type=click.IntRange(1, 1_000), default=5, show_default=True, help="Of each cell.")
@click.option("--bound/--no-bound", "with_bound", default=True, show_default=True, help="Compute the bound.")
@click.option(
    "--attempts",
    type=click.IntRange(1, 10),
    default=1,
    show_default=True,
    help="Live: how often an invalid or disturbed run is made; the last counts.",
)
@click.option(
    "--beside",
    "is_beside",
    is_flag=True,
    help="Live: simulate the same too; exit 1 where medians part by 0.005, or are 0.002 below mincost.",
)
@options.processes
@click.option("--json", "json_path", type=options.FILE, help="Write the figures.")
@click.option("--markdown", "page_path", type=options.FILE, help="Write the table, for a page.")
@click.option(
    "--judge", "is_judged", is_flag=True,
    help="Exit 1 unless every other policy may replace the first: see loadgen/study/verdict.py.",
)  # fmt: skip
@plain_errors()
def compare_command(
    is_simulated: bool,
    policies: tuple[str, ...],
    with_baselines: bool,
    traces: tuple[str, ...],
    maf: str | None,
    chosen: tuple[str, ...],
    emulate: str,
    pace: Pace,
    rate: float | None,
    duration: float | None,
    slo_ms: str,
    floor: str | None,
    troubles: Troubles,
    seeds: int,
    with_bound: bool,
    attempts: int,
    is_beside: bool,
    processes: int | None,
    json_path: Path | None,
    page_path: Path | None,
    is_judged: bool,
) -> None:
    """Serve the same queries under each policy; print attainment, accuracy, and the distance to the bound.

    Without --trace: MAF, the bursty and the accelerating cells of the paper, mixes of SLOs, unequal
    GPUs and an accuracy floor; with baselines also the paper's headline comparisons. Live, each
    policy has a private cluster of emulated GPUs, and policies take turns with each seed's queries;
    exit 1 if a run was invalid. With --jitter-ms live messages cross a relay of packets between two network
    namespaces, which needs root.
    """
    if not is_simulated and not (traces or chosen):
        raise ConfigError("compare: live runs take their time: expected --trace or --cell, or --simulate")
    _check_kind(is_simulated=is_simulated, is_live=is_beside or attempts > 1)
    if troubles.warm_up_s and (with_bound or not is_simulated):
        raise ConfigError("compare: --warm-up is of simulated runs without the bound: give --no-bound")
    check_outputs({"--json": json_path, "--markdown": page_path})
    cluster = parse_cluster(emulate)
    if with_baselines:
        policies = (*policies, *(one for one in baselines(cluster[0]) if one not in policies))
    for policy in policies:
        make_policy(contender(policy)[0], cluster[0])
    if traces:
        cells = [Cell(Path(trace).name, trace, emulate, rate, slo_ms, floor) for trace in traces]
    else:
        cells = _paper_cells(emulate, maf, slo_ms)
    cells = troubles.on(_chosen(cells, chosen))
    comparison = Comparison(policies, tuple(range(seeds)), duration, with_bound, SimSettings(pace=pace))
    say = _progress()
    live: list[LiveRun] = []
    n_processes = processes or len(os.sched_getaffinity(0))
    rows: list[Beside] = []
    if is_simulated:
        results = comparison.run(cells, n_processes=n_processes, say=say)
    else:
        results, live = compare_live(comparison, cells, say, attempts)
        if is_beside:
            rows = beside(results, simulated_beside(comparison, cells, n_processes, say))
    for line in (*lines(results), "", *headline_lines(results), *verdict_lines(results), *_table(rows)):
        echo(line)
    if json_path is not None:
        write(json_path, _json(comparison, results, live))
    if page_path is not None:
        write(page_path, "\n".join(_table(rows) or markdown(results)) + "\n")
    spoiled = [run for run in live if (run.counts and not run.valid) or run.violations]
    for run in spoiled:
        echo(f"  INVALID          {run.cell}, seed {run.seed}, {run.policy}: {_why(run)}")
    if spoiled or any(row.wrong for row in rows) or (is_judged and any(verdicts(results).values())):
        sys.exit(1)


def _check_kind(*, is_simulated: bool, is_live: bool) -> None:
    """Refuse the options of live runs for simulated ones."""
    if is_simulated and is_live:
        raise ConfigError(
            "compare: --attempts and --beside are of live runs: expected them without --simulate"
        )


def _table(rows: Sequence[Beside]) -> list[str]:
    return [*HEAD, *(row.line() for row in rows)] if rows else []


def _json(comparison: Comparison, results: list[CellResult], live: list[LiveRun]) -> str:
    body = to_dict(comparison, results) | {"environment": environment_of()}
    if live:
        body["live_runs"] = [run.to_dict() for run in live]
    return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


def _chosen(cells: list[Cell], texts: tuple[str, ...]) -> list[Cell]:
    """Return the cells whose name holds one of `texts`; all of them without any."""
    found = [cell for cell in cells if not texts or any(text in cell.name for text in texts)]
    if not found:
        raise ConfigError(f"--cell: no cell's name holds {' or '.join(texts)}")
    return found


def _paper_cells(emulate: str, maf: str | None, slo_ms: str) -> list[Cell]:
    profile, _, n = emulate.partition(":")
    if not n.isdecimal():
        raise ConfigError("--emulate: the paper's cells have one kind of GPU: expected PROFILE:N")
    return paper_cells(profile, int(n), maf, slo_ms)


def _progress() -> Callable[[str], object]:
    began_s = time.monotonic()
    return lambda what: echo(f"  {time.monotonic() - began_s:6.1f} s  {what}", err=True)


def _why(run: LiveRun) -> str:
    return "; ".join(run.invalid_because) or f"{run.violations} violations in the GPUs' event logs"
