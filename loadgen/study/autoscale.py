"""Fleets that follow their load, and fleets that do not: GPU-hours and attainment on one trace, simulated.

The router's core, the policy and the autoscaler are those that serve; what is simulated is what a worker
takes to start, and how long its GPU is paid for: from the decision that starts it until it has drained.

    fixed:N             N workers all the time
    as-served, at-least `router.report.scaler` decides every `every_s` seconds, as `cluster autoscale` does,
                        by one need or the other
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from loadgen.simulator.simulate import SimSettings, Simulation, Workload, summarised, uncollected
from loadgen.simulator.world import START_NS
from router.report.load import Load, fleet, workers_needed
from router.report.scaler import AS_SERVED, NEEDS, Scaler, ScalerSettings, need_of
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError
from superserve.status import SHORT_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.traces.trace import Trace
    from profiles.table import Profile

_BEGIN_NS = START_NS - 50 * MS  # workers have joined; the trace has not begun


@dataclass(frozen=True, slots=True)
class ScaledFleet:
    """A fleet of a study.

    Attributes:
        name: As the table has it: "fixed:4", "as-served".
        scaler: How it follows its load; a fixed fleet has its floor as ceiling.
        need: Which need it follows, one of `router.report.scaler.NEEDS`.
        start_s: What a worker takes from the decision until it has joined.
        every_s: Time between two decisions.
    """

    name: str
    scaler: ScalerSettings
    need: str = AS_SERVED
    start_s: float = 30.0
    every_s: float = 5.0

    @property
    def is_fixed(self) -> bool:
        """Whether it never changes."""
        return self.scaler.floor == self.scaler.ceiling


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a fleet did on a trace.

    Attributes:
        fleet: The fleet.
        attainment: Share of all queries answered by their deadlines.
        accuracy: Mean over the queries answered in time, percent; None if there is none.
        gpu_hours: What it was paid for.
        most: The most workers at once.
        n_changes: How often their number changed.
        sizes: When that was, in seconds from the start, and how many there were from then on.
    """

    fleet: ScaledFleet
    attainment: float
    accuracy: float | None
    gpu_hours: float
    most: int
    n_changes: int
    sizes: tuple[tuple[float, int], ...]


def fixed(n: int) -> ScaledFleet:
    """Return a fleet of `n` workers that never changes."""
    return ScaledFleet(f"fixed:{n}", ScalerSettings(floor=n, ceiling=n))


def run(
    trace: Trace, profile: Profile, of: ScaledFleet, *, policy: str, slo_ns: int, seed: int = 0
) -> Scaled:
    """Serve a trace with a fleet on the virtual clock.

    Args:
        trace: When queries are due.
        profile: Of each worker's one GPU.
        of: The fleet.
        policy: The router's.
        slo_ns: From due to deadline.
        seed: Of the network's delays.
    """
    n_most = of.scaler.ceiling
    world = Simulation([profile] * n_most, policy=policy, seed=seed, settings=SimSettings(gpus_per_process=1))
    hand = _Hand(world, of)
    world.later(_BEGIN_NS, hand.begin)
    workload = Workload(trace, slo_ns)
    clients = world.offer(workload)
    with uncollected():
        world.run()
    result = summarised(workload, world, clients, policy).result
    end_s = trace.duration_ns / SECOND
    return Scaled(
        of, result.slo_attainment or 0.0, result.mean_accuracy, _gpu_hours(hand.sizes, end_s),
        max(n for _, n in hand.sizes), len(hand.sizes) - 1, tuple(hand.sizes),
    )  # fmt: skip


def _gpu_hours(sizes: Sequence[tuple[float, int]], end_s: float) -> float:
    """Return the integral of the fleet's size over the trace, in hours."""
    at_s = np.array([min(max(at, 0.0), end_s) for at, _ in sizes] + [end_s])
    n = np.array([n for _, n in sizes])
    return float((np.diff(at_s) * n).sum() / 3_600)


@dataclass(slots=True)
class _Hand:
    """Does what `cluster autoscale` does: looks at the load, starts and drains workers."""

    world: Simulation
    of: ScaledFleet
    sizes: list[tuple[float, int]] = field(default_factory=list)
    _wanted: set[int] = field(default_factory=set)
    _load: Load = field(default_factory=Load)
    _scaler: Scaler | None = None

    def begin(self, now_ns: int) -> None:
        """Start with the fleet's least workers, and look from then on."""
        floor = self.of.scaler.floor
        self._wanted = set(range(floor))
        self.sizes.append((0.0, floor))
        for i in range(floor, self.of.scaler.ceiling):
            self.world.drain(i, now_ns)
        if not self.of.is_fixed:
            self._scaler = Scaler(self.of.scaler)
            self._note(now_ns)
            self.world.later(START_NS, self._decide)

    def _note(self, now_ns: int) -> None:
        """Record the counters, as the router does each second."""
        self._load.note(self.world.core, now_ns)
        self.world.later(now_ns + SECOND, self._note)

    def _decide(self, now_ns: int) -> None:
        assert self._scaler is not None, "a fixed fleet decides nothing"
        core = self.world.core
        past = self._load.recent(core, now_ns, SHORT_S)
        needed = need_of(workers_needed(past, fleet(core)), self.of.need)
        n = self._scaler.decide(now_ns / SECOND, needed, len(self._wanted))
        if n != len(self._wanted):
            self._scale(n, now_ns)
            self.sizes.append(((now_ns - START_NS) / SECOND, n))
        self.world.later(now_ns + int(self.of.every_s * SECOND), self._decide)

    def _scale(self, n: int, now_ns: int) -> None:
        while len(self._wanted) > n:
            last = max(self._wanted)
            self._wanted.remove(last)
            self.world.drain(last, now_ns)
        for i in range(self.of.scaler.ceiling):
            if len(self._wanted) < n and i not in self._wanted:
                self._wanted.add(i)
                self.world.later(now_ns + int(self.of.start_s * SECOND), partial(self._join, i))

    def _join(self, i: int, now_ns: int) -> None:
        """Let a worker join that has started, unless it is no longer wanted."""
        if i in self._wanted:
            self.world.revive(i, now_ns)


def lines(found: Sequence[Scaled]) -> list[str]:
    """Return the table of a study, a line for each fleet."""
    rows = [f"{'fleet':<10}{'attainment':>12}{'accuracy':>11}{'GPU-hours':>12}{'most':>6}{'changes':>9}"]
    for one in found:
        accuracy = "-" if one.accuracy is None else f"{one.accuracy:.2f} %"
        rows.append(
            f"{one.fleet.name:<10}{one.attainment:>12.5f}{accuracy:>11}{one.gpu_hours:>12.2f}{one.most:>6}"
            f"{one.n_changes:>9}"
        )
    return rows


def fleets(sizes: Sequence[int], scaler: ScalerSettings, *, start_s: float) -> list[ScaledFleet]:
    """Return the fleets of a study: fixed ones of these sizes, and one that follows each need.

    Raises:
        ConfigError: A size is below 1.
    """
    for n in sizes:
        if n < 1:
            raise ConfigError(f"--fixed: expected numbers of workers from 1 on, got {n}")
    scaled = (ScaledFleet(need, scaler, need, start_s) for need in NEEDS)
    return [*(fixed(n) for n in sizes), *scaled]
