"""Readers of the Azure Public Dataset's traces, each recognised by its header line.

    Functions 2019 ("MAF")   HashOwner,HashApp,HashFunction,Trigger,<minute>,<minute>,...
                             one row per function: its invocations in each minute of the day;
                             rows of one owner, application and function are summed
    Functions 2021           app,func,end_timestamp,duration
                             one row per invocation, which arrived at end_timestamp - duration
    LLM inference 2023/2024  TIMESTAMP,ContextTokens,GeneratedTokens
                             one row per request, to 100 ns; a time zone is optional, UTC by default

Lines end in LF or CRLF. Files of one format may be joined by `cat`, each with its header: whole days
of 2019 then follow one another, and the rows of the others, which have absolute instants, are combined.
Every row is checked completely, including the columns that are not used, and the first fault is a TraceError
that names file, line and column. Columns are numbered from 1, as in a spreadsheet.

Source: https://github.com/Azure/AzurePublicDataset (Microsoft, CC BY 4.0). Please cite: for 2019
Shahrad et al., USENIX ATC '20; for 2021 Zhang et al., SOSP '21; for LLM 2023 Patel et al., ISCA '24;
for LLM 2024 Stojkovic et al., HPCA '25.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import compress, filterfalse
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loadgen.traces.arrivals import MAX_ARRIVALS, MAX_DURATION_S
from loadgen.traces.azure_functions import Functions
from superserve.clock import SECOND
from superserve.errors import TraceError

LICENCE = "Azure Public Dataset, Microsoft, CC BY 4.0, github.com/Azure/AzurePublicDataset"
"""The attribution that everything derived from these files must carry."""


@dataclass(frozen=True, slots=True, eq=False)
class MinuteCounts:
    """Functions 2019: invocations per minute, summed over all functions.

    Attributes:
        origin: The dataset, its owner and licence.
        functions: The summed functions, with their invocations in the whole file.
        first_minute: The first minute column's number.
        counts: Invocations in each of the consecutive minutes, shape (n_minutes,).
    """

    origin: str
    functions: Functions
    first_minute: int
    counts: npt.NDArray[np.int64]

    @property
    def n_functions(self) -> int:
        """Return the number of functions summed."""
        return self.functions.n

    @property
    def last_minute(self) -> int:
        """Return the last minute column's number."""
        return self.first_minute + self.counts.size - 1

    def window(self, start_minute: int | None, minutes: int | None, *, source: str) -> MinuteCounts:
        """Return `minutes` minutes from `start_minute` (by default the first, and all that follow).

        Raises:
            TraceError: The window is empty or not within the minutes of `source`.
        """
        start = self.first_minute if start_minute is None else start_minute
        end = self.last_minute + 1 if minutes is None else start + minutes
        if not self.first_minute <= start < end <= self.last_minute + 1:
            raise TraceError(
                f"{source}: expected a window within minutes {self.first_minute} to {self.last_minute},"
                f" got {start} to {end - 1}"
            )
        low, high = start - self.first_minute, end - self.first_minute
        return MinuteCounts(self.origin, self.functions, start, self.counts[low:high])


@dataclass(frozen=True, slots=True, eq=False)
class Invocations:
    """One instant per invocation.

    Attributes:
        origin: The dataset, its owner and licence.
        due_ns: Ascending nanoseconds after the first invocation, shape (n_invocations,).
        duration_ns: From the first invocation to one mean gap after the last, so that the mean
            rate is one over the mean gap.
        functions: Those that were invoked; None if the dataset does not name any.
    """

    origin: str
    due_ns: npt.NDArray[np.int64]
    duration_ns: int
    functions: Functions | None = None


class Column(NamedTuple):
    """A column: its fields' format, as a pattern and in words."""

    name: str
    pattern: bytes
    expected: str


_WORD = rb"[^,]+"
# Nine digits fit in an int64 even when summed over a day of a million functions.
_COUNT = rb"\d{1,9}"
_NUMBER = rb"\d{1,15}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?"
# Years within int64 nanoseconds: numpy silently wraps around for others.
_TIMESTAMP = rb"(?:19[7-9]|20\d|21\d)\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[-+]\d\d:\d\d)?"
_ZONE = re.compile(r"(?:Z|([-+])(\d\d):(\d\d))?\Z")
_A_COUNT = "an integer from 0 to 999999999"
_SECONDS = "a number of seconds, at least 0"

