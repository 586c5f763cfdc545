"""The table of mutants fits the code; the runner reports what survives, what is stale, what is noticed."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tests.mutants.__main__ import main
from tests.mutants.mutant import Mutant, StaleError
from tests.mutants.run import Verdict, baseline, fates
from tests.mutants.table import MUTANTS
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

FEWEST = 40
HALF = "def half(n: int) -> int:\n    # rounds down\n    return n // 2\n"
TEST = "from little import half\n\n\ndef test_half() -> None:\n    assert half(5) == 2\n"


def misfit(mutant: Mutant) -> str | None:
    """Return why a mutant does not fit the code; None if it does."""
    try:
        path, broken = mutant.applied(ROOT)
    except StaleError as error:
        return str(error)
    if broken == path.read_text(encoding="utf-8"):
        return "it changes nothing"
    if mutant.where.startswith("tests"):
        return "a mutant breaks what is tested, not the tests"
    missing = [test for test in mutant.tests if not (ROOT / test).exists() or "e2e" in test]
    return (
        f"expected tests that exist and start no process, got {missing}"
        if missing or not mutant.tests
        else None
    )


def test_every_mutant_fits_the_code() -> None:
    """Its snippet is there exactly once, what it makes of the file is Python, and its tests exist."""
    assert {one.name: why for one in MUTANTS if (why := misfit(one)) is not None} == {}


def test_names_are_unique_and_there_are_enough() -> None:
    """Each can be run by its name; no two are the same fault; every role has some."""
    names = Counter(mutant.name for mutant in MUTANTS)
    faults = Counter((mutant.where, mutant.old, mutant.new) for mutant in MUTANTS)

    assert [name for name, n in names.items() if n > 1] == []
    assert [fault for fault, n in faults.items() if n > 1] == []
    assert len(MUTANTS) >= FEWEST
    for role in ("router/core", "router/policies", "superserve/client", "gpu_worker"):
        assert sum(mutant.where.startswith(role) for mutant in MUTANTS) >= 10, role


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a tree of one package, one test and the settings that the runner asks for."""
    for package, text in (("little", HALF), ("tests", "")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(text)
    (tmp_path / "tests" / "test_half.py").write_text(TEST)
    for name in ("conftest.py", "effort.py", "paths.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["-ra"]\n')
    return tmp_path


def little(old: str, new: str) -> Mutant:
    """Return a mutant of the little package."""
    return Mutant(f"{old} to {new}", "little/__init__.py", old, new, ("tests/test_half.py",))


@pytest.mark.e2e
def test_the_runner_reports_how_each_mutant_fared(tree: Path) -> None:
    """Noticed, passed unnoticed, not applicable, and broken altogether: only the first is good."""
    mutants = (
        little("n // 2", "n // 3"),
        little("# rounds down", "# rounds up"),
        little("n / 2", "n / 3"),
        little("def half", "def third"),
    )
    found = list(fates(mutants, tree, n_jobs=2))

    assert [fate.mutant for fate in found] == list(mutants)
    assert [fate.verdict for fate in found] == [
        Verdict.KILLED,
        Verdict.SURVIVED,
        Verdict.STALE,
        Verdict.BROKEN,  # no test looked at it: the import failed
    ]
    assert found[0].detail == "tests/test_half.py::test_half"
    assert "found 0 times: 'n / 2'" in found[2].detail
    assert (tree / "little" / "__init__.py").read_text() == HALF


@pytest.mark.e2e
def test_the_runner_wants_tests_that_pass(tree: Path) -> None:
    """Tests that fail anyway cannot show that a mutant was noticed."""
    assert baseline(["tests/test_half.py"], tree) is None
    (tree / "tests" / "test_half.py").write_text(TEST.replace("== 2", "== 3"))

    assert "test_half" in (baseline(["tests/test_half.py"], tree) or "")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("n", "m", "expected once, found"),
        ("n // 2", "n // 2", "it changes nothing"),
        ("return n // 2", "return n //", "not Python any more"),
    ],
)
def test_a_stale_mutant_says_why(tree: Path, old: str, new: str, says: str) -> None:
    """So that it can be brought up to date, and is not taken for one that was noticed."""
    with pytest.raises(StaleError, match=f"little/__init__.py: {says}"):
        little(old, new).applied(tree)


def test_the_command_lists_and_selects() -> None:
    """All of them, or those whose name or place has the words; none is an error."""
    listed = CliRunner().invoke(main, ["--list"])
    some = CliRunner().invoke(main, ["--list", "--only", "a late answer is called OK"])
    none = CliRunner().invoke(main, ["--only", "no such thing"])

    assert (listed.exit_code, listed.output.count("\n")) == (0, len(MUTANTS))
    assert some.output.count("\n") == 1
    assert (none.exit_code, none.output) == (1, "Error: no mutant has no such thing in its name or place\n")
