"""The best schedule of a small workload: the paper's zero-one integer program, and what its solver proves.

The paper's program has a variable I(phi, B, n, t) for each subnet phi, set of queries B, GPU n and start
t. There are too many sets to list, so a batch here is opened by a whole number of (kind of GPU, subnet,
size, start), and a share of each query rides in it: at most once in all, at most `size` in a batch, and
only where the query has arrived by the start, outlives the end, and allows the subnet. With the batches
given, that is a transportation problem, whose best solutions are whole; so only the batches need be
declared whole numbers. GPUs of one kind are told apart by nothing: batches that overlap in time are at
most as many as GPUs, and intervals of which no more than n overlap can always be dealt to n GPUs.

Starts are not a grid. A schedule may be shifted left until each batch starts when its last query
arrives or when the batch before it on its GPU ends: so every start is an arrival plus whole batches'
latencies, and there are finitely many.

Source: appendix A.5 of SuperServe (NSDI '25), the optimal offline policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loadgen.bound.highs import Program
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.bound.fluid import BoundWorkload
    from profiles.table import Profile

MAX_STARTS = 2_000
"""Instants at which a batch may start on one kind of GPU, at most: beyond, use `fluid_bound`."""

MAX_RIDES = 500_000
"""Pairs of a query and a batch, at most."""


@dataclass(frozen=True, slots=True)
class ExactBound:
    """What the integer program proves about a workload.

    Attributes:
        accuracy: No schedule has a higher summed accuracy per query, percent. It is the best
            schedule's own when `is_optimal`, else the solver's dual bound.
        found: Of the best schedule that the solver found; None if it found none.
        is_optimal: Whether `found` was proved to be the best, within the solver's gap of 1e-4.
    """

    accuracy: float
    found: float | None
    is_optimal: bool


@dataclass(frozen=True, slots=True)
class _Batch:
    """Batches that may be opened: all of one subnet, size and start on one kind of GPU."""

    worth: float
    size: int
    start_ns: int
    end_ns: int
    riders: tuple[int, ...]


def exact_bound(
    workload: BoundWorkload, gpus: Sequence[Profile], *, time_limit_s: float = 60.0
) -> ExactBound:
    """Return the best summed accuracy per query of any schedule, or the least bound proved in time.

    Args:
        workload: At most some dozens of queries: the program grows with their number and their
            latencies' combinations.
        gpus: The profile of each GPU, all free at 0; equal ones are one kind.
        time_limit_s: How long the solver may take.

    Raises:
        ConfigError: There is no GPU, the instance is too large, or highspy is not installed.
    """
    if not gpus:
        raise ConfigError("bound: expected at least one GPU, got none")
    program = Program()
    best = np.zeros(workload.n)
    once = program.rows(workload.n, upper=1.0)
    kinds: list[Profile] = []
    n_rides = 0
    for profile in gpus:
        if profile not in kinds:
            kinds.append(profile)
            batches = _batches(workload, profile)
            n_rides += sum(len(batch.riders) for batch in batches)
            if n_rides > MAX_RIDES:
                raise ConfigError(f"bound: expected a small workload, got over {MAX_RIDES} possible rides")
            for batch in batches:
                best[list(batch.riders)] = np.maximum(best[list(batch.riders)], batch.worth)
            if batches:
                _add_kind(program, once, batches, gpus.count(profile))
    if program.n_columns == 0:
        return ExactBound(accuracy=0.0, found=0.0, is_optimal=True)
    bound = program.maximise(time_limit_s=time_limit_s)
    found = None if bound.found is None else bound.found / workload.n
    # A solver that was stopped may have proved less than this: no query gets more than its best subnet.
    upper = min(bound.upper, float(best.sum()))
    return ExactBound(upper / workload.n, found, bound.is_optimal)


def _add_kind(program: Program, once: np.ndarray, batches: Sequence[_Batch], n_gpus: int) -> None:
    """Let n GPUs open batches, and queries ride in them."""
    opened = program.columns(len(batches), upper=float(n_gpus), integral=True)
    riders = np.array([query for batch in batches for query in batch.riders])
    of_batch = np.repeat(np.arange(len(batches)), [len(batch.riders) for batch in batches])
    rides = program.columns(len(riders), worth=[batches[b].worth for b in of_batch.tolist()], upper=1.0)
    program.add(once[riders], rides, 1.0)
    seats = program.rows(len(batches), upper=0.0)
    program.add(seats[of_batch], rides, 1.0)
    program.add(seats, opened, [-float(batch.size) for batch in batches])
    # Nobody rides in a batch that is not open. Implied for whole numbers, and the solver's bound
    # is far closer with it.
    open_first = program.rows(len(riders), upper=0.0)
    program.add(open_first, rides, 1.0)
    program.add(open_first, opened[of_batch], -1.0)
    starts = np.array([batch.start_ns for batch in batches])
    ends = np.array([batch.end_ns for batch in batches])
    instants = np.unique(starts)
    running = program.rows(len(instants), upper=float(n_gpus))
    for row, instant in zip(running, instants, strict=True):
        at = opened[(starts <= instant) & (instant < ends)]
        program.add(np.full(len(at), row), at, 1.0)


def _batches(workload: BoundWorkload, profile: Profile) -> list[_Batch]:
    """Return every batch that could answer a query on time, on one kind of GPU."""
    due, deadline = workload.due_ns, workload.due_ns + workload.slo_ns
    batches = []
    for start_ns in _starts(workload, profile):
        for row, subnet in enumerate(profile.subnets):
            for column, size in enumerate(profile.batch_sizes):
                end_ns = start_ns + subnet.latency_ns[column]
                can = (due <= start_ns) & (deadline >= end_ns) & (workload.floor <= row)
                riders = tuple(np.flatnonzero(can).tolist())
                # More room than riders is longer, and no use: a smaller size holds them too.
                if riders and (column == 0 or len(riders) > profile.batch_sizes[column - 1]):
                    batches.append(_Batch(subnet.accuracy, size, start_ns, end_ns, riders))
    return batches


def _starts(workload: BoundWorkload, profile: Profile) -> list[int]:
    """Return every instant at which a batch of a schedule shifted left may start, ascending."""
    last_ns = int((workload.due_ns + workload.slo_ns).max()) - profile.subnets[0].latency_ns[0]
    lasting = {latency_ns for subnet in profile.subnets for latency_ns in subnet.latency_ns}
    waiting = [due_ns for due_ns in workload.due_ns.tolist() if due_ns <= last_ns]
    starts = set(waiting)
    while waiting:
        start_ns = waiting.pop()
        new = {start_ns + took_ns for took_ns in lasting if start_ns + took_ns <= last_ns} - starts
        starts |= new
        waiting += new
        if len(starts) > MAX_STARTS:
            raise ConfigError(
                f"bound: expected a small workload, got over {MAX_STARTS} instants at which a batch may start"
            )
    return sorted(starts)
