"""A reader of a page: saves its files, types its commands, in an empty folder."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from superserve.roles.local import STATE_VARIABLE

PORT = "5555"
"""The port on the pages; tests take a free one."""

COMMAND_S = 180
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
    """Return the blocks of a page in their order; Python, JSON and YAML are saved under the name before."""
    found, end = [], 0
    for match in _FENCE.finditer(page):
        language, text = match.groups()
        names = _FILE.findall(page[end : match.start()])
        assert bool(names) == (language in ("python", "json", "yaml")), (
            f"a name for each file, and none for commands: {text}"
        )
        found.append(Step(names[-1] if names else "", text))
        end = match.end()
    return found


def free_port() -> str:
    """Return a port that nothing holds now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


class Reader:
    """A reader who follows the page in an empty folder, with an own state folder."""

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

    def follow(self, found: list[Step]) -> dict[str, str]:
        """Save every file and type every line; return what each line printed; none may fail."""
        port, outputs = free_port(), {}
        for step in found:
            text = step.text.replace(PORT, port)
            if step.file:
                (self.folder / step.file).write_text(text, encoding="utf-8")
                continue
            for line in text.splitlines():
                code, outputs[line] = self.type(line)
                # On a busy machine `loadgen` exits 1 after its table: its run is disturbed.
                has_run = line.startswith("loadgen") and "SLO attainment" in outputs[line]
                assert code == 0 or has_run, f"{line}\n{outputs[line]}"
        return outputs
