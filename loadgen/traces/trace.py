r"""A trace: when each query of a run is due. Made from a spec, read from a file, scaled, saved.

A saved trace is a short text header and one gap per query:

    SuperServe-trace 1\n
    {"name": "..", "provenance": "..", "duration_ns": .., "n": .., "gap_bytes": 4}\n
    n unsigned little-endian integers of gap_bytes bytes each

A gap is the time in nanoseconds from the query before (of the first, from the start) until the
query is due. `gap_bytes` is 4 when all gaps are below 2**32 ns (4.3 s), else 8. The number on the
first line is the format's version. The file is gzipped if its name ends in .gz.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson

from loadgen.traces import azure
from loadgen.traces.arrivals import (
    MAX_ARRIVALS,
    MAX_DURATION_S,
    MAX_RATE_QPS,
    arrivals_cv2,
    check_positive,
    from_counts,
    from_shape,
    to_ns,
)
from loadgen.traces.specs import KEYS, Spec, is_spec, nearest, parse_spec
from superserve.clock import SECOND
from superserve.errors import TraceError
from superserve.files import write_whole

MAX_FILE_BYTES = 1 << 31
"""The longest file that is read, uncompressed: 2 GiB. The longest published one, of 2021, has 0.3."""

_MAGIC = b"SuperServe-trace "
_VERSION = b"1"
_GZIP_MAGIC = b"\x1f\x8b"
_MINUTE_S = 60
_BLOCK = 1 << 16  # integers at once: 2 MB


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The instants at which the queries of a run are due.

    Attributes:
        name: The trace's name in reports.
        due_ns: Ascending nanoseconds after the start, each in [0, duration_ns), shape (n_queries,).
        duration_ns: Length of the trace.
        provenance: Where the arrivals come from and what was changed, in words.

    Raises:
        TraceError: A field is invalid, or there are no queries.
    """

    name: str
    due_ns: npt.NDArray[np.int64]
    duration_ns: int
    provenance: str

    def __post_init__(self) -> None:
        due_ns = self.due_ns
        if due_ns.ndim != 1 or due_ns.dtype != np.int64:
            raise TraceError(f"{self.name}: due_ns: expected int64 of shape (n_queries,)")
        if not 1 <= self.duration_ns <= MAX_DURATION_S * SECOND:
            raise TraceError(
                f"{self.name}: duration_ns: expected 1 ns to {MAX_DURATION_S:.12g} s, got {self.duration_ns}"
            )
        if not due_ns.size:
            raise TraceError(
                f"{self.name}: no queries in {self.duration_ns / SECOND:.6g} s: expected one at least"
            )
        if due_ns[0] < 0 or due_ns[-1] >= self.duration_ns or (due_ns[1:] < due_ns[:-1]).any():
            raise TraceError(f"{self.name}: due_ns: expected ascending instants in [0, {self.duration_ns})")

    @property
    def n(self) -> int:
        """Return the number of queries."""
        return int(self.due_ns.size)

    @property
    def mean_qps(self) -> float:
        """Return the queries per second over the whole duration."""
        return self.n * SECOND / self.duration_ns

    @property
    def cv2(self) -> float | None:
        """Return the CV² of the gaps between queries; see `loadgen.results.result.arrivals_cv2`."""
        return arrivals_cv2(self.due_ns)

    def peak_qps(self, window_s: float = 1.0) -> float:
        """Return the highest rate over any stretch of `window_s`, wherever it starts.

        A window longer than the trace is cut to its length.
        """
        window_ns = min(to_ns("window_s", window_s), self.duration_ns)
        # The fullest window starts at a query: moving its start to the next query loses none.
        after = np.searchsorted(self.due_ns, self.due_ns + window_ns)
        return int((after - np.arange(self.n)).max()) * SECOND / window_ns

    def scaled(self, *, rate_qps: float | None = None, duration_s: float | None = None) -> Trace:
        """Return the trace at another mean rate, or its beginning, or both.

        With `rate_qps` time is squeezed or stretched, so the shape and the CV² stay; queries are
        never thinned out or repeated. With `duration_s` alone the trace is cut there. With both,
        the first round(rate_qps * duration_s) queries are fitted to `duration_s`.

        Raises:
            TraceError: An argument is out of range, or the trace contains less than was requested.
        """
        if rate_qps is not None:
            return self._squeezed(check_positive("rate_qps", rate_qps, at_most=MAX_RATE_QPS), duration_s)
        return self if duration_s is None else self._cut(duration_s)

    def windowed(self, start_s: float, end_s: float | None = None) -> Trace:
        """Return the part that is due from `start_s` on and before `end_s` (by default, the end), as a trace.

        Raises:
            TraceError: The window is empty, or not within the trace.
        """
        length_s = self.duration_ns / SECOND
        end_s = length_s if end_s is None else end_s
        if not 0 <= start_s < end_s <= length_s:
            raise TraceError(
                f"{self.name}: expected a window within 0 to {length_s:.9g} s,"
                f" got {start_s:.9g} to {end_s:.9g}"
            )
        start_ns, end_ns = round(start_s * SECOND), round(end_s * SECOND)
        low, high = np.searchsorted(self.due_ns, (start_ns, end_ns))
        done = f"{self.provenance}; from {start_s:.9g} s to {end_s:.9g} s"
        return Trace(self.name, self.due_ns[low:high] - start_ns, end_ns - start_ns, done)

    def fitted(self, duration_s: float) -> Trace:
        """Return all queries of the trace in `duration_s`: every gap multiplied by the same factor.

        Raises:
            TraceError: The duration is out of range.
        """
        duration_ns = to_ns("duration_s", duration_s)
        due_ns = _times(self.due_ns, duration_ns, self.duration_ns)
        done = f"all {self.duration_ns / SECOND:.9g} s fitted to {duration_s:.9g} s"
        return Trace(self.name, due_ns, duration_ns, f"{self.provenance}; {done}")

    def save(self, path: Path) -> None:
        """Write the trace to `path`, in the format described in the module's docstring.

        Equal traces give equal files, gzipped ones as well.

        Raises:
            TraceError: The file cannot be written.
        """
        gaps_ns = np.diff(self.due_ns, prepend=0)
        gap_bytes = 4 if int(gaps_ns.max()) < 1 << 32 else 8
        header = {
            "name": self.name,
            "provenance": self.provenance,
            "duration_ns": self.duration_ns,
            "n": self.n,
            "gap_bytes": gap_bytes,
        }
        lines = _MAGIC + _VERSION + b"\n" + orjson.dumps(header) + b"\n"
        data = lines + gaps_ns.astype(f"<u{gap_bytes}").tobytes()
        try:
            write_whole(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        except OSError as error:
            raise TraceError(f"{path}: cannot be written: {error.strerror}") from error

    def _cut(self, duration_s: float) -> Trace:
        """Return the trace's first `duration_s`."""
        duration_ns = to_ns("duration_s", duration_s)
        if duration_ns > self.duration_ns:
            raise TraceError(
                f"{self.name}: expected duration_s of at most {self.duration_ns / SECOND:.9g}"
                f" ({self.n} queries), got {duration_s:.9g}"
            )
        due_ns = self.due_ns[: np.searchsorted(self.due_ns, duration_ns)]
        return Trace(self.name, due_ns, duration_ns, f"{self.provenance}; cut to {duration_s:.9g} s")

    def _squeezed(self, rate_qps: float, duration_s: float | None) -> Trace:
        """Return the first queries, as many as the rate gives in `duration_s` (or all), fitted to it."""
        if duration_s is None:
            n, duration_ns = self.n, to_ns("duration_s", self.n / rate_qps)
        else:
            n, duration_ns = round(rate_qps * duration_s), to_ns("duration_s", duration_s)
        if not 1 <= n <= self.n:
            raise TraceError(
                f"{self.name}: expected rate_qps times duration_s to be 1 to {self.n} queries, which is what"
                f" the trace holds ({self.mean_qps:.6g} q/s for {self.duration_ns / SECOND:.6g} s), got {n}"
            )
        # The used queries end where the next one arrives.
        end_ns = int(self.due_ns[n]) if n < self.n else self.duration_ns
        if end_ns == 0:
            raise TraceError(f"{self.name}: the first {n + 1} queries are due at once: expected a later one")
        due_ns = (self.due_ns[:n] * (duration_ns / end_ns)).astype(np.int64)
        # A query that is due at the same instant as that next one would be at the end.
        np.minimum(due_ns, duration_ns - 1, out=due_ns)
        done = (
            f"the first {n} of {self.n} queries, {end_ns / SECOND:.9g} s, "
            f"fitted to {duration_ns / SECOND:.9g} s for a mean of {rate_qps:.9g} q/s"
        )
        return Trace(self.name, due_ns, duration_ns, f"{self.provenance}; {done}")


Source: TypeAlias = Spec | azure.MinuteCounts | azure.Invocations | Trace
"""What a trace can be made from."""


def load_trace(
    spec: str,
    *,
    rate_qps: float | None = None,
    duration_s: float | None = None,
    seed: int = 0,
    start_minute: int | None = None,
    minutes: int | None = None,
) -> Trace:
    """Return the trace that `spec` names, at the requested rate and duration.

    A spec of `loadgen.traces.specs` is drawn for `duration_s`, by default `accel`'s ramp, which no other
    spec has. `rate_qps` multiplies all its rates, and the tau of `accel`, so that the expected mean
    is `rate_qps`; it is also used for a missing `rate`.

    A Functions 2019 file counts invocations per minute; they are summed over its functions. The whole
    window is squeezed into `duration_s` (by default, real time), each minute into an equal part.
    Without `rate_qps` every minute has exactly its recorded count. With it, the total is exactly
    round(rate_qps * duration_s), split over the minutes by a multinomial draw in proportion to
    their counts. The file does not record when within its minute an invocation arrived: positions
    are drawn uniformly at random. So arrivals are a Poisson process whose rate is constant within a
    minute, conditioned on its counts or total; bursts shorter than a minute occur only by chance, and
    a real workload's may have been sharper.

    A Functions 2021, LLM inference 2023 or saved file has its own instants: see `Trace.scaled`.

    Args:
        spec: A path (gzipped or not), or a spec like `bursty:base=1500,variant=5550,cv2=8`.
        rate_qps: Mean rate; by default the trace's own.
        duration_s: Length; by default the trace's own.
        seed: Of everything random, at least 0. Equal arguments give equal traces.
        start_minute: First minute to use, as numbered in a Functions 2019 file's header.
        minutes: Number of minutes to use, of a Functions 2019 file.

    Raises:
        TraceError: The file or spec is invalid, or does not contain what was requested.
    """
    source = open_source(spec, rate_qps=rate_qps)
    if start_minute is not None or minutes is not None:
        if not isinstance(source, azure.MinuteCounts):
            raise TraceError(
                f"trace {spec!r}: start_minute and minutes: only Functions 2019 counts by minute"
            )
        source = source.window(start_minute, minutes, source=spec)
    return trace_of(source, spec, rate_qps=rate_qps, duration_s=duration_s, seed=seed)


def open_source(spec: str, *, rate_qps: float | None = None, functions: str | None = None) -> Source:
    """Return the source that `spec` names: a process to draw from, minute counts, or recorded arrivals.

    Args:
        spec: As `load_trace` takes it.
        rate_qps: Used for a missing `rate` of a spec.
        functions: The functions to use of an Azure Functions file, as `loadgen.traces.azure_functions`
            reads them.

    Raises:
        TraceError: The file or spec is invalid, or has no such functions.
    """
    if rate_qps is not None:
        check_positive("rate_qps", rate_qps, at_most=MAX_RATE_QPS)
    if is_spec(spec):
        _check_no_functions(spec, functions)
        return parse_spec(spec, rate_qps=rate_qps)
    data = _read(Path(spec))
    if data.startswith(_MAGIC):
        _check_no_functions(spec, functions)
        return _decoded(data, spec)
    return azure.parse(data, source=spec, functions=functions)


def trace_of(
    source: Source,
    spec: str,
    *,
    rate_qps: float | None = None,
    duration_s: float | None = None,
    seed: int = 0,
) -> Trace:
    """Return the trace of a source that `open_source` found for `spec`; see `load_trace` for the rest.

    Raises:
        TraceError: It does not contain what was requested.
    """
    if rate_qps is not None:
        check_positive("rate_qps", rate_qps, at_most=MAX_RATE_QPS)
    if duration_s is not None:
        to_ns("duration_s", duration_s)
    if seed < 0:
        raise TraceError(f"seed: expected an integer of at least 0, got {seed}")
    if isinstance(source, Spec):
        return _drawn(source, rate_qps, duration_s, seed)
    if isinstance(source, azure.MinuteCounts):
        return _filled(source, Path(spec), rate_qps, duration_s, seed)
    if isinstance(source, azure.Invocations):
        source = _recorded(source, Path(spec))
    return source.scaled(rate_qps=rate_qps, duration_s=duration_s)


def _recorded(found: azure.Invocations, path: Path) -> Trace:
    """Return the trace of recorded arrivals."""
    functions = "" if found.functions is None else f"{found.functions.n} functions, "
    provenance = f"{found.origin}: {path.name}, {functions}{found.due_ns.size} recorded arrivals"
    return Trace(_stem(path), found.due_ns, found.duration_ns, provenance)


def _drawn(spec: Spec, rate_qps: float | None, duration_s: float | None, seed: int) -> Trace:
    """Return a spec's trace."""
    duration_s = spec.implied_s() if duration_s is None else duration_s
    if duration_s is None:
        raise TraceError(f"trace {spec}: duration_s is missing: expected a number of seconds")
    duration_ns = to_ns("duration_s", duration_s)
    if rate_qps is not None:
        spec = spec.at_mean(rate_qps, duration_s)
    due_ns = spec.draw(duration_s=duration_s, seed=seed)
    provenance = f"synthetic, not recorded: {spec} for {duration_s:.9g} s, seed {seed}"
    return Trace(str(spec), due_ns, duration_ns, provenance)


def _filled(
    found: azure.MinuteCounts, path: Path, rate_qps: float | None, duration_s: float | None, seed: int
) -> Trace:
    """Return the trace of a window of minute counts."""
    if not found.counts.any():
        raise TraceError(f"{path}: no invocations in minutes {found.first_minute} to {found.last_minute}")
    if duration_s is None:
        duration_s = float(found.counts.size * _MINUTE_S)
    if rate_qps is None:
        due_ns = from_counts(found.counts, duration_s=duration_s, seed=seed)
        totals = "the recorded count of each minute"
    else:
        shape = found.counts.astype(np.float64)
        due_ns = from_shape(shape, rate_qps=rate_qps, duration_s=duration_s, seed=seed)
        totals = f"{due_ns.size} queries for a mean of {rate_qps:.9g} q/s, split over the minutes at random"
    provenance = (
        f"{found.origin}: {path.name}, {found.n_functions} functions, "
        f"minutes {found.first_minute} to {found.last_minute}, "
        f"{int(found.counts.sum())} recorded invocations, squeezed into {duration_s:.9g} s; {totals}; "
        f"positions within a minute, which are not recorded, uniform at random, seed {seed}"
    )
    return Trace(_stem(path), due_ns, to_ns("duration_s", duration_s), provenance)


def _check_no_functions(spec: str, functions: str | None) -> None:
    """Raise TraceError if functions are requested from a trace that has none."""
    if functions is not None:
        raise TraceError(f"trace {spec!r}: functions: only a file of Azure Functions 2019 or 2021 has any")


def _times(ns: npt.NDArray[np.int64], numerator: int, denominator: int) -> npt.NDArray[np.int64]:
    """Return floor(ns * numerator / denominator), shape (n,).

    In Python integers, because the products exceed int64, and floats would move a query that is due on
    the edge of a bin into the bin before. In blocks, because each integer takes 32 bytes.
    """
    scaled = np.empty_like(ns)
    for low in range(0, ns.size, _BLOCK):
        block = ns[low : low + _BLOCK].astype(object)
        scaled[low : low + _BLOCK] = block * numerator // denominator
    return scaled


def _stem(path: Path) -> str:
    """Return the file's name without its suffixes."""
    return path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".txt")


