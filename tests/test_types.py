"""The types are right, tests included: a test of its own, so that it runs beside the others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.timeout(600)
def test_mypy_finds_nothing() -> None:
    """As `make lint` asks, by the settings in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
