"""What a policy promises, line by line: a pure function from a cell's figures to what holds, and by how much.

Figures are means over seeds on which all served the very same queries. The yardstick is the better of
`slackfit` and of `mincost` on GPUs that are a quarter slower: a policy that buys accuracy with time may not
attain less than one that has a quarter less time and spends none of it on accuracy. In the same way the
policies that keep no reserve for what may come, `slackfit` and the baseline, are compared with on GPUs a
twentieth slower: docs/policies.md proves that no policy keeps line a and equals them on the same GPUs.

    a  attains at least what the yardstick does, less 0.0005, and what mincost does, less 0.01; where there
       are priorities the highest class does so first, and then all queries
    b  in cells that leave no excuse (recorded, the paper's grid, spikes onto idle GPUs), at least what
       mincost does, less 0.0005
    c  correct answers a query (attainment times accuracy, percent): at least those of mincost, and of
       slackfit and the baseline on GPUs a twentieth slower, each less 0.02
    d  accuracy: at least that of this slackfit, less 0.02, where attainments differ by less than 0.0005
    e  within 0.3 of the bound on correct answers where it is near: with 8 GPUs or more, one SLO of 36 ms or
       longer, a bound that attains 1, and mincost's mean batch of 14 or more; not where queries come at once

In cells that bring a surprise (a surge or a slowdown far beyond all before it) no policy that spends time on
accuracy keeps lines a, b and c against mincost: docs/policies.md has the argument. There line a says instead

    a  attains at least what slackfit and the baseline do, less 0.0005, and what mincost does, less 0.05

while b, and c against mincost, do not count, and the GPUs of c and d are a tenth slower: what has come once
is reserved for from then on.

The bound is a fluid's: it knows no whole batches. Of 200 queries at once on 8 GPUs each has 25, and within
36 ms two batches of 16 places: at best 78.8 % on the CNN profile, while the fluid would have 80.0 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadgen.study.compare import Figures

ATTAINMENT = 0.0005
"""Share of all queries that counts as noise."""

BELOW_MINCOST = 0.01
"""Share of all queries by which attainment may fall short of mincost's on the same GPUs."""

BELOW_IN_SURPRISE = 0.05
"""The same where a surprise comes: what PlanFit lost when this was set, and a fifth more."""

CORRECT = 0.02
"""Points of correct answers a query, or of accuracy, that count as noise."""

OF_BOUND = 0.3
"""Points of correct answers a query within which the bound must be, where it is near."""

NEAR_GPUS = 8
NEAR_SLO_NS = 36_000_000
NEAR_BATCH = 14.0
"""The least number of GPUs, SLO and mean batch of mincost for line e to count."""

SLOWED, SLOWED_IN_SURPRISE = 0.95, 0.9
"""Speed of the GPUs on which lines c and d put slackfit and the baseline; and where a surprise comes."""

# Sums and means of floats: a margin this far below 0 is 0.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Standing:
    """What is judged: one cell's figures, each a mean over the seeds, and what the cell is like.

    Attributes:
        candidate: Of the policy that is judged.
        slower: Of `mincost` on GPUs 0.8 times as fast.
        baseline: Of the policy that the candidate is to replace.
        slowed_slackfit, slowed_baseline: Of these two on GPUs `slowed_speed` times as fast.
        bound: What no schedule exceeds.
        is_strict: Whether line b counts.
        is_at_once: Whether queries come many at once, so that whole batches keep the bound away.
        n_gpus: GPUs of the cluster.
        slo_ns: The one SLO; None if they differ.
        is_surprise: Whether a surge or a slowdown comes that is far beyond all before it.
    """

    candidate: Figures
    slackfit: Figures
    mincost: Figures
    slower: Figures
    baseline: Figures
    slowed_slackfit: Figures
    slowed_baseline: Figures
    bound: Figures
    is_strict: bool
    is_at_once: bool
    n_gpus: int
    slo_ns: int | None
    is_surprise: bool = False

    @property
    def of_bound(self) -> float:
        """Correct answers a query less those of the bound, in points."""
        return self.candidate.per_query - self.bound.per_query


