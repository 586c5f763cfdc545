"""Measure a profile: the latency of each subnet at each batch size, on the device that will serve.

Every round runs each (subnet, batch size) once, in a new order, so that a busy
moment of the machine affects all of them alike. A fit then removes noise that
contradicts two rules: latency grows with the batch size (P1) and with accuracy
(P2). The measured figures stay in the file under "raw".
"""

from __future__ import annotations

import itertools
import platform
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson

from profiles.table import Profile, SubnetProfile, evenly, statistics_path
from superserve.errors import ConfigError
from superserve.files import write_whole
from superserve.roles.version import cpu_name
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from superserve.clock import Clock
    from superserve.subnet import TensorSpec

MIN_ROUNDS = 5
"""Rounds measured even after the budget is spent: a median of fewer means little."""

_WARM_UP_ROUNDS = 3  # the first runs of each shape allocate, and pick kernels
_P99_SAMPLES = 100  # with fewer, a cell's own 99th percentile is just its maximum
_LEAST_SPEED_UP = 0.03  # a less accurate subnet is worth keeping if it is at least this much faster
_SEED = 20250428  # of the order and of the images; dense layers take equally long for any image


class TimedExecutor(Protocol):
    """An executor that can be measured."""

    @property
    def subnets(self) -> tuple[Subnet, ...]:
        """The hosted subnets, by ascending accuracy."""
        ...

    @property
    def input_spec(self) -> TensorSpec:
        """One query's input."""
        ...

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Run `batch` on row `subnet`."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """How to measure.

    Attributes:
        batch_sizes: Ascending.
        rounds: How often each (subnet, batch size) runs.
        budget_ns: Start no further round after this time, once `MIN_ROUNDS` are done; None for no limit.
    """

    batch_sizes: tuple[int, ...]
    rounds: int
    budget_ns: int | None = None

    def __post_init__(self) -> None:
        sizes = list(self.batch_sizes)
        if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
            raise ConfigError(f"batch_sizes: expected ascending sizes of at least 1, got {sizes}")
        if self.rounds < 1:
            raise ConfigError(f"repeats: expected at least 1, got {self.rounds}")


@dataclass(frozen=True, slots=True)
class Place:
    """What the figures depend on: the device in words, and versions."""

    device: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Measurement:
    """A profile and the measurements that it was fitted to.

    Attributes:
        profile: The fitted profile, of the pareto subnets.
        raw: By subnet name, as measured: least, median and p99 milliseconds by batch size.
        dropped: Names of the subnets left out because they are not pareto on this device.
    """

    profile: Profile
    raw: dict[str, dict[str, list[float]]]
    dropped: tuple[str, ...]

    def to_json(self) -> bytes:
        """Return the profile's file, with the measured figures under "raw"."""
        document = {**self.profile.to_dict(), "raw": self.raw}
        return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


@dataclass(frozen=True, slots=True)
class Device:
    """Where a supernet is measured, and how.

    Attributes:
        device: "cpu", "cuda" or `"cuda:<n>"`.
        threads: CPU threads of torch.
        weights: A checkpoint's path, "random", or None for the shipped one.
        precision: Precision to compute in: see `gpu_worker.engines.torch_executor.Placement`.
        uses_graphs: Whether CUDA graphs are captured, as the worker does.
    """

    device: str = "cpu"
    threads: int = 1
    weights: str | None = None
    precision: str = "auto"
    uses_graphs: bool = True


def measure_supernet(
    supernet: str, subnets: Profile, setting: Setting, device: Device, *, name: str, clock: Clock
) -> Measurement:
    """Make a supernet resident and measure it.

    Args:
        supernet: Its name: see `gpu_worker.models.kinds`.
        subnets: A profile of the supernet, searched or measured elsewhere: its subnets and accuracies.
        setting: How to measure.
        device: Where.
        name: Of the new profile.
        clock: Times the runs.

    Raises:
        ConfigError: The supernet or the device is not available, or the subnets belong to another one.
    """
    # torch takes seconds to import, and only this function needs it.
    from gpu_worker.engines.torch_executor import Placement, TorchExecutor  # noqa: PLC0415
    from gpu_worker.models.kinds import RANDOM, supernet_kind  # noqa: PLC0415

    kind = supernet_kind(supernet)
    if subnets.supernet != kind.name:
        raise ConfigError(f"subnets: expected a profile of {kind.name}, got one of {subnets.supernet}")
    placement = Placement(
        device=device.device,
        threads=device.threads,
        batch_sizes=setting.batch_sizes,
        precision=device.precision,
        uses_graphs=device.uses_graphs,
    )
    hosted = [Subnet(row.name, row.control) for row in subnets.subnets]
    # Without statistics: they affect answers, not how long a batch takes.
    executor = TorchExecutor.load(supernet, hosted, weights=device.weights, placement=placement)
    executor.warm_up()
    place = torch_place(device.device, device.threads, executor.precision)
    notes = ["Weights are random: latencies alone are meant."] if device.weights == RANDOM else []
    if kind.lengths is not None:
        notes.append(f"Latencies are of queries of {kind.lengths.longest} tokens, the longest.")
    notes.append(f"Subnets and accuracies are those of {subnets.name}: {subnets.provenance}")
    return measure(
        executor, subnets.subnets, setting, place, name=name, supernet=kind.name, clock=clock, notes=notes
    )


