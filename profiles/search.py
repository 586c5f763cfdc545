"""Search a supernet for its pareto subnets: accuracy up, costs down, in one run.

An evolution with non-dominated survival: parents are crossed or mutated, and of parents and
children those survive that no other beats in everything; of equals, those in emptier regions. What
comes back is the best of all that were judged; `find_profile` makes a profile of it, for one device.

Costs are properties of a subnet and not of a device, so a search is the same everywhere for one seed.
With multiply-adds and kernels as costs, the front holds the best subnets for every device whose
latency grows with both.

Sources: the operators are those of Once for All's evolution (Cai et al., ICLR '20), the survival is
that of NSGA-II (Deb et al., 2002).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from gpu_worker.calibration import save_statistics
from gpu_worker.kinds import RANDOM, SupernetKind, supernet_kind
from profiles.accuracy import Judge, MeasuredAccuracy, judge_of
from profiles.flops import Cost, CostCounter, FittedLatency, fit_on_device, runs, spread, surroundings
from profiles.measure import Measurement, fit, torch_place
from profiles.table import Profile, SubnetProfile, statistics_path
from superserve.errors import ConfigError
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from gpu_worker.control import Control, Entry
    from gpu_worker.supernet import Supernet
    from gpu_worker.torch_executor import Placement
    from superserve.clock import Clock

    Floats = npt.NDArray[np.float64]

Genome = tuple[Any, ...]
"""All entries of a control tuple, in the order of its space."""

_N_PROBES = 6  # random tuples at which it is seen what each entry touches
_MUTATION = 0.1  # chance of an entry to change, as in Once for All; of short tuples one changes in any case
_TRIES = 8  # mutations of a child until it is a network not seen before
_PARENTS = 0.5  # share of the population, the best of it, that has children


@dataclass(frozen=True, slots=True)
class Effort:
    """How far to search.

    Attributes:
        population: Subnets that survive a generation.
        generations: After the first, random one.
        seed: Of everything that is drawn.
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
    """A subnet that was judged.

    Attributes:
        control: Its control tuple, canonical.
        accuracy: Percent.
        cost: The less of either part, the better.
    """

    control: Control
    accuracy: float
    cost: Cost


class Space:
    """A supernet's control tuples, of which those that come to the same network count as one.

    An entry may not matter: the width of a block that does not run, or a value that is rounded to
    the same channels as another. Which ones is seen in the settings of the operators, whatever
    the supernet's tuples mean.
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
        """Return a genome as the supernet takes it."""
        values = iter(genome)
        return {key: list(itertools.islice(values, n)) for key, n in self._keys}

    def genome(self, control: Control) -> Genome:
        """Return a control tuple's entries in a row."""
        return tuple(itertools.chain.from_iterable(control[key] for key, _ in self._keys))

    def signature(self, genome: Genome) -> tuple[Any, ...]:
        """Return what tells networks apart: the settings of every operator that runs, and None for others.

        Raises:
            ConfigError: If an entry is out of bounds.
        """
        settings = self._settings(genome)
        return tuple(
            setting if runs(around, settings) else None
            for around, setting in zip(self._around, settings, strict=True)
        )

    def canonical(self, genome: Genome) -> Genome:
        """Return the same network's genome with every entry that does not matter at its lowest."""
        settings = self._settings(genome)
        running = {place for place, around in enumerate(self._around) if runs(around, settings)}
        lowered = tuple(
            same.get(value, value) if running & touched else entry.choices[0]
            for value, entry, same, touched in zip(
                genome, self._entries, self._same, self._touched, strict=True
            )
        )
        # What an entry touches was only seen at a few tuples: at others it may touch more.
        return lowered if self.signature(lowered) == self.signature(genome) else genome

    def random(self, rng: np.random.Generator) -> Genome:
        """Draw each entry alike from its choices."""
        return tuple(choices[int(rng.integers(len(choices)))] for choices in self.choices)

    def levelled(self, rng: np.random.Generator) -> Genome:
        """Draw a level from smallest to largest, and each entry near it: all of `random` are middling."""
        near = np.clip(rng.uniform() + 0.15 * rng.standard_normal(len(self.choices)), 0, 1)
        return tuple(
            choices[min(int(at * len(choices)), len(choices) - 1)]
            for at, choices in zip(near.tolist(), self.choices, strict=True)
        )

    def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """Draw some entries anew, one at least."""
        is_new = rng.random(len(genome)) < _MUTATION
        is_new[int(rng.integers(len(genome)))] = True
        return tuple(
            new if is_drawn else old
            for old, new, is_drawn in zip(genome, self.random(rng), is_new.tolist(), strict=True)
        )

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """Take each entry from one of two."""
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
        """Return for each entry the settings that it touches, and for each choice the lowest alike."""
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
    """Every network that was judged, once."""

    def __init__(
        self, space: Space, accuracy: Callable[[Sequence[Control]], Floats], cost: Callable[[Control], Cost]
    ) -> None:
        self._space, self._accuracy, self._cost = space, accuracy, cost
        self._seen: set[tuple[Any, ...]] = set()  # only asked for membership: its order means nothing
        self.genomes: list[Genome] = []
        self.candidates: list[Candidate] = []

    def has(self, genome: Genome) -> bool:
        """Tell whether a genome's network was judged."""
        return self._space.signature(genome) in self._seen

    def add(self, genomes: Sequence[Genome]) -> list[int]:
        """Judge those that are new; return their numbers."""
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
        """Return (n, objectives), each the less the better."""
        chosen = (self.candidates[number] for number in numbers)
        return np.array([(-accuracy, *cost) for _, accuracy, cost in chosen])


