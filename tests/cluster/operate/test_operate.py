"""Drain, restart and their way back, on real processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
from typing import TYPE_CHECKING

import pytest

from cluster.host.config import SOCKET
from cluster.host.onhost import do
from cluster.operate.engine import here as engine_here
from superserve.errors import ConfigError
from superserve.net.connection import ask_status
from tests.cluster.machine import CRASH, ROOT, WAIT_S
from tests.e2e.pages import check

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.machine import Machine

OLD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})  # as `python -m` will
import superserve.roles.version
superserve.roles.version.version = lambda: "0.0.9+old"
"""
PAGE = "operating.md"
pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_query(here: Machine, tmp_path: Path) -> None:
    """At an SLO of 3 s and some hundred queries a second, every one is answered in time."""
    cluster = here.up()
    before = {name: here.pid(name) for name in ("router", "worker-0", "worker-1")}
    path = tmp_path / "run.json"
    with here.start(
        "run", "--trace", "poisson:rate=300", "--duration", "600", "--slo-ms", "3000", "--json", str(path),
        module="loadgen",
    ) as load:  # fmt: skip
        here.until(lambda: ask_status(cluster.client_endpoint).queries.received > 300)
        code, output = here.run("restart", "--rolling")
        received = ask_status(cluster.client_endpoint).queries.received
        here.until(lambda: ask_status(cluster.client_endpoint).queries.received > received + 300)
        load.send_signal(signal.SIGINT)
        said, _ = load.communicate(timeout=WAIT_S)

    assert code == 0, output
    check(PAGE, "restart", output)
    for name in ("worker-0", "worker-1"):
        assert here.pid(name) not in (None, before[name])
    assert here.pid("router") == before["router"]
    queries = json.loads(path.read_text())["queries"]
    assert received < queries["total"]
    assert (queries["ok"], queries["unsent"]) == (queries["total"], 0), said
    assert here.run("status")[0] == 0
    assert here.run("down")[0] == 0


def test_drained_is_away_until_it_is_asked_back(here: Machine) -> None:
    """Drain twice, status, restart by name, drain again, up: each prints what it did."""
    cluster = here.up()

    code, output = here.run("drain", "worker-0")
    assert code == 0, output
    check(PAGE, "drain", output)
    assert set(ask_status(cluster.client_endpoint).processes()) == {"worker-1"}
    code, output = here.run("drain", "worker-0")
    assert (code, "worker-0: has ended already (STOPPED)" in output) == (0, True), output
    code, output = here.run("status")
    assert (code, "worker-0: STOPPED: ended as asked, with exit code 0" in output) == (1, True), output
    code, output = here.run("drain", "worker-O")
    assert (code, "did you mean worker-" in output) == (1, True), output

    code, output = here.run("restart", "worker-0")
    assert (code, "worker-0: live again" in output) == (0, True), output
    assert here.run("status")[0] == 0

    code, output = here.run("drain", "worker-0", "worker-1")
    assert (code, "warning: no worker is left after this" in output) == (0, True), output
    code, output = here.run("up", "--emulate", "cnn-8gpu-modelled:2", "--workers", "2")
    assert (code, "started again: worker-0, worker-1" in output) == (0, True), output
    assert here.run("status")[0] == 0
    assert here.run("down")[0] == 0


def test_a_worker_that_cannot_start_ends_a_rolling_restart(here: Machine) -> None:
    """The error has its last words; the other worker was not touched, and serves."""
    here.up()
    untouched = here.pid("worker-1")
    fault = here.fault("gpu_worker", CRASH)

    code, output = here.run("restart", "--rolling")

    assert code == 1
    check(PAGE, "restart-failed", output)
    assert here.pid("worker-1") == untouched
    code, output = here.run("doctor")
    assert code == 1
    check(PAGE, "doctor-fatal", output)

    fault.unlink()
    code, output = here.run("restart", "worker-0")
    assert code == 0, output
    assert here.run("status")[0] == 0
    assert here.run("down")[0] == 0


def test_the_doctor_finds_nothing_wrong_with_a_cluster_that_is_well(here: Machine) -> None:
    """Doctor also finds a worker of another version: exit 1, and the same in JSON."""
    here.up()
    code, output = here.run("doctor")
    assert code == 0, output
    check(PAGE, "doctor", output)

    here.fault("gpu_worker", OLD)
    code, output = here.run("restart", "worker-1")
    assert code == 0, output
    code, output = here.run("doctor", "--json")
    assert code == 1
    found = [finding for finding in json.loads(output)["findings"] if finding["verdict"] != "ok"]
    assert [finding["check"] for finding in found] == ["versions"]
    assert found[0]["text"].startswith("worker-1: runs 0.0.9+old, the router ")
    assert here.run("down")[0] == 0
    code, output = here.run("doctor")
    assert (code, "no cluster 'default' runs on this machine" in output) == (1, True)


def test_the_router_is_restarted_only_if_asked_for(here: Machine) -> None:
    """It comes back on its ports, its workers find it, and the command prints what that costs."""
    cluster = here.up()
    before = {name: here.pid(name) for name in ("router", "worker-0", "worker-1")}

    code, output = here.run("restart", "--router")

    assert code == 0, output
    assert "while it is away, some seconds, new queries are refused" in output
    assert here.pid("router") != before["router"]
    assert {name: here.pid(name) for name in ("worker-0", "worker-1")} == {
        "worker-0": before["worker-0"],
        "worker-1": before["worker-1"],
    }
    after = here.cluster()
    assert after is not None
    assert after.client_endpoint == cluster.client_endpoint
    assert here.run("status")[0] == 0
    assert here.run("down")[0] == 0


def test_a_keeper_listens_to_its_user_alone(here: Machine) -> None:
    """Its socket is in a folder of 0700; nonsense is refused, and the keeper lives."""
    cluster = here.up()
    folder = here.base / "default"
    mode = stat.S_IMODE((folder / SOCKET).stat().st_mode)
    assert (mode, stat.S_IMODE(folder.stat().st_mode)) == (0o700, 0o700)

    engine = engine_here("default", cluster)
    said = do("stop", {"folder": str(folder), "role": "worker-7"})
    assert "BAD_NAME" in said["error"]
    with pytest.raises(ConfigError, match="worker-7: expected a role"):
        engine.scale("worker-7", 0)
    with contextlib.ExitStack() as stack:
        for i in range(40):
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            descriptor = os.open(folder, os.O_PATH)
            stack.callback(os.close, descriptor)
            other.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
            if i % 2:
                with contextlib.suppress(OSError):  # the keeper hangs up
                    other.sendall(b"\xff" * 5_000)
        do("start", {"folder": str(folder), "role": "worker-0"})  # it runs: nothing to do

    assert here.run("status")[0] == 0
    assert here.run("down")[0] == 0
    assert not (folder / SOCKET).exists()
