"""The committed figures: which rows have moved is said only of rows that moved beyond noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from loadgen.bench import figures
from loadgen.bench.rows.row import BenchRow
from loadgen.bench.table import ROWS
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

THEN = {
    "here": {
        "commit": "abc",
        "date": "2026-01-02",
        "rows": {
            "rate": {"value": 100.0, "ratio": 0.5},
            "alone": {"value": 10.0, "ratio": None},
            "gone": {"value": 1.0, "ratio": None},
        },
    }
}


def row(name: str, value: float | None, reference: float | None) -> BenchRow:
    """Return a row without conditions."""
    return BenchRow(name, value, "us", "x", reference)


@pytest.mark.parametrize(
    ("value", "reference", "line"),
    [
        (100.0, 200.0, None),
        (300.0, 600.0, None),  # the hour: value and reference together
        (124.0, 200.0, None),
        (130.0, 200.0, "moved: rate: ratio 0.5 -> 0.65 (+30%, noise 25%)"),
        (70.0, 200.0, "moved: rate: ratio 0.5 -> 0.35 (-30%, noise 25%)"),
        (150.0, None, None),
        (170.0, None, "moved: rate: value 100 -> 170 (+70%, noise 60%)"),
    ],
)
def test_what_moves_beyond_noise_is_named(value: float, reference: float | None, line: str | None) -> None:
    """Up or down; by its ratio where both runs have one."""
    lines = figures.compared([row("rate", value, reference), row("new", 1.0, None)], THEN, "here")
    n_moved = 0 if line is None else 1
    assert lines == [
        f"1 rows compared with commit abc of 2026-01-02: {n_moved} moved", *([line] if line else [])
    ]  # fmt: skip


def test_a_row_without_a_figure_is_not_compared() -> None:
    """Neither one that found nothing now, nor one that was not measured."""
    lines = figures.compared([row("alone", None, None)], THEN, "here")
    assert lines == ["0 rows compared with commit abc of 2026-01-02: 0 moved"]


def test_another_kind_of_machine_is_not_compared() -> None:
    """It is named, with those that are known."""
    (line,) = figures.compared([row("alone", 1.0, None)], THEN, "there")
    assert line == "no committed figures of this kind of machine (there); known: here"


def test_what_is_recorded_is_found(tmp_path: Path) -> None:
    """Rows that were not measured keep their figures, other kinds theirs."""
    path = tmp_path / "figures.json"
    figures.record([row("a", 1.0, 2.0), row("b", 3.0, None)], "one", path)
    figures.record([row("b", 4.0, None)], "two", path)
    found = figures.load(path)
    assert found[figures.kind()]["commit"] == "two"
    assert found[figures.kind()]["rows"] == {
        "a": {"value": 1.0, "ratio": 0.5}, "b": {"value": 4.0, "ratio": None}
    }  # fmt: skip
    assert figures.load(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["[", "[1]", '{"here": {}}', '{"here": {"rows": 1}}'])
def test_a_malformed_file_is_named(tmp_path: Path, text: str) -> None:
    """With its path, and what was expected."""
    path = tmp_path / "figures.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"figures\.json: expected an object of kinds of machines"):
        figures.load(path)


def test_the_committed_figures_are_of_rows_that_exist() -> None:
    """A row that was renamed would never be compared again."""
    for of_kind in figures.load().values():
        assert set(of_kind["rows"]) <= set(ROWS)
