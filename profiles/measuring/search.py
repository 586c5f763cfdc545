"""Search a supernet for its pareto subnets: accuracy up, costs down, in one run.

An evolution with non-dominated survival: parents are crossed or mutated, and those parents and
children survive that no other beats in everything; among equals, those in emptier regions. The
result is the best of all evaluated subnets; `find_profile` makes a profile of it, for one device.

Costs belong to a subnet, not to a device, so the same seed gives the same search everywhere.
With multiply-adds and kernels as costs, the front contains the best subnets for every device whose
latency grows with both.

Sources: the operators are those of Once for All's evolution (Cai et al., ICLR '20), the survival is
that of NSGA-II (Deb et al., 2002).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from profiles.measuring.flops import Cost, runs, surroundings
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from gpu_worker.supernet.control import Control, Entry
    from gpu_worker.supernet.supernet import Supernet

    Floats = npt.NDArray[np.float64]

Genome = tuple[Any, ...]
"""All entries of a control tuple, in the order of its space."""

_N_PROBES = 6  # random tuples at which each entry's effect is observed
_MUTATION = 0.1  # chance that an entry changes, as in Once for All; of short tuples at least one changes
_TRIES = 8  # mutations of a child until it is a network that was not seen before
_PARENTS = 0.5  # share of the population, its best part, that has children


@dataclass(frozen=True, slots=True)
class SearchEffort:
    """How far to search.

    Attributes:
        population: Subnets that survive a generation.
        generations: After the first, random one.
        seed: Of all random numbers.
    """

    population: int
    generations: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 4:
            raise ConfigError(f"population: expected at least 4, got {self.population}")
        if self.generations < 0:
            raise ConfigError(f"generations: expected at least 0, got {self.generations}")
        if self.seed < 0:
            raise ConfigError(f"seed: expected at least 0, got {self.seed}")


class Candidate(NamedTuple):
    """A subnet that was evaluated.

    Attributes:
        control: Its control tuple, canonical.
        accuracy: Percent.
        cost: Two parts; less of either is better.
    """

    control: Control
    accuracy: float
    cost: Cost


class Space:
    """A supernet's control tuples; tuples that make the same network count as one.

    An entry may not matter: the width of a block that does not run, or a value that rounds to the
    same channels as another. The operators' settings show which, independently of what the
    supernet's tuples mean.
    """

    def __init__(self, supernet: Supernet) -> None:
        self._supernet = supernet
        space = supernet.controls.space
        self._keys = tuple((key, len(row)) for key, row in space.entries.items())
        self._entries: tuple[Entry, ...] = tuple(itertools.chain(*space.entries.values()))
        self._around = surroundings(supernet.model)
        self._touched, self._same = self._probe()
        self.choices = tuple(
            tuple(choice for choice in entry.choices if same[choice] == choice)
            for entry, same in zip(self._entries, self._same, strict=True)
        )

    def control(self, genome: Genome) -> Control:
        """Return a genome in the supernet's form."""
        values = iter(genome)
        return {key: list(itertools.islice(values, n)) for key, n in self._keys}

    def genome(self, control: Control) -> Genome:
        """Return a control tuple's entries in a row."""
        return tuple(itertools.chain.from_iterable(control[key] for key, _ in self._keys))

    def signature(self, genome: Genome) -> tuple[Any, ...]:
        """Return what distinguishes networks: the settings of every operator that runs, None for others.

        Raises:
            ConfigError: An entry is out of bounds.
        """
        settings = self._settings(genome)
        return tuple(
            setting if runs(around, settings) else None
            for around, setting in zip(self._around, settings, strict=True)
        )

    def canonical(self, genome: Genome) -> Genome:
        """Return the genome of the same network with every entry that does not matter at its lowest."""
        settings = self._settings(genome)
        running = {place for place, around in enumerate(self._around) if runs(around, settings)}
        lowered = tuple(
            same.get(value, value) if running & touched else entry.choices[0]
            for value, entry, same, touched in zip(
                genome, self._entries, self._same, self._touched, strict=True
            )
        )
        # The effect of an entry was observed at a few tuples only: at others it may have more.
        return lowered if self.signature(lowered) == self.signature(genome) else genome

    def random(self, rng: np.random.Generator) -> Genome:
        """Draw each entry uniformly from its choices."""
        return tuple(choices[int(rng.integers(len(choices)))] for choices in self.choices)

    def levelled(self, rng: np.random.Generator) -> Genome:
        """Draw a level from smallest to largest, and entries near it: `random` draws only middling ones."""
        near = np.clip(rng.uniform() + 0.15 * rng.standard_normal(len(self.choices)), 0, 1)
        return tuple(
            choices[min(int(at * len(choices)), len(choices) - 1)]
            for at, choices in zip(near.tolist(), self.choices, strict=True)
        )

    def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """Draw new values for some entries, at least one."""
        is_new = rng.random(len(genome)) < _MUTATION
        is_new[int(rng.integers(len(genome)))] = True
        return tuple(
            new if is_drawn else old
            for old, new, is_drawn in zip(genome, self.random(rng), is_new.tolist(), strict=True)
        )

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """Take each entry from one of the two."""
        return tuple(
            pair[side]
            for *pair, side in zip(one, other, rng.integers(2, size=len(one)).tolist(), strict=True)
        )

    @property
    def ends(self) -> tuple[Genome, Genome]:
        """The smallest and the largest of the space."""
        space = self._supernet.controls.space
        return self.genome(space.smallest), self.genome(space.largest)

    def _settings(self, genome: Genome) -> tuple[Any, ...]:
        return self._supernet.settings_of(Subnet("candidate", self.control(genome)))

    def _probe(self) -> tuple[list[frozenset[int]], list[dict[Any, Any]]]:
        """Return for each entry the settings that it affects, and for each choice the lowest equivalent."""
        rng = np.random.default_rng(0)
        probes = [*self.ends]
        probes += [self.genome(self._supernet.controls.space.random(rng)) for _ in range(_N_PROBES)]
        touched, same = [], []
        for number, entry in enumerate(self._entries):
            # By choice: the settings at every probe, end to end.
            seen = {
                choice: tuple(
                    self._settings((*probe[:number], choice, *probe[number + 1 :])) for probe in probes
                )
                for choice in entry.choices
            }
            first = seen[entry.choices[0]]
            touched.append(
                frozenset(
                    place
                    for other in seen.values()
                    for before, after in zip(first, other, strict=True)
                    for place in range(len(before))
                    if before[place] != after[place]
                )
            )
            same.append(
                {c: next(low for low in entry.choices if seen[low] == seen[c]) for c in entry.choices}
            )
        return touched, same


