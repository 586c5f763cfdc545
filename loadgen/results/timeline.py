"""A run over time: how the queries due in each bin of time ended, as in the result file.

Every query counts in the bin in which it was due, whenever its answer came. So a bin's outcomes
sum to its queries, the bins sum to the run's totals, and all series share one time axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.results.histogram import rank
from loadgen.results.result import OUTCOMES, PERMILLE, quantiles_ms
from loadgen.results.river import SlackRiver, river_from, river_of
from loadgen.results.run import in_time
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import STATUSES, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from loadgen.results.result import RunResult
    from loadgen.results.run import Run
    from loadgen.traces.trace import Trace

    Floats = npt.NDArray[np.float64]
    Counts = npt.NDArray[np.int64]

AIM_BINS = 200
"""About this many bins: a screen shows no more, and a bin still has many queries."""

MIN_BIN_NS = 100 * MS  # at 1,000 q/s a shorter bin has under a hundred queries: too few for a p99
N_TAIL = 300
"""Points of the latency distribution."""

_NICE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_LATENCY = {"p50": 500, "p99": 990}
_LAG = {"p50": 500, "p99": 990, "max": 1000}
_BATCH = ("mean", "p10", "p90")
_DIGITS = 4  # of the file: a tenth of a microsecond, for milliseconds


@dataclass(frozen=True, slots=True)
class SubnetSeries:
    """How many queries one subnet answered, by bin; late answers count too."""

    name: str
    accuracy: float
    queries: Counts


@dataclass(frozen=True, slots=True, eq=False)
class RunTimeline:
    """A run in bins; every series has shape (n_bins,), with NaN for a bin without data.

    Attributes:
        bin_ms: Width of a bin; the last one ends with the trace, so it may be narrower.
        queries: By outcome, how many of the queries due in each bin ended with it.
        mean_accuracy: Percent, over the answers in time.
        batch_size: "mean", "p10" and "p90" over batches, not over queries.
        subnets: From smallest to largest.
        latency_ms: "p50" and "p99" of the queries answered with an output, including late ones.
        queue_wait_ms: "p50" and "p99" of their time in the router's queue.
        send_lag_ms: "p50", "p99" and "max" of how late queries were sent.
        noise_ms: "p50", "p99" and "max" of how late the noise probe woke; NaN without a probe.
        noise_p99_9_ms: The probe's over the whole run, which decides validity.
        tail_ms: Latencies in ascending order, picked to be evenly spread on a complementary log
            scale, shape (n_points,).
        tail_n: How many answered queries took at least that long, same length.
        river: The queue by time to the deadline; None in an older file.
    """

    bin_ms: float
    queries: Mapping[str, Counts]
    mean_accuracy: Floats
    batch_size: Mapping[str, Floats]
    subnets: tuple[SubnetSeries, ...]
    latency_ms: Mapping[str, Floats]
    queue_wait_ms: Mapping[str, Floats]
    send_lag_ms: Mapping[str, Floats]
    noise_ms: Mapping[str, Floats]
    noise_p99_9_ms: float | None
    tail_ms: Floats
    tail_n: Counts
    river: SlackRiver | None = None

    @property
    def n_bins(self) -> int:
        """Return the number of bins."""
        return len(self.mean_accuracy)

    @property
    def due(self) -> Counts:
        """Return how many queries were due in each bin."""
        return sum(self.queries.values(), start=np.zeros(self.n_bins, np.int64))

    def of(self, outcome: str) -> Counts:
        """Return how many queries due in each bin ended as `outcome`."""
        return self.queries.get(outcome, np.zeros(self.n_bins, np.int64))

    def to_dict(self) -> dict[str, Any]:
        """Return the result file's `timeline`."""
        river = {} if self.river is None else {"river": self.river.to_dict()}
        return {
            "bin_ms": self.bin_ms,
            "queries": {name: counts.tolist() for name, counts in self.queries.items()},
            "mean_accuracy": _plain(self.mean_accuracy),
            "batch_size": {name: _plain(values) for name, values in self.batch_size.items()},
            "subnets": [
                {"name": one.name, "accuracy": one.accuracy, "queries": one.queries.tolist()}
                for one in self.subnets
            ],
            "latency_ms": {name: _plain(values) for name, values in self.latency_ms.items()},
            "queue_wait_ms": {name: _plain(values) for name, values in self.queue_wait_ms.items()},
            "send_lag_ms": {name: _plain(values) for name, values in self.send_lag_ms.items()},
            "noise_ms": {name: _plain(values) for name, values in self.noise_ms.items()},
            "noise_p99_9_ms": self.noise_p99_9_ms,
            "latency_tail": {"ms": _plain(self.tail_ms), "at_least": self.tail_n.tolist()},
            **river,
        }


