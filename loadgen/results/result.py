"""A run's figures: exact quantiles, the run result file, and whether the run counts.

Quantiles are order statistics, never interpolated: the p99.9 is the latency of an actual
query. An open-loop run counts only if its load was really offered, so the sender's own
lateness is compared with a probe that measures how late this machine wakes any thread.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Mapping  # noqa: TC003  read at run time: the fields' types are the format
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from loadgen.results.histogram import Histogram, rank
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.fields import OMITTED, Count, body_of, check_schema, read_file

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SCHEMA = 1
"""Version of the run result file."""

OUTCOMES = (
    "ok",
    "late",
    "expired",
    "infeasible",
    "overloaded",
    "failed",
    "worker_lost",
    "invalid",
    "cancelled",
    "draining",
    "unanswered",
    "unsent",
)
"""How a query of a trace can end; a run's counts of these sum to its total."""

LATENCY_QUANTILES = ("p50", "p90", "p99", "p99_9", "max")
"""Keys of `latency_ms`."""

LAG_QUANTILES = ("p50", "p99", "p99_9", "max")
"""Keys of `send_lag_ms`."""

PERMILLE = {"p50": 500, "p90": 900, "p99": 990, "p99_9": 999, "max": 1000}
"""The values of the quantiles' names, in thousandths."""

MAX_EXACT = 100_000_000
"""Up to this many durations quantiles are exact; for more they are a histogram's: see `histogram`."""

_ATTAINMENT_TOLERANCE = 1e-6  # files have six digits


def quantile_ns(ns: npt.NDArray[np.int64], permille: int) -> int | None:
    """Return the smallest duration that `permille` thousandths of them do not exceed.

    Args:
        ns: Durations in any order, shape (n,).
        permille: 1 to 1000; 999 is the p99.9, 1000 the maximum.

    Returns:
        Nanoseconds; None if `ns` is empty.

    Source: nearest rank, the element of rank ceil(n * permille / 1000).
    """
    if not len(ns):
        return None
    place = rank(len(ns), permille) - 1
    return int(np.partition(ns, place)[place])


def quantiles_ms(
    ns: npt.NDArray[np.int64], names: tuple[str, ...] = LATENCY_QUANTILES, *, max_exact: int = MAX_EXACT
) -> dict[str, float | None]:
    """Return quantiles in milliseconds, by name; None each if `ns` is empty.

    Args:
        ns: Durations in any order, shape (n,).
        names: Which ones: `LATENCY_QUANTILES` or `LAG_QUANTILES`.
        max_exact: Up to this many durations they are exact; for more, at most 0.8 % too high, because
            sorting would take as much memory again.
    """
    if len(ns) > max_exact:
        counted = Histogram()
        counted.add(ns)
        told = {name: counted.quantile_ns(PERMILLE[name]) for name in names}
        return {name: None if one is None else one / MS for name, one in told.items()}
    # Sorted once: five selections from a long array cost more.
    ordered = np.sort(ns)
    ranks = {name: rank(len(ns), PERMILLE[name]) for name in names}
    return {name: int(ordered[one - 1]) / MS if len(ns) else None for name, one in ranks.items()}


def _kept() -> Any:
    """Return a field that the file leaves out if the run did not keep it."""
    return field(default=None, metadata=OMITTED)


