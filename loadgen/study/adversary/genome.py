"""A workload as a small genome: a cycle of rates and spikes, SLOs, GPUs, floors and troubles.

Rates and spikes are relative to what the GPUs can do, so that a genome keeps its kind when its cluster or
its SLOs change. Drawing, mutating and crossing take a `random.Random` and nothing else: equal draws, equal
genomes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loadgen.simulator.workloads import mixed_workload, parse_cluster, parse_floor, parse_slos
from loadgen.study.compare import Cell
from loadgen.traces import arrivals
from loadgen.traces.trace import Trace
from profiles.table import load_profile
from superserve.clock import SECOND

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    import numpy.typing as npt

    from loadgen.simulator.workloads import Workload

GPUS = (1, 2, 4, 8, 16)
SLO_MS = (12.0, 500.0)
CYCLE_S = (0.01, 2.0)
MOST_LOAD = 1.6
MOST_SPIKE = 3.0
"""Of the queries that the GPUs do within the shortest SLO, on the smallest subnet in full batches."""
MOST_SLOWNESS = 2.5
MOST_JITTER_MS = 5.0
MOST_CV2 = 100.0
MOST_SECONDS = 20.0
MOST_PARTS = 5


@dataclass(frozen=True, slots=True)
class Genome:
    """A workload.

    Attributes:
        profile: Of the GPUs.
        cycle_s: After which rates and spikes come again.
        rates: (share of the cycle, load) of each stretch, in order.
        spikes: (place in the cycle from 0 to 1, size) of each.
        cv2: Of the gaps beside the spikes.
        slos: (ms, weight) of each.
        n_gpus: GPUs.
        unequal: The profile of half of them takes this many times as long; 1 is none.
        slowness: All of them take this many times as long as their profile says.
        floor: (row of the profile, share of the queries); None is none.
        jitter_ms: Of each message.
        seed: Draws the arrivals.
    """

    profile: str
    cycle_s: float
    rates: tuple[tuple[float, float], ...]
    spikes: tuple[tuple[float, float], ...]
    cv2: float
    slos: tuple[tuple[float, float], ...]
    n_gpus: int
    unequal: float
    slowness: float
    floor: tuple[int, float] | None
    jitter_ms: float
    seed: int

    @property
    def family(self) -> str:
        """What kind of arrivals it has, and what else makes them hard."""
        kinds = (("spikes", bool(self.spikes)), ("jumps", len(self.rates) > 1), ("bursts", self.cv2 > 2))
        terms = (
            ("floors", self.floor is not None), ("mix", len(self.slos) > 1), ("slow", self.slowness > 1),
            ("unequal", self.unequal > 1 and self.n_gpus > 1), ("jitter", self.jitter_ms > 0),
        )  # fmt: skip
        kind = next((name for name, has in kinds if has), "smooth")
        return f"{kind}, {next((name for name, has in terms if has), 'plain')}"

    @property
    def cluster(self) -> str:
        """The GPUs, as `--emulate` takes them."""
        half = self.n_gpus // 2
        if self.unequal == 1 or not half:
            return f"{self.profile}:{self.n_gpus}"
        return f"{self.profile}:{self.n_gpus - half},{self.profile}*{self.unequal:g}:{half}"

    @property
    def slo_ms(self) -> str:
        """The SLOs, as `--slo-ms` takes them."""
        if len(self.slos) == 1:
            return f"{self.slos[0][0]:g}"
        return ",".join(f"{ms:g}:{weight:g}" for ms, weight in self.slos)

    def cell(self, trace: str, warm_up_s: float = 0.0) -> Cell:
        """Return the cell that plays its arrivals from a file, and does not count those of the warm-up."""
        floor = None
        if self.floor is not None:
            row, share = self.floor
            floor = f"{load_profile(self.profile).subnets[row].accuracy:g}:{share:g}"
        return Cell(
            self.family, trace, self.cluster, slo_ms=self.slo_ms, floor=floor, jitter_ms=self.jitter_ms,
            speed=round(1 / self.slowness, 4), warm_up_s=warm_up_s,
        )  # fmt: skip

    def trace(self, queries: int, times: int = 1) -> Trace:
        """Return its arrivals: whole cycles until there are about `queries` queries, or 20 s of them.

        All of them come so many `times`, once after the other.
        """
        can_qps = self._can_qps()
        sizes = [max(1, round(size * can_qps * self._slo_s())) for _, size in self.spikes]
        per_cycle = sum(share * load for share, load in self.rates) * self.cycle_s * can_qps + sum(sizes)
        most = max(1, math.floor(MOST_SECONDS / self.cycle_s))
        n_cycles = min(most, max(1, math.ceil(queries / max(per_cycle, 1e-9))))
        duration_ns = round(n_cycles * self.cycle_s * SECOND)
        starts_s = np.arange(n_cycles) * self.cycle_s
        parts = [self._between(can_qps, n_cycles)]
        for (place, _), size in zip(self.spikes, sizes, strict=True):
            parts.append(np.repeat(((starts_s + place * self.cycle_s) * SECOND).astype(np.int64), size))
        due_ns = np.sort(np.concatenate(parts))[: 3 * queries]
        due_ns = np.minimum(due_ns, duration_ns - 1)
        if not due_ns.size:
            due_ns = np.zeros(1, np.int64)
        due_ns = np.concatenate([due_ns + i * duration_ns for i in range(times)])
        return Trace(self.family, due_ns, times * duration_ns, f"evolved, not recorded: {self!r}")

    def workload(self, trace: Trace) -> Workload:
        """Return its queries, as `loadgen compare` draws them from its trace with seed 0."""
        cell = self.cell("")
        floor = None if cell.floor is None else parse_floor(cell.floor)
        return mixed_workload(trace, parse_slos(self.slo_ms), floor, seed=0)

    def _slo_s(self) -> float:
        return min(ms for ms, _ in self.slos) / 1e3

    def _can_qps(self) -> float:
        gpus = parse_cluster(self.cluster)
        each = (gpu.max_batch_size * SECOND / gpu.latency_ns(0, gpu.max_batch_size) for gpu in gpus)
        return sum(each) / self.slowness

    def _between(self, can_qps: float, n_cycles: int) -> npt.NDArray[np.int64]:
        """Return the arrivals beside the spikes: a process of unit rate, warped to the rates."""
        lengths = np.array([share for share, _ in self.rates]) * self.cycle_s
        counts = lengths * np.array([max(load, 1e-9) for _, load in self.rates]) * can_qps
        edges_s = np.concatenate(([0.0], np.cumsum(np.tile(lengths, n_cycles))))
        edges_n = np.concatenate(([0.0], np.cumsum(np.tile(counts, n_cycles))))
        if edges_n[-1] < 1:
            return np.zeros(0, np.int64)
        # A thousand queries a second, so that nanoseconds are millionths of a query.
        unit = arrivals.gamma(rate_qps=1e3, cv2=self.cv2, duration_s=edges_n[-1] / 1e3, seed=self.seed)
        return (np.interp(unit / 1e6, edges_n, edges_s) * SECOND).astype(np.int64)


def drawn(rng: random.Random, profile: str) -> Genome:
    """Return a random genome."""
    n_parts = rng.choice((1, 1, 2, 3))
    return Genome(
        profile=profile,
        cycle_s=_log(rng, *CYCLE_S),
        rates=_shares([(rng.uniform(0.1, 1), rng.uniform(0, 1.2)) for _ in range(n_parts)]),
        spikes=tuple(_spike(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))),
        cv2=rng.choice((0.0, 1.0, 1.0, _log(rng, 1, MOST_CV2))),
        slos=tuple(_slo(rng) for _ in range(rng.choice((1, 1, 2, 3)))),
        n_gpus=rng.choice(GPUS),
        unequal=rng.choice((1.0, 1.0, 1.0, round(_log(rng, 1.3, 5), 2))),
        slowness=rng.choice((1.0, 1.0, 1.0, round(_log(rng, 1.1, MOST_SLOWNESS), 2))),
        floor=rng.choice((None, None, None, _floor(rng, profile))),
        jitter_ms=rng.choice((0.0, 0.0, 0.0, round(rng.uniform(0.5, MOST_JITTER_MS), 2))),
        seed=rng.randrange(1 << 30),
    )


def mutated(rng: random.Random, genome: Genome) -> Genome:
    """Return a genome that differs in one to three genes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        genome = rng.choice(_MUTATIONS)(rng, genome)
    return genome


