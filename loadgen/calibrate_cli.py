"""`loadgen calibrate`: what this machine's senders can do against a null sink."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import orjson

from loadgen.calibrate import calibrate
from loadgen.environment import environment_of
from loadgen.run import RunSettings
from loadgen.tables import check_writable, write
from superserve.clock import MS
from superserve.errors import SuperServeError


@click.command("calibrate")
@click.option("--rate", type=click.FloatRange(1), required=True, help="Queries a second, Poisson arrivals.")
@click.option("--senders", type=click.IntRange(1, 64), default=1, show_default=True, help="Sender processes.")
@click.option("--payload-bytes", type=click.IntRange(0, 64 << 20), default=64, show_default=True)
@click.option(
    "--slo-ms", type=click.FloatRange(0.001), default=36.0, show_default=True, help="To judge lag by."
)
@click.option("--seconds", type=click.FloatRange(0.2, 600), default=2.0, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures."
)
def calibrate_command(
    rate: float, senders: int, payload_bytes: int, slo_ms: float, seconds: float, json_path: Path | None
) -> None:
    """Send to a sink that answers at once, and print how late queries were sent.

    Exits 1 if a run at this rate would not count, whatever it is offered to.
    """
    try:
        if json_path is not None:
            check_writable(json_path, "--json")
        settings = RunSettings(int(slo_ms * MS), senders, payload_bytes)
        found = calibrate(rate, settings, seconds)
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    for line in found.to_lines():
        click.echo(line)
    if json_path is not None:
        body = {"schema": 1, **found.to_dict(), "environment": environment_of()}
        write(json_path, orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    sys.exit(0 if found.valid else 1)
