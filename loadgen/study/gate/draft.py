"""One cell of the gate, and how long it is: by its load, so that all cost about as much to simulate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from loadgen.simulator.workloads import parse_cluster, parse_slos
from loadgen.study.compare import Cell
from loadgen.traces.specs import parse_spec

CNN, TRANSFORMER = "cnn-8gpu-modelled", "transformer-8gpu-modelled"
CNN_8, TRANSFORMER_8 = f"{CNN}:8", f"{TRANSFORMER}:8"
TRANSFORMER_SLO_MS = "200"

QUERIES = 24_000
"""What a cell is to have, about, for each seed."""

SECONDS = (1.0, 12.0)
"""The shortest and the longest cell, unless it says otherwise.

In a shorter one the bound gains too much from the SLO behind the last query, in which the GPUs have nothing
else to do and which no policy foresees: at 36 ms and 85 % load 0.9 points in 0.25 s, and 0.2 in 1 s.
"""


@dataclass(frozen=True, slots=True)
class GateCell:
    """A cell of the gate.

    Attributes:
        family: The question that it belongs to.
        cell: What is simulated.
        is_strict: Whether attainment has no excuse there: line b of the promise.
        is_held_out: Whether a policy may not be tuned on it.
        is_surprise: Whether a surge or a slowdown comes that is far beyond all before it.
        skipped: Why it cannot be played; None if it can.
    """

    family: str
    cell: Cell
    is_strict: bool = False
    is_held_out: bool = False
    skipped: str | None = None
    is_surprise: bool = False

    @property
    def name(self) -> str:
        """The cell's name, which no other has."""
        return self.cell.name

    @property
    def is_at_once(self) -> bool:
        """Whether its queries come many at once."""
        return self.cell.trace.partition(":")[0] in ("spikes", "pareto")

    @property
    def n_gpus(self) -> int:
        """GPUs of its cluster."""
        return len(parse_cluster(self.cell.cluster))

    @property
    def slo_ns(self) -> int | None:
        """The one SLO of its queries; None if they differ."""
        slos = parse_slos(self.cell.slo_ms)
        return slos[0][0] if len(slos) == 1 else None


@cache
def most_qps(cluster: str) -> float:
    """Return what the GPUs do on the smallest subnet in full batches, queries a second."""
    return sum(
        gpu.max_batch_size * 1e9 / gpu.latency_ns(0, gpu.max_batch_size) for gpu in parse_cluster(cluster)
    )


def at_load(share: float, cluster: str) -> float:
    """Return a share of `most_qps`, to whole queries a second."""
    return max(1.0, round(share * most_qps(cluster)))


def draft(
    family: str,
    name: str,
    spec: str,
    *,
    cluster: str = CNN_8,
    slo_ms: str = "36",
    seconds: float | None = None,
    is_strict: bool = False,
    is_surprise: bool = False,
    **terms: Any,
) -> GateCell:
    """Return a cell of a spec, as long as `QUERIES` take at its mean rate unless `seconds` says otherwise.

    Args:
        family: The question that it belongs to; the cell's name begins with it.
        name: What it is there.
        spec: As `loadgen.traces.specs` takes it.
        cluster: Of the cell.
        slo_ms: Of the cell.
        seconds: How long it is.
        is_strict: Whether line b counts there.
        is_surprise: Whether the lines for surprises count there.
        terms: Further fields of `Cell`.
    """
    if seconds is None:
        mean_qps = parse_spec(spec, rate_qps=None).mean_qps(SECONDS[1])
        seconds = round(min(SECONDS[1], max(SECONDS[0], QUERIES / mean_qps)), 2)
    cell = Cell(f"{family} {name}", spec, cluster, slo_ms=slo_ms, duration_s=seconds, **terms)
    return GateCell(family, cell, is_strict, is_surprise=is_surprise)
