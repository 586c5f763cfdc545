"""The version names the code that runs: a change anywhere in it, at any depth, is another version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from superserve.roles.version import digest, version
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_a_change_in_a_sub_folder_is_another_version(tmp_path: Path) -> None:
    """A module two folders down counts: a host that runs an older one is seen."""
    module = tmp_path / "router" / "core" / "edf.py"
    module.parent.mkdir(parents=True)
    module.write_text("ORDER = 1\n")
    before = digest(tmp_path)

    module.write_text("ORDER = 2\n")

    assert digest(tmp_path) != before


def test_a_module_that_moves_is_another_version(tmp_path: Path) -> None:
    """The same bytes under another name are other code."""
    (tmp_path / "router").mkdir()
    module = tmp_path / "router" / "edf.py"
    module.write_text("ORDER = 1\n")
    before = digest(tmp_path)

    (tmp_path / "router" / "core").mkdir()
    module.rename(tmp_path / "router" / "core" / "edf.py")

    assert digest(tmp_path) != before


def test_a_process_states_the_digest_of_the_code_that_it_runs(tmp_path: Path) -> None:
    """Of this checkout's files, and not of a folder without any."""
    assert version().endswith(f"+{digest(ROOT)[:8]}")
    assert digest(ROOT) != digest(tmp_path)


def test_what_does_not_serve_is_left_out(tmp_path: Path) -> None:
    """The load generator's files are not what a router or worker runs."""
    before = digest(tmp_path)
    (tmp_path / "loadgen").mkdir()
    (tmp_path / "loadgen" / "run.py").write_text("\n")

    assert digest(tmp_path) == before
    assert "+" in version()
