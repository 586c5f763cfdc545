"""Options that several commands share, each declared once, and the parsing of their values.

They are here and not in `loadgen.cli`, because programs on lower floors (`loadgen.study.agreement`,
`loadgen.paper.figures`, `loadgen.simulator.chaos`) use them too.
"""

from __future__ import annotations

from pathlib import Path

import click

from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.net.keys import ENVIRONMENT

DEFAULT_POLICY = "planfit"
"""Of private and simulated routers, and of the demo; `router` and `cluster` have the same default."""

_MAX_SLO_MS = 86_400_000  # a day, the wire's limit for a slack

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

trace = click.option(
    "--trace", "spec", required=True, help="A trace file, or a spec such as poisson:rate=2000."
)
rate = click.option("--rate", type=float, help="Scale the trace to this mean rate, queries per second.")
duration = click.option("--duration", type=float, help="Squeeze or cut the trace to this many seconds.")
maf = click.option("--maf", type=click.Path(exists=True, dir_okay=False), help="A Functions 2019 file.")
connect = click.option(
    "--connect", metavar="HOST:PORT", help="Of a router.  [default: the cluster running on this machine]"
)
keys = click.option("--keys", envvar=ENVIRONMENT, help="A client's key file, for a router with keys.")
emulate = click.option("--emulate", metavar="PROFILE:N", help="Use a private router and N emulated GPUs.")
policy = click.option(
    "--policy", help=f"Policy of a private or simulated router.  [default: {DEFAULT_POLICY}]"
)
seed = click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
slo_ms = click.option("--slo-ms", type=float, default=36.0, show_default=True, help="From due to deadline.")
senders = click.option(
    "--senders", type=click.IntRange(1, 64), default=1, show_default=True, help="Sender processes."
)
payload_bytes = click.option(
    "--payload-bytes", type=click.IntRange(0, 64 << 20), help="[default: what the model takes, or 64]"
)
processes = click.option("--processes", type=click.IntRange(1), help="[default: one for each processor]")
json_file = click.option("--json", "json_path", type=FILE, help="Write the result.")
report_file = click.option("--report", "page_path", type=FILE, help="Write a page about it, as HTML.")


def slo_ns_of(milliseconds: float) -> int:
    """Return `--slo-ms` in nanoseconds.

    Raises:
        ConfigError: It is not above 0, or over a day.
    """
    if not 0 < milliseconds <= _MAX_SLO_MS:
        raise ConfigError(f"--slo-ms: expected milliseconds above 0 and up to a day, got {milliseconds}")
    return int(milliseconds * MS)


def profile_and_n(text: str, *, most: int) -> tuple[str, int]:
    """Return the two parts of PROFILE:N.

    Raises:
        ConfigError: It is not such a text, or N is not 1 to `most`.
    """
    name, colon, count = text.rpartition(":")
    if not colon or not count.isdecimal() or not 1 <= int(count) <= most:
        raise ConfigError(f"--emulate: expected PROFILE:N with N from 1 to {most}, got {text!r}")
    return name, int(count)
