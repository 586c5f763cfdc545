"""`loadgen`: offer a trace to a router, open loop, and report the outcome honestly."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loadgen import options
from loadgen.cli.adversary import adversary_command
from loadgen.cli.agent import agent_command
from loadgen.cli.autoscale import autoscale_command
from loadgen.cli.calibrate import calibrate_command
from loadgen.cli.compare import compare_command
from loadgen.cli.gate import gate_command
from loadgen.cli.run import run_command
from loadgen.cli.search import search_command
from loadgen.cli.simulate import simulate_command
from loadgen.cli.trace import trace_group
from loadgen.results.report import load_runs
from loadgen.results.style import check_installed
from loadgen.results.tables import check_writable, write_page
from superserve.files import check_text
from superserve.roles.command import plain_errors


@click.group()
@plain_errors()
def cli() -> None:
    """Open-loop load for SuperServe: latency counts from the instant a query was due."""
    check_text(sys.argv[1:])


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=options.FILE, required=True, help="The page, as HTML.")
@plain_errors()
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Make the page of one saved run, or one that compares several."""
    check_installed()
    results, labels = load_runs(runs)
    check_writable(output, "--output")
    write_page(output, results, labels)


cli.add_command(run_command)
cli.add_command(agent_command)
cli.add_command(calibrate_command)
cli.add_command(simulate_command)
cli.add_command(compare_command)
cli.add_command(autoscale_command)
cli.add_command(gate_command)
cli.add_command(adversary_command)
cli.add_command(search_command)
cli.add_command(trace_group)
