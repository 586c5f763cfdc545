"""What the slow tests of engines share: each is installed, or built, once in a run."""

from __future__ import annotations

import fcntl
import re
from typing import TYPE_CHECKING

import pytest

from tests.cluster.engines.real import PODMAN_PROGRAMS, Podman, Tools, helm_in, require
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Return the commands of docs/engines.md that a test runs."""
    (block,) = re.findall(rf"^<!-- runs: {name} -->\n```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(block).splitlines()


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Fill a folder unless another process of this run has done so, or does it now; return it."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder.with_suffix(".made")
        if not made.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all processes of this run share, or that the only one has."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if own.name.startswith("popen-") else own


@pytest.fixture(scope="session")
def tools(shared: Path) -> Tools:
    """Return a validator of manifests and podman-compose."""
    return Tools(once(shared / "tools", lambda folder: Tools(folder).install()))


@pytest.fixture(scope="session")
def helm(shared: Path) -> Path:
    """Return helm."""
    return once(shared / "helm", helm_in) / "helm" / "helm"


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Yield podman with the image of deploy/Dockerfile; nothing of it stays."""
    require(*PODMAN_PROGRAMS)
    podman = Podman(tmp_path_factory.mktemp("podman"))
    podman.set_up()
    try:
        podman.build(commands("keys")[0])
        yield podman
    finally:
        podman.tear_down()
