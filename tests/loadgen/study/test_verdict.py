"""Whether a policy may take another's place: what the limits mean, cell by cell."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from loadgen.cli import cli
from loadgen.study.compare import Cell, CellResult, Figures
from loadgen.study.verdict import differs, markdown, shortfalls, verdict_lines

ALIKE = Cell("alike", "poisson:rate=1", "cnn-8gpu-modelled:8")
MIXED = Cell("mixed", "poisson:rate=1", "cnn-8gpu-modelled:8", slo_ms="18,36")


def result(cell: Cell, theirs: tuple[float, float], ours: tuple[float, float]) -> CellResult:
    """Return a cell's result of one seed: attainment and summed accuracy a query of "old" and "new"."""
    figures: dict[str, tuple[Figures, ...]] = {
        name: (Figures(attainment, per_query / attainment, per_query),)
        for name, (attainment, per_query) in (("old", theirs), ("new", ours))
    }
    return CellResult(cell, (0,), figures, None)


@pytest.mark.parametrize(
    ("cell", "ours", "expected"),
    [
        (ALIKE, (0.999, 78.0), ()),
        (ALIKE, (0.9986, 77.981), ()),  # within both limits
        (ALIKE, (0.9984, 78.0), ("attainment -0.00060",)),
        (ALIKE, (0.999, 77.97), ("summed accuracy a query -0.0300, expected at least -0.02",)),
        (MIXED, (0.999, 78.31), ()),
        (MIXED, (0.999, 78.2), ("summed accuracy a query +0.2000, expected at least +0.3",)),
    ],
)
def test_the_limits(cell: Cell, ours: tuple[float, float], expected: tuple[str, ...]) -> None:
    """Behind by no more than noise where all are alike, ahead by a margin where they differ."""
    assert shortfalls(result(cell, (0.999, 78.0), ours), "new", "old") == expected


def test_cells_that_differ() -> None:
    """Mixes of SLOs, several profiles, and floors."""
    assert not differs(ALIKE)
    assert differs(MIXED)
    assert differs(Cell("unequal", "poisson:rate=1", "cnn-8gpu-modelled:4,cnn-8gpu-modelled*2.5:4"))
    assert differs(Cell("floor", "poisson:rate=1", "cnn-8gpu-modelled:8", floor="78:0.3"))


def test_the_verdict_names_every_cell_that_falls_short() -> None:
    """One line has the verdict, the others the cells."""
    good, bad = result(ALIKE, (1, 78), (1, 78)), result(MIXED, (1, 78), (1, 78))
    assert verdict_lines([good]) == ["new may take old's place: it holds every limit in 1 cells"]
    assert verdict_lines([good, bad]) == [
        "new may not take old's place; of 2 cells it falls short in:",
        "  mixed: summed accuracy a query +0.0000, expected at least +0.3",
    ]


def test_the_page_has_a_row_for_each_cell() -> None:
    """Cell, each policy's figures, the paired difference, the bound."""
    row = markdown([result(MIXED, (0.5, 40), (1, 79))])[-1]
    assert row == "| mixed | 40.000 (0.50000) | 79.000 (1.00000) | +39.000 |  |"


def test_judging_exits_1_where_a_policy_falls_short() -> None:
    """The command's exit code is the verdict."""
    common = ["compare", "--simulate", "--trace", "poisson:rate=4000", "--duration", "0.5", "--seeds", "1",
              "--no-bound", "--processes", "1", "--judge", "--policy", "slackfit"]  # fmt: skip
    for policy, code in (("demandfit", 0), ("mincost", 0), ("maxacc", 1)):
        found = CliRunner().invoke(cli, [*common, "--policy", policy])
        assert found.exit_code == code, found.output
