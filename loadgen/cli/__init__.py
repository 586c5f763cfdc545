"""`loadgen`: offer a trace to a router, open loop, and report the outcome honestly."""

from __future__ import annotations

from pathlib import Path

import click

from loadgen import options
from loadgen.cli.agent import agent_command
from loadgen.cli.calibrate import calibrate_command
from loadgen.cli.compare import compare_command
from loadgen.cli.run import run_command
from loadgen.cli.search import search_command
from loadgen.cli.simulate import simulate_command
from loadgen.cli.trace import trace_group
from loadgen.results.report import load_runs
from loadgen.results.style import check_installed
from loadgen.results.tables import check_writable, refuse_bytes, write_page
from superserve.errors import SuperServeError


@click.group()
def cli() -> None:
    """Open-loop load for SuperServe: latency counts from the instant a query was due."""
    refuse_bytes()


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=options.FILE, required=True, help="The page, as HTML.")
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Make the page of one saved run, or one that compares several."""
    try:
        check_installed()
        results, labels = load_runs(runs)
        check_writable(output, "--output")
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    write_page(output, results, labels)


cli.add_command(run_command)
cli.add_command(agent_command)
cli.add_command(calibrate_command)
cli.add_command(simulate_command)
cli.add_command(compare_command)
cli.add_command(search_command)
cli.add_command(trace_group)
