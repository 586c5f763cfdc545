"""What emulated GPUs ran and when, in a form that a checker can prove possible.

One file for each worker process:

    magic, schema, blob length    12 bytes, little endian
    JSON                          worker, profile, batch_sizes, latency_ns, pace
    records                       32 bytes a batch, in the order the batches ended

Instants are the writing process's own monotonic clock: compare them within a file, never
between files. The header contains the profile's table, so that a log can be checked without
the profile. A worker that is killed in the middle of a write leaves a file that is read up
to its last whole record.

    python -m gpu_worker.serve.eventlog FILE...    prints the report, exits 1 on violations
"""

from __future__ import annotations

import contextlib
import logging
import struct
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
import orjson

from gpu_worker.core.played import AS_PROFILED, Pace
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.fields import read_file
from superserve.files import write_all
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

log = logging.getLogger("gpu_worker")

SCHEMA = 1
"""Version of the file format."""

RECORD = np.dtype(
    [
        ("batch_id", "<u8"),
        ("started_ns", "<i8"),
        ("ended_ns", "<i8"),
        ("gpu", "<u4"),
        ("subnet", "<u2"),
        ("batch_size", "<u2"),
    ]
)
"""One batch; 32 bytes."""

_PACK = struct.Struct("<QqqIHH").pack  # the same 32 bytes, without the cost of an array
_PREFIX = struct.Struct("<4sHxxI")
_MAGIC = b"SSEL"
_FLUSH_BYTES = 4_096 * RECORD.itemsize  # 128 KiB: about 50 us of page cache every 4,096 batches
_MAX_EXAMPLES = 5  # of each kind of violation in each file; the rest are counted


@dataclass(frozen=True, slots=True)
class EventLogHeader:
    """The worker of a log, and the profile that its GPUs follow.

    Attributes:
        worker: The worker process's name.
        profile: The profile's name.
        batch_sizes: Profiled batch sizes, ascending, shape (n_sizes,).
        latency_ns: Median latency, shape (n_subnets, n_sizes).
        pace: How fast its GPUs are compared with that, by the file's clock.
    """

    worker: str
    profile: str
    batch_sizes: tuple[int, ...]
    latency_ns: tuple[tuple[int, ...], ...]
    pace: Pace = AS_PROFILED

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise ConfigError(f"batch_sizes: expected ascending integers of at least 1, got {sizes}")
        for subnet, row in enumerate(self.latency_ns):
            if len(row) != len(sizes) or not 0 <= min(row) <= max(row) < 2**63:
                expected = f"{len(sizes)} integers of 0 to 2^63 - 1"
                raise ConfigError(f"latency_ns[{subnet}]: expected {expected}, got {row}")


