"""What befalls the cells of a comparison, and from when on it counts: options of `loadgen compare`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from loadgen import options
from loadgen.simulator.faults import load_faults
from loadgen.simulator.workloads import parse_priorities

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from loadgen.study.compare import Cell

_OPTIONS = (
    click.option(
        "--priority", metavar="CLASS:SHARE,...",
        help="Classes of shares of the queries; the rest is of class 0, the lowest.",
    ),
    click.option("--faults", "path", type=options.FILE, help="A fault file: see docs/simulator.md."),
    click.option(
        "--jitter-ms", type=click.FloatRange(0, 60_000), default=0.0, show_default=True,
        help="Each message takes up to this much more.",
    ),
    click.option(
        "--clients", type=click.IntRange(1, 10_000), default=1, show_default=True, help="That send.",
    ),
    click.option(
        "--warm-up", type=click.FloatRange(0), default=0.0, show_default=True, metavar="SECONDS",
        help="Simulated: queries due before that are served and not counted.",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Troubles:
    """The options' values; each has its meaning in `loadgen.study.compare.Cell`."""

    priority: str | None
    path: Path | None
    jitter_ms: float
    clients: int
    warm_up_s: float

    def on(self, cells: list[Cell]) -> list[Cell]:
        """Return the cells with these.

        Raises:
            ConfigError: The classes or the fault file are not what they should be.
        """
        if self.priority is not None:
            parse_priorities(self.priority)
        faults = () if self.path is None else load_faults(self.path)
        return [
            replace(
                cell,
                priority=self.priority,
                faults=faults,
                jitter_ms=self.jitter_ms,
                n_clients=self.clients,
                warm_up_s=self.warm_up_s,
            )
            for cell in cells
        ]


def trouble_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options, and hand it all of them as `troubles`."""

    @functools.wraps(command)
    def with_troubles(
        *,
        priority: str | None,
        path: Path | None,
        jitter_ms: float,
        clients: int,
        warm_up: float,
        **others: Any,
    ) -> None:
        command(troubles=Troubles(priority, path, jitter_ms, clients, warm_up), **others)

    return functools.reduce(lambda made, option: option(made), reversed(_OPTIONS), with_troubles)
