"""Which form of the code runs: pure Python, compiled, or neither because the two differ."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from typing import TYPE_CHECKING

import pytest

from superserve.build import COMPILED, PURE, build, build_of
from superserve.errors import ConfigError
from superserve.roles.version import version

if TYPE_CHECKING:
    from pathlib import Path


def recorded(root: Path, *, suffix: str = EXTENSION_SUFFIXES[0]) -> Path:
    """Write a module and the record of its compilation; return the module."""
    module = root / "router" / "edf.py"
    module.parent.mkdir()
    module.write_text("QUEUE = 1\n")
    (root / "superserve").mkdir()
    modules = {"router/edf.py": hashlib.sha256(b"QUEUE = 1\n").hexdigest()}
    (root / "superserve" / "compiled.json").write_text(json.dumps({"suffix": suffix, "modules": modules}))
    return module


def test_without_a_record_python_is_pure(tmp_path: Path) -> None:
    """A checkout that was never compiled."""
    assert build_of(tmp_path) == PURE


def test_what_was_compiled_from_this_source_runs(tmp_path: Path) -> None:
    """With the source beside it, or without."""
    module = recorded(tmp_path)
    assert build_of(tmp_path) == COMPILED
    module.unlink()
    assert build_of(tmp_path) == COMPILED


def test_what_was_compiled_for_another_python_is_passed_over(tmp_path: Path) -> None:
    """This one does not load it, so the source may differ."""
    recorded(tmp_path, suffix=".cpython-39-x86_64-linux-gnu.so").write_text("QUEUE = 2\n")
    assert build_of(tmp_path) == PURE


def test_a_source_that_has_changed_since_is_refused_by_name(tmp_path: Path) -> None:
    """The error says what to type."""
    module = recorded(tmp_path)
    module.write_text("QUEUE = 2\n")
    with pytest.raises(ConfigError, match=f"{module}: the source has changed .* type `make compile`"):
        build_of(tmp_path)


def test_the_version_says_which_form_runs() -> None:
    """In one line, as users paste it into reports."""
    words = [sys.executable, "-P", "-m", "superserve", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"superserve {version()}, {build()} core, Python 3.")
