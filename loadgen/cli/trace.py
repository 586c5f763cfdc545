"""`loadgen trace`: describe a trace, and make one from another."""

from __future__ import annotations

from pathlib import Path

import click

from loadgen import options
from loadgen.results.tables import check_writable
from loadgen.traces.cut import Cut, describe, make_trace
from superserve.roles.command import plain_errors

_DURATION = click.option("--duration", type=float, help="Seconds to draw a spec for.")
_FUNCTIONS = click.option(
    "--functions", metavar="top:N|NAMES", help="Of an Azure Functions file, the busiest N or the named ones."
)
_WINDOW = click.option(
    "--window", metavar="START:END",
    help="END is not included: minute numbers of a Functions 2019 file, otherwise seconds.",
)  # fmt: skip


@click.group("trace")
def trace_group() -> None:
    """Describe traces and make them. TRACE is a file or a spec, as for `loadgen run`."""


@trace_group.command()
@click.argument("spec", metavar="TRACE")
@_WINDOW
@_FUNCTIONS
@_DURATION
@options.seed
@plain_errors()
def info(spec: str, window: str | None, functions: str | None, duration: float | None, seed: int) -> None:
    """Print a trace's kind, counts, rates and burstiness, and a picture of its rate."""
    cut = Cut(window=window, functions=functions, duration_s=duration, seed=seed)
    made = make_trace(spec, cut)
    for line in (made.trace.name, *describe(made)):
        click.echo(line)


@trace_group.command()
@click.argument("spec", metavar="TRACE")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path),
    help="The saved trace; gzipped if it ends in .gz.",
)  # fmt: skip
@_WINDOW
@_FUNCTIONS
@click.option("--squeeze-to", "squeeze_to_s", type=float, metavar="S", help="To this many seconds.")
@click.option("--speed-up", type=float, metavar="X", help="This many times as fast.")
@click.option("--rate", type=float, metavar="Q", help="To this mean rate, queries per second.")
@_DURATION
@options.seed
@plain_errors()
def make(
    spec: str,
    out: Path,
    window: str | None,
    functions: str | None,
    squeeze_to_s: float | None,
    speed_up: float | None,
    rate: float | None,
    duration: float | None,
    seed: int,
) -> None:
    """Save a part of a trace, optionally at another speed, and describe it.

    All recorded queries are kept, and every gap is multiplied by one factor, so the shape stays.
    """
    cut = Cut(window, functions, squeeze_to_s, speed_up, rate, duration, seed)
    made = make_trace(spec, cut)
    check_writable(out, "--out")
    made.trace.save(out)
    for line in (made.trace.name, *describe(made)):
        click.echo(line)
    click.echo(f"  written          {out}: {out.stat().st_size:,} bytes")
