"""Policies compared on the same queries: cells of traces, terms and clusters, by seed.

A cell is a trace with the terms of its queries and a cluster. Each seed draws new arrivals, and each policy
serves the very same queries of that seed, so that differences are paired. The bound is added: what no
schedule can exceed, from `loadgen.bound`.
"""

from __future__ import annotations

import contextlib
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_worker.core.played import AS_PROFILED, SPEEDS
from loadgen.bound import fluid as bound
from loadgen.results.run import in_time
from loadgen.simulator.faults import jitter_faults
from loadgen.simulator.simulate import SimSettings, simulate
from loadgen.simulator.workloads import (
    mixed_workload,
    parse_cluster,
    parse_floor,
    parse_priorities,
    parse_slos,
    slowed,
)
from loadgen.traces.azure import MinuteCounts
from loadgen.traces.specs import Spec
from loadgen.traces.trace import open_source, trace_of
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError
from superserve.net.context import has_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from gpu_worker.core.played import Pace
    from loadgen.simulator.faults import Fault
    from loadgen.simulator.simulate import Simulated, Workload
    from loadgen.traces.trace import Trace
    from profiles.table import Profile

EQUAL_ATTAINMENT = 0.001
"""Attainments that differ by at most this count as equal in the headline comparisons."""

MAF_QPS = 6_400.0
"""The mean rate of the paper's CNN runs on MAF."""

SLOW_FACTOR = 2.5
"""How much slower the slower half of unequal GPUs is."""

