"""Readers of the Azure Public Dataset's traces, each recognised by its header line.

    Functions 2019 ("MAF")   HashOwner,HashApp,HashFunction,Trigger,<minute>,<minute>,...
                             one row per function: its invocations in each minute of the day
    Functions 2021           app,func,end_timestamp,duration
                             one row per invocation, which arrived at end_timestamp - duration
    LLM inference 2023       TIMESTAMP,ContextTokens,GeneratedTokens
                             one row per request, to 100 ns

Lines end in LF or CRLF. Every row is checked whole, also the columns that are not used, and the
first fault is a TraceError that names file, line and column.

Source: https://github.com/Azure/AzurePublicDataset (Microsoft, CC BY 4.0). To be cited: for 2019
Shahrad et al., USENIX ATC '20; for 2021 Zhang et al., SOSP '21; for LLM 2023 Patel et al., ISCA '24.
"""

from __future__ import annotations

import re
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
"""The attribution that everything derived from these files carries along."""


@dataclass(frozen=True, slots=True, eq=False)
class MinuteCounts:
    """Functions 2019: invocations per minute, summed over all functions.

    Attributes:
        origin: The dataset, its owner and licence.
        functions: Those summed, with their invocations in the whole file.
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
        functions: Those that were invoked; None where the dataset tells of none.
    """

    origin: str
    due_ns: npt.NDArray[np.int64]
    duration_ns: int
    functions: Functions | None = None


class Column(NamedTuple):
    """A column: what its fields look like, as a pattern and in words."""

    name: str
    pattern: bytes
    expected: str


_WORD = rb"[^,]+"
# Nine digits fit in an int64 through any sum over a day of a million functions.
_COUNT = rb"\d{1,9}"
_NUMBER = rb"\d{1,15}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?"
# Years that int64 nanoseconds reach: numpy wraps the others around silently.
_TIMESTAMP = rb"(?:19[7-9]|20\d|21\d)\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?"
_A_COUNT = "an integer from 0 to 999999999"
_SECONDS = "a number of seconds, at least 0"

_MINUTE_KEYS = ("HashOwner", "HashApp", "HashFunction", "Trigger")
_COLUMNS_2021 = (
    Column("app", _WORD, "a name"),
    Column("func", _WORD, "a name"),
    Column("end_timestamp", _NUMBER, _SECONDS),
    Column("duration", _NUMBER, _SECONDS),
)
_COLUMNS_LLM = (
    Column("TIMESTAMP", _TIMESTAMP, "YYYY-MM-DD HH:MM:SS.fffffff"),
    Column("ContextTokens", _COUNT, _A_COUNT),
    Column("GeneratedTokens", _COUNT, _A_COUNT),
)
_HEADER_2021 = tuple(column.name for column in _COLUMNS_2021)
_HEADER_LLM = tuple(column.name for column in _COLUMNS_LLM)


def parse(data: bytes, *, source: str, functions: str | None = None) -> MinuteCounts | Invocations:
    """Return the trace that a file of one of the three formats holds.

    Args:
        data: The file, uncompressed.
        source: The file's name, for errors.
        functions: The functions wanted, as `loadgen.traces.azure_functions` reads them; by default all.

    Raises:
        TraceError: The header is none of the three, a row is malformed, there are no invocations, or
            the functions wanted are not there.
    """
    lines = data.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
    header = tuple(lines[0].decode("utf-8-sig", errors="replace").split(","))
    rows = lines[1:]
    if header[:4] == _MINUTE_KEYS:
        return _minute_counts(_minutes(header[4:], source), rows, functions, source)
    if header == _HEADER_2021:
        return _functions_2021(rows, functions, source)
    if header == _HEADER_LLM:
        if functions is not None:
            raise TraceError(f"{source}: functions: LLM inference 2023 does not tell of any")
        return _llm_2023(rows, source)
    raise TraceError(
        f"{source}: line 1: unknown header {lines[0][:60].decode(errors='replace')!r}: expected that of Azure"
        f" Functions 2019 ({','.join(_MINUTE_KEYS)},<minutes>), Functions 2021 ({','.join(_HEADER_2021)})"
        f" or LLM inference 2023 ({','.join(_HEADER_LLM)}), or a saved trace"
    )


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


