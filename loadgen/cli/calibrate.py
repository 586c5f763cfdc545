"""`loadgen calibrate`: what this generator can do alone, at a rate, without a cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loadgen import options
from loadgen.live.calibrate import calibrate
from loadgen.live.run import RunSettings
from loadgen.results.tables import json_line
from loadgen.traces.trace import load_trace
from superserve.clock import MS
from superserve.roles.command import plain_errors


@click.command("calibrate")
@click.option("--trace", "spec", default="poisson:rate=10000", show_default=True, help="A file or a spec.")
@options.rate
@click.option(
    "--seconds", type=click.FloatRange(0.1, 60), default=2.0, show_default=True, help="How much to offer."
)
@click.option("--slo-ms", type=click.FloatRange(0.1, 86_400_000), default=36.0, show_default=True)
@options.senders
@click.option("--payload-bytes", type=click.IntRange(0, 64 << 20), default=64, show_default=True)
@click.option("--json-lines", "is_json", is_flag=True, help="Print one JSON object.")
@plain_errors()
def calibrate_command(
    spec: str,
    rate: float | None,
    seconds: float,
    slo_ms: float,
    senders: int,
    payload_bytes: int,
    is_json: bool,
) -> None:
    """Offer the start of a trace to a null sink, and print how late this generator alone sends it.

    Exit 1 if a run with such a lag would be invalid.
    """
    trace = load_trace(spec, rate_qps=rate, duration_s=None if Path(spec).exists() else seconds)
    settings = RunSettings(int(slo_ms * MS), senders, payload_bytes)
    found = calibrate(trace, settings, seconds=seconds)
    click.echo(json_line(found.to_dict()) if is_json else found.to_line())
    if not found.valid:
        sys.exit(1)
