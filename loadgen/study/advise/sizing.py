"""The fewest GPUs that meet an SLO, for each policy, and what a few more of them give.

A number of GPUs holds if the trace attains what is asked for, and does so again with other arrivals. It is
sought from what the load costs at least, by doubling and bisection: attainment grows with GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loadgen.simulator.simulate import simulate
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadgen.traces.trace import Trace
    from profiles.table import Profile

MOST_GPUS = 4_096
BEYOND = (1.0, 1.25, 1.5, 2.0)
"""What of the answer is simulated beside it: what more GPUs buy in accuracy."""


@dataclass(frozen=True, slots=True)
class SizedRun:
    """What a number of GPUs gave under a policy.

    Attributes:
        attainment: Share of the queries in time: of the worse of the runs, if there were two.
        accuracy: Mean of those in time, percent; None if none was.
    """

    policy: str
    gpus: int
    attainment: float
    accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"policy": self.policy, "gpus": self.gpus, "slo_attainment": self.attainment,
                "mean_accuracy": self.accuracy}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SizingQuestion:
    """What is asked.

    Attributes:
        profile: Of each GPU.
        attainment: The share of the queries that must be in time.
        slo_ns: From due to deadline.
        traces: The load, and the same load with other arrivals, if there are any.
    """

    profile: Profile
    attainment: float
    slo_ns: int
    traces: tuple[Trace, ...]

    @property
    def least_gpus(self) -> int:
        """The least number that could serve the mean rate, on the smallest subnet in its best batches."""
        trace = self.traces[0]
        busy_ns = trace.n * self.profile.least_costs_ns()[0]
        return max(1, math.ceil(busy_ns / max(1, trace.duration_ns)))


@dataclass(slots=True)
class SizingAnswer:
    """What was found for one policy.

    Attributes:
        least: The fewest GPUs that held; None if not even the most did.
        runs: Every number tried, ascending.
    """

    policy: str
    least: SizedRun | None
    runs: list[SizedRun] = field(default_factory=list)


def size(
    question: SizingQuestion, policy: str, say: Callable[[str], object], beyond: Sequence[float] = BEYOND
) -> SizingAnswer:
    """Find the fewest GPUs for a policy, and simulate some more; `say` receives a line for each run.

    Raises:
        ConfigError: The policy is unknown.
    """
    tried: dict[int, SizedRun] = {}

    def run(n: int) -> SizedRun:
        if n not in tried:
            tried[n] = _run(question, policy, n)
            say(line_of(tried[n], question.attainment))
        return tried[n]

    least = _fewest(lambda n: run(n).attainment >= question.attainment, question.least_gpus)
    if least is not None:
        for share in beyond:
            run(min(MOST_GPUS, math.ceil(share * least)))
    found = sorted(tried.values(), key=lambda one: one.gpus)
    return SizingAnswer(policy, None if least is None else tried[least], found)


def _fewest(holds: Callable[[int], bool], start: int) -> int | None:
    """Return the least number that holds, or None if `MOST_GPUS` do not."""
    low, high = 0, start  # low fails, as far as known: none serve nothing
    while not holds(high):
        if high >= MOST_GPUS:
            return None
        low, high = high, min(2 * high, MOST_GPUS)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _run(question: SizingQuestion, policy: str, n: int) -> SizedRun:
    """Simulate a number of GPUs; the second arrivals only if the first ones held."""
    cluster = [question.profile] * n
    worst = SizedRun(policy, n, 1.0, None)
    for seed, trace in enumerate(question.traces):
        found = simulate(trace, cluster, policy=policy, slo_ns=question.slo_ns, seed=seed).result
        attainment = found.slo_attainment or 0.0
        if attainment <= worst.attainment or worst.accuracy is None:
            worst = SizedRun(policy, n, attainment, found.mean_accuracy)
        if attainment < question.attainment:
            break
    return worst


def line_of(run: SizedRun, attainment: float) -> str:
    """Return a run as a line."""
    holds = "holds" if run.attainment >= attainment else "fails"
    accuracy = "-" if run.accuracy is None else f"{run.accuracy:.2f} %"
    name = f"{run.policy:<12} {run.gpus:>5} GPUs"
    return f"  {name}  {holds}  attainment {run.attainment:.5f}  accuracy {accuracy}"


def best_of(answers: Sequence[SizingAnswer]) -> SizingAnswer | None:
    """Return the policy that needs the fewest GPUs; of equals, the most accurate."""
    held = [one for one in answers if one.least is not None]
    return min(held, key=_order, default=None)


def _order(answer: SizingAnswer) -> tuple[int, float]:
    assert answer.least is not None, "only those that held are compared"
    return answer.least.gpus, -(answer.least.accuracy or 0.0)


def words_of(question: SizingQuestion, answers: Sequence[SizingAnswer]) -> list[str]:
    """Return the advice in words."""
    trace = question.traces[0]
    rate_qps = trace.n * SECOND / trace.duration_ns
    asked = f"attainment {question.attainment:g} at {question.slo_ns / MS:g} ms"
    best = best_of(answers)
    if best is None or best.least is None:
        return [f"No number of GPUs up to {MOST_GPUS:,} gives {asked}"]
    least = best.least
    at = f"at {least.accuracy or 0.0:.2f} % accuracy"
    lines = [f"{least.gpus} GPUs under {least.policy}: {asked} for {rate_qps:,.0f} q/s, {at}"]
    fewer = [one for one in best.runs if one.gpus < least.gpus]
    if fewer:
        lines.append(f"  with {fewer[-1].gpus} the attainment is {fewer[-1].attainment:.4f}")
    lines += [
        f"  with {one.gpus} the accuracy is {one.accuracy or 0.0:.2f} %"
        for one in best.runs
        if one.gpus > least.gpus and one.attainment >= question.attainment
    ]
    for other in answers:
        if other is not best and other.least is not None:
            at = f"{other.least.gpus} GPUs at {other.least.accuracy or 0.0:.2f} %"
            lines.append(f"  under {other.policy}: {at}")
        elif other is not best:
            lines.append(f"  under {other.policy}: no number up to {MOST_GPUS:,} holds")
    return lines


def check_question(question: SizingQuestion) -> None:
    """Refuse an SLO that no answer could meet, before anything is simulated.

    Raises:
        ConfigError: It is below the quickest answer of the profile.
    """
    quickest_ns = question.profile.latency_ns(0, 1)
    if question.slo_ns <= quickest_ns:
        name = question.profile.subnets[0].name
        raise ConfigError(
            f"--slo-ms: expected more than {quickest_ns / MS:g} ms, which {name} alone takes on a GPU of "
            f"{question.profile.name}, got {question.slo_ns / MS:g}"
        )