def _minute_counts(minutes: range, rows: list[bytes], choice: str | None, source: str) -> MinuteCounts:
    """Return the sum of the rows of Functions 2019, each of which is a function."""
    keys = [Column(name, rb"[^,]*", "a name") for name in _MINUTE_KEYS]
    _check(rows, (*keys, *(Column(str(minute), _COUNT, _A_COUNT) for minute in minutes)), source)
    names: list[str] = []
    sums: list[int] = []
    totals = np.zeros(len(minutes), dtype=np.int64)
    for row in rows:  # summed as they come: a published day has 50,000 functions, 0.6 GB of counts
        counts = _counts(row)
        names.append(b"/".join(row.split(b",", 3)[1:3]).decode(errors="replace"))
        sums.append(int(counts.sum()))
        totals += counts
    found = Functions(tuple(names), np.array(sums, dtype=np.int64))
    if choice is not None:
        is_chosen = found.chosen(choice, source=source)
        totals = np.sum([_counts(row) for row in compress(rows, is_chosen)], axis=0)
        found = _narrowed(found, is_chosen)
    if not totals.any():
        raise TraceError(f"{source}: no invocations: every count of {found.n} functions is 0")
    return MinuteCounts(f"Azure Functions 2019 ({LICENCE})", found, minutes[0], totals)


def _counts(row: bytes) -> npt.NDArray[np.int64]:
    """Return a function's invocations in each minute, shape (n_minutes,)."""
    return np.fromstring(row.split(b",", 4)[4], dtype=np.int64, sep=",")


def _functions_2021(rows: list[bytes], choice: str | None, source: str) -> Invocations:
    """Return the arrivals of Functions 2021: each end minus its duration."""
    _check(rows, _COLUMNS_2021, source)
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
        # Real rows lie together; the one that does not is furthest from the one in the middle.
        line = int(np.abs(every_s - np.median(every_s)).argmax()) + 2
        raise TraceError(
            f"{source}: line {line}: expected at most {MAX_DURATION_S:.12g} s from first to last arrival,"
            f" got one at {every_s[line - 2]:.6g} s"
        )
    # Rows end out of order, and begin in order only to within rounding.
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
    """Return those that were chosen."""
    return Functions(tuple(compress(found.names, is_chosen)), found.totals[is_chosen])


def _llm_2023(rows: list[bytes], source: str) -> Invocations:
    """Return the arrivals of LLM inference 2023: its timestamps."""
    _check(rows, _COLUMNS_LLM, source)
    stamps = [row[: row.index(b",")].decode() for row in rows]
    try:
        # numpy reads all seven digits; datetime's parser stops at six.
        instants = np.array(stamps, dtype="datetime64[ns]").astype(np.int64)
    except ValueError:
        line, stamp = next((line, stamp) for line, stamp in enumerate(stamps, 2) if not _is_instant(stamp))
        raise TraceError(
            f"{source}: line {line}: TIMESTAMP: expected a day and time that exist, got {stamp!r}"
        ) from None
    if int(instants.max()) - int(instants.min()) > MAX_DURATION_S * SECOND:
        line = int(np.abs(instants - np.median(instants)).argmax()) + 2
        raise TraceError(
            f"{source}: line {line}: expected at most {MAX_DURATION_S:.12g} s from first to last arrival,"
            f" got one at {stamps[line - 2]}"
        )
    instants.sort()
    return _invocations(f"Azure LLM inference 2023 ({LICENCE})", instants - instants[0], source)


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
    # One mean gap more than the span: never less than a nanosecond past the last arrival.
    return Invocations(origin, due_ns, span_ns + max(1, round(span_ns / (due_ns.size - 1))), functions)


def _check(rows: list[bytes], columns: tuple[Column, ...], source: str) -> None:
    """Raise TraceError at the first row whose fields are not what the columns hold."""
    if not rows:
        raise TraceError(f"{source}: no rows after the header: expected one or more")
    if len(rows) > MAX_ARRIVALS:
        raise TraceError(f"{source}: expected at most {MAX_ARRIVALS} rows, got {len(rows)}")
    row_pattern = re.compile(b",".join(column.pattern for column in columns))
    bad = next(filterfalse(row_pattern.fullmatch, rows), None)
    if bad is not None:
        raise TraceError(f"{source}: line {rows.index(bad) + 2}: {_fault(bad, columns)}")


def _fault(row: bytes, columns: tuple[Column, ...]) -> str:
    """Return what is wrong with a row that does not match its columns."""
    fields = row.split(b",")
    if len(fields) != len(columns):
        return f"expected {len(columns)} columns, got {len(fields)}"
    for column, field in zip(columns, fields, strict=True):
        if not re.fullmatch(column.pattern, field):
            found = field[:60].decode(errors="replace")
            return f"column {column.name}: expected {column.expected}, got {found!r}"
    raise AssertionError("the row matches its columns")