_DAY = range(1, 1441)
_MINUTE_KEYS = ("HashOwner", "HashApp", "HashFunction", "Trigger")
_COLUMNS_2021 = (
    Column("app", _WORD, "a name"),
    Column("func", _WORD, "a name"),
    Column("end_timestamp", _NUMBER, _SECONDS),
    Column("duration", _NUMBER, _SECONDS),
)
_COLUMNS_LLM = (
    Column("TIMESTAMP", _TIMESTAMP, "YYYY-MM-DD HH:MM:SS.fffffff, then Z, +HH:MM or nothing"),
    Column("ContextTokens", _COUNT, _A_COUNT),
    Column("GeneratedTokens", _COUNT, _A_COUNT),
)
_HEADER_2021 = tuple(column.name for column in _COLUMNS_2021)
_HEADER_LLM = tuple(column.name for column in _COLUMNS_LLM)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The rows of a file, or of several joined files, each with a header.

    Attributes:
        source: The file's name, for errors.
        headers: The fields of each header.
        header_lines: The line of each, ascending, shape (n_headers,).
        n_rows: The rows under each, shape (n_headers,).
        rows: All of them.
    """

    source: str
    headers: tuple[tuple[str, ...], ...]
    header_lines: tuple[int, ...]
    n_rows: tuple[int, ...]
    rows: list[bytes]

    def line(self, row: int) -> int:
        """Return the line number of a row."""
        starts = [sum(self.n_rows[:part]) for part in range(len(self.n_rows))]
        part = bisect_right(starts, row) - 1
        return self.header_lines[part] + 1 + row - starts[part]

    def check_one_header(self) -> None:
        """Raise TraceError at the first header that differs from the first one."""
        for line, header in zip(self.header_lines, self.headers, strict=True):
            if header != self.headers[0]:
                raise TraceError(f"{self.source}: line {line}: expected the header of line 1 again, or a row")


def parse(data: bytes, *, source: str, functions: str | None = None) -> MinuteCounts | Invocations:
    """Return the trace in a file of one of the three formats.

    Args:
        data: The file, uncompressed.
        source: The file's name, for errors.
        functions: The functions to use, as `loadgen.traces.azure_functions` reads them; by default all.

    Raises:
        TraceError: The header is none of the three, a row is malformed, there are no invocations, or
            the functions are not there.
    """
    data = data.replace(b"\r\n", b"\n").rstrip(b"\n")
    first = data.partition(b"\n")[0]
    header = tuple(first.decode("utf-8-sig", errors="replace").split(","))
    if header[:4] == _MINUTE_KEYS:
        return _minute_counts(_table(data, _MINUTE_KEYS, source), functions)
    if header == _HEADER_2021:
        return _functions_2021(_table(data, header, source), functions)
    if header == _HEADER_LLM:
        if functions is not None:
            raise TraceError(f"{source}: functions: LLM inference traces have none")
        return _llm(_table(data, header, source))
    raise TraceError(
        f"{source}: line 1: unknown header {first[:60].decode(errors='replace')!r}: expected that of Azure"
        f" Functions 2019 ({','.join(_MINUTE_KEYS)},<minutes>), Functions 2021 ({','.join(_HEADER_2021)})"
        f" or LLM inference 2023 and 2024 ({','.join(_HEADER_LLM)}), or a saved trace"
    )


def _table(data: bytes, keys: tuple[str, ...], source: str) -> _Table:
    """Return the file's rows, under headers that begin with `keys`.

    A header is found wherever it begins, even after a row: the published files do not end with a line
    end, so that `cat` puts the next file's header on the line of the last row.
    """
    key_bytes = ",".join(keys).encode()
    starts = [found.start() for found in re.finditer(b"(?:\xef\xbb\xbf)?" + key_bytes + b"(?![^,\n])", data)]
    ends = [*starts[1:], len(data)]
    headers, header_lines, n_rows, rows = [], [], [], []
    line = 1
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        line += data.count(b"\n", starts[i - 1], start) if i else 0
        header, *own = data[start:end].rstrip(b"\n").split(b"\n")
        headers.append(tuple(header.decode("utf-8-sig", errors="replace").split(",")))
        header_lines.append(line)
        n_rows.append(len(own))
        rows += own
    return _Table(source, tuple(headers), tuple(header_lines), tuple(n_rows), rows)


def _minutes(names: tuple[str, ...], source: str) -> range:
    """Return the numbers of the minute columns, which follow one another."""
    if not names or not re.fullmatch(r"[0-9]{1,9}", names[0]):
        found = repr(names[0]) if names else "the line's end"
        raise TraceError(f"{source}: line 1: column 5: expected a minute's number, got {found}")
    minutes = range(int(names[0]), int(names[0]) + len(names))
    for column, (minute, name) in enumerate(zip(minutes, names, strict=True), start=5):
        if name != str(minute):
            raise TraceError(
                f"{source}: line 1: column {column}: expected minute {minute}, got {name[:60]!r}"
            )
    return minutes


def _minute_counts(table: _Table, choice: str | None) -> MinuteCounts:
    """Return the sum of the rows of Functions 2019, each of which is a function's, of one day."""
    source, rows = table.source, table.rows
    minutes = _minutes(table.headers[0][len(_MINUTE_KEYS) :], source)
    _check_days(table, minutes)
    columns = [Column(name, rb"[^,]*", "a name") for name in _MINUTE_KEYS]
    _check(table, (*columns, *(Column(f"minute {minute}", _COUNT, _A_COUNT) for minute in minutes)))
    index: dict[bytes, int] = {}
    keyed = (b",".join(row.split(b",", 3)[:3]) for row in rows)
    of_row = np.fromiter((index.setdefault(key, len(index)) for key in keyed), np.int64)
    totals = np.zeros(len(index), dtype=np.int64)
    counts = np.zeros((len(table.headers), len(minutes)), dtype=np.int64)
    day_of_row = np.repeat(np.arange(len(table.headers)), table.n_rows)
    for row, function, day in zip(rows, of_row, day_of_row, strict=True):
        one = _counts(row)  # one at a time: a published day has 50,000 functions, 0.6 GB of counts
        totals[function] += one.sum()
        counts[day] += one
    found = Functions(_names_2019(list(index)), totals)
    if choice is not None:
        is_chosen = found.chosen(choice, source=source)
        counts[:] = 0
        for i in np.flatnonzero(is_chosen[of_row]):
            counts[day_of_row[i]] += _counts(rows[i])
        found = _narrowed(found, is_chosen)
    if not counts.any():
        raise TraceError(f"{source}: no invocations: every count of {found.n} functions is 0")
    return MinuteCounts(f"Azure Functions 2019 ({LICENCE})", found, minutes[0], counts.ravel())