class EventLogWriter:
    """Writes one worker process's log; for one thread.

    As a context manager: entering creates the file (and replaces one of the same name, so a
    restarted worker needs another path), leaving writes the rest. Up to 4,096 batches wait in
    memory; a killed worker loses them.

    Args:
        path: The file to create.
        header: Written before the records.
    """

    __slots__ = ("_buffer", "_file", "_has_records", "_header", "_is_new", "_path")

    def __init__(self, path: Path, header: EventLogHeader) -> None:
        self._path = path
        self._header = header
        self._buffer = bytearray()
        self._file: IO[bytes] | None = None
        self._is_new = not path.exists()
        self._has_records = False

    def open(self) -> None:
        """Create the file and write its header.

        Raises:
            ConfigError: The file cannot be created.
        """
        try:
            self._file = self._path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigError(f"{self._path}: expected a path that can be written: {error}") from error
        # By asdict: orjson reads a dataclass's memory, and a compiled one has another layout.
        blob = orjson.dumps(self._header, default=asdict, option=orjson.OPT_PASSTHROUGH_DATACLASS)
        self._buffer += _PREFIX.pack(_MAGIC, SCHEMA, len(blob)) + blob
        self.flush()

    def add(
        self, gpu: int, batch_id: int, subnet: int, batch_size: int, started_ns: int, ended_ns: int
    ) -> None:
        """Record that `gpu` ran a batch of `batch_size` queries on `subnet` between two instants.

        Args:
            gpu: The emulated GPU's number within this process.
            batch_id: The router's number for the batch.
            subnet: Row of the profile.
            batch_size: Queries in it, before padding.
            started_ns: Instant at which it began, on this process's monotonic clock.
            ended_ns: Instant at which it ended, on the same clock.
        """
        # Packed at once: converting thousands of tuples to an array would stall the worker for
        # milliseconds whenever the buffer is full.
        if self._file is None:
            return
        self._has_records = True
        self._buffer += _PACK(batch_id, started_ns, ended_ns, gpu, subnet, batch_size)
        if len(self._buffer) >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Pass all records so far to the operating system.

        If it takes no more, as on a full disk, the log ends there, and the worker goes on.
        """
        file = self._file
        if file is None:
            return
        try:
            write_all(file, self._buffer)
        except OSError as error:
            log.error("%s: the event log ends here: %s", self._path, error.strerror)
            self._file = None
            with contextlib.suppress(OSError):
                if self._is_new and file.tell() == 0:
                    self._path.unlink()  # not even its header: an empty file is no log
            file.close()
        self._buffer.clear()

    def close(self) -> None:
        """Write the rest and close the file; do nothing if it is closed."""
        if self._file is None:
            return
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._is_new and not self._has_records and isinstance(error, ConfigError):
            with contextlib.suppress(OSError):  # it was never to serve: a header alone is no log
                self._path.unlink()


def read_log(path: Path) -> tuple[EventLogHeader, npt.NDArray[np.void]]:
    """Read a log up to its last whole record.

    Returns:
        The header, and the records (dtype `RECORD`, shape (n_batches,), read-only).

    Raises:
        ConfigError: Not an event log, or of another schema; the error names file and field.
    """
    try:
        data = path.read_bytes()
        header, offset = _decode_header(data)
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable event log: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    n_records = (len(data) - offset) // RECORD.itemsize
    return header, np.frombuffer(data, dtype=RECORD, count=n_records, offset=offset)


def _decode_header(data: bytes) -> tuple[EventLogHeader, int]:
    """Return the header and the offset of the records."""
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise ConfigError(f"expected an event log, which begins with {_MAGIC!r}, got {data[:12]!r}")
    _, schema, blob_length = _PREFIX.unpack_from(data)
    if schema != SCHEMA:
        raise ConfigError(f"schema: expected {SCHEMA}, got {schema}")
    offset = _PREFIX.size + blob_length
    if len(data) < offset:
        raise ConfigError(f"expected a header of {offset} bytes, got {len(data)}")
    try:
        fields = orjson.loads(data[_PREFIX.size : offset])
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"header: expected JSON: {error}") from error
    return read_file(EventLogHeader, fields, ""), offset


@dataclass(frozen=True, slots=True)
class EventLogReport:
    """What the checked logs contain, and what no real GPU could have done.

    Attributes:
        n_logs: Files checked.
        n_gpus: GPUs that ran at least one batch.
        n_batches: Batches run.
        n_queries: Queries in them.
        busy_ns: Time spent running batches, summed over GPUs.
        idle_ns: Time between a GPU's batches, summed over GPUs; not the time before
            its first or after its last one.
        idle_p50_ns: Median gap between two batches of a GPU; None if there is no gap.
        idle_p99_ns: 99th percentile of these gaps.
        busy_share: busy / (busy + idle); None without batches.
        n_violations: How often a rule is broken.
        violations: Sentences naming file, GPU and batches: the first few of each kind
            in each file, then how many more. Empty if every rule holds.
    """

    n_logs: int
    n_gpus: int
    n_batches: int
    n_queries: int
    busy_ns: int
    idle_ns: int
    idle_p50_ns: int | None
    idle_p99_ns: int | None
    busy_share: float | None
    n_violations: int
    violations: tuple[str, ...]

    def to_text(self) -> str:
        """Return the report as lines for a person to read."""
        share = "-" if self.busy_share is None else f"{self.busy_share:.2%}"
        gaps = f"idle gap p50 {_in_ms(self.idle_p50_ns)}, p99 {_in_ms(self.idle_p99_ns)}"
        lines = [
            f"{self.n_logs} logs, {self.n_gpus} GPUs, {self.n_batches} batches, {self.n_queries} queries",
            f"busy {share} between first and last batch; {gaps}",
            f"{self.n_violations} violations" if self.violations else "no violations",
        ]
        return "\n".join([*lines, *self.violations])


def _in_ms(duration_ns: int | None) -> str:
    return "-" if duration_ns is None else f"{duration_ns / MS:.3f} ms"


def check_logs(paths: Sequence[Path]) -> EventLogReport:
    """Check that what the logs record is possible on real GPUs.

    The rules: every batch ends after it starts; no GPU begins a batch before the last
    one ended; no batch is faster than the profiled median of its subnet at the next
    profiled batch size, at the pace in the log's header; no batch ran twice, on any GPU.
    Check the logs of one life of the router together: another router numbers its batches
    from 1 again.

    Raises:
        ConfigError: A file is not an event log; the error names the file and what was expected.
    """
    logs = [_Log(path, *read_log(path)) for path in paths]
    found = [violation for log in logs for violation in log.violations()]
    found += _repeated_batches(logs)
    return replace(
        _measure(logs),
        n_violations=sum(len(kind) for kind in found),
        violations=tuple(sentence for kind in found for sentence in kind.sentences()),
    )


@dataclass(frozen=True, slots=True)
class _Violations:
    """All violations of one kind in one file; `describe(i)` describes the i-th."""

    where: str
    what: str
    indices: npt.NDArray[np.intp]
    describe: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.indices)

    def sentences(self) -> Iterator[str]:
        for index in self.indices[:_MAX_EXAMPLES]:
            yield self.describe(int(index))
        if len(self) > _MAX_EXAMPLES:
            yield f"{self.where}: and {len(self) - _MAX_EXAMPLES} more that {self.what}"


class _Log:
    """One file's records, in order of GPU and start."""

    def __init__(self, path: Path, header: EventLogHeader, records: npt.NDArray[np.void]) -> None:
        order = np.lexsort((records["ended_ns"], records["started_ns"], records["gpu"]))
        self.path = path
        self.header = header
        self.records = records[order]
        self.gaps_ns, self.is_first = _gaps_ns(self.records)

    def violations(self) -> list[_Violations]:
        kinds = [self._backwards(), self._overlapping(), self._unprofiled(), self._too_quick()]
        return [kind for kind in kinds if len(kind)]

    def name(self, index: int) -> str:
        record = self.records[index]
        return f"{self.path}: gpu {record['gpu']}: batch {record['batch_id']}"

    def _kind(self, what: str, broken: npt.NDArray[np.bool_], describe: Callable[[int], str]) -> _Violations:
        return _Violations(str(self.path), what, np.flatnonzero(broken), describe)

    def _backwards(self) -> _Violations:
        lasted_ns = self.records["ended_ns"] - self.records["started_ns"]
        return self._kind(
            "do not end after they start",
            lasted_ns <= 0,
            lambda i: f"{self.name(i)} ended {lasted_ns[i]} ns after it started, expected more than 0",
        )

    def _overlapping(self) -> _Violations:
        return self._kind(
            "start before the GPU is free",
            ~self.is_first & (self.gaps_ns < 0),
            lambda i: f"{self.name(i)} started {-self.gaps_ns[i]} ns before the GPU was free",
        )

    def _unprofiled(self) -> _Violations:
        return self._kind(
            "are not in the profile",
            ~self._is_profiled(),
            lambda i: (
                f"{self.name(i)} has subnet {self.records['subnet'][i]} and size"
                f" {self.records['batch_size'][i]}, expected a subnet under {len(self.header.latency_ns)}"
                f" and a size of 1 to {self.header.batch_sizes[-1]}"
            ),
        )

    def _too_quick(self) -> _Violations:
        lasted_ns = self.records["ended_ns"] - self.records["started_ns"]
        least_ns = self._profiled_ns()
        return self._kind(
            "are quicker than the profile",
            # A batch that ends before it starts is reported once, above.
            (lasted_ns > 0) & (lasted_ns < least_ns),
            lambda i: (
                f"{self.name(i)} (subnet {self.records['subnet'][i]}, size {self.records['batch_size'][i]})"
                f" took {lasted_ns[i]} ns, expected at least {least_ns[i]}"
            ),
        )

    def _is_profiled(self) -> npt.NDArray[np.bool_]:
        sizes = self.records["batch_size"]
        known: npt.NDArray[np.bool_] = (
            (sizes >= 1)
            & (sizes <= self.header.batch_sizes[-1])
            & (self.records["subnet"] < len(self.header.latency_ns))
        )
        return known

    def _profiled_ns(self) -> npt.NDArray[np.int64]:
        """Return each batch's latency at the next profiled size and the GPU's pace; 0 if it has none."""
        known = self._is_profiled()
        least_ns = np.zeros(len(self.records), dtype=np.int64)
        if known.any():
            table = np.array(self.header.latency_ns, dtype=np.int64)  # (n_subnets, n_sizes)
            columns = np.searchsorted(self.header.batch_sizes, self.records["batch_size"][known], side="left")
            profiled_ns = table[self.records["subnet"][known], columns]
            least_ns[known] = self._at_pace(profiled_ns, self.records["started_ns"][known])
        return least_ns

    def _at_pace(
        self, profiled_ns: npt.NDArray[np.int64], started_ns: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return what batches of these profiled latencies take that start at these instants."""
        pace = self.header.pace
        if pace.drift == 0.0 and pace.speed == 1.0:
            return profiled_ns
        # In Python integers and floats, as the GPU computed it: not a nanosecond may differ.
        pairs = zip(profiled_ns.tolist(), started_ns.tolist(), strict=True)
        return np.array([int(one_ns * pace.slowness(at_ns)) for one_ns, at_ns in pairs], np.int64)


def _gaps_ns(records: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the idle time before each batch (negative: an overlap) and which are a GPU's first."""
    is_first = np.ones(len(records), dtype=np.bool_)
    is_first[1:] = records["gpu"][1:] != records["gpu"][:-1]
    gaps_ns = np.zeros(len(records), dtype=np.int64)
    bounds = [*np.flatnonzero(is_first), len(records)]
    for begin, end in pairwise(bounds):
        # The latest end so far, not the last one: a batch may lie within a longer one.
        free_ns = np.maximum.accumulate(records["ended_ns"][begin : end - 1])
        gaps_ns[begin + 1 : end] = records["started_ns"][begin + 1 : end] - free_ns
    return gaps_ns, is_first


def _repeated_batches(logs: Sequence[_Log]) -> list[_Violations]:
    batch_ids = _concatenate([log.records["batch_id"] for log in logs], np.uint64)
    ends = np.cumsum([len(log.records) for log in logs])
    order = np.argsort(batch_ids, kind="stable")
    is_repeat = batch_ids[order][1:] == batch_ids[order][:-1]
    repeats, earlier = order[1:][is_repeat], order[:-1][is_repeat]

    def place(index: int) -> str:
        log = int(np.searchsorted(ends, index, side="right"))
        return logs[log].name(index - int(ends[log]))  # from the log's end: negative

    def describe(index: int) -> str:
        return f"{place(int(repeats[index]))} is also {place(int(earlier[index]))}"

    found = _Violations("all logs", "ran twice", np.arange(len(repeats)), describe)
    return [found] if len(found) else []


def _measure(logs: Sequence[_Log]) -> EventLogReport:
    """Return the report's figures, without violations."""
    gaps_ns = _concatenate([np.maximum(log.gaps_ns[~log.is_first], 0) for log in logs], np.int64)
    busy_ns = sum(int((log.records["ended_ns"] - log.records["started_ns"]).sum()) for log in logs)
    idle_ns = int(gaps_ns.sum())
    return EventLogReport(
        n_logs=len(logs),
        n_gpus=sum(int(log.is_first.sum()) for log in logs),
        n_batches=sum(len(log.records) for log in logs),
        n_queries=sum(int(log.records["batch_size"].sum(dtype=np.int64)) for log in logs),
        busy_ns=busy_ns,
        idle_ns=idle_ns,
        idle_p50_ns=_quantile(gaps_ns, 50),
        idle_p99_ns=_quantile(gaps_ns, 99),
        busy_share=busy_ns / (busy_ns + idle_ns) if busy_ns + idle_ns else None,
        n_violations=0,
        violations=(),
    )


def _concatenate(arrays: list[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays])


def _quantile(values: npt.NDArray[np.int64], percent: int) -> int | None:
    """Return the smallest value that `percent` % of the values do not exceed."""
    if not len(values):
        return None
    rank = -(-len(values) * percent // 100)
    return int(np.partition(values, rank - 1)[rank - 1])


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.pass_context
@plain_errors()
def cli(context: click.Context, files: tuple[Path, ...]) -> None:
    """Check the event logs FILES of one run; exit 1 if a GPU did the impossible."""
    report = check_logs(files)
    click.echo(report.to_text())
    context.exit(1 if report.violations else 0)


if __name__ == "__main__":
    cli(prog_name="python -m gpu_worker.serve.eventlog")
