"""`loadgen gate`: what it plays and refuses; its exit code is the verdict; judgements are listed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from loadgen.cli import cli
from loadgen.study.compare import Cell
from loadgen.study.gate.draft import GateCell

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = GateCell("tiny", Cell("tiny heavy", "poisson:rate=2000", "cnn-8gpu-modelled:2", duration_s=0.2))
LIGHT = GateCell(
    "tiny", Cell("tiny light", "poisson:rate=200", "cnn-8gpu-modelled:2", duration_s=0.2), is_held_out=True
)
AWAY = GateCell("tiny", Cell("tiny away", "missing", "cnn-8gpu-modelled:2"), skipped="its file is not here")


@pytest.fixture(autouse=True)
def _two_tiny_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("loadgen.cli.gate.gate_cells", lambda _: [HEAVY, LIGHT, AWAY])
    monkeypatch.chdir(tmp_path)


def run(*args: str) -> tuple[int, str]:
    """Run `loadgen gate` in this process; return the exit code and all that it printed."""
    found = CliRunner().invoke(cli, ["gate", "--processes", "1", *args])
    return found.exit_code, found.output


def test_a_look_plays_the_cells_for_tuning(tmp_path: Path) -> None:
    """A sample of them too; the figures are kept and written; held-out cells are not played."""
    code, output = run("--policy", "demandfit", "--sample", "--json", "x.json", "--markdown", "x.md")

    assert code == 0, output
    assert "seeds 1 to 2" in output
    assert "tiny heavy" in output
    assert "tiny light" not in output
    assert "demandfit keeps its promise in 1 cells" in output
    assert len(list((tmp_path / "out" / "gate").iterdir())) == 2
    assert json.loads((tmp_path / "x.json").read_text())["seeds"] == [1, 2]
    assert "| tiny heavy | tuned |" in (tmp_path / "x.md").read_text()


def test_a_policy_that_breaks_its_promise_exits_1() -> None:
    """The exit code is the verdict, and the table says which line failed and by how much."""
    code, output = run("--policy", "fixed:largest", "--seeds", "3:1")

    assert code == 1
    assert "FAILS a -0." in output
    assert "fixed:largest breaks its promise in 1 cells" in output


def test_judgements_are_listed_with_their_seeds(tmp_path: Path) -> None:
    """All cells, fresh seeds each time, and both verdicts stand in the list and on its page."""
    code, output = run("--policy", "demandfit", "--judgement", "list.json")
    assert code == 0, output
    assert "tiny light" in output
    assert "tiny away: skipped: its file is not here" in output
    code, _ = run("--policy", "fixed:largest", "--judgement", "list.json")
    assert code == 1

    first, second = json.loads((tmp_path / "list.json").read_text())
    assert (first["seeds"], first["holds"]) == ([21, 22, 23, 24, 25], True)
    assert (second["seeds"], second["holds"]) == ([26, 27, 28, 29, 30], False)
    assert first["n_cells"] == 2
    assert first["n_skipped"] == 1
    assert list(second["fails"]) == ["tiny heavy"]
    assert "fails in 1" in (tmp_path / "list.md").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "slackfitt"), "did you mean 'slackfit'"),
        (("--baseline", "slackfitt"), "did you mean 'slackfit'"),
        (("--seeds", "21:5"), "--seeds: expected seeds from 1 to 20 without --judgement"),
        (("--seeds", "5"), "--seeds: expected FIRST:N"),
        (("--seeds", "5:5", "--judgement", "list.json"), "expected seeds from 21 on"),
        (("--sample", "--judgement", "list.json"), "--judgement: a judgement is of all cells"),
        (("--cell", "tiny", "--judgement", "list.json"), "--judgement: a judgement is of all cells"),
        (("--any-version", "--judgement", "list.json"), "--judgement: a judgement is of all cells"),
        (("--cell", "light"), "--cell: no cell's name holds light"),
        (("--family", "huge"), "--family: expected one of tiny, got 'huge'"),
        (("--cell", "away"), "--cell: every cell is skipped; tiny away: its file is not here"),
        (("--json", "/dev/null/x.json"), "--json: /dev/null: expected a folder"),
    ],
)
def test_wrong_options_are_refused_by_name(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """The message names the option and what was expected; nothing is played or listed."""
    code, output = run(*args)

    assert code == 1
    assert said in output
    assert not (tmp_path / "list.json").exists()
    assert not (tmp_path / "out").exists()
