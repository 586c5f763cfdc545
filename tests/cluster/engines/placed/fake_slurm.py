"""Slurm's commands as a script on PATH: jobs are files, and each call is noted.

jobs/ID      a line of squeue, as `slurm_commands` asks for it
calls        each command line
fail/NAME    if it is there, that command fails with its content on stderr
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")

_SCRIPT = f"""\
#!{sys.executable} -IS
import os, pathlib, sys
folder = pathlib.Path(__file__).parent
name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (folder / "calls").open("a") as calls:
    calls.write(" ".join([name, *args]) + "\\n")
fail = folder / "fail" / name
if fail.exists():
    sys.exit(fail.read_text())
jobs = {{int(path.name): path for path in (folder / "jobs").iterdir()}}
lines = {{number: path.read_text() for number, path in sorted(jobs.items())}}
if name == "sbatch":
    script = sys.stdin.read()
    number = max([0, *jobs]) + 1
    (folder / f"script-{{number}}").write_text(script)
    job = next(line.partition("=")[2] for line in script.splitlines() if "--job-name=" in line)
    (folder / "jobs" / str(number)).write_text(f"{{number}}|{{job}}|RUNNING|0:07|n{{number}}|None")
    print(number)
elif name == "squeue":
    wanted = [name for arg in args if arg.startswith("--name=") for name in arg[7:].split(",")]
    for line in lines.values():
        _, job, state, _, node, _ = line.split("|", 5)
        if not wanted:
            print(line)
        elif job in wanted and state == "RUNNING":
            print(job + "|" + node)
elif name == "scontrol" and "node" in args:
    print(f"NodeName={{args[-1]}} Arch=x86_64 NodeAddr=10.1.0.{{args[-1][1:]}} NodeHostName={{args[-1]}}")
elif name == "scancel":
    path = jobs[int(args[-1])]
    parts = path.read_text().split("|", 5)
    parts[2] = "COMPLETED" if "--batch" in args else "CANCELLED"
    path.write_text("|".join(parts))
"""


@dataclass(frozen=True, slots=True)
class FakeSlurm:
    """A Slurm cluster that is a folder.

    Attributes:
        folder: With the commands, jobs and calls.
    """

    folder: Path

    @property
    def calls(self) -> list[str]:
        """Every command line so far."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def script(self, number: int) -> str:
        """Return what was submitted as that job."""
        return (self.folder / f"script-{number}").read_text()

    def set(self, number: int, **fields: str) -> None:
        """Change a job's state, node or reason, or make one."""
        path = self.folder / "jobs" / str(number)
        names = ("id", "name", "state", "up", "node", "reason")
        text = path.read_text() if path.exists() else f"{number}|other|RUNNING|0:01|n{number}|None"
        values = dict(zip(names, text.split("|", 5), strict=True)) | fields
        path.write_text("|".join(values[name] for name in names))

    def fail(self, name: str, words: str) -> None:
        """Let a command fail from now on."""
        (self.folder / "fail" / name).write_text(words)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Put the commands first on PATH."""
    for name in ("jobs", "fail"):
        (folder / name).mkdir(parents=True)
    for name in COMMANDS:
        path = folder / name
        path.write_text(_SCRIPT)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return FakeSlurm(folder)
