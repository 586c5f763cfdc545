"""The gate run: candidate and comparators on the same queries, cell by cell and seed by seed.

What the comparators attain is taken from the store where it is known, so that a run after a change of the
candidate simulates that alone. The candidate's own figures are never taken from there.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadgen.simulator.workloads import parse_cluster
from loadgen.study.compare import CellResult, Figures, bound_in, serve
from loadgen.study.gate.promise import PromiseLine, Standing, findings, shortcomings, slowed_speed
from loadgen.study.gate.store import BOUND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from loadgen.study.compare import Cell
    from loadgen.study.gate.draft import GateCell
    from loadgen.study.gate.store import FigureStore

SLACKFIT, MINCOST, SLOWER = "slackfit", "mincost", "mincost@0.8"
BASELINE = "demandfit"
"""The policy that a candidate is to replace, unless another is named."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A cell that was played.

    Attributes:
        of: The cell.
        result: All figures, by policy and seed.
        standing: The means that the promise looks at.
        fails: The lines that fail, the worst of each letter.
    """

    of: GateCell
    result: CellResult
    standing: Standing
    fails: tuple[PromiseLine, ...]

    @property
    def verdict(self) -> str:
        """The lines that hold, or those that fail and by how much."""
        if not self.fails:
            return f"holds {''.join(dict.fromkeys(line.line for line in findings(self.standing)))}"
        return "FAILS " + "; ".join(map(str, self.fails))


@dataclass(frozen=True, slots=True)
class _Task:
    """What is to be computed of one cell and seed."""

    cell: Cell
    seed: int
    policies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyGate:
    """Who is judged, against whom, and on which seeds.

    Attributes:
        candidate: As `--policy` takes it.
        baseline: The policy that it is to replace.
        seeds: Of every cell.
        store: Where the comparators' figures are kept.
    """

    candidate: str
    baseline: str
    seeds: tuple[int, ...]
    store: FigureStore

    def comparators(self, of: GateCell) -> tuple[str, ...]:
        """Return the policies whose figures in a cell are kept."""
        return tuple(dict.fromkeys((SLACKFIT, MINCOST, SLOWER, self.baseline, *self._slowed(of))))

    def _slowed(self, of: GateCell) -> tuple[str, str]:
        """Return slackfit and the baseline on the slower GPUs of lines c and d."""
        speed = slowed_speed(is_surprise=of.is_surprise)
        return f"{SLACKFIT}@{speed:g}", f"{self.baseline}@{speed:g}"

    def run(
        self,
        cells: Sequence[GateCell],
        *,
        n_processes: int = 1,
        say: Callable[[str], object] = lambda _: None,
    ) -> list[Judged]:
        """Play the cells that can be played; the result does not depend on `n_processes` or on the store.

        Raises:
            ConfigError: A trace or the store cannot be read, or the store cannot be written.
        """
        played = [cell for cell in cells if cell.skipped is None]
        known: dict[tuple[str, int], dict[str, Figures]] = {}
        tasks = []
        for one in played:
            for seed in self.seeds:
                found = known[one.name, seed] = self._stored(one, seed)
                wanted = (*self.comparators(one), BOUND, *self._own(one))
                if missing := tuple(policy for policy in wanted if policy not in found):
                    tasks.append(_Task(one.cell, seed, missing))
        n_missing = sum(len(task.policies) for task in tasks)
        say(f"{len(played)} cells, {len(self.seeds)} seeds: {n_missing} figures to compute")
        by_name = {cell.name: cell for cell in played}
        open_seeds = Counter(task.cell.name for task in tasks)
        for task, figures in zip(tasks, _all(tasks, n_processes), strict=True):
            known[task.cell.name, task.seed].update(figures)
            for policy, computed in figures.items():
                if policy == BOUND or policy in self.comparators(by_name[task.cell.name]):
                    self.store.put(task.cell, task.seed, policy, computed)
            open_seeds[task.cell.name] -= 1
            if not open_seeds[task.cell.name]:
                done = self._judged(by_name[task.cell.name], known)
                ours = done.standing.candidate
                say(f"{done.of.name}: {ours.attainment:.5f} {ours.per_query:.3f}  {done.verdict}")
        return [self._judged(cell, known) for cell in played]

    def _own(self, of: GateCell) -> tuple[str, ...]:
        return () if self.candidate in self.comparators(of) else (self.candidate,)

    def _stored(self, of: GateCell, seed: int) -> dict[str, Figures]:
        found = {policy: self.store.get(of.cell, seed, policy) for policy in (*self.comparators(of), BOUND)}
        return {policy: one for policy, one in found.items() if one is not None}

    def _judged(self, of: GateCell, known: dict[tuple[str, int], dict[str, Figures]]) -> Judged:
        by_seed = [known[of.name, seed] for seed in self.seeds]
        names = tuple(dict.fromkeys((self.candidate, *self.comparators(of))))
        result = CellResult(
            of.cell, self.seeds, {name: tuple(one[name] for one in by_seed) for name in names},
            tuple(one[BOUND] for one in by_seed),
        )  # fmt: skip
        bound = result.mean_bound()
        assert bound is not None, "computed or known for each seed"
        slowed_slackfit, slowed_baseline = map(result.mean, self._slowed(of))
        standing = Standing(
            result.mean(self.candidate), result.mean(SLACKFIT), result.mean(MINCOST), result.mean(SLOWER),
            result.mean(self.baseline), slowed_slackfit, slowed_baseline, bound, of.is_strict, of.is_at_once,
            of.n_gpus, of.slo_ns, of.is_surprise,
        )  # fmt: skip
        return Judged(of, result, standing, shortcomings(standing))


def _all(tasks: Sequence[_Task], n_processes: int) -> Iterable[dict[str, Figures]]:
    if n_processes == 1 or len(tasks) < 2:
        yield from map(_computed, tasks)
        return
    with ProcessPoolExecutor(min(n_processes, len(tasks))) as pool:
        yield from pool.map(_computed, tasks)


def _computed(task: _Task) -> dict[str, Figures]:
    workload, cluster = task.cell.workload(None, task.seed), parse_cluster(task.cell.cluster)
    return {
        policy: bound_in(task.cell, workload, cluster)
        if policy == BOUND
        else serve(task.cell, workload, cluster, policy, seed=task.seed)
        for policy in task.policies
    }
