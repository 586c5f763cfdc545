"""Profile: how accurate each subnet is, and how long each takes at each batch size.

A profile is a JSON file (schema 1), measured on a GPU by `profiles.measuring.measure` or modelled:

    {"schema": 1, "name", "supernet", "device", "source": "measured" | "modelled",
     "provenance", "versions": {package: version}, "date", "batch_sizes": [1, 2, ...],
     "subnets": [{"name", "control": {...} | null, "accuracy", "gflops": number | null,
                  "latency_ms": [one per batch size], "latency_ms_p99": [the same]}]}

`latency_ms` is the median. Every key is required; "raw" may be added to the profile or to a
subnet for the figures behind it, and is not kept in memory. In memory latencies are
integer nanoseconds. A `Profile` that exists is valid, so policies may bisect in it:

- batch sizes ascend strictly, and each latency is at least that of the size before (P1);
- accuracy ascends strictly from row to row, within 0 to 100;
- pareto: at every batch size a row's median and p99 are at least those of the row before
  (P2), and its median is longer for at least one batch size. A row that is everywhere as
  fast as a less accurate one makes the latter useless: leave that out.

P1 and P2 are the properties that SlackFit rests on (SuperServe, NSDI '25).
"""

from __future__ import annotations

import difflib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import orjson

from superserve.errors import ProfileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMA = 1
"""The version of the file format that this module reads and writes."""

MAX_BATCH_SIZE = 65_536
"""The largest batch size of a profile: look-up tables have an entry for each size up to it."""

_NS_PER_MS = 1_000_000
_MAX_LATENCY_MS = 1e9  # eleven days: a larger figure is in the wrong unit
_DATA = Path(__file__).with_name("data")
_SUBNET_KEYS = ("name", "control", "accuracy", "gflops", "latency_ms", "latency_ms_p99")
_PROFILE_KEYS = (
    *("schema", "name", "supernet", "device", "source", "provenance", "versions", "date"),
    *("batch_sizes", "subnets"),
)


