"""The `cluster` command in a state folder of a test, faults on purpose, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it ships no types

from superserve.roles import local
from superserve.roles.local import STATE_VARIABLE
from tests import warm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from superserve.roles.local import LocalCluster, Role

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 60.0  # reached only when something is broken
_ASK_EVERY_S = 0.02

# Python runs this file before anything else in a process whose PYTHONPATH leads here.
_SITE = """
import pathlib, sys
words = [word for word in sys.orig_argv[1:] if word != "-P"]
module = words[1] if words[:1] == ["-m"] else ""
fault = pathlib.Path(__file__).with_name(f"fault-{module}.py")
if fault.exists():
    exec(compile(fault.read_text(), str(fault), "exec"))
"""
HANG = """
import signal
from superserve.roles.processes import die_with_parent
die_with_parent()
signal.pause()
"""
CRASH = "import os\nprint('no memory for [weights]', flush=True)\nos._exit(7)\n"


class Machine:
    """This machine, as far as one test has a part in it.

    Attributes:
        base: What SUPERSERVE_STATE says; processes of this test are known by it.
        folder: Where commands are typed.
        env: The environment of every command.
    """

    def __init__(self, folder: Path) -> None:
        self.base = folder / "state"
        self.folder = ROOT
        self._faults = folder / "faults"
        self._faults.mkdir()
        (self._faults / "sitecustomize.py").write_text(_SITE)
        self.env = {
            **os.environ,
            STATE_VARIABLE: str(self.base),
            "PYTHONPATH": f"{self._faults}{os.pathsep}{ROOT}",
        }

    def fault(self, module: str, code: str) -> Path:
        """Have every later `python -m <module>` run `code` first; remove the file to end that."""
        path = self._faults / f"fault-{module}.py"
        path.write_text(code)
        return path

    def start(self, *args: str, module: str = "cluster") -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *args], env=self.env, cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *args: str, module: str = "cluster") -> tuple[int, str]:
        """Run a command; return its exit code and all that it printed."""
        # A fault strikes only a Python that starts.
        if self.folder == ROOT and not (self._faults / f"fault-{module}.py").exists():
            return warm.run(module, *args, env=self.env, timeout_s=WAIT_S)
        with self.start(*args, module=module) as command:
            output, _ = command.communicate(timeout=WAIT_S)
        return command.returncode, output

    def up(self, *args: str) -> LocalCluster:
        """Bring the default cluster up with two emulated GPUs in two processes, and return it."""
        code, output = self.run("up", "--emulate", "cnn-8gpu-modelled:2", "--workers", "2", *args)
        assert code == 0, output
        cluster = self.cluster()
        assert cluster is not None
        return cluster

    def cluster(self, name: str = local.DEFAULT_NAME) -> LocalCluster | None:
        """Return what the state file says."""
        return local.load(self.base / name)

    def role(self, name: str) -> Role | None:
        """Return a role of the default cluster, as the state file has it."""
        cluster = self.cluster()
        return next((role for role in cluster.roles if role.name == name), None) if cluster else None

    def pid(self, name: str) -> int | None:
        """Return the number of a role's process; None while it has none."""
        role = self.role(name)
        return None if role is None or role.process is None else role.process.pid

    def files(self) -> set[str]:
        """Return the files in the state folder, logs left out."""
        return {str(path.relative_to(self.base)) for path in self.base.glob("*/*") if path.suffix != ".log"}

    def processes(self) -> list[psutil.Process]:
        """Return every process that belongs to this test, whoever started it and wherever it hangs."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(STATE_VARIABLE) == str(self.base))
        except psutil.Error:  # ended, a zombie, or another user's
            return False

    def is_running(self, module: str) -> bool:
        """Return whether a `python -m <module>` of this test runs."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline():
                    return True
        return False

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so that other processes bring about."""
        give_up_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < give_up_s, (
                f"not within {WAIT_S} s; {self.processes()}; {self.cluster()}"
            )
            time.sleep(_ASK_EVERY_S)

    def until_empty(self) -> None:
        """Wait until no process of this test is left."""
        self.until(lambda: not self.processes())

    def close(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """Give a machine; assert at the end that the test itself has left nothing running."""
    here = Machine(folder)
    try:
        yield here
        left = here.processes()
        assert not left, f"left behind: {left}"
    finally:
        here.close()