def crossed(rng: random.Random, one: Genome, other: Genome) -> Genome:
    """Return a genome that has each gene of either parent; arrivals come from one of them as a whole."""
    first, second = rng.sample((one, other), 2)
    genes = {
        name: getattr(rng.choice((one, other)), name)
        for name in ("slos", "n_gpus", "unequal", "slowness", "floor", "jitter_ms", "cv2")
    }
    spikes = rng.choice((first.spikes, second.spikes))
    return replace(first, spikes=spikes, **genes)


def _log(rng: random.Random, least: float, most: float) -> float:
    return round(math.exp(rng.uniform(math.log(least), math.log(most))), 4)


def _near(rng: random.Random, value: float, least: float, most: float) -> float:
    """Return a value near another, on a scale of ratios."""
    return round(min(most, max(least, value * math.exp(rng.gauss(0, 0.4)))), 4)


def _slo(rng: random.Random) -> tuple[float, float]:
    return (round(_log(rng, *SLO_MS), 1), round(_log(rng, 0.3, 8), 2))


def _spike(rng: random.Random) -> tuple[float, float]:
    return (round(rng.random(), 3), round(_log(rng, 0.05, MOST_SPIKE), 3))


def _floor(rng: random.Random, profile: str) -> tuple[int, float]:
    return (rng.randrange(1, load_profile(profile).n_subnets), round(rng.uniform(0.05, 0.6), 3))


