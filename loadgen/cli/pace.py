"""How fast emulated GPUs are compared with their profile: `--speed` and `--drift`, declared once."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from gpu_worker.core.played import SPEEDS, Pace

if TYPE_CHECKING:
    from collections.abc import Callable

_SPEED = click.option(
    "--speed", type=click.FloatRange(*SPEEDS),
    default=1.0, show_default=True,
    help="Of the emulated GPUs, as a multiple of their profile's; 0.67 is 1.5 x slower.",
)  # fmt: skip
_DRIFT = click.option(
    "--drift", type=click.FloatRange(-1, 1),
    default=0.0, show_default=True,
    help="Share of that speed added each minute; negative throttles.",
)  # fmt: skip


def pace_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --speed and --drift, and pass it both as `pace`."""

    @functools.wraps(command)
    def with_pace(*, speed: float, drift: float, **options: Any) -> None:
        command(pace=Pace(speed, drift), **options)

    return _SPEED(_DRIFT(with_pace))
