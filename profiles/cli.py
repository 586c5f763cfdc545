"""The `profiles` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from profiles.measuring.commands import (
    accuracy_command,
    batch_sizes_option,
    calibrate_command,
    search_command,
    show_command,
)
from profiles.measuring.measure import (
    Device,
    Measurement,
    Setting,
    measure_supernet,
    save_measurement,
    thinned,
)
from profiles.table import load_profile
from superserve.clock import MonotonicClock
from superserve.errors import ConfigError, SuperServeError
from superserve.files import check_text

_QUICK_ROUNDS = 40  # enough for a median; the tail needs the full number
_QUICK_BUDGET_NS = 6_000_000_000  # with torch's import and the warm-up, under 15 s in all


@click.group()
def cli() -> None:
    """Make and show profiles: how long each subnet takes at each batch size."""
    try:
        check_text(sys.argv[1:])
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


for _command in (search_command, show_command, calibrate_command, accuracy_command):
    cli.add_command(_command)


@cli.command("measure")
@click.option(
    "--supernet", default="digits", show_default=True, help="A supernet's name, or module:attribute."
)
@click.option(
    "--subnets",
    "source",
    metavar="PROFILE",
    help="Measure the subnets of this profile, which was searched or measured elsewhere.",
)
@click.option(
    "--at-most", type=click.IntRange(2), help="Measure this many of them, evenly spread.  [default: all]"
)
@click.option("--weights", metavar="FILE", help='A checkpoint, or "random".  [default: the shipped one]')
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:<n>.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")
@click.option("--precision", default="auto", show_default=True, help="auto, float32, float16 or bfloat16.")
@click.option("--eager", is_flag=True, help="Capture no CUDA graphs.")
@batch_sizes_option
@click.option("--repeats", default=200, show_default=True, help="Times each subnet and size is run.")
@click.option("--quick", is_flag=True, help="Stop after a few seconds; at most 40 repeats.")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Profile to write."
)
def measure_command(
    supernet: str, source: str | None, at_most: int | None, batch_sizes: tuple[int, ...], repeats: int,
    quick: bool, eager: bool, out: Path, **device: Any,
) -> None:  # fmt: skip
    """Measure a supernet's subnets on this machine and write the profile to OUT."""
    try:
        source = source or _profile_of(supernet)
        setting = Setting(
            batch_sizes=batch_sizes,
            rounds=min(repeats, _QUICK_ROUNDS) if quick else repeats,
            budget_ns=_QUICK_BUDGET_NS if quick else None,
        )
        measurement = measure_supernet(
            supernet,
            thinned(load_profile(source), at_most),
            setting,
            Device(**device, uses_graphs=not eager),
            name=out.stem,
            clock=MonotonicClock(),
        )
        save_measurement(measurement, out, source)
    except (SuperServeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    _show(measurement)
    click.echo(f"wrote {out}")


def _profile_of(supernet: str) -> str:
    """Return the shipped profile of a supernet."""
    from gpu_worker.models.kinds import supernet_kind  # noqa: PLC0415  it imports torch

    kind = supernet_kind(supernet)
    if kind.profile is None:
        raise ConfigError(f"--subnets: {kind.name} comes without a profile: make one by `profiles search`")
    return kind.profile


def _show(measurement: Measurement) -> None:
    profile = measurement.profile
    click.echo(f"{profile.device}: median / p99 ms by batch size")
    width = max(len(subnet.name) for subnet in profile.subnets)
    sizes = "".join(f"{size:>16}" for size in profile.batch_sizes)
    click.echo(f"{'':{width}}        %{sizes}")
    for subnet in profile.subnets:
        cells = (
            f"{median / 1e6:7.4g} /{p99 / 1e6:6.4g}"
            for median, p99 in zip(subnet.latency_ns, subnet.latency_p99_ns, strict=True)
        )
        click.echo(f"{subnet.name:{width}}  {subnet.accuracy:6.2f}{''.join(cells)}")
    for name in measurement.dropped:
        click.echo(f"left out {name}: a more accurate subnet is about as fast here")