def bin_ns(duration_ns: int) -> int:
    """Return the width of a run's bins: a round number, at least `MIN_BIN_NS`, for about 130 to 200 bins."""
    least = max(MIN_BIN_NS, duration_ns / AIM_BINS)
    power = 10.0 ** math.floor(math.log10(least))
    return min(width for nice in _NICE if (width := round(nice * power)) >= least)


def recorded(
    run: Run, trace: Trace, slo_ns: int | npt.NDArray[np.int64], environment: Mapping[str, Any]
) -> RunResult:
    """Return a run's result with everything that its file keeps: reasons, timeline and environment."""
    timeline = timeline_of(
        run.columns, duration_ns=trace.duration_ns, slo_ns=slo_ns, subnets=run.subnets, noise=run.noise
    )
    return replace(
        run.result, reasons=run.reasons, timeline=timeline.to_dict(), environment=dict(environment)
    )


def timeline_of(
    columns: Mapping[str, npt.NDArray[Any]],
    *,
    duration_ns: int,
    slo_ns: int | npt.NDArray[np.int64],
    subnets: Sequence[tuple[str, float]],
    noise: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None,
) -> RunTimeline:
    """Bin the columns of a run; about a second for two million queries.

    Args:
        columns: Of `loadgen.live.run.Run`, in the order in which queries were due.
        duration_ns: Length of the trace.
        slo_ns: From due to deadline: one for all, or shape (n,).
        subnets: Name and accuracy, from smallest to largest.
        noise: When a noise probe woke, from the start of the run, and how late; ascending.
    """
    due_ns, sent_ns, answered_ns = columns["due_ns"], columns["sent_ns"], columns["answered_ns"]
    has_output = columns["status"] <= Status.LATE
    is_ok = in_time(dict(columns), slo_ns)
    bins = _Bins.cut(due_ns, duration_ns)
    answered = bins.of(has_output)
    latency_ns = (answered_ns - due_ns)[has_output]
    rows = columns["subnet"][has_output]
    nothing = np.zeros(0, np.int64)
    woke_ns, late_ns = (nothing, nothing) if noise is None else noise
    tail_ms, tail_n = _tail(latency_ns)
    return RunTimeline(
        bin_ms=bin_ns(duration_ns) / MS,
        queries=_outcomes(columns, is_ok, bins),
        mean_accuracy=_means(columns["accuracy"][is_ok], bins.of(is_ok)),
        batch_size=_batches(columns["batch_size"][has_output], answered),
        subnets=tuple(
            SubnetSeries(name, accuracy, answered.of(rows == row).sizes)
            for row, (name, accuracy) in enumerate(subnets)
        ),
        latency_ms=_quantiles_ms(latency_ns, answered, _LATENCY),
        queue_wait_ms=_quantiles_ms(columns["queued_ns"][has_output], answered, _LATENCY),
        send_lag_ms=_quantiles_ms((sent_ns - due_ns)[sent_ns >= 0], bins.of(sent_ns >= 0), _LAG),
        noise_ms=_quantiles_ms(late_ns, _Bins.cut(woke_ns, duration_ns), _LAG),
        noise_p99_9_ms=quantiles_ms(late_ns, ("p99_9",))["p99_9"],
        tail_ms=tail_ms,
        tail_n=tail_n,
        river=river_of(columns, slo_ns, bins.index(), len(bins.sizes), bin_ns(duration_ns)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Bins:
    """The bins of ascending instants: those from bounds[i] to bounds[i + 1] are in bin i."""

    bounds: Counts

    @classmethod
    def cut(cls, instants_ns: npt.NDArray[np.int64], duration_ns: int) -> _Bins:
        """Return the bins of instants that all lie in the run."""
        edges_ns = np.arange(0, duration_ns, bin_ns(duration_ns), dtype=np.int64)
        return cls(np.searchsorted(instants_ns, np.append(edges_ns, duration_ns)))

    def of(self, chosen: npt.NDArray[np.bool_]) -> _Bins:
        """Return the bins of the chosen ones only."""
        return _Bins(np.concatenate(([0], np.cumsum(chosen)))[self.bounds])

    @property
    def sizes(self) -> Counts:
        """Return how many are in each bin."""
        return np.asarray(np.diff(self.bounds), dtype=np.int64)

    def index(self) -> Counts:
        """Return the bin of each, shape (n,)."""
        return np.repeat(np.arange(len(self.bounds) - 1), self.sizes)


def _outcomes(
    columns: Mapping[str, npt.NDArray[Any]], is_ok: npt.NDArray[np.bool_], bins: _Bins
) -> dict[str, Counts]:
    """Count outcomes by bin, each query once; outcomes that did not occur are left out."""
    # From a status byte to its name's index in OUTCOMES; without an answer it is unanswered.
    places = np.full(256, OUTCOMES.index("unanswered"))
    for status in STATUSES:
        places[status] = OUTCOMES.index(status.name.lower())
    places[Status.OK] = OUTCOMES.index("late")  # by our clock, not by the router's
    place = places[columns["status"]]
    place[is_ok] = OUTCOMES.index("ok")
    place[columns["sent_ns"] < 0] = OUTCOMES.index("unsent")
    n = len(OUTCOMES)
    counts = np.bincount(bins.index() * n + place, minlength=n * len(bins.sizes)).reshape(-1, n)
    return {name: counts[:, i] for i, name in enumerate(OUTCOMES) if counts[:, i].any()}


def _means(values: npt.NDArray[Any], bins: _Bins) -> Floats:
    """Return the mean of each bin."""
    sums = np.bincount(bins.index(), weights=values, minlength=len(bins.sizes))
    return np.where(bins.sizes > 0, sums / np.maximum(1, bins.sizes), np.nan)


def _batches(sizes: npt.NDArray[np.uint16], bins: _Bins) -> dict[str, Floats]:
    """Return mean, p10 and p90 of the sizes of each bin's batches.

    A batch of n queries is seen n times, so each counts 1/n. A batch whose queries were due
    in two bins counts in both, in parts.
    """
    known, place = np.unique(sizes, return_inverse=True)
    n_bins, n = len(bins.sizes), max(1, len(known))
    weights = np.bincount(bins.index() * n + place, 1.0 / np.maximum(1, sizes), n_bins * n).reshape(-1, n)
    total = weights.sum(axis=1)
    is_empty = total == 0
    series = {"mean": np.where(is_empty, np.nan, bins.sizes / np.where(is_empty, 1.0, total))}
    for name, share in (("p10", 0.1), ("p90", 0.9)):
        # The first size that this share does not exceed; a rounding error must not move it further.
        reached = weights.cumsum(axis=1) >= (share * total * (1 - 1e-12))[:, None]
        at = known[reached.argmax(axis=1)] if len(known) else np.zeros(n_bins)
        series[name] = np.where(is_empty, np.nan, at)
    return series


def _quantiles_ms(ns: npt.NDArray[np.int64], bins: _Bins, permille: Mapping[str, int]) -> dict[str, Floats]:
    """Return exact quantiles of each bin, in milliseconds, by name."""
    series = {name: np.full(len(bins.sizes), np.nan) for name in permille}
    for i in np.flatnonzero(bins.sizes):
        ordered = np.sort(ns[bins.bounds[i] : bins.bounds[i + 1]])
        for name, one in permille.items():
            series[name][i] = ordered[rank(len(ordered), one) - 1] / MS
    return series


def _tail(latency_ns: npt.NDArray[np.int64]) -> tuple[Floats, Counts]:
    """Return latencies, ascending, and how many are at least as long, evenly spread on a log scale."""
    n = len(latency_ns)
    if not n:
        return np.zeros(0), np.zeros(0, np.int64)
    ordered = np.sort(latency_ns)
    marked = [n - rank(n, one) + 1 for one in PERMILLE.values()]
    at_least = np.unique(np.concatenate((np.geomspace(1, n, N_TAIL).round().astype(np.int64), marked)))[::-1]
    return ordered[n - at_least] / MS, at_least


# --- reading it back --------------------------------------------------------------------------


def timeline_from(raw: object) -> RunTimeline:
    """Read the `timeline` of a result file.

    Raises:
        ConfigError: It is not what `RunTimeline.to_dict` writes; the error names the field.
    """
    found = _object(raw, "timeline")
    n = len(_list(found, "mean_accuracy"))
    if not n:
        raise ConfigError("timeline.mean_accuracy: expected one bin at least")
    tail = _object(found.get("latency_tail"), "timeline.latency_tail")
    n_tail = len(_list(tail, "ms"))
    noise = found.get("noise_p99_9_ms")
    queries = _object(found.get("queries"), "timeline.queries")
    if unknown := sorted(set(queries) - set(OUTCOMES)):
        raise ConfigError(f"timeline.queries: expected outcomes, got {unknown[0]!r}")
    return RunTimeline(
        bin_ms=float(_floats([found.get("bin_ms")], 1, "bin_ms")[0]),
        queries={name: _counts(queries[name], n, f"queries.{name}") for name in queries},
        mean_accuracy=_floats(found["mean_accuracy"], n, "mean_accuracy"),
        batch_size=_by_name(found, "batch_size", _BATCH, n),
        subnets=tuple(_subnet(one, n, i) for i, one in enumerate(_list(found, "subnets"))),
        latency_ms=_by_name(found, "latency_ms", _LATENCY, n),
        queue_wait_ms=_by_name(found, "queue_wait_ms", _LATENCY, n),
        send_lag_ms=_by_name(found, "send_lag_ms", _LAG, n),
        noise_ms=_by_name(found, "noise_ms", _LAG, n),
        noise_p99_9_ms=None if noise is None else float(_floats([noise], 1, "noise_p99_9_ms")[0]),
        tail_ms=_floats(tail["ms"], n_tail, "latency_tail.ms"),
        tail_n=_counts(tail.get("at_least"), n_tail, "latency_tail.at_least"),
        river=river_from(found.get("river"), n),
    )


def _subnet(raw: object, n: int, i: int) -> SubnetSeries:
    where = f"subnets[{i}]"
    found = _object(raw, f"timeline.{where}")
    accuracy = float(_floats([found.get("accuracy")], 1, f"{where}.accuracy")[0])
    return SubnetSeries(
        str(found.get("name")), accuracy, _counts(found.get("queries"), n, f"{where}.queries")
    )


def _by_name(found: dict[str, Any], field: str, names: Iterable[str], n: int) -> dict[str, Floats]:
    series = _object(found.get(field), f"timeline.{field}")
    return {name: _floats(series.get(name), n, f"{field}.{name}") for name in names}


def _object(raw: object, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected an object, got {type(raw).__name__}")
    return raw


def _list(found: dict[str, Any], field: str) -> list[Any]:
    values = found.get(field)
    if not isinstance(values, list):
        raise ConfigError(f"timeline.{field}: expected a list, got {type(values).__name__}")
    return values


def _floats(raw: object, n: int, field: str) -> Floats:
    """Return n numbers, NaN for null."""
    is_right = isinstance(raw, list) and len(raw) == n and all(isinstance(x, int | float | None) for x in raw)
    if not is_right:
        raise ConfigError(f"timeline.{field}: expected {n} numbers or nulls")
    return np.array(raw, dtype=np.float64)  # None becomes NaN


def _counts(raw: object, n: int, field: str) -> Counts:
    values = _floats(raw, n, field)
    if not (values >= 0).all():
        raise ConfigError(f"timeline.{field}: expected {n} counts")
    return values.astype(np.int64)


def _plain(values: Floats) -> list[float | None]:
    """Return the values for JSON: rounded, and null for NaN."""
    return [None if math.isnan(value) else value for value in values.round(_DIGITS).tolist()]
