"""A local cluster whose roles keep crashing, or whose disk is full: reported, and nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from cluster.spec.roles import TIMING_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cluster.machine import Machine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

# A worker that serves for a while, each time.
CRASHES_LATER = """
import os, threading
import superserve.roles.processes as processes
announce = processes.announce_ready
def announce_and_crash(info):
    announce(info)
    print("it served for a while", flush=True)
    threading.Timer(0.5, os._exit, (9,)).start()
processes.announce_ready = announce_and_crash
"""


def roles(here: Machine) -> dict[str, Any]:
    """Return each role of `cluster status --json`, by name."""
    body = json.loads(here.run("status", "--json")[1])
    return {role["name"]: role for role in body["roles"]}


def kill(here: Machine, name: str) -> None:
    """Kill a role with SIGKILL."""
    pid = roles(here)[name]["pid"]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_worker_that_crashes_after_each_good_start_ends_fatal(here: Machine) -> None:
    """Whatever supervisor calls a start, it is not started for ever; `restart` brings it back once mended."""
    here.env[TIMING_VARIABLE] = "first_backoff_s=0.05,most_restarts=2"
    here.up()
    fault = here.fault("gpu_worker", CRASHES_LATER)
    kill(here, "worker-0")

    here.until(lambda: (role := here.role("worker-0")) is not None and role.state == "FATAL")
    code, output = here.run("status")
    assert code == 1
    assert "worker-0: FATAL: worker-0 (pid " in output
    assert "ended with exit code 9 while it was needed" in output
    assert "it served for a while" in output
    assert roles(here)["worker-1"]["state"] == "RUNNING"
    role = here.role("worker-0")
    assert role is not None
    assert role.restarts == 2

    fault.unlink()
    code, output = here.run("restart", "worker-0")
    assert code == 0, output
    assert here.run("status")[0] == 0
    assert here.run("down")[0] == 0
    assert here.processes() == []
    assert here.files() == set()


@pytest.fixture
def small_disk(here: Machine) -> Iterator[Path]:
    """Have the state folder on a disk of 1 MB; yield the file that fills it."""
    here.base.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "superserve-test", str(here.base)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"a disk of its own needs root: {done.stderr.strip()}")
    try:
        yield here.base / "filler"
    finally:
        here.close()
        subprocess.run(["umount", "--lazy", str(here.base)], check=True)


def fill(path: Path) -> None:
    """Leave no byte of a disk free."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4_096))
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0")


@pytest.mark.slow
def test_a_cluster_outlives_a_full_disk(here: Machine, small_disk: Path) -> None:
    """Roles are restarted, `status` is right, and `down` leaves nothing."""
    here.up()
    fill(small_disk)
    before = roles(here)
    kill(here, "worker-0")
    kill(here, "router")
    here.until(
        lambda: (
            {role["state"] for role in roles(here).values()} == {"RUNNING"}
            and roles(here)["worker-0"]["pid"] != before["worker-0"]["pid"]
            and roles(here)["router"]["pid"] != before["router"]["pid"]
        )
    )
    here.until(lambda: here.run("status")[0] == 0)

    code, output = here.run("down")
    assert code == 0, output
    assert here.processes() == []
    assert here.files() == set()


@pytest.mark.slow
def test_up_on_a_full_disk_says_so_and_leaves_nothing(here: Machine, small_disk: Path) -> None:
    """No process, no file, and the reason; there is room again: it comes up."""
    fill(small_disk)
    code, output = here.run("up", "--emulate", "cnn-8gpu-modelled:1")
    assert code == 1
    assert "No space left on device" in output
    assert "Traceback" not in output
    assert here.processes() == []
    assert here.files() == set()

    small_disk.unlink()
    here.up()
    assert here.run("down")[0] == 0
