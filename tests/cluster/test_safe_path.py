"""The installed package runs, whatever lies in the user's folder, and the user's own code is found there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gpu_worker.models.kinds import supernet_kind
from profiles.table import load_profile
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from tests.cluster.machine import WAIT_S
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.machine import Machine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MINE = "raise SystemExit('this is the code of the user')\n"
OWN_POLICY = """
import helper_of_mine
from router.policies.slackfit import SlackFit

def mine(profile, argument):
    policy = SlackFit(profile, None)
    helper_of_mine.seen(argument)
    return policy
"""
OWN_KIND = """
from dataclasses import replace
from gpu_worker.models.kinds import KINDS

kind = replace(KINDS["digits"], name="mine")
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a folder with names of our packages and of Python's, as a service has them."""
    folder = tmp_path / "service"
    folder.mkdir()
    for name in ("router", "gpu_worker"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(MINE)
        (folder / name / "__main__.py").write_text(MINE)
    for name in ("cluster", "loadgen", "superserve", "random", "secrets", "orjson"):
        (folder / f"{name}.py").write_text(MINE)
    return folder


def in_folder(folder: Path, program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run an installed command, as `bin/PROGRAM` does, with `folder` as the working folder."""
    start = f"import {program}.cli, sys; sys.argv[0] = {program!r}; {program}.cli.cli()"
    return subprocess.run(
        [sys.executable, "-P", "-c", start, *args],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=WAIT_S * 2,
    )  # fmt: skip


def test_children_run_the_installed_package(hostile: Path) -> None:
    """A router, a worker and a sender, started in a folder that has modules of their names."""
    done = in_folder(
        hostile, "loadgen", "run", "--trace", "constant:rate=50", "--duration", "1", "--slo-ms", "10000",
        "--emulate", "cnn-8gpu-modelled:1", "--json", "out.json",
    )  # fmt: skip

    assert "code of the user" not in done.stderr
    assert json.loads((hostile / "out.json").read_text())["queries"]["ok"] == 50, done.stderr


def test_a_cluster_runs_the_installed_package(hostile: Path, here: Machine) -> None:
    """Its keeper, its router and its workers; and down stops them."""
    here.folder = hostile
    here.up()
    assert here.run("status")[0] == 0
    code, output = here.run("down")
    assert code == 0, output


def test_a_policy_of_ones_own_is_found_where_the_command_is_typed(tmp_path: Path) -> None:
    """With what it imports from beside it, in the command and in the router that it starts."""
    (tmp_path / "helper_of_mine.py").write_text("def seen(argument):\n    assert argument == 'x'\n")
    (tmp_path / "policies_of_mine.py").write_text(OWN_POLICY)
    done = in_folder(
        tmp_path, "loadgen", "run", "--trace", "constant:rate=50", "--duration", "1", "--slo-ms", "10000",
        "--emulate", "cnn-8gpu-modelled:1", "--policy", "policies_of_mine:mine:x", "--json", "out.json",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["queries"]["ok"] == 50


def test_a_kind_of_ones_own_is_found_by_profiles(tmp_path: Path) -> None:
    """The kind is loaded; that this profile is another's shows that it was."""
    (tmp_path / "kinds_of_mine.py").write_text(OWN_KIND)
    done = in_folder(
        tmp_path, "profiles", "calibrate", "cnn-8gpu-modelled", "--supernet", "kinds_of_mine:kind",
        "--out", "mine.json",
    )  # fmt: skip

    assert "the profile's, got mine" in done.stderr, done.stderr


def test_what_is_not_there_is_named() -> None:
    """A module, an attribute, and what a module of one's own fails to import."""
    profile = load_profile("cnn-8gpu-modelled")
    with pytest.raises(ConfigError, match="policy 'nowhere_at_all' is unknown"):
        make_policy("nowhere_at_all:thing", profile)
    with pytest.raises(ConfigError, match=r"policy json:nothing: .*has no attribute 'nothing'"):
        make_policy("json:nothing", profile)
    for name in ("json:nothing", ":nothing", "..:nothing", "no_module_of_mine:kind"):
        with pytest.raises(ConfigError, match=f"^supernet {name}: "):
            supernet_kind(name)
