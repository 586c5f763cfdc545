"""The best that any schedule could do: an upper bound on whole traces, by a fluid relaxation.

A policy decides without knowing what comes. The bound knows every arrival, and ignores what makes
scheduling hard: it is the value of a linear program to which every real schedule gives a solution, so
no policy, simulated or live, does better. It may be out of reach itself.

**What is relaxed.** Time is divided into bins. A query may be served by any shares of any bins between
the one in which it arrives and the one with its deadline: arrivals are rounded down, deadlines up. A
subnet costs each query the least share of a batch's time over all batch sizes that end within the
query's own SLO. A GPU of a kind gives each bin its length.

**Why it bounds.** Take any real schedule, and charge each query on time its batch's time, divided by the
batch's queries, evenly while the batch runs. That is within its window; no GPU gives more than a bin's
length in a bin; and a query is charged at least its subnet's least share, since a batch that answers it
on time ends within its SLO. So this is a solution of the program, with the same value. Median latencies
are used, because emulated and simulated GPUs take exactly these. For GPUs that are sometimes faster the
bound holds only in expectation.

**Why it is small.** Queries of one SLO have windows in the order of arrival, so serving them first in,
first out loses nothing, on each kind of GPU: for each SLO and kind, what has been served by the end of a
bin must be between what arrived by then and what arrived a window before. That takes three variables and
three constraints a bin, instead of one for each pair of bin and query. Subnets below the concave hull of
accuracy over cost are left out: a mix of their neighbours is as accurate for less.

The linear program's value is not taken from the solver: see `loadgen.bound.highs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loadgen.bound.highs import Program
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from profiles.table import Profile

    Ints = npt.NDArray[np.int64]

BINS_PER_SLO = 4
"""Bins in the shortest SLO, unless the caller sets their width.