DURATION_S = 30.0
"""How long a cell is drawn for where neither the cell nor the comparison has a duration."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One column of a comparison.

    Attributes:
        name: Its name in tables.
        trace: A file or a spec, as `loadgen.traces.trace.load_trace` takes it.
        cluster: As `loadgen.simulator.workloads.parse_cluster` takes it.
        rate_qps: Mean rate of the trace; None keeps its own.
        slo_ms: One SLO or a mix, as `--slo-ms` takes it.
        floor: An accuracy floor for a share of the queries, as `--floor` takes it; or None.
        priority: Priority classes for shares of the queries, as `--priority` takes them; or None.
        faults: What goes wrong, from the start of the trace.
        jitter_ms: Each message of every peer takes up to this much more, all the time.
        n_clients: Clients that the queries are dealt out to.
        speed: Of its GPUs: times as fast as their profile.
        duration_s: Its own length; None is that of the comparison.
        minutes: How many minutes of a Functions 2019 file are played, others with each seed; None is all.
        warm_up_s: Queries due before that are served and not counted.
    """

    name: str
    trace: str
    cluster: str
    rate_qps: float | None = None
    slo_ms: str = "36"
    floor: str | None = None
    priority: str | None = None
    faults: tuple[Fault, ...] = ()
    jitter_ms: float = 0.0
    n_clients: int = 1
    speed: float = 1.0
    duration_s: float | None = None
    minutes: int | None = None
    warm_up_s: float = 0.0

    def workload(self, duration_s: float | None, seed: int) -> Workload:
        """Return the queries of a seed, drawn for `duration_s` unless the cell has its own length."""
        trace = self._trace(duration_s if self.duration_s is None else self.duration_s, seed)
        floor = None if self.floor is None else parse_floor(self.floor)
        classes = () if self.priority is None else parse_priorities(self.priority)
        return mixed_workload(trace, parse_slos(self.slo_ms), floor, classes, seed=seed)

    def _trace(self, duration_s: float | None, seed: int) -> Trace:
        """Return the arrivals of a seed: recorded instants as long as they are, if no length is asked for."""
        source = open_source(self.trace, rate_qps=self.rate_qps)
        if isinstance(source, MinuteCounts) and self.minutes is not None:
            n_starts = source.counts.size - self.minutes + 1
            start = source.first_minute + (seed * _MINUTES_APART) % max(1, n_starts)
            source = source.window(start, self.minutes, source=self.trace)
        if duration_s is None and isinstance(source, Spec | MinuteCounts):
            duration_s = DURATION_S
        return trace_of(source, self.trace, rate_qps=self.rate_qps, duration_s=duration_s, seed=seed)

    def settings(self, settings: SimSettings, *, speed: float = 1.0) -> SimSettings:
        """Return the settings under which it is simulated, on GPUs that are another `speed` times as fast."""
        pace = replace(settings.pace, speed=settings.pace.speed * self.speed * speed)
        return replace(settings, pace=pace, n_clients=max(settings.n_clients, self.n_clients))

    def troubles(self, n_gpus: int, settings: SimSettings) -> tuple[Fault, ...]:
        """Return its faults, those of its jitter included."""
        if not self.jitter_ms:
            return self.faults
        n_processes = -(-n_gpus // settings.gpus_per_process)
        jitter = jitter_faults(
            round(self.jitter_ms * MS), n_processes=n_processes, n_clients=settings.n_clients
        )
        return (*self.faults, *jitter)


# Prime to the minutes of a day and of most windows, so that seeds take stretches far apart.
_MINUTES_APART = 97


def paper_cells(profile: str, n_gpus: int, maf: str | None, slo_ms: str = "36") -> list[Cell]:
    """Return the cells that policies are judged by: the paper's workloads, and what it leaves open.

    Args:
        profile: Of the GPUs.
        n_gpus: How many.
        maf: A Functions 2019 file; None uses synthetic arrivals of its shape.
        slo_ms: Of the cells that have one SLO.
    """
    even = f"{profile}:{n_gpus}"
    half = n_gpus // 2
    unequal = f"{profile}:{n_gpus - half},{profile}*{SLOW_FACTOR:g}:{half}"
    trace, rate = (f"maf-like:rate={MAF_QPS:g}", None) if maf is None else (maf, MAF_QPS)
    name = "maf-like" if maf is None else "maf"
    base = Cell(name, trace, even, rate, slo_ms)
    cells = [base]
    for variant in (2950, 4900, 5550):
        for cv2 in (2, 4, 8):
            spec = f"bursty:base=1500,variant={variant},cv2={cv2}"
            cells.append(Cell(f"bursty {variant} cv2 {cv2}", spec, even, None, slo_ms))
    for to in (4800, 6800, 7800):
        for tau in (250, 500, 5000):
            spec = f"accel:from=2500,to={to},tau={tau},cv2=8"
            cells.append(Cell(f"accel {to} tau {tau}", spec, even, None, slo_ms))
    mixes = {"even": "18,36,100", "urgent": "18:3,36:2,100:1", "patient": "18:1,36:2,100:3"}
    cells += [replace(base, name=f"{name} mix {kind}", slo_ms=mix) for kind, mix in mixes.items()]
    capacity = (n_gpus - half + half / SLOW_FACTOR) / n_gpus
    slower_qps = MAF_QPS * capacity
    trace = f"maf-like:rate={slower_qps:g}" if maf is None else maf
    rate = None if maf is None else slower_qps
    cells.append(Cell(f"{name} unequal", trace, unequal, rate, slo_ms))
    cells.append(replace(base, name=f"{name} floor", floor=f"78:{1 / 3:.6f}"))
    return cells


@dataclass(frozen=True, slots=True)
class Figures:
    """What a policy attained, or a bound on it.

    Attributes:
        attainment: Share of all queries answered in time.
        accuracy: Their mean profiled accuracy, percent; None without any, and for a bound.
        per_query: Their summed accuracy, over all queries, percent.
        top: The attainment of the highest priority class; None for a bound, and if all are of one class.
        mean_batch: Queries in a batch, a mean over batches; None without any, and for a bound.
    """

    attainment: float
    accuracy: float | None
    per_query: float
    top: float | None = None
    mean_batch: float | None = None


@dataclass(frozen=True, slots=True)
class CellResult:
    """A cell's figures: for each policy and for the bound one for each seed.

    Attributes:
        bounds: None if they were not computed.
    """

    cell: Cell
    seeds: tuple[int, ...]
    policies: dict[str, tuple[Figures, ...]]
    bounds: tuple[Figures, ...] | None

    def mean(self, policy: str) -> Figures:
        """Return a policy's figures, averaged over the seeds."""
        return _mean(self.policies[policy])

    def mean_bound(self) -> Figures | None:
        """Return the bounds, averaged over the seeds."""
        return None if self.bounds is None else _mean(self.bounds)

    def gain(self, policy: str, over: str) -> tuple[float, float]:
        """Return how far a policy's summed accuracy per query is ahead of another's: mean and its error.

        Differences are paired by seed; the error is that of their mean, NaN for one seed.
        """
        pairs = zip(self.policies[policy], self.policies[over], strict=True)
        ahead = [one.per_query - other.per_query for one, other in pairs]
        error = stdev(ahead) / math.sqrt(len(ahead)) if len(ahead) > 1 else math.nan
        return fmean(ahead), error


def _mean(figures: Sequence[Figures]) -> Figures:
    return Figures(
        fmean(one.attainment for one in figures),
        _mean_known(one.accuracy for one in figures),
        fmean(one.per_query for one in figures),
        _mean_known(one.top for one in figures),
        _mean_known(one.mean_batch for one in figures),
    )


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare.

    Attributes:
        policies: As `--policy` takes them, `@SPEED` included; the first is what the others are compared with.
        duration_s: Of cells that have no length; None is 30 s, or all that was recorded.
        with_bound: Whether the bound is computed too.
    """

    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    duration_s: float | None
    with_bound: bool
    settings: SimSettings

    def run(
        self, cells: Sequence[Cell], *, n_processes: int = 1, say: Callable[[str], object] = lambda _: None
    ) -> list[CellResult]:
        """Simulate every policy on every cell and seed; the result does not depend on `n_processes`."""
        tasks = [(self, cell, seed) for cell in cells for seed in self.seeds]
        found: dict[tuple[str, int], tuple[dict[str, Figures], Figures | None]] = {}
        for (_, cell, seed), figures in zip(tasks, _all(tasks, n_processes), strict=True):
            found[cell.name, seed] = figures
            say(f"{cell.name}, seed {seed}")
        return [self._result(cell, found) for cell in cells]

    def _result(
        self, cell: Cell, found: dict[tuple[str, int], tuple[dict[str, Figures], Figures | None]]
    ) -> CellResult:
        of_seeds = [found[cell.name, seed] for seed in self.seeds]
        bounds = tuple(one for _, one in of_seeds if one is not None)
        policies = {policy: tuple(one[policy] for one, _ in of_seeds) for policy in self.policies}
        return CellResult(cell, self.seeds, policies, bounds or None)

    def one(self, cell: Cell, seed: int) -> tuple[dict[str, Figures], Figures | None]:
        """Return the figures of every policy on one cell and seed, and the bound."""
        workload = cell.workload(self.duration_s, seed)
        cluster = parse_cluster(cell.cluster)
        figures = {
            policy: serve(cell, workload, cluster, policy, seed=seed, settings=self.settings)
            for policy in self.policies
        }
        return figures, bound_in(cell, workload, cluster, self.settings) if self.with_bound else None


def contender(text: str) -> tuple[str, float]:
    """Return the policy and the speed of its GPUs of `POLICY[@SPEED]`, as `--policy` takes it.

    Raises:
        ConfigError: What follows the @ is no speed.
    """
    policy, at, speed = text.rpartition("@")
    if not at:
        return text, 1.0
    try:
        value = float(speed)
    except ValueError:
        value = math.nan
    if not SPEEDS[0] <= value <= SPEEDS[1]:
        least, most = SPEEDS
        raise ConfigError(
            f"policy {text!r}: expected a speed from {least:g} to {most:g} after @, got {speed!r}"
        )
    return policy, value


def serve(
    cell: Cell,
    workload: Workload,
    cluster: Sequence[Profile],
    text: str,
    *,
    seed: int,
    settings: SimSettings | None = None,
) -> Figures:
    """Return the figures of one policy, as `contender` reads it, on the queries of one cell and seed."""
    policy, speed = contender(text)
    settings = cell.settings(settings or SimSettings(), speed=speed)
    faults = cell.troubles(len(cluster), settings)
    found = simulate(workload, cluster, policy=policy, seed=seed, faults=faults, settings=settings)
    result = found.result
    if cell.warm_up_s:
        return _after(found, workload, round(cell.warm_up_s * SECOND))
    top = None
    if workload.priority is not None and (is_top := workload.priority == workload.priority.max()).sum():
        top = None if is_top.all() else float(in_time(found.columns, workload.slo_ns)[is_top].mean())
    return Figures(
        result.slo_attainment or 0.0, result.mean_accuracy, found.accuracy_per_query, top,
        result.batch_size_mean,
    )  # fmt: skip


def _after(found: Simulated, workload: Workload, from_ns: int) -> Figures:
    """Return the figures of the queries that are due from an instant on; the mean batch is that of all."""
    counted = found.columns["due_ns"] >= from_ns
    if not counted.any():
        raise ConfigError(f"--warm-up: no query is due after {from_ns / SECOND:g} s")
    is_good = in_time(found.columns, workload.slo_ns)
    good = counted & is_good
    attained = float(is_good[counted].mean())
    accuracy = float(found.columns["accuracy"][good].mean(dtype=np.float64)) if good.any() else None
    top = None
    if workload.priority is not None:
        is_top = counted & (workload.priority == workload.priority.max())
        top = None if is_top[counted].all() else float(is_good[is_top].mean())
    return Figures(attained, accuracy, attained * (accuracy or 0.0), top, found.result.batch_size_mean)


def bound_in(
    cell: Cell, workload: Workload, cluster: Sequence[Profile], settings: SimSettings | None = None
) -> Figures:
    """Return the bound on one cell and seed, on GPUs as fast as its own ever are."""
    pace = cell.settings(settings or SimSettings()).pace
    quickest = min([1.0, *(fault.amount for fault in cell.faults if fault.kind == "slow")])
    factor = quickest * _least_slowness(pace, workload.trace.duration_ns)
    known = {id(profile): profile if factor == 1.0 else slowed(profile, factor) for profile in cluster}
    return bound_of(workload, [known[id(profile)] for profile in cluster])


def _least_slowness(pace: Pace, duration_ns: int) -> float:
    """Return measured over profiled latency where the pace is fastest: it only rises or only falls."""
    if pace == AS_PROFILED:
        return 1.0
    return min(pace.slowness(pace.began_ns + at_ns) for at_ns in (0, duration_ns))


_POOL_THREADS = 2  # one that hands out work, one that feeds its pipe


def _all(
    tasks: list[tuple[Comparison, Cell, int]], n_processes: int
) -> Iterable[tuple[dict[str, Figures], Figures | None]]:
    pool = None
    # Else this process does it all, and takes longer: where /dev/shm takes no semaphore, as in some
    # containers, or where no more processes may be started, which a pool does not survive.
    if n_processes > 1 and _can_fork(n_processes):
        with contextlib.suppress(OSError):
            pool = ProcessPoolExecutor(n_processes)
    if pool is None:
        yield from map(_task, tasks)
        return
    with pool:
        yield from pool.map(_task, tasks)


def _can_fork(n: int) -> bool:
    """Tell whether `n` processes and a pool's threads can be started; starts and ends them."""
    reader, writer = os.pipe()
    children: list[int] = []
    try:
        while len(children) < n:
            child = os.fork()
            if child == 0:  # until the parent has seen all, or is gone
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            children.append(child)
        return has_threads(_POOL_THREADS)
    except OSError:
        return False
    finally:
        os.close(writer)
        os.close(reader)
        for child in children:
            os.waitpid(child, 0)


def _task(task: tuple[Comparison, Cell, int]) -> tuple[dict[str, Figures], Figures | None]:
    comparison, cell, seed = task
    return comparison.one(cell, seed)


def bound_of(workload: Workload, cluster: Sequence[Profile]) -> Figures:
    """Return upper bounds on what any schedule attains; see `loadgen.bound`.

    Attainment and summed accuracy are bounded separately, not both at once; so there is no mean accuracy.
    """
    n = workload.trace.n
    slo_ns = np.broadcast_to(np.asarray(workload.slo_ns, np.int64), (n,)).copy()
    floors: npt.NDArray[np.int64] = np.zeros(n, np.int64)
    if workload.min_accuracy is not None:
        rows = [cluster[0].floor_row(float(accuracy) - 1e-5) for accuracy in np.unique(workload.min_accuracy)]
        if None in rows:
            raise ConfigError(f"floor: no subnet of {cluster[0].name} reaches it")
        floors = np.array(rows, np.int64)[np.unique(workload.min_accuracy, return_inverse=True)[1]]
    found = bound.fluid_bound(bound.BoundWorkload(workload.trace.due_ns, slo_ns, floors), cluster)
    return Figures(found.attainment, None, found.accuracy)


# --- the paper's headline comparisons -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Headline:
    """How a policy compares with the baselines in one cell, as in the paper's abstract.

    Attributes:
        accuracy_gain: Its mean accuracy, less that of the most accurate baseline whose attainment is
            within `EQUAL_ATTAINMENT` of its own, or above; percentage points; None if there is none.
        over: That baseline.
        mincost_gain: Its mean accuracy less `mincost`'s; None if that did not run.
        attainment_ratio: Its attainment over that of the baseline with the nearest mean accuracy that
            is not below its own; None if there is none.
        at: That baseline.
    """

    accuracy_gain: float | None
    over: str | None
    mincost_gain: float | None
    attainment_ratio: float | None
    at: str | None


def is_baseline(policy: str) -> bool:
    """Return whether a policy is one of those that the headline comparisons use as a baseline."""
    return policy == "mincost" or (policy.startswith("fixed:") and not is_paced(policy))


def is_paced(policy: str) -> bool:
    """Return whether a policy runs on GPUs of another speed: such a yardstick is not judged."""
    return "@" in policy


def baselines(profile: Profile) -> tuple[str, ...]:
    """Return every baseline: each subnet alone, and the cheapest."""
    return (*(f"fixed:{subnet.name}" for subnet in profile.subnets), "mincost")


def headline(result: CellResult, policy: str) -> Headline:
    """Return the headline comparisons of a policy in one cell, from figures averaged over the seeds."""
    ours = result.mean(policy)
    rivals = {name: result.mean(name) for name in result.policies if is_baseline(name)}
    accuracies = {name: one.accuracy for name, one in rivals.items() if one.accuracy is not None}
    if ours.accuracy is None:
        return Headline(None, None, None, None, None)
    least = ours.attainment - EQUAL_ATTAINMENT
    equal = {name: accuracies[name] for name in accuracies if rivals[name].attainment >= least}
    over = max(equal, key=equal.__getitem__, default=None)
    better = {name: accuracy for name, accuracy in accuracies.items() if accuracy >= ours.accuracy}
    at = min(better, key=better.__getitem__, default=None)
    mincost = accuracies.get("mincost")
    share = 0.0 if at is None else rivals[at].attainment
    return Headline(
        None if over is None else ours.accuracy - equal[over],
        over,
        None if mincost is None else ours.accuracy - mincost,
        ours.attainment / share if share else None,
        at,
    )


# --- output -------------------------------------------------------------------------------------


def to_dict(comparison: Comparison, results: Sequence[CellResult]) -> dict[str, Any]:
    """Return the file that `loadgen compare --json` writes, without its environment."""
    return {
        "schema": 1,
        "policies": list(comparison.policies),
        "seeds": list(comparison.seeds),
        "duration_s": comparison.duration_s,
        "cells": [_cell_dict(result) for result in results],
    }


def _cell_dict(result: CellResult) -> dict[str, Any]:
    cell, first = result.cell, next(iter(result.policies))
    names = [name for name in result.policies if not is_baseline(name) and not is_paced(name)]
    has_rivals = any(map(is_baseline, result.policies))
    gains = {name: result.gain(name, first) for name in result.policies if name != first}
    return {
        "name": cell.name,
        "trace": cell.trace,
        "rate_qps": cell.rate_qps,
        "cluster": cell.cluster,
        "slo_ms": cell.slo_ms,
        "floor": cell.floor,
        "priority": cell.priority,
        "faults": [fault.to_dict() for fault in cell.faults],
        "jitter_ms": cell.jitter_ms,
        "clients": cell.n_clients,
        "warm_up_s": cell.warm_up_s,
        "policies": {name: [asdict(one) for one in runs] for name, runs in result.policies.items()},
        "bound": None if result.bounds is None else [asdict(one) for one in result.bounds],
        "gain_per_query": {
            name: {"over": first, "mean": mean, "error": None if math.isnan(error) else error}
            for name, (mean, error) in gains.items()
        },
        "headline": {name: asdict(headline(result, name)) for name in names} if has_rivals else None,
    }


def lines(results: Sequence[CellResult]) -> list[str]:
    """Return the table: attainment, accuracy and summed accuracy by cell and policy, and the bound."""
    wide = max(len(result.cell.name) for result in results)
    policies = list(results[0].policies)
    longest = max(map(len, policies))
    head = f"{'cell':<{wide}}  {'policy':<{longest}}  attainment  accuracy  per query   ahead        of bound"
    found = [head]
    for result in results:
        limit = result.mean_bound()
        for policy in policies:
            mean = result.mean(policy)
            ahead = ""
            if policy != policies[0]:
                gain, error = result.gain(policy, policies[0])
                ahead = f"{gain:+.4f}" + ("" if math.isnan(error) else f" ±{error:.4f}")
            of = "" if limit is None else f"{mean.per_query - limit.per_query:+.3f}"
            accuracy = "-" if mean.accuracy is None else f"{mean.accuracy:.3f}"
            found.append(
                f"{result.cell.name:<{wide}}  {policy:<{longest}}  {mean.attainment:10.5f}  "
                f"{accuracy:>8}  {mean.per_query:9.4f}   {ahead:<15} {of}".rstrip()
            )
        if limit is not None:
            found.append(
                f"{result.cell.name:<{wide}}  {'(bound)':<{longest}}  {limit.attainment:10.5f}  "
                f"{'':8}  {limit.per_query:9.4f}"
            )
    return found


def headline_lines(results: Sequence[CellResult]) -> list[str]:
    """Return the headline comparisons, a line for each cell and policy that is not a baseline."""
    found = []
    for result in results:
        for policy in result.policies:
            if is_baseline(policy) or is_paced(policy):
                continue
            one = headline(result, policy)
            parts = []
            if one.accuracy_gain is not None:
                parts.append(f"{one.accuracy_gain:+.2f} points over {one.over} at equal attainment")
            if one.mincost_gain is not None:
                parts.append(f"{one.mincost_gain:+.2f} over mincost")
            if one.attainment_ratio is not None:
                parts.append(f"{one.attainment_ratio:.2f} x the attainment of {one.at} at equal accuracy")
            if parts:
                found.append(f"{result.cell.name}, {policy}: {', '.join(parts)}")
    return found
