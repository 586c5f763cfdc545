"""Seeded arrival processes: pure functions from rates and a seed to instants.

    constant        equal gaps
    poisson         exponential gaps
    gamma           gamma gaps of a given CV² (variance over squared mean; Poisson has 1)
    bursty          a constant base stream merged with a gamma variant stream
    accelerating    gamma gaps around a mean that ramps from one rate to another
    from_counts     an exact number of arrivals in each of equal bins
    from_shape      bins filled in proportion to a shape, with an exact total
    maf_like        from_shape over a synthetic shape in the manner of Azure Functions 2019

Each returns the instants at which queries are due: ascending int64 nanoseconds after the start,
shape (n_queries,), each in [0, duration_s * 1e9). Equal arguments give equal arrivals with the same
version of numpy; for the gamma processes a longer duration only appends. Invalid arguments raise
TraceError, and so does a process of more than MAX_ARRIVALS queries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from superserve.clock import SECOND
from superserve.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_ARRIVALS = 100_000_000
"""The most queries in a trace: 800 MB of instants. A larger number is a mistyped rate."""

MAX_DURATION_S = 1e7
"""The longest trace: 116 days, up to which a float holds every instant to about a nanosecond."""

MAX_RATE_QPS = 1e9
"""The highest rate: a query a nanosecond."""

MAX_CV2 = 1e4
"""The burstiest gaps: the burstiest Azure excerpt has 160. Above this, a trace is one burst or empty."""

# Drawn in pieces of at most 32 MB, so that a wrong guess of the number needed costs little.
_CHUNK = 1 << 22

# A day of the minutes that Azure Functions 2019 counts, and enough functions for a heavy tail.
_MAF_MINUTES = 1440
_MAF_FUNCTIONS = 1000


def check_positive(field: str, value: float, *, at_most: float) -> float:
    """Return `value` if it is a number in (0, at_most]; otherwise raise TraceError naming `field`."""
    if not 0 < value <= at_most:  # also false for NaN
        raise TraceError(f"{field}: expected a number above 0 and at most {at_most:.12g}, got {value}")
    return value


def check_cv2(value: float, *, field: str = "cv2") -> float:
    """Return `value` if it is a CV² in [0, MAX_CV2]; otherwise raise TraceError naming `field`."""
    if not 0 <= value <= MAX_CV2:
        raise TraceError(f"{field}: expected a number from 0 to {MAX_CV2:.12g}, got {value}")
    return value


def to_ns(field: str, seconds: float) -> int:
    """Return a duration in nanoseconds; raise TraceError unless 1 ns to MAX_DURATION_S."""
    ns = round(check_positive(field, seconds, at_most=MAX_DURATION_S) * SECOND)
    if ns < 1:
        raise TraceError(f"{field}: expected at least 1 ns, got {seconds} s")
    return ns


def constant(*, rate_qps: float, duration_s: float) -> npt.NDArray[np.int64]:
    """Return arrivals at 0, 1/rate, 2/rate and so on: CV² 0."""
    return gamma(rate_qps=rate_qps, cv2=0.0, duration_s=duration_s, seed=0)


def poisson(*, rate_qps: float, duration_s: float, seed: int) -> npt.NDArray[np.int64]:
    """Return a Poisson process: independent exponential gaps, CV² 1."""
    return gamma(rate_qps=rate_qps, cv2=1.0, duration_s=duration_s, seed=seed)


def gamma(*, rate_qps: float, cv2: float, duration_s: float, seed: int) -> npt.NDArray[np.int64]:
    """Return a renewal process: independent gamma gaps of mean 1/rate and the given CV².

    The gaps have shape 1/cv2 and scale cv2/rate; `cv2` 0 gives equal gaps starting at 0. The
    process starts as if a query had just arrived, so it exceeds rate * duration by (cv2 - 1) / 2
    queries on average: 3.5 at CV² 8, whatever the length.

    Source of the process: SuperServe (NSDI '25), section 6.1.
    """
    duration_ns = to_ns("duration_s", duration_s)
    check_positive("rate_qps", rate_qps, at_most=MAX_RATE_QPS)
    due_ns = _renewal(cv2, rate_qps * duration_s, np.random.default_rng(seed))
    due_ns *= SECOND
    due_ns /= rate_qps
    return _cut(due_ns, duration_ns)


def bursty(
    *, base_qps: float, variant_qps: float, cv2: float, duration_s: float, seed: int
) -> npt.NDArray[np.int64]:
    """Return a constant stream at `base_qps` merged with a gamma stream at `variant_qps`.

    `cv2` is that of the variant stream; the merged stream's is lower.

    Source: the bursty traces of SuperServe (NSDI '25), section 6.
    """
    to_ns("duration_s", duration_s)
    check_positive("base_qps", base_qps, at_most=MAX_RATE_QPS)
    check_positive("variant_qps", variant_qps, at_most=MAX_RATE_QPS)
    _check_count((base_qps + variant_qps) * duration_s)
    base = constant(rate_qps=base_qps, duration_s=duration_s)
    variant = gamma(rate_qps=variant_qps, cv2=cv2, duration_s=duration_s, seed=seed)
    merged = np.concatenate((base, variant))
    merged.sort(kind="stable")  # finds the two runs and merges them
    return merged


def ramp_s(*, from_qps: float, to_qps: float, tau_qps_per_s: float) -> float:
    """Return how long a rate takes from `from_qps` to `to_qps`, changing by `tau_qps_per_s` a second."""
    check_positive("from_qps", from_qps, at_most=MAX_RATE_QPS)
    check_positive("to_qps", to_qps, at_most=MAX_RATE_QPS)
    check_positive("tau_qps_per_s", tau_qps_per_s, at_most=MAX_RATE_QPS)
    return abs(to_qps - from_qps) / tau_qps_per_s


def accelerating_count(*, from_qps: float, to_qps: float, tau_qps_per_s: float, duration_s: float) -> float:
    """Return the expected number of queries of `accelerating`: the integral of its rate."""
    ramp = min(ramp_s(from_qps=from_qps, to_qps=to_qps, tau_qps_per_s=tau_qps_per_s), duration_s)
    slope = math.copysign(tau_qps_per_s, to_qps - from_qps)
    return (from_qps + slope * ramp / 2) * ramp + to_qps * (duration_s - ramp)


def accelerating(
    *, from_qps: float, to_qps: float, tau_qps_per_s: float, cv2: float, duration_s: float, seed: int
) -> npt.NDArray[np.int64]:
    """Return arrivals whose mean rate ramps linearly from `from_qps` to `to_qps`, then stays.

    The rate changes by `tau_qps_per_s` every second, downwards if `to_qps` is the smaller; a
    duration shorter than the ramp cuts it. A gamma process of unit rate and the given CV² is warped
    in time: its arrival at u becomes the instant t at which the integral of the rate reaches u.

    Source: the time-varying traces of SuperServe (NSDI '25), section 6.
    """
    duration_ns = to_ns("duration_s", duration_s)
    ramp = ramp_s(from_qps=from_qps, to_qps=to_qps, tau_qps_per_s=tau_qps_per_s)
    total = accelerating_count(
        from_qps=from_qps, to_qps=to_qps, tau_qps_per_s=tau_qps_per_s, duration_s=duration_s
    )
    passed = _renewal(cv2, total, np.random.default_rng(seed))  # (n_queries,), in units of queries
    slope = math.copysign(tau_qps_per_s, to_qps - from_qps)
    in_ramp = (from_qps + to_qps) / 2 * ramp
    split = int(np.searchsorted(passed, in_ramp))
    rising, level = passed[:split], passed[split:]
    # from * t + slope * t² / 2 = u, solved in the form that subtracts no nearly equal numbers. The
    # root is the rate at t, which rounding may make negative at the end of a falling ramp.
    rising[:] = 2 * rising / (from_qps + np.sqrt(np.maximum(from_qps**2 + 2 * slope * rising, 0)))
    level[:] = ramp + (level - in_ramp) / to_qps
    passed *= SECOND
    return _cut(passed, duration_ns)


def from_counts(counts: npt.NDArray[np.int64], *, duration_s: float, seed: int) -> npt.NDArray[np.int64]:
    """Return exactly `counts[i]` arrivals in the i-th of equal bins, uniform inside each bin.

    Independent uniform positions are a Poisson process given its count: within a bin the gaps
    have CV² 1, and bursts shorter than a bin occur only by chance.

    Args:
        counts: Arrivals per bin, at least 0, shape (n_bins,).
        duration_s: Length of all bins together.
        seed: Draws the positions.
    """
    duration_ns = to_ns("duration_s", duration_s)
    _check_count(float(counts.sum()))
    position = np.random.default_rng(seed).random(int(counts.sum()))  # (n_queries,), in bins
    position += np.repeat(np.arange(counts.size), counts)
    position *= duration_ns / counts.size
    due_ns = position.astype(np.int64)
    due_ns.sort()
    # Rounding may move the last bin's last draw onto its edge.
    return np.minimum(due_ns, duration_ns - 1, out=due_ns)


def from_shape(
    shape: npt.NDArray[np.float64], *, rate_qps: float, duration_s: float, seed: int
) -> npt.NDArray[np.int64]:
    """Return round(rate * duration) arrivals, spread over equal bins in proportion to `shape`.

    The total is exact; its split over the bins is multinomial and positions inside a bin are
    uniform. That is a Poisson process of piecewise constant rate, conditioned on its total.

    Args:
        shape: Relative rate of each bin, at least 0 and not all 0, shape (n_bins,).
        rate_qps: Mean rate over the whole duration.
        duration_s: Length of all bins together.
        seed: Draws the split and the positions.
    """
    check_positive("rate_qps", rate_qps, at_most=MAX_RATE_QPS)
    total = rate_qps * to_ns("duration_s", duration_s) / SECOND
    _check_count(total)
    split_seed, position_seed = np.random.SeedSequence(seed).generate_state(2)
    counts = np.random.default_rng(int(split_seed)).multinomial(round(total), shape / shape.sum())
    return from_counts(counts, duration_s=duration_s, seed=int(position_seed))


def maf_like(*, rate_qps: float, duration_s: float, seed: int) -> npt.NDArray[np.int64]:
    """Return synthetic arrivals similar to a day of Azure Functions 2019; see maf_like_shape.

    The day's 1440 minutes are squeezed into `duration_s` and filled by `from_shape`. It stands in
    for a real trace if there is none. Results on it are not results on Azure's trace.
    """
    shape_seed, arrival_seed = np.random.SeedSequence(seed).generate_state(2)
    shape = maf_like_shape(seed=int(shape_seed))
    return from_shape(shape, rate_qps=rate_qps, duration_s=duration_s, seed=int(arrival_seed))


def maf_like_shape(*, seed: int) -> npt.NDArray[np.float64]:
    """Return a synthetic day's relative invocations per minute, mean 1, shape (1440,).

    A sum over 1000 functions whose popularity follows Zipf's law with exponent 0.9. Two in five of
    the 950 less popular are timers that fire in every 1st, 5th, 10th, 15th, 30th or 60th minute; the
    others follow a day's sine, each a little early or late, and burst at random moments by a Pareto
    factor that halves every minute. The constants are chosen by eye so that the coefficient of
    variation (0.06 to 0.12) and the peak over the mean (1.2 to 1.9) come out near those of excerpts
    of the real trace: 0.10 in a 500-function sample of eight hours, and the 8750 over 6400 q/s of
    the workload in SuperServe's paper. Nothing is fitted.
    """
    rng = np.random.default_rng(seed)
    minute = np.arange(_MAF_MINUTES)
    weight = np.arange(1, _MAF_FUNCTIONS + 1) ** -0.9
    # A slow timer among the most popular functions would drown all others whenever it fires.
    is_timer = (rng.random(_MAF_FUNCTIONS) < 0.4) & (np.arange(_MAF_FUNCTIONS) >= 50)
    activity = np.where(is_timer[:, None], _timers(rng, minute), _callers(rng, minute))
    total = weight @ activity  # (n_functions,) @ (n_functions, n_minutes) -> (n_minutes,)
    return np.asarray(total / total.mean(), dtype=np.float64)


def _timers(rng: np.random.Generator, minute: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return each function's activity, mean 1, if it were a timer: shape (n_functions, n_minutes)."""
    share = (0.5, 0.2, 0.1, 0.1, 0.05, 0.05)
    period: npt.NDArray[np.int64] = rng.choice((1, 5, 10, 15, 30, 60), size=(_MAF_FUNCTIONS, 1), p=share)
    phase = rng.integers(0, period)
    return np.asarray(np.where((minute + phase) % period == 0, period, 0), dtype=np.float64)


def _callers(rng: np.random.Generator, minute: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return each function's activity, about 1, if people called it: shape (n_functions, n_minutes)."""
    phase = rng.normal(0, 1, (_MAF_FUNCTIONS, 1))
    daily = 1 + 0.25 * np.sin(2 * np.pi * minute / _MAF_MINUTES + phase)
    starts = rng.random((_MAF_FUNCTIONS, minute.size)) < 0.002
    height = np.minimum(rng.pareto(1.5, starts.shape), 5.0) * starts
    burst: npt.NDArray[np.float64] = height.copy()
    for age in range(1, 6):
        burst[:, age:] += height[:, :-age] * 0.5**age
    return daily * (1 + burst)


def _renewal(cv2: float, until: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return a renewal process of unit rate: its ascending arrivals below `until`, shape (n,)."""
    check_cv2(cv2)
    _check_count(until)
    if cv2 == 0:
        return np.arange(math.ceil(until), dtype=np.float64)
    draw = _gaps(cv2, rng)
    chunks: list[npt.NDArray[np.float64]] = []
    reached, drawn = 0.0, 0
    while reached < until:
        # Six standard deviations above the expectation, so that one draw is almost always enough.
        left = until - reached
        chunk = draw(min(_CHUNK, int(left + 6 * math.sqrt(cv2 * left) + cv2) + 16))
        # The sum continues within the chunk, so that the arrivals do not depend on where chunks end.
        chunk[0] += reached
        np.cumsum(chunk, out=chunk)
        chunks.append(chunk)
        reached = float(chunk[-1])
        drawn += chunk.size
        _check_count(drawn - _CHUNK)
    last = chunks[-1]
    chunks[-1] = last[: np.searchsorted(last, until)]
    return np.concatenate(chunks)


def _gaps(cv2: float, rng: np.random.Generator) -> Callable[[int], npt.NDArray[np.float64]]:
    """Return a function that draws gamma gaps of mean 1 and the given CV²."""
    if cv2 == 1:
        return rng.standard_exponential  # eight times as fast as the gamma of shape 1
    return lambda n: rng.standard_gamma(1 / cv2, n) * cv2


def _cut(due_ns: npt.NDArray[np.float64], duration_ns: int) -> npt.NDArray[np.int64]:
    """Return the ascending instants before `duration_ns`, in whole nanoseconds."""
    # Rounding in a division may move the last arrival onto the end.
    return due_ns[: np.searchsorted(due_ns, duration_ns)].astype(np.int64)


def _check_count(expected: float) -> None:
    """Raise TraceError if a process of about `expected` queries would not fit."""
    if not expected <= MAX_ARRIVALS:
        raise TraceError(
            f"rate and duration: expected at most {MAX_ARRIVALS} queries in a trace, got about {expected:.6g}"
        )


def arrivals_cv2(arrivals_ns: npt.NDArray[np.int64]) -> float | None:
    """Return the squared coefficient of variation of the gaps between arrivals.

    Args:
        arrivals_ns: Instants on one clock in any order, shape (n,).

    Returns:
        Variance over squared mean of the gaps, 1 for Poisson arrivals; None for fewer
        than three arrivals or if all fall on one instant.
    """
    gaps_ns = np.diff(np.sort(arrivals_ns)).astype(np.float64)
    if len(gaps_ns) < 2 or not gaps_ns.any():
        return None
    return float(gaps_ns.var() / gaps_ns.mean() ** 2)
