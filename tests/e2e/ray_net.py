"""A Ray cluster for a test: a raylet in each host's namespace, the head in the first.

Ray takes 285 MB and is an optional extra, so it has an environment of its own: this test's Python if that has
Ray, else one below out/, made once, which sees this Python's packages. Everything that Ray starts lives in
the hosts' namespaces and ends with them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import subprocess
import sys
import sysconfig
import venv
from typing import TYPE_CHECKING

import pytest

from tests.e2e.netns import ROOT, net

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.netns import Net

_PORT = 6_379
_N_CPUS = 8  # of each node, as Ray counts
_INSTALL_S = 300.0
_START_S = 300.0  # some 5 s on a quiet machine, 40 s on a busy one
_PLACE = ROOT / "out" / "ray-venv"


class RayNet:
    """A Ray cluster on the hosts of a network; commands are typed on its head.

    Attributes:
        net: The hosts.
        python: A Python with Ray and this package.
        address: Of the Ray cluster.
    """

    def __init__(self, here: Net, python: Path) -> None:
        self.net = here
        self.python = python
        self.head = here.hosts[0]
        self.address = f"{here.address(self.head)}:{_PORT}"
        here.env |= {
            "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(here.folder / "ray"), "TMPDIR": str(here.folder),
            "RAY_raylet_start_wait_time_s": "120",  # other tests may keep the machine busy
            # A node that is cut off counts as dead after some seconds, not half a minute.
            "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
        }  # fmt: skip

    def open(self) -> None:
        """Start a raylet on every host; return when all have joined."""
        (self.net.folder / "ray").mkdir()
        self._start(
            self.head, "--head", f"--port={_PORT}", "--include-dashboard=false",
            f"--temp-dir={self.net.folder / 'ray'}",
        )  # fmt: skip
        for host in self.net.hosts[1:]:  # one after the other: two that choose names for sockets at once hang
            self._start(host, f"--address={self.address}")

    def cluster(self, *args: str) -> tuple[int, str]:
        """Run `python -m cluster ...` on the head; return its exit code and all that it printed."""
        return self.net.run(str(self.python), "-P", "-m", "cluster", *args, host=self.head)

    def _start(self, host: str, *more: str) -> None:
        started = self.net.start(
            str(self.python), "-m", "ray.scripts.scripts", "start",
            f"--node-ip-address={self.net.address(host)}",
            f"--num-cpus={_N_CPUS}", "--num-gpus=2", "--object-store-memory=100000000", *more, host=host,
        )  # fmt: skip
        try:
            output, _ = started.communicate(timeout=_START_S)
        except subprocess.TimeoutExpired:
            started.kill()
            output, _ = started.communicate()
        assert started.returncode == 0, output


@functools.cache
def python_with_ray() -> tuple[Path | None, str]:
    """Return a Python with Ray, and why there is none."""
    if importlib.util.find_spec("ray") is not None:
        return ROOT / sys.executable, ""
    python = _PLACE / "bin" / "python"
    if not (_PLACE / "done").exists():
        venv.create(_PLACE, with_pip=True, clear=True)
        (_PLACE / sysconfig.get_path("purelib", vars={"base": "."}) / "this.pth").write_text(
            sysconfig.get_path("purelib") + "\n"
        )
        try:
            done = subprocess.run(
                [python, "-m", "pip", "install", "--quiet", "ray>=2.40"],
                capture_output=True, text=True, timeout=_INSTALL_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, f"pip install ray did not end within {_INSTALL_S:g} s"
        if done.returncode:
            return None, f"pip install ray: {done.stderr.strip()[-300:]}"
        (_PLACE / "done").touch()
    return python, ""


@contextlib.contextmanager
def ray(*hosts: str) -> Iterator[RayNet]:
    """Give a Ray cluster; skip the test, with the reason, where there can be none."""
    python, reason = python_with_ray()
    if python is None:
        pytest.skip(reason)
    with net(*hosts) as here:
        cluster = RayNet(here, python)
        cluster.open()
        yield cluster
