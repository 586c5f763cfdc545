"""The gate's cells, all families together, half of them for tuning and half held out.

A family asks one question. Loads are shares of what the cluster's GPUs do on the smallest subnet in full
batches. Every second cell of a family is held out: a policy is tuned on the others, so that a judgement also
says whether it holds where it was not tuned.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from loadgen.study.gate import arrivals, terms
from loadgen.study.gate.recorded import recorded_family
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadgen.study.gate.draft import GateCell

SAMPLE = 20
"""Cells of a sample."""

# A sample is for a quick look: these take seconds each.
_COSTLY = ("512 GPUs", "64 GPUs", "64 at", "accel")


def gate_cells(traces: Path | None = None) -> list[GateCell]:
    """Return every cell, by family.

    Args:
        traces: A folder with Azure's files; without it their cells are there, and skipped.
    """
    families = [
        arrivals.paper_family(), recorded_family(traces), arrivals.spikes_family(), arrivals.on_off_family(),
        arrivals.ramps_family(), arrivals.pareto_family(), arrivals.gamma_family(), terms.jitter_family(),
        terms.slow_family(), terms.unequal_family(), terms.sizes_family(), terms.slos_family(),
        terms.mixes_family(), terms.floors_family(), terms.priorities_family(), terms.overload_family(),
        terms.clients_family(), terms.transformer_family(),
    ]  # fmt: skip
    return [replace(cell, is_held_out=i % 2 == 1) for family in families for i, cell in enumerate(family)]


def chosen_cells(
    cells: Sequence[GateCell], *, texts: Sequence[str] = (), families: Sequence[str] = ()
) -> list[GateCell]:
    """Return the cells whose name holds one of `texts` and whose family is one of `families`; none is all.

    Raises:
        ConfigError: There is no such family, or no such cell.
    """
    known = list(dict.fromkeys(cell.family for cell in cells))
    for family in families:
        if family not in known:
            raise ConfigError(f"--family: expected one of {', '.join(known)}, got {family!r}")
    found = [cell for cell in cells if not families or cell.family in families]
    found = [cell for cell in found if not texts or any(text in cell.name for text in texts)]
    if not found:
        raise ConfigError(f"--cell: no cell's name holds {' or '.join(texts)}")
    return found


def sample(cells: Sequence[GateCell]) -> list[GateCell]:
    """Return some cells that can be played, from every family in turn, quick ones: for a quick look."""
    by_family: dict[str, list[GateCell]] = {}
    for cell in cells:
        if cell.skipped is None and not any(text in cell.name for text in _COSTLY):
            by_family.setdefault(cell.family, []).append(cell)
    rounds = zip_longest(*by_family.values())
    return [cell for one in rounds for cell in one if cell is not None][:SAMPLE]
