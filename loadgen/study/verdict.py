"""Whether one policy may replace another: never behind by more than noise, and ahead where it must be.

A policy is judged cell by cell, by means over seeds on which both served the very same queries. Nowhere may
it attain less or be less accurate than the limits below allow; and where queries or GPUs differ from each
other, it must be ahead by a noticeable margin.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loadgen.study.compare import is_baseline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.study.compare import Cell, CellResult

ATTAINMENT_BEHIND = 0.0005
"""Most that attainment may fall short by, as a share of all queries."""

ACCURACY_BEHIND = 0.02
"""Most that it may fall short by, in points of summed accuracy per query."""

AHEAD = 0.3
"""Least that it must be ahead by where queries or GPUs differ, in points of summed accuracy per query."""


def differs(cell: Cell) -> bool:
    """Return whether the queries or the GPUs of a cell differ: SLOs, floors, or profiles."""
    return "," in cell.slo_ms or "," in cell.cluster or cell.floor is not None


def shortfalls(result: CellResult, policy: str, over: str) -> tuple[str, ...]:
    """Return how a policy falls short of what it needs to replace another, in words."""
    ours, theirs = result.mean(policy), result.mean(over)
    ahead, _ = result.gain(policy, over)
    found = []
    if ours.attainment < theirs.attainment - ATTAINMENT_BEHIND:
        found.append(f"attainment {ours.attainment - theirs.attainment:+.5f}")
    least = AHEAD if differs(result.cell) else -ACCURACY_BEHIND
    if ahead < least:
        found.append(f"summed accuracy a query {ahead:+.4f}, expected at least {least:+g}")
    return tuple(found)


def verdicts(results: Sequence[CellResult]) -> dict[str, list[str]]:
    """Return, for each policy except the first and the baselines, where it falls short of the first."""
    first, *others = results[0].policies
    return {
        policy: [
            f"{result.cell.name}: {', '.join(short)}"
            for result in results
            if (short := shortfalls(result, policy, first))
        ]
        for policy in others
        if not is_baseline(policy)
    }


def verdict_lines(results: Sequence[CellResult]) -> list[str]:
    """Return a line for each judged policy, and one for each cell where it falls short."""
    first = next(iter(results[0].policies))
    found = []
    for policy, short in verdicts(results).items():
        if short:
            found.append(f"{policy} may not take {first}'s place; of {len(results)} cells it falls short in:")
            found += [f"  {line}" for line in short]
        else:
            found.append(f"{policy} may take {first}'s place: it holds every limit in {len(results)} cells")
    return found


def markdown(results: Sequence[CellResult]) -> list[str]:
    """Return the table of a page: summed accuracy per query and attainment of each policy, and the bound."""
    policies = list(results[0].policies)
    first = policies[0]
    heads = ["cell", *policies, *(f"{one} ahead by" for one in policies[1:]), "bound"]
    found = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for result in results:
        limit = result.mean_bound()
        means = [result.mean(policy) for policy in policies]
        cells = [result.cell.name, *(f"{one.per_query:.3f} ({one.attainment:.5f})" for one in means)]
        for policy in policies[1:]:
            ahead, error = result.gain(policy, first)
            cells.append(f"{ahead:+.3f}" if math.isnan(error) else f"{ahead:+.3f} ± {error:.3f}")
        cells.append("" if limit is None else f"{limit.per_query:.3f} ({limit.attainment:.5f})")
        found.append(f"| {' | '.join(cells)} |")
    return found
