"""Modules that moved are found under their old names for one release, and each says where it went."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from superserve.moved import _FINDER

ROLES = ("gpu_worker", "loadgen", "router")


def moves() -> dict[str, str]:
    """Return old names and new ones, of every package that has any."""
    for role in ROLES:
        importlib.import_module(role)
    return dict(_FINDER.moved)


@pytest.mark.parametrize(("old", "new"), sorted(moves().items()))
def test_an_old_name_is_the_new_module_and_warns(old: str, new: str) -> None:
    """Both names lead to one module object, so that its classes are the same classes."""
    sys.modules.pop(old, None)

    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        found = importlib.import_module(old)

    assert found is importlib.import_module(new)
    assert found.__spec__ is not None
    assert found.__spec__.name == new


@pytest.mark.parametrize("module", ["gpu_worker.eventlog", "loadgen.chaos", "loadgen.reproduce"])
def test_python_m_finds_old_names(module: str) -> None:
    """Commands that the pages have shown still run."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=30, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