def _check_days(table: _Table, minutes: range) -> None:
    """Raise TraceError unless each header after the first begins another whole day.

    Shorter parts could belong to one day or to two: the file does not show which.
    """
    table.check_one_header()
    if len(table.headers) > 1 and minutes != _DAY:
        raise TraceError(
            f"{table.source}: line {table.header_lines[1]}: a second header: expected one, since only whole"
            f" days, of minutes 1 to 1440, can be joined; these are minutes {minutes[0]} to {minutes[-1]}"
        )


def _names_2019(keys: list[bytes]) -> tuple[str, ...]:
    """Return `app/function` of each `owner,app,function`; with the owner if several have the same name."""
    full = [key.decode(errors="replace").replace(",", "/") for key in keys]
    short = [name.partition("/")[2] for name in full]
    times = Counter(short)
    return tuple(name if times[name] == 1 else long for long, name in zip(full, short, strict=True))


def _counts(row: bytes) -> npt.NDArray[np.int64]:
    """Return a function's invocations in each minute, shape (n_minutes,)."""
    return np.fromstring(row.split(b",", 4)[4], dtype=np.int64, sep=",")


def _functions_2021(table: _Table, choice: str | None) -> Invocations:
    """Return the arrivals of Functions 2021: each end minus its duration."""
    table.check_one_header()
    _check(table, _COLUMNS_2021)
    source, rows = table.source, table.rows
    fields = b",".join(rows).split(b",")
    end_s = np.fromiter(map(float, fields[2::4]), np.float64, len(rows))
    duration_s = np.fromiter(map(float, fields[3::4]), np.float64, len(rows))
    every_s = start_s = end_s - duration_s
    found, of_row = _invoked(fields)
    if choice is not None:
        is_chosen = found.chosen(choice, source=source)
        start_s = start_s[is_chosen[of_row]]
        found = _narrowed(found, is_chosen)
    if not np.ptp(start_s) <= MAX_DURATION_S:
        # Real rows are close together; the wrong one is farthest from the median.
        row = int(np.abs(every_s - np.median(every_s)).argmax())
        raise TraceError(
            f"{source}: line {table.line(row)}: expected at most {MAX_DURATION_S:.12g} s from first to last"
            f" arrival, got one at {every_s[row]:.6g} s"
        )
    # Rows are sorted by neither end nor, because of rounding, exactly by begin.
    start_s = np.sort(start_s)
    due_ns = np.rint((start_s - start_s[0]) * SECOND).astype(np.int64)
    return _invocations(f"Azure Functions 2021 ({LICENCE})", due_ns, source, found)