def thinned(profile: Profile, at_most: int | None) -> Profile:
    """Return a profile with `at_most` of its rows, evenly spread, including the first and the last."""
    if at_most is None:
        return profile
    rows = evenly(profile.n_subnets, at_most)
    return replace(profile, subnets=tuple(profile.subnets[row] for row in rows))


def save_measurement(measurement: Measurement, path: Path, subnets: str | Path) -> None:
    """Write a profile to `path`; beside it SubnetNorm's statistics, if `subnets`, its source, has any.

    Args:
        measurement: What to write.
        path: The profile's file.
        subnets: The profile that was measured: a shipped one's name, or a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, measurement.to_json())
    statistics, own = statistics_path(subnets), statistics_path(path)
    if statistics.exists() and statistics != own:
        write_whole(own, statistics.read_bytes())


def measure(
    executor: TimedExecutor,
    subnets: Sequence[SubnetProfile],
    setting: Setting,
    place: Place,
    *,
    name: str,
    supernet: str,
    clock: Clock,
    notes: Sequence[str] = (),
) -> Measurement:
    """Measure `executor` and fit a profile called `name` to the measurements.

    Args:
        executor: Hosts `subnets`, in that order.
        subnets: Their names, control tuples and accuracies, by ascending accuracy; of those equally accurate
            the fastest is kept.
        setting: How to measure.
        place: What the figures depend on.
        name: Of the profile.
        supernet: Whose subnets they are.
        clock: Times the runs.
        notes: Sentences for the provenance.

    Raises:
        ConfigError: No profile can be made of the subnets.
    """
    samples = sample(executor, setting, clock)
    median, p99 = np.median(samples, axis=0), percentile_99(samples)
    rows = told_apart(median, _first_of_equals(subnets, pareto_rows(median)))
    fitted = fit(median[rows])
    fitted_p99 = np.maximum(fit(p99[rows]), fitted)
    profile = Profile(
        name=name,
        supernet=supernet,
        device=place.device,
        source="measured",
        provenance=" ".join([_provenance(len(samples)), *notes]),
        versions=place.versions,
        date=datetime.now(UTC).date().isoformat(),
        batch_sizes=setting.batch_sizes,
        subnets=tuple(map(_subnet_profile, (subnets[row] for row in rows), fitted, fitted_p99)),
    )
    names = [subnet.name for subnet in subnets]
    dropped = tuple(name for row, name in enumerate(names) if row not in rows)
    return Measurement(profile, _raw(names, samples), dropped)


def sample(executor: TimedExecutor, setting: Setting, clock: Clock) -> npt.NDArray[np.int64]:
    """Return the nanoseconds of every run, (rounds, subnets, batch sizes), after a warm-up."""
    rng = np.random.default_rng(_SEED)
    spec = executor.input_spec
    batches = [_batch(rng, (size, *spec.shape), spec.dtype) for size in setting.batch_sizes]
    cells = list(itertools.product(range(len(executor.subnets)), range(len(batches))))
    for _, (row, column) in itertools.product(range(_WARM_UP_ROUNDS), cells):
        executor.execute(row, batches[column])
    rounds: list[npt.NDArray[np.int64]] = []
    started_ns = clock.now_ns()
    while len(rounds) < setting.rounds:
        spent = setting.budget_ns is not None and clock.now_ns() - started_ns >= setting.budget_ns
        if spent and len(rounds) >= MIN_ROUNDS:
            break
        took_ns = np.zeros((len(executor.subnets), len(batches)), dtype=np.int64)
        for row, column in rng.permutation(cells).tolist():
            before_ns = clock.now_ns()
            executor.execute(row, batches[column])
            took_ns[row, column] = clock.now_ns() - before_ns
        rounds.append(took_ns)
    return np.stack(rounds)


def _batch(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Return random queries: numbers around 0, or pixels or tokens in a small range for integer types."""
    if np.issubdtype(np.dtype(dtype), np.integer):
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def percentile_99(samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the 99th percentile of each (subnet, batch size), for samples (rounds, subnets, sizes).

    Below 100 rounds one hiccup would decide a cell's whole tail. Then the tail is that of all cells
    together: as a ratio to their medians or as time beyond them, whichever is less. A stall of the machine
    is as long in each cell: 15 ms are 150 times a median of 0.1 ms, and as a ratio alone they gave another
    cell of 18 ms a p99 of 2.7 s, which no run had taken.
    """
    if len(samples) >= _P99_SAMPLES:
        return np.asarray(np.quantile(samples, 0.99, axis=0))
    median = np.median(samples, axis=0)
    ratio, beyond = np.quantile(samples / median, 0.99), np.quantile(samples - median, 0.99)
    return np.asarray(np.minimum(median * ratio, median + beyond))


def pareto_rows(latency: npt.NDArray[np.float64]) -> list[int]:
    """Return the rows worth keeping of a table (subnets by ascending accuracy, batch sizes).

    A row is dropped if a more accurate one is about as fast, by the geometric mean over
    batch sizes.
    """
    mean_log = np.log(latency).mean(axis=1)
    kept: list[int] = []
    for row in reversed(range(len(latency))):
        if not kept or mean_log[row] < mean_log[kept[-1]] + np.log(1 - _LEAST_SPEED_UP):
            kept.append(row)
    return kept[::-1]


def _first_of_equals(subnets: Sequence[SubnetProfile], rows: Sequence[int]) -> list[int]:
    """Return the rows, by ascending latency, without those that are no more accurate than a faster one."""
    kept: list[int] = []
    for row in rows:
        if not kept or subnets[row].accuracy > subnets[kept[-1]].accuracy:
            kept.append(row)
    return kept


def told_apart(latency: npt.NDArray[np.float64], rows: Sequence[int]) -> list[int]:
    """Return the rows that differ at one batch size at least once the table is fitted, in whole nanoseconds.

    Where noise puts a more accurate subnet before a less accurate one at some sizes, the fit takes their mean
    for both. Of rows that it makes equal the most accurate is kept.
    """
    kept = list(rows)
    while True:
        fitted = np.rint(fit(latency[kept]))
        differ = [*(fitted[1:] != fitted[:-1]).any(axis=1).tolist(), True]
        if all(differ):
            return kept
        kept = [row for row, is_apart in zip(kept, differ, strict=True) if is_apart]


def fit(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the table made monotone along each row and then down each column.

    The second pass does not undo the first: isotonic regression preserves order.
    """
    along = np.stack([isotonic(row) for row in table])
    down = np.stack([isotonic(column) for column in along.T], axis=1)
    # Means of equal pools can differ in the last bit; in a profile they must not.
    return np.asarray(np.maximum.accumulate(np.maximum.accumulate(down, axis=1), axis=0))


def isotonic(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the ascending values nearest in least squares: pool adjacent violators."""
    pools: list[tuple[float, int]] = []  # mean and number of the values pooled
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, n_before = pools.pop()
            mean = (mean * count + before * n_before) / (count + n_before)
            count += n_before
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


def torch_place(device: str, threads: int, precision: str = "float32") -> Place:
    """Return what torch's latencies on this machine depend on."""
    import torch  # noqa: PLC0415  slow to import, and only measuring needs it

    if torch.device(device).type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        words = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    if precision != "float32":
        words += f", {precision}"
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return Place(words, versions)


def _provenance(rounds: int) -> str:
    tail = (
        "p99 is each cell's own"
        if rounds >= _P99_SAMPLES
        else "p99 is the 99th percentile of all cells, as a ratio to their medians or as time beyond them, "
        "whichever is less"
    )
    return (
        f"Measured by profiles.measure: {rounds} interleaved rounds after a warm-up; {tail}; both made "
        "monotone in batch size and accuracy by isotonic regression. The measured figures are under raw."
    )


def _subnet_profile(
    subnet: SubnetProfile, median: npt.NDArray[np.float64], p99: npt.NDArray[np.float64]
) -> SubnetProfile:
    return replace(
        subnet, latency_ns=tuple(map(round, median.tolist())), latency_p99_ns=tuple(map(round, p99.tolist()))
    )


def _raw(names: Sequence[str], samples: npt.NDArray[np.int64]) -> dict[str, dict[str, list[float]]]:
    figures = {
        "min_ms": samples.min(axis=0),
        "median_ms": np.median(samples, axis=0),
        "p99_ms": np.quantile(samples, 0.99, axis=0),
    }
    return {
        name: {key: (table[row] / 1e6).round(6).tolist() for key, table in figures.items()}
        for row, name in enumerate(names)
    }
