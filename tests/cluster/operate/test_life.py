"""The `cluster` command with real processes: up, used, down; and whatever dies in between."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from superserve.client.client import Client
from superserve.roles.local import Phase, RoleState
from tests.cluster.machine import CRASH, HANG, WAIT_S

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.cluster.machine import Machine

pytestmark = pytest.mark.e2e

EMULATE = ("--emulate", "cnn-8gpu-modelled:1")


def finish(command: subprocess.Popen[str]) -> tuple[int, str]:
    """Return a command's exit code and output."""
    with command:
        output, _ = command.communicate(timeout=WAIT_S)
    return command.returncode, output


def is_well(here: Machine) -> bool:
    """Return whether `cluster status` finds nothing wrong."""
    return here.run("status")[0] == 0


NO_PIDFD = """
import errno, os

def refuse(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

os.pidfd_open = refuse
"""


def test_down_stops_a_cluster_also_without_descriptors_of_processes(here: Machine) -> None:
    """As on Linux 4.18, or in a container that forbids them: what `down` reports as stopped has ended."""
    here.up()
    here.fault("cluster", NO_PIDFD)
    code, output = here.run("down")

    assert code == 0, output
    assert here.processes() == []


# --- up, used, down ---------------------------------------------------------------------------


def test_a_cluster_is_ready_when_up_returns_and_gone_when_down_does(here: Machine, tmp_path: Path) -> None:
    """Status is well, load finds it without --connect, a second up is a no-op, down leaves nothing."""
    cluster = here.up()
    pids = [cluster.keeper.pid, *(role.process.pid for role in cluster.roles if role.process)]
    assert len(pids) == 4
    assert sorted(pids) == sorted(process.pid for process in here.processes())
    assert cluster.phase is Phase.RUNNING

    code, output = here.run("status")
    assert code == 0, output
    for words in (cluster.client_endpoint, "worker-1", "1 of 1", "policy     planfit"):
        assert words in output
    body = json.loads(here.run("status", "--json")[1])
    assert body["problems"] == []
    assert {slot["name"] for slot in body["status"]["workers"]} == {"worker-0", "worker-1"}

    path = tmp_path / "run.json"
    code, output = here.run(
        "run", "--trace", "constant:rate=50", "--duration", "1", "--slo-ms", "10000", "--json", str(path),
        module="loadgen",
    )  # fmt: skip
    queries = json.loads(path.read_text())["queries"]
    assert (queries["ok"], queries["total"]) == (50, 50), output

    code, output = here.run("up", "--emulate", "cnn-8gpu-modelled:2", "--workers", "2")
    assert (code, here.cluster()) == (0, cluster), output
    assert "runs already" in output
    code, output = here.run("up", "--emulate", "cnn-8gpu-modelled:2", "--policy", "maxacc")
    assert code == 1
    for words in (
        "policy: it runs with planfit, asked for maxacc",
        "in 2 processes, asked for",
        "cluster down",
    ):
        assert words in output

    code, output = here.run("down")
    assert code == 0, output
    assert here.processes() == []
    assert here.files() == set()
    assert all(str(pid) in output for pid in pids)

    assert here.run("down") == (0, "no cluster 'default' runs on this machine: nothing to stop\n")
    code, output = here.run("status")
    assert code == 1
    assert "start one with `cluster up`" in output
    code, output = here.run("logs", "router", "worker-1")
    assert code == 0
    assert "worker-1 joined" in output


def test_a_plain_up_serves_digits_and_load_sends_what_they_take(here: Machine, tmp_path: Path) -> None:
    """Without options the shipped supernet is up, and a plain load has payloads of the model's size."""
    code, output = here.run("up", "--device", "cpu")
    assert code == 0, output
    assert "digits on cpu" in output

    path = tmp_path / "run.json"
    _, output = here.run(
        "run", "--trace", "constant:rate=20", "--duration", "1", "--slo-ms", "10000", "--json", str(path),
        module="loadgen",
    )  # fmt: skip

    assert json.loads(path.read_text())["queries"]["ok"] == 20, output
    assert here.run("down")[0] == 0
    assert here.processes() == []


def test_down_answers_what_is_queued(here: Machine) -> None:
    """Queries that the router has taken are served before it ends, in order."""
    code, output = here.run("up", "--emulate", "transformer-8gpu-modelled:1")
    assert code == 0, output
    cluster = here.cluster()
    assert cluster is not None
    with Client(cluster.client_endpoint) as client:
        futures = [client.submit(b"image", slo_ms=20_000, min_accuracy=85.1) for _ in range(100)]
        futures[0].result(WAIT_S)

        code, output = here.run("down")

        assert code == 0, output
        assert [future.result(WAIT_S).is_late for future in futures] == [False] * 100