On the cells of docs/demandfit.md four times as many lower the bound by less than 0.001 points, and the
solver then takes some thirty times as long.
"""

TIME_LIMIT_S = 600.0
"""How long the solver may take."""


@dataclass(frozen=True, slots=True, eq=False)
class BoundWorkload:
    """The queries to serve: one entry each, shape (n,).

    Attributes:
        due_ns: When it arrives, at least 0, ascending.
        slo_ns: From then to its deadline.
        floor: The smallest row of the profile that may serve it.

    Raises:
        ConfigError: A column is malformed.
    """

    due_ns: Ints
    slo_ns: Ints
    floor: Ints

    def __post_init__(self) -> None:
        n = len(self.due_ns)
        if not n or len(self.slo_ns) != n or len(self.floor) != n:
            raise ConfigError(
                f"bound: expected as many SLOs and floors as queries, at least one, got {n}, "
                f"{len(self.slo_ns)} and {len(self.floor)}"
            )
        if self.due_ns[0] < 0 or (np.diff(self.due_ns) < 0).any():
            raise ConfigError("bound: due_ns: expected ascending instants of at least 0")
        if self.slo_ns.min() <= 0 or self.floor.min() < 0:
            raise ConfigError("bound: expected slo_ns above 0 and floors of at least 0")

    @property
    def n(self) -> int:
        """Number of queries."""
        return len(self.due_ns)


def uniform(due_ns: Ints, *, slo_ns: int, floor: int = 0) -> BoundWorkload:
    """Return a workload whose queries all have the same SLO and floor."""
    n = len(due_ns)
    return BoundWorkload(due_ns, np.full(n, slo_ns, dtype=np.int64), np.full(n, floor, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class FluidBound:
    """Upper bounds on what any schedule of a workload attains. Each holds on its own, not both at once.

    Attributes:
        accuracy: Summed accuracy of the queries answered on time, over all queries; percent.
        attainment: Share of all queries answered on time.
        bin_ns: Width of the bins that were used.
        is_tight: Whether the solver reached its optimum: if not, lower bounds exist.
    """

    accuracy: float
    attainment: float
    bin_ns: int
    is_tight: bool


def fluid_bound(
    workload: BoundWorkload,
    gpus: Sequence[Profile],
    *,
    bin_ns: int | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> FluidBound:
    """Return upper bounds on summed accuracy per query and on attainment.

    Args:
        workload: The queries.
        gpus: The profile of each GPU; equal ones are one kind.
        bin_ns: Width of the bins; narrower ones are tighter, and take longer. None is the shortest
            SLO over `BINS_PER_SLO`.
        time_limit_s: How long each of the two programs may take.

    Raises:
        ConfigError: There is no GPU, a profile lacks a floor's row, a bin has no width, or highspy is
            not installed.
        ProcessError: The solver proved nothing in its time.
    """
    if bin_ns is None:
        bin_ns = max(1, int(workload.slo_ns.min()) // BINS_PER_SLO)
    if not gpus or bin_ns <= 0:
        raise ConfigError(f"bound: expected GPUs and bins of some width, got {len(gpus)} and {bin_ns} ns")
    if workload.floor.max() >= min(profile.n_subnets for profile in gpus):
        raise ConfigError(f"bound: floor: no profile row is {workload.floor.max()}")
    summed = _Fluid(workload, gpus, bin_ns, count_only=False).program.maximise(time_limit_s=time_limit_s)
    served = _Fluid(workload, gpus, bin_ns, count_only=True).program.maximise(time_limit_s=time_limit_s)
    most = max(profile.subnets[-1].accuracy for profile in gpus)
    return FluidBound(
        accuracy=min(summed.upper / workload.n, most),
        attainment=min(served.upper / workload.n, 1.0),
        bin_ns=bin_ns,
        is_tight=summed.is_optimal and served.is_optimal,
    )


def options(
    profile: Profile, slo_ns: int, floor: int, *, count_only: bool = False
) -> tuple[tuple[float, float], ...]:
    """Return the useful ways to serve one query: (worth, cost in nanoseconds).

    Args:
        profile: Latencies by row and batch size.
        slo_ns: A batch must end within it.
        floor: The smallest row allowed.
        count_only: A query on time is worth 1, not its accuracy; then only the cheapest way is useful.
    """
    frontier = profile.frontier(floor=floor, limit_ns=slo_ns)
    if count_only:
        # The row at the floor is the cheapest (P2), and may itself be below the hull of accuracies.
        sizes = zip(profile.batch_sizes, profile.subnets[floor].latency_ns, strict=True)
        return ((1.0, min(ns / size for size, ns in sizes if ns <= slo_ns)),) if frontier else ()
    return tuple((profile.subnets[row].accuracy, cost_ns) for row, cost_ns in frontier)


class _Fluid:
    """Builds the program of one workload. Work is measured in bins of one GPU."""

    def __init__(
        self, workload: BoundWorkload, gpus: Sequence[Profile], bin_ns: int, *, count_only: bool
    ) -> None:
        self.program = Program()
        self._workload = workload
        self._bin_ns = bin_ns
        self._count_only = count_only
        self._arrival_bin = workload.due_ns // bin_ns
        windows = self._window(workload.slo_ns)
        self._n_bins = int((self._arrival_bin + windows).max())
        kinds: list[tuple[Profile, int]] = []
        for profile in gpus:
            if all(profile != known for known, _ in kinds):
                kinds.append((profile, sum(profile == other for other in gpus)))
        capacity = [self.program.rows(self._n_bins, upper=n_gpus) for _, n_gpus in kinds]
        for slo_ns in np.unique(workload.slo_ns).tolist():
            work = self._arrivals(slo_ns, [profile for profile, _ in kinds])
            for (_, n_gpus), rows, entries in zip(kinds, capacity, work, strict=True):
                self._first_in_first_out(slo_ns, n_gpus, rows, entries)

    def _window(self, slo_ns: Ints) -> Ints:
        """Return in how many bins a query may be served, from the one in which it arrives."""
        return -(-slo_ns // self._bin_ns) + 1

    def _arrivals(self, slo_ns: int, kinds: Sequence[Profile]) -> list[list[tuple[Ints, Ints, float]]]:
        """Add, for each bin's queries of this SLO, how many are served by which kind and subnet, by floor.

        Returns:
            For each kind of GPU, its work: bins, variables, and the cost of one query in bins.
        """
        workload, program = self._workload, self.program
        work: list[list[tuple[Ints, Ints, float]]] = [[] for _ in kinds]
        of_slo = workload.slo_ns == slo_ns
        for floor in np.unique(workload.floor[of_slo]).tolist():
            bins, counts = np.unique(
                self._arrival_bin[of_slo & (workload.floor == floor)], return_counts=True
            )
            once = program.rows(len(bins), upper=counts)
            for entries, profile in zip(work, kinds, strict=True):
                for worth, cost_ns in options(profile, slo_ns, floor, count_only=self._count_only):
                    served = program.columns(len(bins), worth=worth, upper=counts)
                    program.add(once, served, 1.0)
                    entries.append((bins, served, cost_ns / self._bin_ns))
        return work

    def _first_in_first_out(
        self, slo_ns: int, n_gpus: int, capacity: Ints, entries: Sequence[tuple[Ints, Ints, float]]
    ) -> None:
        """Make one kind of GPU serve its work of one SLO, each query within its window.

        backlog(t) = backlog(t-1) + work(t) - service(t), and what is left after a bin arrived within the
        last window less one bin: backlog(t) <= work(t-window+2) + ... + work(t).
        """
        program, n_bins = self.program, self._n_bins
        window = int(self._window(np.asarray(slo_ns)))
        most = n_gpus * window  # what is left of a window's work must be done within it
        work = program.columns(n_bins, upper=2.0 * most)
        service = program.columns(n_bins, upper=n_gpus)
        backlog = program.columns(n_bins, upper=most)
        drawn = program.rows(n_bins, lower=0.0, upper=0.0)
        program.add(drawn, work, -1.0)
        for bins, served, cost in entries:
            program.add(drawn[bins], served, cost)
        balance = program.rows(n_bins, lower=0.0, upper=0.0)
        program.add(balance, work, 1.0)
        program.add(balance, service, -1.0)
        program.add(balance, backlog, -1.0)
        program.add(balance[1:], backlog[:-1], 1.0)
        program.add(capacity, service, 1.0)
        in_time = program.rows(n_bins, upper=0.0)
        program.add(in_time, backlog, 1.0)
        for age in range(window - 1):
            program.add(in_time[age:], work[: n_bins - age], -1.0)