def _shares(parts: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    total = sum(share for share, _ in parts)
    return tuple((share / total, load) for share, load in parts)


def _other_cycle(rng: random.Random, one: Genome) -> Genome:
    return replace(one, cycle_s=_near(rng, one.cycle_s, *CYCLE_S))


def _other_rate(rng: random.Random, one: Genome) -> Genome:
    parts = list(one.rates)
    i = rng.randrange(len(parts))
    share, load = parts[i]
    load = rng.choice((0.0, rng.uniform(0, MOST_LOAD), _near(rng, load, 0.001, MOST_LOAD)))
    parts[i] = (_near(rng, share, 0.02, 1), load)
    return replace(one, rates=_shares(parts))


def _other_parts(rng: random.Random, one: Genome) -> Genome:
    parts = list(one.rates)
    if len(parts) > 1 and (len(parts) >= MOST_PARTS or rng.random() < 0.5):
        del parts[rng.randrange(len(parts))]
    else:
        parts.insert(rng.randrange(len(parts) + 1), (rng.uniform(0.05, 0.5), rng.uniform(0, MOST_LOAD)))
    return replace(one, rates=_shares(parts))


def _other_spikes(rng: random.Random, one: Genome) -> Genome:
    spikes = list(one.spikes)
    if spikes and rng.random() < 0.7:
        i = rng.randrange(len(spikes))
        place, size = spikes[i]
        spikes[i] = (rng.choice((place, round(rng.random(), 3))), _near(rng, size, 0.02, MOST_SPIKE))
    elif spikes and rng.random() < 0.3:
        del spikes[rng.randrange(len(spikes))]
    elif len(spikes) < MOST_PARTS:
        spikes.append(_spike(rng))
    return replace(one, spikes=tuple(spikes))


def _other_slos(rng: random.Random, one: Genome) -> Genome:
    slos = list(one.slos)
    i = rng.randrange(len(slos))
    kind = rng.random()
    if kind < 0.6:
        ms, weight = slos[i]
        slos[i] = (round(_near(rng, ms, *SLO_MS), 1), round(_near(rng, weight, 0.1, 10), 2))
    elif kind < 0.8 and len(slos) > 1:
        del slos[i]
    elif len(slos) < 3:
        slos.append(_slo(rng))
    return replace(one, slos=tuple(slos))


def _other_cv2(rng: random.Random, one: Genome) -> Genome:
    return replace(one, cv2=rng.choice((0.0, 1.0, _near(rng, max(one.cv2, 1), 0.5, MOST_CV2))))


def _other_gpus(rng: random.Random, one: Genome) -> Genome:
    return replace(one, n_gpus=rng.choice(GPUS))


def _other_unequal(rng: random.Random, one: Genome) -> Genome:
    return replace(one, unequal=rng.choice((1.0, round(_log(rng, 1.3, 5), 2))))


def _other_slowness(rng: random.Random, one: Genome) -> Genome:
    return replace(one, slowness=rng.choice((1.0, round(_near(rng, one.slowness, 1, MOST_SLOWNESS), 2))))


def _other_floor(rng: random.Random, one: Genome) -> Genome:
    return replace(one, floor=rng.choice((None, _floor(rng, one.profile))))


def _other_jitter(rng: random.Random, one: Genome) -> Genome:
    return replace(one, jitter_ms=rng.choice((0.0, round(rng.uniform(0.2, MOST_JITTER_MS), 2))))


def _other_seed(rng: random.Random, one: Genome) -> Genome:
    return replace(one, seed=rng.randrange(1 << 30))


# Arrivals come more often than terms: there is more to try.
_MUTATIONS: tuple[Callable[[random.Random, Genome], Genome], ...] = (
    _other_cycle, _other_cycle, _other_rate, _other_rate, _other_parts, _other_spikes, _other_spikes,
    _other_slos, _other_slos, _other_cv2, _other_gpus, _other_unequal, _other_slowness, _other_floor,
    _other_jitter, _other_seed,
)  # fmt: skip
