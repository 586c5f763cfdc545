"""docs/policies.md: its table of constants is the code's, and its package installs and serves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from router.policies import planfit
from router.policies.registry import known_policies
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """Return the page's blocks of one language."""
    return [text for name, text in _BLOCK.findall(PAGE) if name == language]


def test_every_shipped_policy_has_its_row() -> None:
    """The first table names all of them, and none that there is not."""
    named = re.findall(r"^\| `([a-z]+)(?::[A-Z]+)?` \|", PAGE, re.MULTILINE)
    assert set(named) == set(known_policies())


def test_the_table_of_constants_is_the_codes() -> None:
    """Every number that PlanFit was tuned by, with its value."""
    rows = dict(re.findall(r"^\| `(_[A-Z_]+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    values = {
        name: value
        for name, value in vars(planfit).items()
        if name.startswith("_") and isinstance(value, float) and name != "_FOR_EVER"
    }
    assert {name: float(value) for name, value in rows.items()} == values


@pytest.mark.timeout(120)
def test_the_package_of_the_page_is_installed_and_simulated(tmp_path: Path) -> None:
    """Its two files install without a network, and its command serves all queries by it."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (toml,), (python,), (shell,) = blocks("toml"), blocks("python"), blocks("sh")
    (source / "pyproject.toml").write_text(toml, encoding="utf-8")
    (source / "steady_policy.py").write_text(python, encoding="utf-8")
    install, simulate = shell.splitlines()
    assert install == "python -m pip install --no-deps --no-build-isolation ."
    # Into a folder of its own, so that this environment stays as it is.
    options = ["--no-index", "--disable-pip-version-check", "--quiet", "--target", str(target), "."]
    run([*install.replace("python", sys.executable).split()[:-1], *options], source)

    words = simulate.split()
    assert words.pop(0) == "loadgen"
    output = run([sys.executable, "-m", "loadgen", *words], source, str(target))

    assert "steady:cnn-78.25\n" in output, output
    assert "SLO attainment   1.00000" in output, output
    assert "mean accuracy    78.250 %" in output, output


def run(command: list[str], folder: Path, *paths: str) -> str:
    """Run a command, which must not fail; return what it printed."""
    path = os.pathsep.join([*paths, str(ROOT)])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}, text=True, timeout=100,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout
