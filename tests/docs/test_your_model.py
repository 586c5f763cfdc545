"""docs/your-model.md, block after block, in an empty folder: files are saved, commands are typed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from superserve.roles.local import STATE_VARIABLE
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = ROOT / "docs" / "your-model.md"
PORT = "5555"
"""The port on the page; the test takes a free one."""

COMMAND_S = 120
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"[Ss]ave (?:it|this) as\s`([\w.]+)`")


class Step(NamedTuple):
    """What the reader does with one block: saves it as a file, or types it.

    Attributes:
        file: The name under which it is saved; empty if it is typed.
        text: The block.
    """

    file: str
    text: str


def steps(page: str) -> list[Step]:
    """Return the blocks of a page in their order; a block of Python is saved under the name before it."""
    found, end = [], 0
    for match in _FENCE.finditer(page):
        language, text = match.groups()
        names = _FILE.findall(page[end : match.start()])
        assert bool(names) == (language == "python"), f"a name for each file, and none for commands: {text}"
        found.append(Step(names[-1] if names else "", text))
        end = match.end()
    return found


def free_port() -> str:
    """Return a port that nothing holds now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


class Reader:
    """Somebody who follows the page in an empty folder, with a state folder of their own."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.folder = folder
        self.env = {
            **os.environ,
            STATE_VARIABLE: str(state),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "200",
        }

    def type(self, line: str) -> tuple[int, str]:
        """Run one line; return its exit code and all that it printed."""
        done = subprocess.run(
            ["/bin/sh", "-c", line], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_S, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Give a reader; whatever the page left running is stopped."""
    folder = tmp_path / "empty"
    folder.mkdir()
    reader = Reader(folder, tmp_path / "state")
    yield reader
    reader.type("cluster down")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_page_takes_a_network_to_a_served_cluster(reader: Reader) -> None:
    """Every file and command of the page works as it stands, and the client gets right answers."""
    port, outputs = free_port(), {}
    for step in steps(PAGE.read_text(encoding="utf-8")):
        text = step.text.replace(PORT, port)
        if step.file:
            (reader.folder / step.file).write_text(text, encoding="utf-8")
            continue
        for line in text.splitlines():
            code, outputs[line] = reader.type(line)
            # On a busy machine `loadgen` exits 1 after its table: the run is disturbed and does not count.
            has_run = line.startswith("loadgen") and "SLO attainment" in outputs[line]
            assert code == 0 or has_run, f"{line}\n{outputs[line]}"

    (client,) = [output for line, output in outputs.items() if line == "python client.py"]
    counts = re.search(r"(\d+) of 100 answered, (\d+) right\nthe last by small-", client)
    assert counts is not None, client
    answered, right = map(int, counts.groups())
    assert right > answered / 2 > 0  # a model whose subnets guess gets a tenth right


def test_the_page_is_read_block_by_block() -> None:
    """The test above is not passed by finding nothing: four files, then commands."""
    found = steps(PAGE.read_text(encoding="utf-8"))

    files = [step.file for step in found if step.file]
    assert files == ["my_model.py", "my_supernet.py", "train.py", "client.py"]
    assert sum(len(step.text.splitlines()) for step in found if not step.file) >= 9
