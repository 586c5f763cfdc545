"""Figures of an earlier run on the same kind of machine, and which rows have moved beyond noise since.

`figures.json` is committed: for each kind of machine the commit, its date, and each row's value and ratio.
Rows with a reference are compared by their ratio, which the hour hardly moves; others by their value, which
it does. `python -m loadgen.bench --record COMMIT` writes what it has measured there.
"""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from superserve.build import build
from superserve.errors import ConfigError
from superserve.files import write_whole
from superserve.roles.version import cpu_name

if TYPE_CHECKING:
    from loadgen.bench.rows.row import BenchRow

FIGURES = Path(__file__).with_name("figures.json")
NOISE_OF_RATIO = 0.25
"""Share by which a ratio to a reference of the same run moves without a cause: both had their turn beside the
same guests of one host, but not at the same instant."""
NOISE_OF_VALUE = 0.6
"""The same of an absolute figure: within one hour the same code took from 25 to 40 us a query."""


def kind() -> str:
    """Return the kind of this machine: processor, cores, and how the core runs."""
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {build()} core"


def load(path: Path = FIGURES) -> dict[str, Any]:
    """Return the committed figures, by kind of machine; empty if there is no file.

    Raises:
        ConfigError: The file is malformed.
    """
    try:
        found = orjson.loads(path.read_bytes())
        if all(isinstance(one["rows"], dict) for one in found.values()):
            figures: dict[str, Any] = found
            return figures
    except FileNotFoundError:
        return {}
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"{path}: expected an object of kinds of machines, each with its rows")


def compared(rows: list[BenchRow], figures: dict[str, Any], machine_kind: str) -> list[str]:
    """Return the lines that say which rows have moved, and by how much.

    Args:
        rows: As measured now.
        figures: As `load` returns them.
        machine_kind: As `kind` returns it.
    """
    then = figures.get(machine_kind)
    if then is None:
        known = "; ".join(figures) or "none"
        return [f"no committed figures of this kind of machine ({machine_kind}); known: {known}"]
    moved, n_compared = [], 0
    for row in rows:
        before = then["rows"].get(row.name)
        if before is None:
            continue
        by_ratio = row.ratio is not None and before.get("ratio") is not None
        now, was = (row.ratio, before["ratio"]) if by_ratio else (row.value, before.get("value"))
        if now is None or not was:
            continue
        n_compared += 1
        noise = NOISE_OF_RATIO if by_ratio else NOISE_OF_VALUE
        change = now / was
        if not 1 / (1 + noise) <= change <= 1 + noise:
            what = "ratio" if by_ratio else "value"
            moved.append(
                f"moved: {row.name}: {what} {was:.3g} -> {now:.3g} ({change - 1:+.0%}, noise {noise:.0%})"
            )
    head = f"{n_compared} rows compared with commit {then['commit']} of {then['date']}: {len(moved)} moved"
    return [head, *moved]


def record(rows: list[BenchRow], commit: str, path: Path = FIGURES) -> None:
    """Enter rows as the figures of this kind of machine; rows that were not measured keep theirs."""
    figures = load(path)
    before = figures.get(kind(), {"rows": {}})
    measured = {row.name: {"value": row.value, "ratio": row.ratio} for row in rows}
    figures[kind()] = {
        "commit": commit,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "rows": {**before["rows"], **measured},
    }
    write_whole(path, orjson.dumps(figures, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
