"""The wheel that is shipped: the same files, the same bytes; and what hosts need beside it."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from cluster.remote import wheel

ROOT = Path(__file__).parents[3]


def test_the_same_files_give_the_same_wheel() -> None:
    """Its hash identifies the version, so only the content may change it."""
    assert wheel.pack() == wheel.pack()


def test_it_runs_where_nothing_else_of_ours_is(tmp_path: Path) -> None:
    """Unpacked, it is all that `python -m router` and the host's part of the launcher need."""
    with zipfile.ZipFile(io.BytesIO(wheel.pack().content)) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    for module in ("router", "gpu_worker"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    where = "import cluster.host.onhost as m; print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_what_hosts_need_is_what_the_project_says() -> None:
    """Each distribution and its least version is of pyproject.toml; none of `server` is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = ("server", "cluster", "worker", "gateway", "tokens")
    declared = {*project["dependencies"], *(one for name in used for one in extras[name])}

    further = (*wheel.FOR_SUPERNETS, *wheel.FOR_FAMILIES, *wheel.FOR_GATEWAY, *wheel.FOR_TEXTS)
    for name, least in (*wheel.ON_EVERY_HOST, *further):
        assert f"{name}>={least}" in declared
    here = {f"{name}>={least}" for name, least in wheel.ON_EVERY_HOST}
    assert {*project["dependencies"], *extras["server"]} <= here


def test_every_package_is_in_it() -> None:
    """The list is pyproject.toml's."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert list(wheel.PACKAGES) == build["targets"]["wheel"]["packages"]