class Front(NamedTuple):
    """What a search found.

    Attributes:
        candidates: Those that no other beats in everything, by ascending accuracy.
        others: Of the others, the space's smallest and largest, and the next best.
        n_judged: Different networks that were judged.
    """

    candidates: list[Candidate]
    others: list[Candidate]
    n_judged: int


def search(
    space: Space,
    accuracy: Callable[[Sequence[Control]], Floats],
    cost: Callable[[Control], Cost],
    effort: Effort,
    on_generation: Callable[[int, int], None] = lambda _done, _total: None,
) -> Front:
    """Return the pareto subnets of a supernet.

    Args:
        space: What to search.
        accuracy: Percent of each control tuple, higher is better.
        cost: Of a control tuple, lower is better.
        effort: How far; one seed gives one result.
        on_generation: Told how many generations are done, of how many.

    The smallest and the largest subnet are always judged.
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
    ends = range(len(space.ends))  # they were judged first
    near = dict.fromkeys([*ends, *survivors(points, len(best) + effort.population)])
    return Front(
        sorted((judged.candidates[i] for i in best), key=lambda one: (one.accuracy, one.cost)),
        [judged.candidates[i] for i in near if i not in set(best)],
        len(judged.candidates),
    )


def _children(
    space: Space, judged: _Judged, parents: Sequence[Genome], n: int, rng: np.random.Generator
) -> list[Genome]:
    """Return new ones, half mutated and half crossed; fewer than `n` where few are left to find."""
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
    """Return the rows, ascending, to which no other row is as low everywhere and lower somewhere.

    Of equal rows the first is kept.
    """
    kept: list[int] = []
    # Sorted so, a row can only be dominated by one before it.
    for row in np.lexsort(points.T[::-1]).tolist():
        if not kept or not (points[kept] <= points[row]).all(axis=1).any():
            kept.append(row)
    return sorted(kept)


def survivors(points: Floats, n: int) -> list[int]:
    """Return `n` rows, the best first: front by front, and in each front the most apart first."""
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


# --- a profile of what was found ------------------------------------------------------------

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""

_RUNNERS_UP = 4  # beside the front, judged again by more examples; the space's ends are two of them
_POOL = 200  # subnets of which a spread is measured, for latencies to be fitted to


@dataclass(frozen=True, slots=True)
class Request:
    """What to find.

    Attributes:
        supernet: Its name: see `gpu_worker.kinds`.
        placement: Where it will serve, with the profile's batch sizes.
        effort: How far to search.
        n_subnets: At most so many rows.
        weights: A checkpoint's path, "random", or None for the one that comes with it.
        predictor: OFA-ResNet50's published accuracy predictor; None measures accuracy.
        examples: What to measure it on: see `gpu_worker.examples`; None for the supernet's own.
    """

    supernet: str
    placement: Placement
    effort: Effort
    n_subnets: int = 32
    weights: str | None = None
    predictor: Path | None = None
    examples: Path | None = None

    def __post_init__(self) -> None:
        if self.n_subnets < 2:
            raise ConfigError(f"subnets: expected at least 2, got {self.n_subnets}")
        if len(self.placement.batch_sizes) < 2:
            raise ConfigError(f"batch_sizes: expected at least two, got {list(self.placement.batch_sizes)}")


@dataclass(frozen=True, slots=True)
class Found:
    """A searched profile, and what is written beside it.

    Attributes:
        profile: Of the pareto subnets.
        raw: What latencies were fitted to, or measured as.
        n_judged: Networks whose accuracy was judged.
        supernet: Holds the statistics of the profile's subnets; None if accuracy was predicted.
        dropped: Subnets that measuring left out.
    """

    profile: Profile
    raw: Mapping[str, Any]
    n_judged: int
    supernet: Supernet | None = None
    dropped: tuple[str, ...] = ()

    def write(self, path: Path) -> Path | None:
        """Write the profile, and SubnetNorm's statistics beside it; return the path of those, if any."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {**self.profile.to_dict(), "raw": self.raw}
        path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        if self.supernet is None or not self.supernet.norms:
            return None
        beside = statistics_path(path)
        subnets = [Subnet(row.name, row.control) for row in self.profile.subnets]
        save_statistics(beside, self.supernet, self.profile.supernet, subnets)
        return beside