# --- the evolution --------------------------------------------------------------------------


class _Judged:
    """Every network that was evaluated, once."""

    def __init__(
        self, space: Space, accuracy: Callable[[Sequence[Control]], Floats], cost: Callable[[Control], Cost]
    ) -> None:
        self._space, self._accuracy, self._cost = space, accuracy, cost
        self._seen: set[tuple[Any, ...]] = set()  # for membership only: its order has no meaning
        self.genomes: list[Genome] = []
        self.candidates: list[Candidate] = []

    def has(self, genome: Genome) -> bool:
        """Return whether a genome's network was evaluated."""
        return self._space.signature(genome) in self._seen

    def add(self, genomes: Sequence[Genome]) -> list[int]:
        """Evaluate the new ones; return their numbers."""
        fresh = []
        for genome in genomes:
            signature = self._space.signature(genome)
            if signature not in self._seen:
                self._seen.add(signature)
                fresh.append(self._space.canonical(genome))
        if not fresh:
            return []
        controls = [self._space.control(genome) for genome in fresh]
        accuracies = self._accuracy(controls).tolist()
        first = len(self.candidates)
        self.genomes += fresh
        self.candidates += [
            Candidate(control, accuracy, self._cost(control))
            for control, accuracy in zip(controls, accuracies, strict=True)
        ]
        return list(range(first, len(self.candidates)))

    def points(self, numbers: Sequence[int]) -> Floats:
        """Return (n, objectives); lower is better."""
        chosen = (self.candidates[number] for number in numbers)
        return np.array([(-accuracy, *cost) for _, accuracy, cost in chosen])