def _invoked(fields: list[bytes]) -> tuple[Functions, npt.NDArray[np.int64]]:
    """Return the functions that the rows name, and which of them each row invokes, shape (n_rows,).

    A function's name is unique only within its application.
    """
    index: dict[tuple[bytes, bytes], int] = {}
    pairs = zip(fields[0::4], fields[1::4], strict=True)
    of_row = np.fromiter((index.setdefault(pair, len(index)) for pair in pairs), np.int64)
    names = tuple(b"/".join(pair).decode(errors="replace") for pair in index)
    return Functions(names, np.bincount(of_row)), of_row


def _narrowed(found: Functions, is_chosen: npt.NDArray[np.bool_]) -> Functions:
    """Return only the chosen ones."""
    return Functions(tuple(compress(found.names, is_chosen)), found.totals[is_chosen])


def _llm(table: _Table) -> Invocations:
    """Return the arrivals of LLM inference 2023 or 2024: its timestamps."""
    table.check_one_header()
    _check(table, _COLUMNS_LLM)
    source = table.source
    stamps = [row[: row.index(b",")].decode() for row in table.rows]
    locals_, ahead_ns = zip(*map(_zoned, stamps), strict=True)
    try:
        # numpy reads all seven digits; datetime's parser reads only six.
        instants = np.array(locals_, dtype="datetime64[ns]").astype(np.int64) - np.array(ahead_ns, np.int64)
    except ValueError:
        row = next(row for row, stamp in enumerate(locals_) if not _is_instant(stamp))
        raise TraceError(
            f"{source}: line {table.line(row)}: column 1, TIMESTAMP: expected a day and time that exist, got"
            f" {stamps[row]!r}"
        ) from None
    if int(instants.max()) - int(instants.min()) > MAX_DURATION_S * SECOND:
        row = int(np.abs(instants - np.median(instants)).argmax())
        raise TraceError(
            f"{source}: line {table.line(row)}: expected at most {MAX_DURATION_S:.12g} s from first to last"
            f" arrival, got one at {stamps[row]}"
        )
    instants.sort()
    origin = f"Azure LLM inference {stamps[0][:4]} ({LICENCE})"
    return _invocations(origin, instants - instants[0], source)


def _zoned(stamp: str) -> tuple[str, int]:
    """Return a timestamp without its time zone, and how far that is ahead of UTC, in nanoseconds."""
    zone = _ZONE.search(stamp)
    assert zone is not None, "the zone may be empty"
    sign, hours, minutes = zone.groups()
    if sign is None:
        return stamp[: zone.start()], 0
    ahead_ns = (int(hours) * 60 + int(minutes)) * 60 * SECOND
    return stamp[: zone.start()], -ahead_ns if sign == "-" else ahead_ns


def _is_instant(stamp: str) -> bool:
    """Return whether the calendar and the clock have this instant."""
    try:
        np.datetime64(stamp, "ns")
    except ValueError:
        return False
    return True


def _invocations(
    origin: str, due_ns: npt.NDArray[np.int64], source: str, functions: Functions | None = None
) -> Invocations:
    """Return a recording of these arrivals, the first of which is at 0."""
    span_ns = int(due_ns[-1])
    if span_ns == 0:
        raise TraceError(f"{source}: expected arrivals at two different instants at least, for a rate")
    # One mean gap longer than the span: at least a nanosecond after the last arrival.
    return Invocations(origin, due_ns, span_ns + max(1, round(span_ns / (due_ns.size - 1))), functions)


def _check(table: _Table, columns: tuple[Column, ...]) -> None:
    """Raise TraceError at the first row with a field that does not fit its column."""
    source, rows = table.source, table.rows
    for line, n in zip(table.header_lines, table.n_rows, strict=True):
        if not n:
            where = f"line {line}: " if line > 1 else ""
            raise TraceError(f"{source}: {where}no rows after the header: expected one or more")
    if len(rows) > MAX_ARRIVALS:
        raise TraceError(f"{source}: expected at most {MAX_ARRIVALS} rows, got {len(rows)}")
    row_pattern = re.compile(b",".join(column.pattern for column in columns))
    bad = next(filterfalse(row_pattern.fullmatch, rows), None)
    if bad is not None:
        raise TraceError(f"{source}: line {table.line(rows.index(bad))}: {_fault(bad, columns)}")


def _fault(row: bytes, columns: tuple[Column, ...]) -> str:
    """Return what is wrong with a row that does not match its columns."""
    fields = row.split(b",")
    if len(fields) != len(columns):
        return f"expected {len(columns)} columns, got {len(fields)}"
    for number, (column, field) in enumerate(zip(columns, fields, strict=True), start=1):
        if not re.fullmatch(column.pattern, field):
            found = field[:60].decode(errors="replace")
            return f"column {number}, {column.name}: expected {column.expected}, got {found!r}"
    raise AssertionError("the row matches its columns")
