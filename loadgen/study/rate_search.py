"""The highest rate that still holds, found by doubling, halving and bisection. Pure: the caller probes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True)
class Probe:
    """One short run at one rate.

    Attributes:
        rate_qps: The offered rate.
        share: Share of the queries answered in time.
        holds: Whether that share is enough.
        noise_ns: p99.9 of how late the noise probe woke during the run.
        lag_ns: p99.9 of how late the senders were; counted in every latency.
        n_unsent: Queries that were refused at the sender; counted as missed.
    """

    rate_qps: float
    share: float
    holds: bool
    noise_ns: int
    lag_ns: int = 0
    n_unsent: int = 0

    @property
    def held_qps(self) -> float | None:
        """The rate, if it held."""
        return self.rate_qps if self.holds else None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where to look for the rate, and how long.

    Attributes:
        start_qps: The first rate tried.
        lowest_qps: The lowest rate to try.
        highest_qps: The highest rate to try.
        tolerance: The search ends when the least rate that fails is at most
            (1 + tolerance) times the highest that holds.
        max_probes: It also ends after this many rates.
    """

    start_qps: float
    lowest_qps: float = 250.0
    highest_qps: float = 400_000.0
    tolerance: float = 0.06
    max_probes: int = 8


def highest_rate(holds: Callable[[float], bool], bounds: Bounds) -> float | None:
    """Return the highest rate tried for which `holds` is true; None if there was none."""
    low: float | None = None
    high: float | None = None
    rate: float | None = bounds.start_qps
    for _ in range(bounds.max_probes):
        if rate is None:
            break
        if holds(rate):
            low = rate
        else:
            high = rate
        rate = _next_rate(low, high, bounds)
    return low


def _next_rate(low: float | None, high: float | None, bounds: Bounds) -> float | None:
    """Return the rate to try between one that holds and one that fails; None when they are close."""
    if low is None:
        assert high is not None, "the first rate held or failed"
        return max(high / 2, bounds.lowest_qps) if high > bounds.lowest_qps else None
    if high is None:
        return min(low * 2, bounds.highest_qps) if low < bounds.highest_qps else None
    return math.sqrt(low * high) if high > low * (1 + bounds.tolerance) else None


def undisturbed(
    offer: Callable[[float], Probe],
    rate_qps: float,
    *,
    noisy_ns: int,
    may_repeat: Callable[[], bool] = lambda: True,
    max_repeats: int = 1,
) -> Probe:
    """Return a probe at `rate_qps`; one that fails while the machine is noisy is repeated."""
    found = offer(rate_qps)
    for _ in range(max_repeats):
        if found.holds or found.noise_ns <= noisy_ns or not may_repeat():
            break
        found = offer(rate_qps)
    return found


def confirmed(
    offer: Callable[[float], Probe],
    rate_qps: float,
    *,
    noisy_ns: int,
    steps: Sequence[float] = (1.0, 0.8, 0.65, 0.5),
    may_repeat: Callable[[], bool] = lambda: True,
    max_repeats: int = 1,
) -> Probe:
    """Return the first probe that holds at `rate_qps` times a step; the last one if none does."""
    assert steps, "one step at least"
    for step in steps:
        found = undisturbed(
            offer, rate_qps * step, noisy_ns=noisy_ns, may_repeat=may_repeat, max_repeats=max_repeats
        )
        if found.holds:
            break
    return found
