"""A forked command does what a new Python would, and is killed when it does not end."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests import warm
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("args", [("status",), ("statsu",), ("down", "--help")])
def test_a_forked_command_is_as_a_new_one(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Its exit code and all that it prints, in the environment that it is given."""
    env = {**os.environ, "SUPERSERVE_STATE": str(tmp_path), "COLUMNS": "70"}
    new = subprocess.run(
        [sys.executable, "-P", "-m", "cluster", *args], cwd=ROOT, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    assert warm.run("cluster", *args, env=env, timeout_s=60.0) == (new.returncode, new.stdout)


def test_one_that_does_not_end_is_killed() -> None:
    """The error has what it printed until then."""
    with pytest.raises(AssertionError, match=r"did not end within 5 s: listening at "):
        warm.run("loadgen", "agent", env=os.environ, timeout_s=5.0)