def find_profile(
    request: Request,
    *,
    name: str,
    clock: Clock,
    remeasure: Callable[[Profile], Measurement] | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> Found:
    """Search a supernet and make a profile of its pareto subnets.

    Args:
        request: What to find.
        name: Of the profile.
        clock: Times the runs that latencies are fitted to.
        remeasure: Measures every subnet of a profile, in place of the fitted latencies.
        on_progress: Told what is done.

    Raises:
        ConfigError: Naming what cannot be had: the supernet, its weights, the device, an accuracy.
    """
    kind = supernet_kind(request.supernet)
    judge = judge_of(kind, request.weights, request.predictor, request.examples, request.placement)
    counter = CostCounter(kind)
    space = Space(counter.supernet)
    latency = fit_on_device(
        request.supernet,
        [(counter(control), control) for control in _pool(space, request.effort.seed)],
        weights=request.weights,
        placement=request.placement,
        clock=clock,
        on_round=lambda done, total: on_progress("measuring a few subnets", done, total),
    )
    front = search(
        space, judge, counter, request.effort, lambda done, total: on_progress("searching", done, total)
    )
    on_progress("judging", 0, 1)
    note, supernet = "", None
    if isinstance(judge, MeasuredAccuracy):
        supernet = judge.supernet
        chosen, note = _finals(front, judge, latency, kind, request.n_subnets)
    else:
        chosen = _chosen(front.candidates, latency, request.n_subnets)
    on_progress("judging", 1, 1)
    place = torch_place(request.placement.device, request.placement.threads or 1)
    profile = Profile(
        name=name,
        supernet=kind.name,
        device=place.device,
        source="modelled",
        provenance=_provenance(
            request, judge, front.n_judged, note, latency.words if remeasure is None else ""
        ),
        versions=place.versions,
        date=datetime.now(UTC).date().isoformat(),
        batch_sizes=request.placement.batch_sizes,
        subnets=_profile_rows(chosen, latency, kind),
    )
    if remeasure is None:
        return Found(profile, {"latency_fit": latency.raw}, front.n_judged, supernet)
    measured = remeasure(profile)
    return Found(measured.profile, measured.raw, front.n_judged, supernet, measured.dropped)


def _pool(space: Space, seed: int) -> list[Control]:
    """Return different subnets from all over the space, its ends among them."""
    rng = np.random.default_rng((seed, _POOL))
    drawn = [*space.ends, *(space.levelled(rng) for _ in range(_POOL))]
    found = {space.signature(genome): space.control(space.canonical(genome)) for genome in drawn}
    return list(found.values())


def servable(accuracies: Sequence[float], latency_ms: Floats) -> list[int]:
    """Return the rows that a profile can hold, by ascending accuracy: each pays for being slower.

    Args:
        accuracies: Percents; what is equal to two decimals counts as equal.
        latency_ms: (subnets, batch sizes), compared by their geometric means.
    """
    mean_log = np.log(latency_ms).mean(axis=1)
    rounded = [round(accuracy, 2) for accuracy in accuracies]
    kept: list[int] = []
    for row in sorted(range(len(rounded)), key=lambda row: (-rounded[row], mean_log[row])):
        if not kept or (rounded[row] < rounded[kept[-1]] and mean_log[row] < mean_log[kept[-1]]):
            kept.append(row)
    return kept[::-1]


def _servable(candidates: Sequence[Candidate], latency: FittedLatency) -> list[int]:
    latency_ms = latency.median_ms([candidate.cost for candidate in candidates])
    return servable([candidate.accuracy for candidate in candidates], latency_ms)


def _chosen(candidates: Sequence[Candidate], latency: FittedLatency, n: int) -> list[Candidate]:
    """Return up to `n` candidates that a profile can hold, evenly over their accuracies."""
    rows = _servable(candidates, latency)
    return [candidates[rows[i]] for i in spread([candidates[row].accuracy for row in rows], n)]


def _finals(
    front: Front, judge: MeasuredAccuracy, latency: FittedLatency, kind: SupernetKind, n: int
) -> tuple[list[Candidate], str]:
    """Choose by more selection examples, then report what was chosen as the held-out ones have it.

    Few examples, as the search had, may misrank the next best. The supernet holds the statistics then.
    """
    finalists = [*front.candidates, *front.others[:_RUNNERS_UP]]
    subnets = [Subnet(f"{number}", candidate.control) for number, candidate in enumerate(finalists)]
    statistics = judge.calibrated(subnets)
    selected = _chosen(_rejudged(finalists, judge.selection(subnets, statistics)), latency, n)
    numbers = [[one.control for one in finalists].index(one.control) for one in selected]
    again = _rejudged(selected, judge.held_out([subnets[number] for number in numbers], statistics))
    rows = _servable(again, latency)
    kept = [again[row] for row in rows]
    note = (
        f"There the kept subnets average {np.mean([selected[row].accuracy for row in rows]):.2f} %, on the "
        f"held-out ones {np.mean([candidate.accuracy for candidate in kept]):.2f} %; "
        f"{len(selected) - len(rows)} that the held-out ones rank out of order were left out."
    )
    if statistics:
        judge.supernet.set_statistics(
            {_name(kind, again[row]): statistics[f"{numbers[row]}"] for row in rows}
        )
    return kept, note


def _rejudged(candidates: Sequence[Candidate], accuracies: Sequence[float]) -> list[Candidate]:
    return [one._replace(accuracy=accuracy) for one, accuracy in zip(candidates, accuracies, strict=True)]


def _profile_rows(
    chosen: Sequence[Candidate], latency: FittedLatency, kind: SupernetKind
) -> tuple[SubnetProfile, ...]:
    # Monotone at every batch size, and not in the mean alone; what that makes equal is one row.
    median = np.rint(1e6 * fit(latency.median_ms([candidate.cost for candidate in chosen])))  # ns
    p99 = np.rint(median * (latency.p99_ratio / latency.median_ratio))
    return tuple(
        SubnetProfile(
            name=_name(kind, candidate),
            control=candidate.control,
            accuracy=round(candidate.accuracy, 2),
            gflops=round(candidate.cost.gflops, 6),
            latency_ns=tuple(map(int, median[row])),
            latency_p99_ns=tuple(map(int, p99[row])),
        )
        for row, candidate in enumerate(chosen)
        if row == len(chosen) - 1 or (median[row] != median[row + 1]).any()
    )


def _name(kind: SupernetKind, candidate: Candidate) -> str:
    """Return what tables show: the supernet's first word and the accuracy, which no other row has."""
    return f"{re.split('[^A-Za-z0-9]', kind.name)[0]}-{candidate.accuracy:.2f}"


def _provenance(request: Request, judge: Judge, n_judged: int, note: str, latency: str) -> str:
    effort = request.effort
    found = (
        f"Found by profiles.search: seed {effort.seed}, {effort.generations} generations of "
        f"{effort.population}; {n_judged} different subnets were judged."
    )
    weights = "Weights were random, on which latencies do not depend." if request.weights == RANDOM else ""
    return " ".join(part for part in (found, judge.words, note, latency, weights) if part)