def slowed_speed(*, is_surprise: bool) -> float:
    """Return the speed of the GPUs on which lines c and d put slackfit and the baseline."""
    return SLOWED_IN_SURPRISE if is_surprise else SLOWED


@dataclass(frozen=True, slots=True)
class PromiseLine:
    """What one line says of a cell.

    Attributes:
        line: Its letter.
        against: What the candidate was compared with.
        margin: By how much the line holds, in its own unit; negative is by how much it fails.
    """

    line: str
    against: str
    margin: float

    @property
    def holds(self) -> bool:
        """Whether the line holds."""
        return self.margin >= -_ROUNDING

    def __str__(self) -> str:
        """Return the line and by how much it holds or fails."""
        return f"{self.line} {self.margin:+.5f} ({self.against})"


def findings(standing: Standing) -> tuple[PromiseLine, ...]:
    """Return what each line that counts in this cell says, in order."""
    return tuple(_findings(standing))


def shortcomings(standing: Standing) -> tuple[PromiseLine, ...]:
    """Return the lines that fail, the worst of each letter alone."""
    worst: dict[str, PromiseLine] = {}
    for one in findings(standing):
        if not one.holds and (one.line not in worst or one.margin < worst[one.line].margin):
            worst[one.line] = one
    return tuple(worst.values())


def _findings(standing: Standing) -> Iterator[PromiseLine]:
    ours, slackfit, mincost, slower = (
        standing.candidate, standing.slackfit, standing.mincost, standing.slower,
    )  # fmt: skip
    if ours.top is not None:
        yield from _line_a("highest class: ", ours.top, slackfit.top, mincost.top, slower.top)
    if standing.is_surprise:
        for name, one in (("slackfit", slackfit), ("baseline", standing.baseline)):
            yield PromiseLine("a", name, ours.attainment - one.attainment + ATTAINMENT)
        lost = mincost.attainment - ours.attainment
        yield PromiseLine("a", f"mincost less {BELOW_IN_SURPRISE:g}", BELOW_IN_SURPRISE - lost)
    else:
        yield from _line_a("", ours.attainment, slackfit.attainment, mincost.attainment, slower.attainment)
        if standing.is_strict:
            yield PromiseLine("b", "mincost", ours.attainment - mincost.attainment + ATTAINMENT)
        yield PromiseLine("c", "mincost", ours.per_query - mincost.per_query + CORRECT)
    slowed, at = standing.slowed_slackfit, f"at {slowed_speed(is_surprise=standing.is_surprise):g}"
    for name, one in (("slackfit", slowed), ("baseline", standing.slowed_baseline)):
        yield PromiseLine("c", f"{name} {at}", ours.per_query - one.per_query + CORRECT)
    are_alike = abs(ours.attainment - slowed.attainment) < ATTAINMENT
    if are_alike and ours.accuracy is not None and slowed.accuracy is not None:
        yield PromiseLine("d", f"slackfit {at}", ours.accuracy - slowed.accuracy + CORRECT)
    if is_near(standing):
        yield PromiseLine("e", "bound", standing.of_bound + OF_BOUND)


def _line_a(
    of: str, ours: float, slackfit: float | None, mincost: float | None, slower: float | None
) -> Iterator[PromiseLine]:
    assert slackfit is not None, "all served the same queries"
    assert mincost is not None, "all served the same queries"
    assert slower is not None, "all served the same queries"
    yardstick = max(slackfit, slower)
    name = "slackfit" if slackfit >= slower else "mincost at 0.8"
    yield PromiseLine("a", f"{of}{name}", ours - yardstick + ATTAINMENT)
    yield PromiseLine("a", f"{of}mincost less {BELOW_MINCOST:g}", ours - mincost + BELOW_MINCOST)


def is_near(standing: Standing) -> bool:
    """Tell whether the bound is one that a policy can come near to, so that line e counts."""
    batch = standing.mincost.mean_batch
    return (
        not standing.is_at_once
        and standing.n_gpus >= NEAR_GPUS
        and standing.slo_ns is not None
        and standing.slo_ns >= NEAR_SLO_NS
        and standing.bound.attainment >= 1.0 - _ROUNDING
        and batch is not None
        and batch >= NEAR_BATCH
    )