@dataclass(frozen=True, slots=True)
class SubnetProfile:
    """One row of a profile.

    Attributes:
        name: Unique within the profile.
        control: The supernet's own control tuple (depths, widths, ...); None when modelled.
        accuracy: Percent, 0 to 100.
        gflops: Billions of multiply-adds for one query; None if unknown.
        latency_ns: Median latency of a batch, one for each of the profile's batch sizes.
        latency_p99_ns: 99th percentile of the latency, for each batch size.
    """

    name: str
    control: Mapping[str, Any] | None
    accuracy: float
    gflops: float | None
    latency_ns: tuple[int, ...]
    latency_p99_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """Latency and accuracy of a supernet's pareto subnets on one device.

    Subnets are known by their row: 0 is the least accurate and the fastest.

    Attributes:
        name: The profile's name; the file's name without .json if it is shipped.
        supernet: The supernet it belongs to.
        device: The GPU or CPU it was measured on or is modelled after.
        source: Whether the latencies were measured or modelled.
        provenance: How the figures were made, in words.
        versions: Versions of what the figures depend on, such as torch and the driver.
        date: When it was made, ISO 8601.
        batch_sizes: Profiled batch sizes, ascending.
        subnets: Rows, by ascending accuracy.
        unit_cost_ns: The least cost of a query, averaged over the rows: a GPU with half the unit cost
            counts twice. Derived.

    Raises:
        ProfileError: The figures break a rule of this module's docstring.
    """

    name: str
    supernet: str
    device: str
    source: Literal["measured", "modelled"]
    provenance: str
    versions: Mapping[str, str]
    date: str
    batch_sizes: tuple[int, ...]
    subnets: tuple[SubnetProfile, ...]
    unit_cost_ns: float = field(init=False, repr=False, compare=False)
    # Derived, because the router looks up latencies on its hot path.
    _column: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of each batch size from 0
    _median: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)  # by row
    _p99: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)  # by row
    _p99_columns: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    _accuracies: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _rows: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_profile(self)
        columns = (bisect_left(self.batch_sizes, size) for size in range(self.batch_sizes[-1] + 1))
        p99 = tuple(subnet.latency_p99_ns for subnet in self.subnets)
        self._derive("_column", tuple(columns))
        self._derive("_median", tuple(subnet.latency_ns for subnet in self.subnets))
        self._derive("_p99", p99)
        self._derive("_p99_columns", tuple(zip(*p99, strict=True)))
        self._derive("_accuracies", tuple(subnet.accuracy for subnet in self.subnets))
        costs = [min(map(truediv, subnet.latency_ns, self.batch_sizes)) for subnet in self.subnets]
        self._derive("unit_cost_ns", sum(costs) / len(costs))
        self._derive("_rows", {subnet.name: row for row, subnet in enumerate(self.subnets)})

    def _derive(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the only way to set a frozen dataclass's field

    @property
    def n_subnets(self) -> int:
        """Number of rows; at least 1."""
        return len(self.subnets)

    @property
    def max_batch_size(self) -> int:
        """The largest profiled batch size."""
        return self.batch_sizes[-1]

    def latency_ns(self, subnet: int, batch_size: int) -> int:
        """Return the median latency of `batch_size` queries on row `subnet`.

        A batch size between two profiled ones costs the next profiled one.

        Raises:
            ProfileError: `batch_size` is below 1 or above the largest profiled one.
        """
        if not 0 < batch_size < len(self._column):
            self._refuse(batch_size)
        return self._median[subnet][self._column[batch_size]]

    def latency_p99_ns(self, subnet: int, batch_size: int) -> int:
        """Return the 99th percentile of the latency, otherwise as `latency_ns`."""
        if not 0 < batch_size < len(self._column):
            self._refuse(batch_size)
        return self._p99[subnet][self._column[batch_size]]

    def padded(self, batch_size: int) -> int:
        """Return the smallest profiled batch size that holds `batch_size` queries.

        Raises:
            ProfileError: `batch_size` is below 1 or above the largest profiled one.
        """
        if not 0 < batch_size < len(self._column):
            self._refuse(batch_size)
        return self.batch_sizes[self._column[batch_size]]

    def _refuse(self, batch_size: int) -> NoReturn:
        raise ProfileError(
            f"profile {self.name!r}: batch_size: expected 1 to {self.max_batch_size}, got {batch_size}"
        )

    def largest_batch(self, subnet: int, budget_ns: int) -> int | None:
        """Return the largest profiled batch size whose p99 on row `subnet` is at most `budget_ns`.

        Returns:
            None if not even the smallest batch fits. O(log of the number of batch sizes).
        """
        column = bisect_right(self._p99[subnet], budget_ns) - 1
        return self.batch_sizes[column] if column >= 0 else None

    def most_accurate(self, batch_size: int, budget_ns: int) -> int | None:
        """Return the most accurate row whose p99 for `batch_size` queries is at most `budget_ns`.

        Returns:
            None if not even row 0 fits. O(log of the number of rows).

        Raises:
            ProfileError: `batch_size` is below 1 or above the largest profiled one.
        """
        if not 0 < batch_size < len(self._column):
            self._refuse(batch_size)
        row = bisect_right(self._p99_columns[self._column[batch_size]], budget_ns) - 1
        return row if row >= 0 else None

    def row(self, name: str) -> int:
        """Return the row of the subnet called `name`.

        Raises:
            ProfileError: There is none; the message suggests the nearest name.
        """
        row = self._rows.get(name)
        if row is None:
            hint = _nearest(name, self._rows)
            raise ProfileError(f"profile {self.name!r}: no subnet is called {name!r}{hint}")
        return row

    def floor_row(self, min_accuracy: float) -> int | None:
        """Return the smallest row with at least `min_accuracy` percent; None if there is none."""
        row = bisect_left(self._accuracies, min_accuracy)
        return row if row < len(self._accuracies) else None

    def frontier(self, *, floor: int = 0, limit_ns: int | None = None) -> tuple[tuple[int, float], ...]:
        """Return the rows worth running, and the least cost of a query on each: (row, nanoseconds).

        A query's cost is its share of a batch's median latency, at the batch size that minimises it.
        A row below the concave hull of accuracy over cost is left out: a mix of its neighbours is as
        accurate for less.

        Args:
            floor: The smallest row allowed.
            limit_ns: Batches that take longer do not count; None for no limit.
        """
        hull: list[tuple[int, float]] = []
        for row, subnet in enumerate(self.subnets[floor:], floor):
            sizes = zip(self.batch_sizes, subnet.latency_ns, strict=True)
            costs = [ns / size for size, ns in sizes if limit_ns is None or ns <= limit_ns]
            if not costs:
                break  # P2: no row above it is faster
            while hull and self._is_pointless(
                hull[-2] if len(hull) > 1 else None, hull[-1], (row, min(costs))
            ):
                hull.pop()
            hull.append((row, min(costs)))
        return tuple(hull)

    def _is_pointless(
        self, below: tuple[int, float] | None, point: tuple[int, float], above: tuple[int, float]
    ) -> bool:
        """Return whether `point` lies on or below the line from `below`, None for no service, to `above`."""
        row, cost_ns = below or (None, 0.0)
        worth = 0.0 if row is None else self._accuracies[row]
        rise = (self._accuracies[point[0]] - worth) * (above[1] - point[1])
        return rise <= (self._accuracies[above[0]] - self._accuracies[point[0]]) * (point[1] - cost_ns)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile in the form of its file: see the module's docstring."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "supernet": self.supernet,
            "device": self.device,
            "source": self.source,
            "provenance": self.provenance,
            "versions": dict(self.versions),
            "date": self.date,
            "batch_sizes": list(self.batch_sizes),
            "subnets": [_subnet_dict(subnet) for subnet in self.subnets],
        }

    def to_json(self) -> bytes:
        """Return the bytes of the profile's file, ending in a newline."""
        return orjson.dumps(self.to_dict(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_dict(cls, data: object, where: str = "profile") -> Profile:
        """Return the profile that `data`, a parsed profile file, describes.

        Args:
            data: What `to_dict` returns; anything else is refused.
            where: The source of `data` in messages, such as its file name.

        Raises:
            ProfileError: A key is missing or unknown, or a value is invalid.
        """
        fields = _object(data, _PROFILE_KEYS, where)
        if fields["schema"] != SCHEMA or isinstance(fields["schema"], bool):
            raise ProfileError(f"{where}: schema: expected {SCHEMA}, got {fields['schema']!r}")
        texts = {
            key: _text(fields, key, where) for key in ("name", "supernet", "device", "provenance", "date")
        }
        source = _source(fields["source"], where)
        versions = _versions(fields["versions"], where)
        sizes = tuple(
            _batch_size(size, where) for size in _list(fields["batch_sizes"], f"{where}: batch_sizes")
        )
        rows = enumerate(_list(fields["subnets"], f"{where}: subnets"))
        subnets = tuple(_subnet(row, f"{where}: subnets[{index}]") for index, row in rows)
        try:
            return cls(source=source, versions=versions, batch_sizes=sizes, subnets=subnets, **texts)
        except ProfileError as error:
            raise ProfileError(f"{where}: {error}") from error


def shipped_profiles() -> tuple[str, ...]:
    """Return the names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _DATA.glob("*.json")))


def load_profile(name_or_path: str | Path) -> Profile:
    """Read and check a profile.

    Args:
        name_or_path: A shipped profile's name, such as "cnn-8gpu-modelled", or a file's path.
            A shipped name wins over a file of that name; write "./name" for the file.

    Raises:
        ProfileError: There is no such profile, or it is malformed: see `Profile.from_dict`.
    """
    path = profile_path(name_or_path)
    try:
        data = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ProfileError(_no_profile(str(name_or_path), error)) from error
    except orjson.JSONDecodeError as error:
        raise ProfileError(f"{path}: expected JSON: {error}") from error
    return Profile.from_dict(data, where=str(path))


def evenly(n: int, most: int) -> list[int]:
    """Return at most `most` of the rows below `n`, evenly spread, including the first and the last."""
    if most >= n:
        return list(range(n))
    return [round(i * (n - 1) / (most - 1)) for i in range(most)]


def profile_path(name_or_path: str | Path) -> Path:
    """Return the file that `load_profile` reads, whether or not it exists."""
    shipped = isinstance(name_or_path, str) and name_or_path in shipped_profiles()
    return _DATA / f"{name_or_path}.json" if shipped else Path(name_or_path)


def statistics_path(profile: str | Path) -> Path:
    """Return the path of SubnetNorm's statistics for a profile's subnets: a file beside the profile."""
    return profile_path(profile).with_suffix(".statistics.safetensors")


def _no_profile(name: str, error: OSError) -> str:
    """Return why `name` could not be read, and what can be."""
    names = shipped_profiles()
    reason = error.strerror or str(error)
    return (
        f"{name}: {reason}: expected a file or a shipped profile ({', '.join(names)}){_nearest(name, names)}"
    )


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known word most like `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _subnet_dict(subnet: SubnetProfile) -> dict[str, Any]:
    """Return one row in the form of the file."""
    return {
        "name": subnet.name,
        "control": None if subnet.control is None else dict(subnet.control),
        "accuracy": subnet.accuracy,
        "gflops": subnet.gflops,
        "latency_ms": [latency / _NS_PER_MS for latency in subnet.latency_ns],
        "latency_ms_p99": [latency / _NS_PER_MS for latency in subnet.latency_p99_ns],
    }


# Reading: keys and types.


def _object(value: object, keys: Sequence[str], where: str) -> Mapping[str, Any]:
    """Return `value` if it is an object with exactly `keys`, and perhaps "raw"."""
    if not isinstance(value, Mapping):
        raise ProfileError(f"{where}: expected an object, got {type(value).__name__}")
    for key in value:
        if key not in keys and key != "raw":
            raise ProfileError(f"{where}: unknown key {key!r}{_nearest(str(key), keys)}")
    for key in keys:
        if key not in value:
            raise ProfileError(f"{where}: {key}: missing")
    return value


def _list(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise ProfileError(f"{where}: expected a list, got {type(value).__name__}")
    return value


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise ProfileError(f"{where}: {key}: expected a string, got {value!r}")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProfileError(f"{where}: expected a number, got {value!r}")
    return value


def _source(value: object, where: str) -> Literal["measured", "modelled"]:
    if value == "measured":
        return "measured"
    if value == "modelled":
        return "modelled"
    raise ProfileError(f"{where}: source: expected 'measured' or 'modelled', got {value!r}")


def _versions(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ProfileError(f"{where}: versions: expected an object, got {type(value).__name__}")
    return {str(key): _text(value, key, f"{where}: versions") for key in value}


def _batch_size(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ProfileError(f"{where}: batch_sizes: expected whole numbers, got {value!r}")
    return value


def _subnet(value: object, where: str) -> SubnetProfile:
    """Return the row that `value` describes; `where` includes its name as soon as it is known."""
    fields = _object(value, _SUBNET_KEYS, where)
    name = _text(fields, "name", where)
    where = f"{where} {name!r}"
    control, gflops = fields["control"], fields["gflops"]
    if control is not None and not isinstance(control, Mapping):
        raise ProfileError(f"{where}: control: expected an object or null, got {control!r}")
    return SubnetProfile(
        name=name,
        control=control,
        accuracy=_number(fields["accuracy"], f"{where}: accuracy"),
        gflops=None if gflops is None else _number(gflops, f"{where}: gflops"),
        latency_ns=_latencies_ns(fields["latency_ms"], f"{where}: latency_ms"),
        latency_p99_ns=_latencies_ns(fields["latency_ms_p99"], f"{where}: latency_ms_p99"),
    )


def _latencies_ns(value: object, where: str) -> tuple[int, ...]:
    """Convert a list of milliseconds to integer nanoseconds."""
    latencies_ms = [_number(entry, where) for entry in _list(value, where)]
    for latency_ms in latencies_ms:
        if not 0 < latency_ms < _MAX_LATENCY_MS:  # false for NaN, too
            raise ProfileError(
                f"{where}: expected milliseconds above 0 and below {_MAX_LATENCY_MS:.0e}, got {latency_ms}"
            )
    return tuple(round(latency_ms * _NS_PER_MS) for latency_ms in latencies_ms)


# Checking: figures against each other.


def _check_profile(profile: Profile) -> None:
    """Raise ProfileError unless the figures keep the rules of this module's docstring."""
    if not profile.name:
        raise ProfileError("name: expected a name, got ''")
    if profile.source not in ("measured", "modelled"):
        raise ProfileError(f"source: expected 'measured' or 'modelled', got {profile.source!r}")
    try:
        datetime.fromisoformat(profile.date)
    except ValueError as error:
        raise ProfileError(f"date: expected an ISO date such as 2026-11-23, got {profile.date!r}") from error
    _check_batch_sizes(profile.batch_sizes)
    if not profile.subnets:
        raise ProfileError("subnets: expected at least one")
    for subnet in profile.subnets:
        _check_subnet(subnet, profile.batch_sizes)
    _check_names(profile.subnets)
    for slower, faster in zip(profile.subnets[1:], profile.subnets, strict=False):
        _check_pareto(slower, faster, profile.batch_sizes)


def _check_batch_sizes(batch_sizes: tuple[int, ...]) -> None:
    ascending = all(before < after for before, after in itertools.pairwise(batch_sizes))
    if not batch_sizes or not ascending or batch_sizes[0] < 1 or batch_sizes[-1] > MAX_BATCH_SIZE:
        raise ProfileError(
            f"batch_sizes: expected ascending sizes from 1 to {MAX_BATCH_SIZE}, got {list(batch_sizes)}"
        )


def _check_names(subnets: tuple[SubnetProfile, ...]) -> None:
    rows: dict[str, int] = {}
    for row, subnet in enumerate(subnets):
        first = rows.setdefault(subnet.name, row)
        if first != row:
            raise ProfileError(
                f"subnet {subnet.name!r}: name: expected a unique name, got that of rows {first} and {row}"
            )


def _check_subnet(subnet: SubnetProfile, batch_sizes: tuple[int, ...]) -> None:
    """Check one row on its own."""
    where = f"subnet {subnet.name!r}"
    if not subnet.name:
        raise ProfileError(f"{where}: name: expected a name")
    if not 0 <= subnet.accuracy <= 100:
        raise ProfileError(f"{where}: accuracy: expected a percentage from 0 to 100, got {subnet.accuracy}")
    if subnet.gflops is not None and not 0 <= subnet.gflops < float("inf"):
        raise ProfileError(f"{where}: gflops: expected a number of at least 0, got {subnet.gflops}")
    _check_latencies(subnet.latency_ns, batch_sizes, f"{where}: latency_ms")
    _check_latencies(subnet.latency_p99_ns, batch_sizes, f"{where}: latency_ms_p99")
    for size, median, p99 in zip(batch_sizes, subnet.latency_ns, subnet.latency_p99_ns, strict=True):
        if p99 < median:
            raise ProfileError(
                f"{where}: latency_ms_p99: at batch size {size} expected at least "
                f"the median {_ms(median)}, got {_ms(p99)}"
            )


def _check_latencies(latencies_ns: tuple[int, ...], batch_sizes: tuple[int, ...], where: str) -> None:
    """P1: a latency for each batch size, positive, none shorter than that of a smaller batch."""
    if len(latencies_ns) != len(batch_sizes):
        raise ProfileError(
            f"{where}: expected {len(batch_sizes)} latencies, one per batch size, got {len(latencies_ns)}"
        )
    least = 1  # nanosecond
    for size, latency_ns in zip(batch_sizes, latencies_ns, strict=True):
        if latency_ns < least:
            raise ProfileError(
                f"{where}: at batch size {size} expected at least {_ms(least)}, got {_ms(latency_ns)}: "
                "latencies are positive and do not fall as batches grow"
            )
        least = latency_ns


def _check_pareto(slower: SubnetProfile, faster: SubnetProfile, batch_sizes: tuple[int, ...]) -> None:
    """P2: `slower`, the row after `faster`, is more accurate, and pays for it."""
    where = f"subnet {slower.name!r}"
    if slower.accuracy <= faster.accuracy:
        raise ProfileError(
            f"{where}: accuracy: expected more than {faster.accuracy}, that of {faster.name!r} before it, "
            f"got {slower.accuracy}"
        )
    _check_not_faster(slower.latency_ns, faster.latency_ns, batch_sizes, f"{where}: latency_ms", faster.name)
    _check_not_faster(
        slower.latency_p99_ns, faster.latency_p99_ns, batch_sizes, f"{where}: latency_ms_p99", faster.name
    )
    if slower.latency_ns == faster.latency_ns:
        raise ProfileError(
            f"{where}: latency_ms: expected longer than the less accurate {faster.name!r} "
            "at one batch size at least (pareto), got the same at each"
        )


def _check_not_faster(
    slower_ns: tuple[int, ...],
    faster_ns: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    where: str,
    rival: str,
) -> None:
    for size, slow_ns, fast_ns in zip(batch_sizes, slower_ns, faster_ns, strict=True):
        if slow_ns < fast_ns:
            raise ProfileError(
                f"{where}: at batch size {size} expected at least {_ms(fast_ns)}, that of the less accurate "
                f"{rival!r} (pareto), got {_ms(slow_ns)}"
            )


def _ms(latency_ns: int) -> str:
    return f"{latency_ns / _NS_PER_MS:.6g} ms"