def test_clusters_of_two_names_run_side_by_side(here: Machine) -> None:
    """Each goes down alone; what to type next names the one that is not the default."""
    here.up()
    code, output = here.run("up", "--name", "other", *EMULATE)
    assert code == 0, output
    assert "cluster down --name other" in output.replace(".venv/bin/", "")
    assert "--connect 127.0.0.1:" in output

    assert here.run("down")[0] == 0
    code, output = here.run("status")
    assert code == 1
    assert "or name one of: other" in output
    assert here.run("status", "--name", "other")[0] == 0
    assert here.run("down", "--name", "other")[0] == 0
    assert here.processes() == []


def test_of_two_ups_at_once_one_starts_and_nothing_is_left(here: Machine) -> None:
    """The other finds it running or starting, and reports that."""
    ended = [finish(command) for command in [here.start("up", *EMULATE) for _ in range(2)]]

    codes = sorted(code for code, _ in ended)
    outputs = "\n".join(output for _, output in ended)
    assert codes in ([0, 0], [0, 1]), outputs
    assert outputs.count("is up") == 1
    assert codes == [0, 0] or "by another command" in outputs
    here.until(lambda: len(here.processes()) == 3)  # the loser's keeper may still be leaving
    assert here.run("down")[0] == 0


# --- what fails in mid-start ------------------------------------------------------------------


def test_a_worker_that_crashes_at_start_is_named_with_its_last_words(here: Machine) -> None:
    """Exit 1, a table, the end of the log, and nothing left running."""
    here.fault("gpu_worker", CRASH)

    code, output = here.run("up", *EMULATE)

    assert code == 1
    assert "worker-0   -" in output
    assert "FATAL" in output
    assert "ended with exit code 7 before it was ready" in output
    assert "no memory for [weights]" in output
    assert here.processes() == []
    assert here.files() == set()


def test_a_worker_that_is_not_ready_in_time_is_named(here: Machine) -> None:
    """It hangs: after the timeout it is FATAL, and everything is stopped."""
    here.fault("gpu_worker", HANG)

    code, output = here.run("up", *EMULATE, "--ready-timeout-s", "1.5")

    assert code == 1
    assert "worker-0" in output
    assert "was not ready within 1.5 s" in output
    assert here.processes() == []


def test_a_port_that_is_taken_is_told_from_the_routers_log(here: Machine) -> None:
    """The router cannot bind, and names the port."""
    cluster = here.up()
    port = cluster.client_endpoint.rpartition(":")[2]

    code, output = here.run("up", "--name", "second", *EMULATE, "--client-port", port)

    assert code == 1
    assert "router" in output
    assert f"bind tcp://127.0.0.1:{port}" in output
    assert here.run("down")[0] == 0


def test_a_keeper_that_cannot_start_is_told_from_its_log(here: Machine) -> None:
    """Its last words, and an exit code."""
    here.fault("cluster.host.watch", CRASH)

    code, output = here.run("up", *EMULATE)

    assert code == 1
    assert "the keeper did not start" in output
    assert "no memory for [weights]" in output
    assert here.processes() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", ["router", "gpu_worker"])
def test_a_launcher_that_ends_in_mid_start_takes_everything_with_it(
    here: Machine, number: signal.Signals, module: str
) -> None:
    """However it ends, and whoever is starting: no process and no file stay."""
    here.fault(module, HANG)
    name = "router" if module == "router" else "worker-0"
    launcher = here.start("up", *EMULATE)
    here.until(lambda: here.pid(name) is not None)

    launcher.send_signal(number)

    code, output = finish(launcher)
    here.until_empty()
    assert code != 0
    if number != signal.SIGKILL:
        assert "interrupted; everything has been stopped" in output
    assert list(here.base.iterdir()) == []


