"""What the gate prints and writes: a line a cell, what fails, and the figures behind it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loadgen.study.gate.promise import findings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.study.compare import Figures
    from loadgen.study.gate.draft import GateCell
    from loadgen.study.gate.run import Judged, PolicyGate


def table_lines(gate: PolicyGate, judged: Sequence[Judged], skipped: Sequence[GateCell]) -> list[str]:
    """Return the table: the candidate's figures, attainment and correct answers of others, the verdict."""
    wide = max((len(one.of.name) for one in judged), default=4)
    title = f"{gate.candidate} for {gate.baseline}, seeds {gate.seeds[0]} to {gate.seeds[-1]}: attainment, "
    heads = (
        f"{'cell':<{wide}}  held   {gate.candidate[:24]:<23}   {'slackfit':<15}  {'mincost':<15}  "
        f"{'at 0.8':<7}  {'baseline':<15}  {'bound':<15}  of bound  verdict"
    )
    found = [title + "accuracy and correct answers a query in percent", heads]
    for one in judged:
        at = one.standing
        accuracy = "-" if at.candidate.accuracy is None else f"{at.candidate.accuracy:.3f}"
        found.append(
            f"{one.of.name:<{wide}}  {'out' if one.of.is_held_out else 'tuned':<5}  "
            f"{at.candidate.attainment:.5f} {accuracy:>7} {at.candidate.per_query:7.3f}   "
            f"{_two(at.slackfit)}  {_two(at.mincost)}  {at.slower.attainment:.5f}  {_two(at.baseline)}  "
            f"{_two(at.bound)}  {at.of_bound:+8.3f}  {one.verdict}"
        )
    found += [f"{cell.name}: skipped: {cell.skipped}" for cell in skipped]
    return found


def _two(figures: Figures) -> str:
    return f"{figures.attainment:.5f} {figures.per_query:7.3f}"


def summary_lines(gate: PolicyGate, judged: Sequence[Judged], n_skipped: int) -> list[str]:
    """Return how many cells hold, tuned and held out, by line and by family what fails."""
    found = []
    for name, ones in (
        ("tuned", [one for one in judged if not one.of.is_held_out]),
        ("held out", [one for one in judged if one.of.is_held_out]),
    ):
        if ones:
            found.append(f"{name}: {sum(not one.fails for one in ones)} of {len(ones)} cells hold every line")
    by_line: dict[str, int] = {}
    by_family: dict[str, list[int]] = {}
    for one in judged:
        counts = by_family.setdefault(one.of.family, [0, 0])
        counts[0] += bool(one.fails)
        counts[1] += 1
        for line in one.fails:
            by_line[line.line] = by_line.get(line.line, 0) + 1
    if by_line:
        found.append("fails by line: " + ", ".join(f"{line} in {by_line[line]}" for line in sorted(by_line)))
        failing = {family: counts for family, counts in by_family.items() if counts[0]}
        found.append("by family: " + ", ".join(f"{name} {bad} of {n}" for name, (bad, n) in failing.items()))
    if n_skipped:
        found.append(f"skipped: {n_skipped} cells")
    if gate.store.n_stale:
        found.append(f"{gate.store.n_stale} figures of comparators are of another version of the code")
    holds = not any(one.fails for one in judged)
    found.append(f"{gate.candidate} {'keeps' if holds else 'breaks'} its promise in {len(judged)} cells")
    return found


def markdown_lines(gate: PolicyGate, judged: Sequence[Judged]) -> list[str]:
    """Return the table of a page."""
    names = (gate.candidate, "accuracy", "slackfit", "mincost", "mincost at 0.8", gate.baseline)
    found = [f"| cell | | {' | '.join(names)} | bound | of bound | verdict |", f"|{'---|' * 11}"]
    for one in judged:
        at = one.standing
        accuracy = "" if at.candidate.accuracy is None else f"{at.candidate.accuracy:.3f}"
        cells = [
            one.of.name, "held out" if one.of.is_held_out else "tuned", _page_two(at.candidate), accuracy,
            _page_two(at.slackfit), _page_two(at.mincost), f"{at.slower.attainment:.5f}",
            _page_two(at.baseline), _page_two(at.bound), f"{at.of_bound:+.3f}", one.verdict,
        ]  # fmt: skip
        found.append(f"| {' | '.join(cells)} |")
    return found


def _page_two(figures: Figures) -> str:
    return f"{figures.per_query:.3f} ({figures.attainment:.5f})"


def to_dict(gate: PolicyGate, judged: Sequence[Judged], skipped: Sequence[GateCell]) -> dict[str, Any]:
    """Return the file that `--json` writes, without its environment."""
    return {
        "schema": 1,
        "policy": gate.candidate,
        "baseline": gate.baseline,
        "seeds": list(gate.seeds),
        "holds": not any(one.fails for one in judged),
        "cells": [_cell_dict(one) for one in judged],
        "skipped": {cell.name: cell.skipped for cell in skipped},
    }


def _cell_dict(one: Judged) -> dict[str, Any]:
    result = one.result
    return {
        "name": one.of.name,
        "family": one.of.family,
        "held_out": one.of.is_held_out,
        "strict": one.of.is_strict,
        "surprise": one.of.is_surprise,
        "cell": {name: value for name, value in asdict(one.of.cell).items() if name != "faults"}
        | {"faults": [fault.to_dict() for fault in one.of.cell.faults]},
        "policies": {name: [asdict(run) for run in runs] for name, runs in result.policies.items()},
        "bound": [asdict(run) for run in result.bounds or ()],
        "of_bound": one.standing.of_bound,
        "lines": [
            {"line": line.line, "against": line.against, "margin": line.margin, "holds": line.holds}
            for line in findings(one.standing)
        ],
    }
