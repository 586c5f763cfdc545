"""What the slow tests of engines share: each is installed, or built, once in a run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.cluster.engines.real import PODMAN_PROGRAMS, Podman, Tools, helm_in, require
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Return the commands of docs/engines.md that a test runs."""
    (block,) = re.findall(rf"^<!-- runs: {name} -->\n```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(block).splitlines()


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    """Return a validator of manifests and podman-compose."""
    tools = Tools(tmp_path_factory.mktemp("tools"))
    tools.install()
    return tools


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return helm."""
    return helm_in(tmp_path_factory.mktemp("helm"))


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