class Front(NamedTuple):
    """The result of a search.

    Attributes:
        candidates: Those that no other beats in everything, by ascending accuracy.
        others: Of the rest, the space's smallest and largest, and the next best.
        n_judged: Different networks that were evaluated.
    """

    candidates: list[Candidate]
    others: list[Candidate]
    n_judged: int


def search(
    space: Space,
    accuracy: Callable[[Sequence[Control]], Floats],
    cost: Callable[[Control], Cost],
    effort: SearchEffort,
    on_generation: Callable[[int, int], None] = lambda _done, _total: None,
) -> Front:
    """Return the pareto subnets of a supernet.

    Args:
        space: What to search.
        accuracy: Percent of each control tuple, higher is better.
        cost: Of a control tuple, lower is better.
        effort: How far; one seed gives one result.
        on_generation: Receives how many generations are done, and of how many.

    The smallest and the largest subnet are always evaluated.
    """
    rng = np.random.default_rng(effort.seed)
    judged = _Judged(space, accuracy, cost)
    half = effort.population // 2
    first = [space.levelled(rng) for _ in range(half)]
    first += [space.random(rng) for _ in range(effort.population - half - len(space.ends))]
    population = judged.add([*space.ends, *first])
    on_generation(0, effort.generations)
    for generation in range(effort.generations):
        parents = population[: max(2, round(_PARENTS * len(population)))]
        genomes = [judged.genomes[i] for i in parents]
        children = judged.add(_children(space, judged, genomes, effort.population, rng))
        numbers = [*population, *children]
        population = [numbers[i] for i in survivors(judged.points(numbers), effort.population)]
        on_generation(generation + 1, effort.generations)
    points = judged.points(range(len(judged.candidates)))
    best = non_dominated(points)
    ends = range(len(space.ends))  # they were evaluated first
    near = dict.fromkeys([*ends, *survivors(points, len(best) + effort.population)])
    return Front(
        sorted((judged.candidates[i] for i in best), key=lambda one: (one.accuracy, one.cost)),
        [judged.candidates[i] for i in near if i not in set(best)],
        len(judged.candidates),
    )


def _children(
    space: Space, judged: _Judged, parents: Sequence[Genome], n: int, rng: np.random.Generator
) -> list[Genome]:
    """Return new genomes, half mutated and half crossed; fewer than `n` if few are left to find."""
    children = []
    for number in range(n):
        one, other = (parents[int(i)] for i in rng.integers(len(parents), size=2))
        child = space.crossed(one, other, rng) if number % 2 else space.mutated(one, rng)
        for _ in range(_TRIES):
            if not judged.has(child):
                children.append(child)
                break
            child = space.mutated(child, rng)
    return children


def non_dominated(points: Floats) -> list[int]:
    """Return the rows, ascending, for which no other row is as low everywhere and lower somewhere.

    Of equal rows the first is kept.
    """
    kept: list[int] = []
    # In this order a row can only be dominated by one before it.
    for row in np.lexsort(points.T[::-1]).tolist():
        if not kept or not (points[kept] <= points[row]).all(axis=1).any():
            kept.append(row)
    return sorted(kept)


def survivors(points: Floats, n: int) -> list[int]:
    """Return `n` rows, the best first: front by front, and in each front the most isolated first."""
    left = list(range(len(points)))
    chosen: list[int] = []
    while left and len(chosen) < n:
        front = [left[i] for i in non_dominated(points[left])]
        apart = _apart(points[front])
        chosen += [front[i] for i in np.argsort(-apart, kind="stable")]
        left = [row for row in left if row not in set(front)]
    return chosen[:n]


def _apart(points: Floats) -> Floats:
    """Return each row's crowding distance: the size of the box between its neighbours, by objective."""
    total = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        total[order[[0, -1]]] = np.inf
        if span > 0:
            total[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return total
