"""`loadgen`: offer a trace to a router, open loop, and report the outcome honestly."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loadgen import options
from loadgen.commands import Commands
from superserve.files import check_text
from superserve.roles.command import plain_errors

# ruff: noqa: PLC0415  each command is imported when it is run


def _run() -> click.Command:
    from loadgen.cli.run import run_command

    return run_command


def _agent() -> click.Command:
    from loadgen.cli.agent import agent_command

    return agent_command


def _calibrate() -> click.Command:
    from loadgen.cli.calibrate import calibrate_command

    return calibrate_command


def _simulate() -> click.Command:
    from loadgen.cli.simulate import simulate_command

    return simulate_command


def _compare() -> click.Command:
    from loadgen.cli.compare import compare_command

    return compare_command


def _autoscale() -> click.Command:
    from loadgen.cli.autoscale import autoscale_command

    return autoscale_command


def _explain() -> click.Command:
    from loadgen.cli.questions.explain import cli as explain_command

    return explain_command


def _advise() -> click.Command:
    from loadgen.cli.questions.advise import advise_command

    return advise_command


def _gate() -> click.Command:
    from loadgen.cli.gate import gate_command

    return gate_command


def _adversary() -> click.Command:
    from loadgen.cli.adversary import adversary_command

    return adversary_command


def _search() -> click.Command:
    from loadgen.cli.search import search_command

    return search_command


def _trace() -> click.Command:
    from loadgen.cli.trace import trace_group

    return trace_group


_LATER = {
    "run": _run, "agent": _agent, "calibrate": _calibrate, "simulate": _simulate, "compare": _compare,
    "autoscale": _autoscale, "explain": _explain, "advise": _advise, "gate": _gate, "adversary": _adversary,
    "search": _search, "trace": _trace,
}  # fmt: skip


@click.group(cls=Commands, later=_LATER)
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
    from loadgen.results.report import load_runs
    from loadgen.results.style import check_installed
    from loadgen.results.tables import check_writable, write_page

    check_installed()
    results, labels = load_runs(runs)
    check_writable(output, "--output")
    write_page(output, results, labels)
