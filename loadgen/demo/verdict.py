"""What must hold in the demo: which problems fail it, and which are warnings.

A wrong answer is always a failure. A missed deadline is one on a quiet machine, unless few were missed: few
compared with what the largest subnet alone misses on the same machine in the same minute. Those are a
warning, and so is what other work cost, as long as adapting met more deadlines than not adapting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadgen.demo.answers import ALL, TOLERANCE_POINTS
from loadgen.options import DEFAULT_POLICY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from loadgen.demo.answers import DemoComparison, Score, ServedAnswers
    from loadgen.demo.serve import Served

ATTAINED, NOT_ATTAINED = 0.99, 0.9
"""The default policy must attain at least the first, the largest subnet alone less than the second."""

_FEW = 0.05
"""Share of the deadlines that the largest subnet alone misses: a stall or two of a slow machine cost less."""

_WRONG = ("failed", "invalid")
_LOST = ("worker_lost", "unanswered")


@dataclass(frozen=True, slots=True)
class DemoVerdict:
    """What is wrong, a line each: failures end the demo with 1, warnings do not."""

    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: DemoVerdict) -> DemoVerdict:
        """Return both."""
        return DemoVerdict(self.failures + other.failures, self.warnings + other.warnings)

    @property
    def exit_code(self) -> int:
        """Of the demo."""
        return 1 if self.failures else 0

    def lines(self) -> list[str]:
        """Return the lines to print."""
        return [
            *(f"WARNING: {line}" for line in self.warnings),
            *(f"FAILED: {line}" for line in self.failures),
        ]


def missed_by_adapting(served: Served) -> list[str]:
    """Return how the default policy's run missed its deadlines, a line each."""
    attained = served.result.slo_attainment or 0.0
    return missed(served) + ([_low(served)] if attained < ATTAINED else [])


def _low(served: Served) -> str:
    attained = served.result.slo_attainment or 0.0
    return f"attainment under {served.policy}: expected at least {ATTAINED}, got {attained:.4f}"


def missed_by_largest(served: Served) -> list[str]:
    """Return how the run of the largest subnet alone fails to show that the load is too much for it."""
    alone = served.result.slo_attainment or 0.0
    high = [f"attainment of the largest subnet: expected below {NOT_ATTAINED}, got {alone:.4f}"]
    return missed(served) + (high if alone >= NOT_ATTAINED else [])


def missed(served: Served) -> list[str]:
    """Return why a run does not count, a line each, whatever it attained."""
    result = served.result
    wrong = _ended(served, _LOST)
    if not result.valid:
        wrong.append(f"the run under {served.policy} does not count: {'; '.join(result.invalid_because)}")
    return wrong


def _ended(served: Served, outcomes: Sequence[str]) -> list[str]:
    counts = {one: served.result.queries[one] for one in outcomes}
    return [f"{n:,} queries {one} under {served.policy}" for one, n in counts.items() if n]


MISSED: dict[str, Callable[[Served], list[str]]] = {
    DEFAULT_POLICY: missed_by_adapting,
    "slackfit": missed,
    "fixed:largest": missed_by_largest,
}
"""The policies, the default one first, and what each one's run must show."""


def judge_serving(runs: Sequence[Served]) -> DemoVerdict:
    """Judge the runs of one load, the default policy's first, the largest subnet's last."""
    failures, warnings = [], []
    attained, alone = (one.result.slo_attainment or 0.0 for one in (runs[0], runs[-1]))
    few = {_low(runs[0])} if 1 - attained <= _FEW * (1 - alone) else set()
    for served in runs:
        for line in MISSED[served.policy](served):
            if served.noise:
                warnings.append(f"{line} (disturbed: {served.noise})")
            elif line in few:
                warnings.append(f"{line} (a stall: the largest subnet alone got {alone:.4f} here)")
            else:
                failures.append(line)
        failures += _ended(served, _WRONG)
    if attained <= alone:
        failures.append(
            f"attainment under {runs[0].policy}: expected more than the largest subnet alone, "
            f"got {attained:.4f} and {alone:.4f}"
        )
    return DemoVerdict(tuple(failures), tuple(warnings))


def wrong_coverage(answers: ServedAnswers) -> list[str]:
    """Return a line if an answer came without an output: of real logits, not all are zero."""
    n, n_out = len(answers.rows) + answers.n_left_out, answers.n_left_out
    if not n_out:
        return []
    return [f"outputs: expected one with every answer, got none with {n_out:,} of {n:,}"]


def thin_answers(scores: Sequence[Score]) -> list[str]:
    """Return a line if too few queries were answered to apply the tolerance."""
    if any(one.is_judged for one in scores):
        return []
    return ["labels: too few queries were answered to judge any subnet's accuracy; try more --seconds"]


def wrong_answers(scores: Sequence[Score], comparisons: Iterable[DemoComparison]) -> list[str]:
    """Return what is wrong with the returned labels and outputs, a line each.

    Args:
        scores: By subnet, and of all of them together.
        comparisons: Of answers that were computed again.
    """
    wrong = [
        f"labels of {one.name}: expected {one.profiled:.2f} % right within {TOLERANCE_POINTS} points, "
        f"got {one.measured:.2f} % of {one.n:,}"
        for one in scores
        if one.is_off
    ]
    if any(one.name == ALL and not one.n for one in scores):
        wrong.append("labels: no query was answered")
    for one in comparisons:
        if one.n_same < one.n:
            wrong.append(f"outputs of {one.name}: {one.n - one.n_same} of {one.n} are not that subnet's")
        if one.n_telling < one.n:
            wrong.append(
                f"outputs of {one.name}: {one.n - one.n_telling} of {one.n} could be a neighbour's: no proof"
            )
    return wrong