def test_a_launcher_that_is_killed_before_its_keeper_begins_leaves_nothing(
    here: Machine, tmp_path: Path
) -> None:
    """The keeper finds nobody at the other end."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    here.fault("cluster.host.watch", f"open({str(gate)!r}).read()")
    launcher = here.start("up", *EMULATE)
    here.until(lambda: here.is_running("cluster.host.watch"))

    launcher.kill()
    finish(launcher)
    gate.write_text("go on")

    here.until_empty()
    assert list(here.base.iterdir()) == []


def test_a_cluster_that_starts_can_be_stopped_from_elsewhere(here: Machine) -> None:
    """`up` reports that it was asked to stop, and `down` that it stopped it."""
    here.fault("gpu_worker", HANG)
    launcher = here.start("up", *EMULATE)
    here.until(lambda: here.pid("worker-0") is not None)

    code, output = here.run("up", *EMULATE)
    assert code == 1
    assert "is starting" in output
    assert here.run("down")[0] == 0

    code, output = finish(launcher)
    assert code == 1
    assert "it was asked to stop" in output
    assert here.processes() == []
    assert here.files() == set()


# --- what dies later --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["worker-1", "router"])
def test_a_role_that_is_killed_is_started_again_and_status_says_so(here: Machine, name: str) -> None:
    """The others stay; a router gets its ports again, so that all find it."""
    before = here.up()
    pid = here.pid(name)
    assert pid is not None

    os.kill(pid, signal.SIGKILL)

    here.until(lambda: (role := here.role(name)) is not None and role.restarts == 1)
    here.until(lambda: is_well(here))
    after = here.cluster()
    assert after is not None
    assert (after.keeper, after.client_endpoint) == (before.keeper, before.client_endpoint)
    changed = [
        old.name for old, new in zip(before.roles, after.roles, strict=True) if old.process != new.process
    ]
    assert changed == [name]
    row = next(line for line in here.run("status")[1].splitlines() if line.startswith(name))
    assert row.split()[2:4] == ["RUNNING", "1"]
    assert here.run("down")[0] == 0
    assert here.processes() == []


def test_a_worker_that_waits_for_its_restart_makes_status_unwell(here: Machine) -> None:
    """Exit 1, with its state and its last lines."""
    here.up()
    here.fault("gpu_worker", CRASH)
    pid = here.pid("worker-0")
    assert pid is not None

    os.kill(pid, signal.SIGKILL)

    # It never comes back: whichever of its restarts is seen, it is not ready.
    here.until(lambda: (role := here.role("worker-0")) is not None and role.state is RoleState.BACKOFF)
    here.until(lambda: (role := here.role("worker-0")) is not None and "exit code 7" in role.why)
    code, output = here.run("status")
    assert code == 1
    assert "no memory for [weights]" in output
    assert here.run("down")[0] == 0
    assert here.processes() == []


def test_an_unwell_cluster_is_not_what_up_asks_for(here: Machine) -> None:
    """A second up fails; it shows how to find the problem, and how to start again."""
    here.up()
    here.fault("gpu_worker", HANG)
    pid = here.pid("worker-0")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    here.until(lambda: here.pid("worker-0") not in (pid, None))

    code, output = here.run("up", "--emulate", "cnn-8gpu-modelled:2", "--workers", "2")

    assert code == 1
    assert "runs already, and is not well: see `cluster status`" in output
    assert here.run("down")[0] == 0
    assert here.processes() == []


def test_a_killed_keeper_takes_all_with_it_and_the_next_up_recovers(here: Machine) -> None:
    """No process stays; status and load report what happened; up removes the remains and reports that."""
    cluster = here.up()

    os.kill(cluster.keeper.pid, signal.SIGKILL)

    here.until_empty()
    code, output = here.run("status")
    assert code == 1
    assert f"its keeper (pid {cluster.keeper.pid}) ended without tidying up" in output
    code, output = here.run("run", "--trace", "constant:rate=50", "--duration", "1", module="loadgen")
    assert code == 1
    assert "start it again with `cluster up`" in output

    code, output = here.run("up", *EMULATE)
    assert code == 0, output
    assert "removed what it left" in output
    assert is_well(here)
    assert here.run("down")[0] == 0


def test_down_tidies_up_after_a_killed_keeper(here: Machine) -> None:
    """It reports that, and removes the file."""
    cluster = here.up()
    os.kill(cluster.keeper.pid, signal.SIGKILL)
    here.until_empty()

    code, output = here.run("down")

    assert code == 0
    assert "removed what it left" in output
    assert here.files() == set()


def test_a_keeper_that_does_not_stop_is_killed_and_its_roles_with_it(here: Machine) -> None:
    """Stopped by SIGSTOP, it handles no SIGTERM; down reports that it was killed."""
    cluster = here.up()
    os.kill(cluster.keeper.pid, signal.SIGSTOP)

    code, output = here.run("status")
    assert (code, "the keeper did not answer within" in output) == (1, True), output
    code, output = here.run("down", "--timeout-s", "0.5")

    assert code == 0
    assert "killed: it did not stop in time" in output
    assert here.processes() == []
    assert here.files() == set()
