"""The search: a population in families, parents that win tournaments, mutation, crossing, restarts.

Each family of workloads keeps its own few, so that the first kind of failure found does not crowd out the
others. When nothing worse has been found for some generations the population starts again; what was found
stays. All that is random comes from one seed, and a generation is drawn before it is evaluated: equal seeds
and numbers of evaluations find the same, however many processes there are.
"""

from __future__ import annotations

import contextlib
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from loadgen.simulator.workloads import parse_cluster
from loadgen.study.adversary.genome import crossed, drawn, mutated
from loadgen.study.compare import bound_in, serve
from superserve.clock import SECOND
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadgen.study.adversary.genome import Genome
    from loadgen.traces.trace import Trace

REFERENCES: dict[str, tuple[str, ...]] = {
    "yardstick": ("slackfit", "mincost@0.8"),
    "mincost": ("mincost",),
    "slackfit": ("slackfit",),
    "bound": (),
}
"""What a policy may be compared with: the best of these policies; `bound` is what no schedule exceeds."""

GENERATION = 24
PER_FAMILY = 4
N_WORST = 10
WORST_OF_FAMILY = 2
STALE_GENERATIONS = 15
"""Generations without anything worse, after which the population starts again."""

_FRESH, _CROSSED, _TOURNAMENT = 0.15, 0.3, 3
_GAIN = 1e-4


@dataclass(frozen=True, slots=True)
class Question:
    """What each workload is asked.

    Attributes:
        policy: Who is to fail.
        against: A key of `REFERENCES`.
        profile: Of the GPUs.
        queries: Of each workload, about.
        is_again: Whether each workload comes twice, and the second time counts: then nothing is a surprise.
    """

    policy: str
    against: str
    profile: str
    queries: int
    is_again: bool = False

    def __post_init__(self) -> None:
        if self.is_again and self.against == "bound":
            raise ConfigError("--again: the bound is of all queries: expected another --against")
        if self.against not in REFERENCES:
            raise ConfigError(f"--against: expected one of {', '.join(REFERENCES)}, got {self.against!r}")


@dataclass(frozen=True, slots=True)
class Scored:
    """A workload and its outcome.

    Attributes:
        genome: The workload.
        gap: The best reference's attainment less the policy's.
        attainments: By policy; the bound's as "bound".
    """

    genome: Genome
    gap: float
    attainments: dict[str, float]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a generation came to."""

    generation: int
    n_evaluations: int
    worst: float
    family: str
    n_families: int
    n_restarts: int


@dataclass(slots=True)
class _State:
    """The population and what was found so far."""

    rng: random.Random
    by_family: dict[str, list[Scored]] = field(default_factory=dict)
    found: dict[str, list[Scored]] = field(default_factory=dict)
    best: float = -1.0
    n_stale: int = 0
    n_restarts: int = 0

    def take(self, scored: Sequence[Scored]) -> None:
        """Let a generation's workloads compete for their families' places."""
        has_gained = False
        for one in scored:
            _keep(self.by_family, one, PER_FAMILY)
            _keep(self.found, one, WORST_OF_FAMILY)
            if one.gap > self.best + _GAIN:
                self.best, has_gained = one.gap, True
        self.n_stale = 0 if has_gained else self.n_stale + 1
        if self.n_stale >= STALE_GENERATIONS:
            self.by_family.clear()
            self.best = -1.0
            self.n_stale = 0
            self.n_restarts += 1

    def children(self, n: int, profile: str) -> list[Genome]:
        """Return the next generation: some fresh, some crossed, all others mutated."""
        rng = self.rng
        found = []
        for _ in range(n):
            kind = rng.random()
            if not self.by_family or kind < _FRESH:
                found.append(drawn(rng, profile))
            elif kind < _FRESH + _CROSSED:
                found.append(mutated(rng, crossed(rng, self._parent(), self._parent())))
            else:
                found.append(mutated(rng, self._parent()))
        return found

    def _parent(self) -> Genome:
        """Return the winner of a tournament, half of the times within one family."""
        rng = self.rng
        families = list(self.by_family.values())
        pool = rng.choice(families) if rng.random() < 0.5 else [one for ones in families for one in ones]
        return max(rng.choices(pool, k=_TOURNAMENT), key=lambda one: one.gap).genome

    def worst(self) -> list[Scored]:
        """Return the worst found, at most some of each family."""
        ones = sorted((one for ones in self.found.values() for one in ones), key=lambda one: -one.gap)
        return ones[:N_WORST]


def _keep(by_family: dict[str, list[Scored]], one: Scored, n: int) -> None:
    ones = by_family.setdefault(one.genome.family, [])
    # Genes without effect, such as unequal halves of one GPU, make no other workload.
    if all(one.attainments != other.attainments for other in ones):
        ones.append(one)
        ones.sort(key=lambda other: -other.gap)
        del ones[n:]


def evolve(
    question: Question,
    *,
    seed: int,
    is_over: Callable[[int], bool],
    n_processes: int = 1,
    say: Callable[[Progress], object] = lambda _: None,
) -> list[Scored]:
    """Return the worst workloads found, the worst first.

    Args:
        question: Who is to fail, and beside whom.
        seed: Draws everything.
        is_over: Gets the number of evaluations after each generation; True ends the search.
        n_processes: That evaluate.
        say: Gets the progress after each generation.
    """
    state = _State(random.Random(f"{seed}/adversary"))
    n_evaluations = generation = 0
    with _mapper(n_processes) as evaluate_all:
        while True:
            scored = evaluate_all(question, state.children(GENERATION, question.profile))
            n_evaluations += len(scored)
            generation += 1
            state.take(scored)
            worst = state.worst()[0]
            say(
                Progress(
                    generation,
                    n_evaluations,
                    worst.gap,
                    worst.genome.family,
                    len(state.found),
                    state.n_restarts,
                )
            )
            if is_over(n_evaluations):
                return state.worst()


@contextlib.contextmanager
def _mapper(n_processes: int) -> Iterator[Callable[[Question, list[Genome]], list[Scored]]]:
    if n_processes == 1:
        yield lambda question, genomes: [evaluated(question, genome) for genome in genomes]
        return
    with ProcessPoolExecutor(n_processes) as pool:
        yield lambda question, genomes: list(pool.map(partial(evaluated, question), genomes))


def arrivals(question: Question, genome: Genome) -> tuple[Trace, float]:
    """Return the arrivals of a workload, and the seconds of them that do not count."""
    trace = genome.trace(question.queries, 2 if question.is_again else 1)
    return trace, trace.duration_ns / 2 / SECOND if question.is_again else 0.0


def evaluated(question: Question, genome: Genome) -> Scored:
    """Return what comes of a workload, as `loadgen compare` finds it with seed 0."""
    trace, warm_up_s = arrivals(question, genome)
    workload, cluster = genome.workload(trace), parse_cluster(genome.cluster)
    cell = genome.cell("", warm_up_s)
    policies = dict.fromkeys((question.policy, *REFERENCES[question.against]))
    attainments = {policy: serve(cell, workload, cluster, policy, seed=0).attainment for policy in policies}
    if question.against == "bound":
        attainments["bound"] = bound_in(cell, workload, cluster).attainment
    rivals = REFERENCES[question.against] or ("bound",)
    best = max(attainments[name] for name in rivals)
    return Scored(genome, best - attainments[question.policy], attainments)