_KEYS = {"queries": ("total", *OUTCOMES), "latency_ms": LATENCY_QUANTILES, "send_lag_ms": LAG_QUANTILES}
"""The keys of fields that are objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run measured: the fields of the run result file, in its order.

    Attributes:
        schema: Version of the file.
        trace: The trace's name or spec.
        policy: The policy's name.
        slo_ms: Time from a query's due instant to its deadline, in milliseconds.
        duration_s: Length of the offered trace, in seconds.
        offered_qps: Queries of the trace over its duration.
        realised_qps: Queries really sent, over the same duration.
        realised_cv2: Burstiness of the instants of sending; None if too few.
        queries: How many there were ("total") and how they ended (`OUTCOMES`).
        slo_attainment: Share of all queries answered by their deadline, unsent ones
            counted as missed; None for an empty trace.
        mean_accuracy: Mean profiled accuracy over queries answered by their deadline;
            None without any.
        goodput_qps: Queries answered by their deadline, over the duration.
        latency_ms: Quantiles of latency since the due instant (`LATENCY_QUANTILES`).
        send_lag_ms: Quantiles of the sender's own lateness (`LAG_QUANTILES`).
        batch_size_mean: Mean size of the batches that answers came in; None without any.
        subnet_share: Share of the answered queries by subnet name.
        valid: Whether the load was really offered; see `judge_validity`.
        invalid_because: Why not; empty if valid.
        disturbed: Whether the machine itself was late enough to explain the sender's lag.
        partial: True for a run that was interrupted: all figures are of the trace up to there; or None.
        reasons: For each status without an output, one of the router's reasons; None if not kept.
        timeline: The run in bins: see `loadgen.results.timeline`; None if it was not kept.
        environment: Where, when and by which command: see `loadgen.live.environment`; None if not kept.
        calibration: The generator on its own: see `loadgen.live.calibrate`; None if it was not calibrated.
        quantiles: "exact", or "histogram, 1 %" for more than `MAX_EXACT` queries; None if not stated.
        generators: For a run from several hosts: each one's queries, and how far off its start may be.
        gaps: What is unknown because generators were lost; None if none was.
        lanes: The GPUs' batches in the worst two seconds: see `loadgen.results.lanes`; None if not kept.
    """

    schema: int = SCHEMA
    trace: str
    policy: str
    slo_ms: float
    duration_s: float
    offered_qps: float
    realised_qps: float
    realised_cv2: float | None
    queries: Mapping[str, Count]
    slo_attainment: float | None
    mean_accuracy: float | None
    goodput_qps: float
    latency_ms: Mapping[str, float | None]
    send_lag_ms: Mapping[str, float | None]
    batch_size_mean: float | None
    subnet_share: Mapping[str, float]
    valid: bool
    invalid_because: tuple[str, ...]
    disturbed: bool = False
    partial: bool | None = _kept()
    reasons: Mapping[str, str] | None = _kept()
    timeline: Mapping[str, Any] | None = _kept()
    environment: Mapping[str, Any] | None = _kept()
    calibration: Mapping[str, Any] | None = _kept()
    quantiles: str | None = _kept()
    generators: tuple[Mapping[str, Any], ...] | None = _kept()
    gaps: tuple[Mapping[str, Any], ...] | None = _kept()
    lanes: Mapping[str, Any] | None = _kept()

    def to_dict(self) -> dict[str, Any]:
        """Return the file's fields, in its order; optional ones only if they are set."""
        return body_of(self)

    def to_json(self) -> str:
        """Return the file's text; a series of the timeline takes one line."""
        option = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
        found = self.to_dict()
        if self.timeline is not None:
            found["timeline"] = {
                key: orjson.Fragment(orjson.dumps(self.timeline[key])) for key in self.timeline
            }
        if self.lanes is not None:
            found["lanes"] = {key: orjson.Fragment(orjson.dumps(self.lanes[key])) for key in self.lanes}
        return orjson.dumps(found, option=option).decode()

    def check(self) -> None:
        """Raise ConfigError, naming the field, unless types, sums and shares agree."""
        # By way of JSON: NumPy's numbers become plain, and NaN, which no file can contain, becomes null.
        _checked(orjson.loads(orjson.dumps(self.to_dict(), option=orjson.OPT_SERIALIZE_NUMPY)))


