"""Live comparisons beside simulations of the same queries: by medians, and where they part.

A live run shares its machine with whatever else runs there. A median over seeds leaves out a run or two that
this spoilt, where a mean would not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from loadgen.simulator.workloads import parse_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadgen.study.compare import Cell, CellResult, Comparison, Figures

APART = 0.005
"""Most by which a live attainment may differ from the simulated one."""

BELOW = 0.002
"""Most by which a policy's live attainment may be below that of `mincost`."""

_YARDSTICK = "mincost"


@dataclass(frozen=True, slots=True)
class Beside:
    """One policy in one cell: medians over the seeds.

    Attributes:
        cell: The cell's name.
        policy: The policy.
        live: Attainment and accuracy of the live runs; accuracy is None if a median run answered none.
        simulated: The same of the simulations.
        wrong: What is not as promised, in words.
    """

    cell: str
    policy: str
    live: tuple[float, float | None]
    simulated: tuple[float, float | None]
    wrong: tuple[str, ...]

    def line(self) -> str:
        """Return it as a row of a table in Markdown."""
        shares = f"{self.live[0]:.5f} | {self.simulated[0]:.5f} | {self.live[0] - self.simulated[0]:+.5f}"
        accuracies = " | ".join(
            "-" if one is None else f"{one:.3f}" for one in (self.live[1], self.simulated[1])
        )
        return (
            f"| {self.cell} | {self.policy} | {shares} | {accuracies} | {'; '.join(self.wrong) or 'holds'} |"
        )


HEAD = (
    "| cell | policy | attainment live | simulated | apart | accuracy live | simulated | |",
    "|---|---|---|---|---|---|---|---|",
)
"""First lines of the table."""


def simulated_beside(
    comparison: Comparison, cells: Sequence[Cell], n_processes: int, say: Callable[[str], object]
) -> list[CellResult]:
    """Simulate what was compared live: one process holds all GPUs, as in a live comparison."""
    found = []
    for cell in cells:
        settings = replace(comparison.settings, gpus_per_process=len(parse_cluster(cell.cluster)))
        alike = replace(comparison, settings=settings, with_bound=False)
        found += alike.run([cell], n_processes=n_processes, say=say)
    return found


def beside(live: Sequence[CellResult], simulated: Sequence[CellResult]) -> list[Beside]:
    """Return a row for each cell and policy; both in the same order, with the same policies."""
    return [
        _row(one, other, policy)
        for one, other in zip(live, simulated, strict=True)
        for policy in one.policies
    ]


def _row(live: CellResult, simulated: CellResult, policy: str) -> Beside:
    ours, theirs = _medians(live.policies[policy]), _medians(simulated.policies[policy])
    wrong = []
    if abs(ours[0] - theirs[0]) > APART:
        wrong.append(f"{ours[0] - theirs[0]:+.5f} from its simulation")
    if _YARDSTICK in live.policies:
        ahead = ours[0] - _medians(live.policies[_YARDSTICK])[0]
        if ahead < -BELOW:
            wrong.append(f"{ahead:+.5f} from {_YARDSTICK} live")
    return Beside(live.cell.name, policy, ours, theirs, tuple(wrong))


def _medians(figures: Sequence[Figures]) -> tuple[float, float | None]:
    accuracies = [one.accuracy for one in figures if one.accuracy is not None]
    return median(one.attainment for one in figures), median(accuracies) if accuracies else None