def _read(path: Path) -> bytes:
    """Return the file's bytes, uncompressed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if data.startswith(_GZIP_MAGIC):
            with gzip.open(path) as unzipped:
                data = unzipped.read(MAX_FILE_BYTES + 1)
        elif path.suffix == ".gz":
            raise TraceError(f"{path}: expected a gzip file, as its name says, got {data[:16]!r}")
    except FileNotFoundError:
        hint = nearest(str(path), tuple(KEYS))
        raise TraceError(
            f"{path}: no such file: expected a trace file, or a spec such as poisson:rate=100{hint}"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: expected a whole gzip file: {error}") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise TraceError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, uncompressed")
    return data


def _decoded(data: bytes, source: str) -> Trace:
    """Return a saved trace."""
    version, _, rest = data.removeprefix(_MAGIC).partition(b"\n")
    if version != _VERSION:
        raise TraceError(f"{source}: line 1: expected format version 1, got {version[:20]!r}")
    line, _, body = rest.partition(b"\n")
    header = _header(line, source)
    n, gap_bytes = header["n"], header["gap_bytes"]
    if gap_bytes not in (4, 8):
        raise TraceError(f"{source}: line 2: gap_bytes: expected 4 or 8, got {gap_bytes}")
    if not 1 <= n <= MAX_ARRIVALS:
        raise TraceError(f"{source}: line 2: n: expected 1 to {MAX_ARRIVALS}, got {n}")
    if len(body) != n * gap_bytes:
        raise TraceError(f"{source}: expected {n * gap_bytes} bytes of gaps, got {len(body)}: cut short?")
    # A gap beyond int64 becomes negative, and then the trace is not ascending.
    gaps_ns = np.frombuffer(body, dtype=f"<u{gap_bytes}").astype(np.int64)
    try:
        return Trace(header["name"], np.cumsum(gaps_ns), header["duration_ns"], header["provenance"])
    except TraceError as error:
        raise TraceError(f"{source}: {error}") from None


def _header(line: bytes, source: str) -> dict[str, Any]:
    """Return a saved trace's header, each field of its type."""
    try:
        header = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise TraceError(f"{source}: line 2: expected a JSON object: {error}") from None
    types = {"name": str, "provenance": str, "duration_ns": int, "n": int, "gap_bytes": int}
    if not isinstance(header, dict) or header.keys() != types.keys():
        raise TraceError(f"{source}: line 2: expected an object of {', '.join(types)}")
    for field, kind in types.items():
        if type(header[field]) is not kind:
            raise TraceError(f"{source}: line 2: {field}: expected {kind.__name__}, got {header[field]!r}")
    return header