def load_run(path: Path) -> RunResult:
    """Read and check a run result file; unknown fields are ignored.

    Raises:
        ConfigError: Missing, malformed or inconsistent; the error names file and field.
    """
    try:
        return _checked(orjson.loads(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable run result: {error}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _checked(body: object) -> RunResult:
    """Return the result in a file's object."""
    check_schema(body, SCHEMA, "")
    run = read_file(RunResult, body, "")
    for name, keys in _KEYS.items():
        if set(found := getattr(run, name)) != set(keys):
            raise ConfigError(f"{name}: expected {', '.join(keys)}, got {', '.join(found)}")
    _check_counts(run.queries, run.slo_attainment)
    if run.valid == bool(run.invalid_because):
        raise ConfigError(
            f"invalid_because: expected reasons exactly if valid is false, got {run.invalid_because}"
        )
    return run


def _check_counts(queries: Mapping[str, int], attainment: float | None) -> None:
    """Raise ConfigError unless the outcomes sum to the total and attainment is ok's share."""
    total, answered = queries["total"], sum(queries[outcome] for outcome in OUTCOMES)
    if answered != total:
        raise ConfigError(f"queries: expected outcomes that sum to total, {total}, got {answered}")
    share = queries["ok"] / total if total else None
    if (share is None) != (attainment is None):
        raise ConfigError(f"slo_attainment: expected {share}, got {attainment}")
    if share is not None and attainment is not None and abs(share - attainment) > _ATTAINMENT_TOLERANCE:
        raise ConfigError(f"slo_attainment: expected ok / total, {share}, got {attainment}")


class Validity(NamedTuple):
    """Whether a run counts.

    Attributes:
        valid: Its load was really offered.
        disturbed: The sender's lag was over 5 % of the SLO, and this machine's own
            lateness explains it.
        reasons: Why it is not valid; empty if it is.
    """

    valid: bool
    disturbed: bool
    reasons: tuple[str, ...]


def judge_validity(
    *, lag_p99_9_ns: int | None, noise_p99_9_ns: int | None, slo_ns: int, unsent: int
) -> Validity:
    """Judge whether a run really offered its load.

    It is invalid if queries stayed unsent, or if the p99.9 of send lag exceeds both 5 % of
    the SLO and twice the p99.9 that a noise probe saw in the same run. A lag over 5 %
    of the SLO that the probe explains leaves the run valid but disturbed.

    Args:
        lag_p99_9_ns: p99.9 of how late queries were sent; None if none were.
        noise_p99_9_ns: p99.9 of the `NoiseProbe`'s lateness; None without a probe, which
            then explains nothing.
        slo_ns: The SLO, a duration.
        unsent: Queries of the trace that were never sent.
    """
    lag_ns, noise_ns = lag_p99_9_ns or 0, noise_p99_9_ns or 0
    is_late = lag_ns * 20 > slo_ns  # 5 %, in integers
    is_explained = lag_ns <= 2 * noise_ns
    reasons = []
    if unsent:
        reasons.append(f"{unsent} queries stayed unsent")
    if is_late and not is_explained:
        reasons.append(
            f"send lag p99.9 was {lag_ns / MS:.3f} ms, over 5 % of the SLO ({slo_ns / 20 / MS:.3f} ms)"
            f" and twice the noise probe's {noise_ns / MS:.3f} ms"
        )
    return Validity(valid=not reasons, disturbed=is_late and is_explained, reasons=tuple(reasons))


class NoiseProbe:
    """A thread that only sleeps, and measures how late it wakes.

    It shows what the machine does to any sleeper: busy cores, a stolen virtual CPU. In
    Python it also waits for its own process's interpreter lock, up to 5 ms each time: in the same
    process as a sender that computes without pause it would excuse the sender's own load. So run it
    in a process that does little else, such as the one that waits for the senders.

    One sample takes 16 bytes: 58 MB an hour at the default period.

    Args:
        period_ns: How long each sleep lasts.
    """

    def __init__(self, *, period_ns: int = MS) -> None:
        self._period_ns = period_ns
        self._late_ns = array("q")
        self._woke_ns = array("q")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="noise-probe", daemon=True)

    def start(self) -> None:
        """Start measuring."""
        self._thread.start()

    def stop(self) -> npt.NDArray[np.int64]:
        """End the thread and return how late each sleep ended, in ns, shape (n_sleeps,)."""
        self._stopping.set()
        self._thread.join()
        return np.array(self._late_ns, dtype=np.int64)

    @property
    def woke_ns(self) -> npt.NDArray[np.int64]:
        """Return when each sleep ended, once stopped: instants, ascending, shape (n_sleeps,)."""
        return np.array(self._woke_ns, dtype=np.int64)

    def __len__(self) -> int:
        """Return how many sleeps have been measured so far."""
        return len(self._late_ns)

    def _run(self) -> None:
        period_s = self._period_ns / 1e9
        while not self._stopping.is_set():
            due_ns = time.monotonic_ns() + self._period_ns
            time.sleep(period_s)
            woke_ns = time.monotonic_ns()
            self._woke_ns.append(woke_ns)
            self._late_ns.append(woke_ns - due_ns)
