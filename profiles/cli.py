"""The `profiles` command."""

from __future__ import annotations

from pathlib import Path

import click

from profiles.measure import Measurement, Setting, measure_supernet
from superserve.clock import MonotonicClock
from superserve.errors import SuperServeError

_QUICK_ROUNDS = 40
_QUICK_BUDGET_NS = 6_000_000_000  # with torch's import and the warm-up, under 15 s in all


@click.group()
def cli() -> None:
    """Make and show profiles: how long each subnet takes at each batch size."""


@cli.command("measure")
@click.option("--supernet", default="digits", show_default=True, help='"digits", or a supernet file.')
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:<n>.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")
@click.option("--batch-sizes", default="1,2,4,8,16", show_default=True, help="Ascending, with commas.")
@click.option("--repeats", default=200, show_default=True, help="Times each subnet and size is run.")
@click.option("--quick", is_flag=True, help="Stop after a few seconds; at most 40 repeats.")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Profile to write."
)
def measure_command(
    supernet: str, device: str, threads: int, batch_sizes: str, repeats: int, quick: bool, out: Path
) -> None:
    """Measure a supernet's subnets on this machine and write the profile to OUT."""
    try:
        setting = Setting(
            batch_sizes=_sizes(batch_sizes),
            rounds=min(repeats, _QUICK_ROUNDS) if quick else repeats,
            budget_ns=_QUICK_BUDGET_NS if quick else None,
        )
        measurement = measure_supernet(
            supernet, setting, name=out.stem, device=device, threads=threads, clock=MonotonicClock()
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(measurement.to_json())
    except (SuperServeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    _show(measurement)
    click.echo(f"wrote {out}")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise click.ClickException(
            f"--batch-sizes: expected whole numbers with commas between, got {text!r}"
        ) from error


def _show(measurement: Measurement) -> None:
    profile = measurement.profile
    click.echo(f"{profile.device}: median / p99 ms by batch size")
    width = max(len(subnet.name) for subnet in profile.subnets)
    sizes = "".join(f"{size:>16}" for size in profile.batch_sizes)
    click.echo(f"{'':{width}}        %{sizes}")
    for subnet in profile.subnets:
        cells = (
            f"{median / 1e6:7.2f} /{p99 / 1e6:7.2f}"
            for median, p99 in zip(subnet.latency_ns, subnet.latency_p99_ns, strict=True)
        )
        click.echo(f"{subnet.name:{width}}  {subnet.accuracy:6.2f}{''.join(cells)}")
    for name in measurement.dropped:
        click.echo(f"left out {name}: a more accurate subnet is about as fast here")
