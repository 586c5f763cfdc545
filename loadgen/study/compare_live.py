"""Policies compared live: the same cells, each policy on a private cluster of emulated GPUs.

Rounds are interleaved: every policy serves each seed's queries in turn before the next seed, so that a
machine that gets busier or quieter affects all of them alike. The runs' own findings, such as being
disturbed, are kept with the figures: a live comparison is only as good as its machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loadgen.live.jitter import enter_private_network
from loadgen.live.run import Emulation, RunSettings, run_emulated
from loadgen.results.calm import await_calm
from loadgen.simulator.workloads import parse_cluster, parse_slos
from loadgen.study.compare import CellResult, Figures, bound_in, is_paced
from superserve.clock import MS
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadgen.study.compare import Cell, Comparison

_CALM_NS = 2 * MS  # a sleeper's p99 delay on a machine that is not busy


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What one live run reports besides its figures.

    Attributes:
        counts: Whether its figures are the comparison's; False if it was repeated.
    """

    cell: str
    policy: str
    seed: int
    valid: bool
    disturbed: bool
    invalid_because: tuple[str, ...]
    send_lag_p99_9_ms: float | None
    violations: int
    counts: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def check_live(cells: Sequence[Cell], policies: Sequence[str] = ()) -> None:
    """Refuse cells that live senders cannot offer, and policies on GPUs of another speed.

    Raises:
        ConfigError: A cell has a mix of SLOs, floors, unequal GPUs, or what only a simulation plays.
    """
    for policy in filter(is_paced, policies):
        raise ConfigError(f"policy {policy!r}: a speed after @ is only simulated; compare it with --simulate")
    for cell in cells:
        if cell.faults or cell.speed != 1.0 or cell.priority is not None or cell.n_clients > 1:
            raise ConfigError(
                f"cell {cell.name}: faults, other speeds of a cell, priorities and several clients are "
                "only simulated; compare it with --simulate"
            )
        if len(parse_slos(cell.slo_ms)) > 1 or cell.floor is not None:
            raise ConfigError(
                f"cell {cell.name}: a live sender has one SLO and no floor; compare it with --simulate"
            )
        if "," in cell.cluster or "*" in cell.cluster:
            raise ConfigError(
                f"cell {cell.name}: live GPUs are of one profile: expected PROFILE:N, got {cell.cluster}; "
                "compare it with --simulate"
            )


def compare_live(
    comparison: Comparison, cells: Sequence[Cell], say: Callable[[str], object], attempts: int = 1
) -> tuple[list[CellResult], list[LiveRun]]:
    """Run every policy on every cell and seed; return the figures, and each run's report.

    With jitter this process moves to a private network for good: see `loadgen.live.jitter`.

    Args:
        comparison: Policies, seeds, and the GPUs' pace.
        cells: What is offered.
        say: Takes a line a run.
        attempts: A run that is invalid or disturbed is repeated until this many were made; the last counts.

    Raises:
        ConfigError: A cell cannot be offered live, or the kernel refuses to let messages jitter.
    """
    check_live(cells, comparison.policies)
    if any(cell.jitter_ms for cell in cells):
        enter_private_network()
    notes: list[LiveRun] = []
    results = []
    for cell in cells:
        figures: dict[str, list[Figures]] = {policy: [] for policy in comparison.policies}
        for turn, seed in enumerate(comparison.seeds):
            first = turn % len(comparison.policies)  # so that no policy always goes first
            for policy in (*comparison.policies[first:], *comparison.policies[:first]):
                found, tried = _tried(comparison, cell, policy, seed, attempts, say)
                figures[policy].append(found)
                notes += tried
        runs = {policy: tuple(ones) for policy, ones in figures.items()}
        results.append(CellResult(cell, comparison.seeds, runs, _bounds(comparison, cell)))
    return results, notes


def _bounds(comparison: Comparison, cell: Cell) -> tuple[Figures, ...] | None:
    if not comparison.with_bound:
        return None
    cluster = parse_cluster(cell.cluster)
    return tuple(
        bound_in(cell, cell.workload(comparison.duration_s, seed), cluster, comparison.settings)
        for seed in comparison.seeds
    )


def _tried(
    comparison: Comparison, cell: Cell, policy: str, seed: int, attempts: int, say: Callable[[str], object]
) -> tuple[Figures, list[LiveRun]]:
    notes: list[LiveRun] = []
    while True:
        found, note = _one(comparison, cell, policy, seed)
        say(_line(found, note))
        if (note.valid and not note.disturbed) or len(notes) + 1 >= attempts:
            return found, [*notes, note]
        notes.append(replace(note, counts=False))


def _one(comparison: Comparison, cell: Cell, policy: str, seed: int) -> tuple[Figures, LiveRun]:
    profile, _, n_gpus = cell.cluster.rpartition(":")
    workload = cell.workload(comparison.duration_s, seed)
    assert isinstance(workload.slo_ns, int), "one SLO, as was checked"
    await_calm(_CALM_NS)
    emulation = Emulation(
        profile, int(n_gpus), policy, pace=comparison.settings.pace, jitter_ns=int(cell.jitter_ms * MS)
    )  # fmt: skip
    run, report = run_emulated(workload.trace, RunSettings(workload.slo_ns, seed=seed), emulation)
    result = run.result
    share = result.slo_attainment or 0.0
    note = LiveRun(
        cell.name, policy, seed, result.valid, result.disturbed, tuple(result.invalid_because),
        result.send_lag_ms["p99_9"], report.n_violations,
    )  # fmt: skip
    return Figures(share, result.mean_accuracy, share * (result.mean_accuracy or 0.0)), note


def _line(found: Figures, note: LiveRun) -> str:
    accuracy = "-" if found.accuracy is None else f"{found.accuracy:.3f} %"
    words = f"{note.cell}, seed {note.seed}, {note.policy}: {found.attainment:.5f}, {accuracy}"
    words += ", disturbed" if note.disturbed else ""
    return words if note.valid else f"{words}, INVALID: {'; '.join(note.invalid_because)}"
