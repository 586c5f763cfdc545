"""What runs in a role's job: restarts with pauses, drains on signals, and the router that moves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.engines.placed.base import Started
from cluster.engines.placed.slurm_keeper import Backoff
from cluster.spec.roles import Timing
from tests.cluster.engines.placed.fake_slurm import FakeSlurm, install
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

# A role: says where it was sent, and what it does at its end.
_ROLE = """\
import signal, sys, time
print("role", *sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), sys.exit(0)))
time.sleep(60)
"""


_KEEPER = """\
import sys
from cluster.engines.placed import slurm_keeper
slurm_keeper._LOOK_S, slurm_keeper._LIST_S = {look_s}, 0.1
sys.exit(slurm_keeper.main(*sys.argv[1:]))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Give Slurm's commands: srun is the role itself, and scancel signals it as Slurm would."""
    fake = install(tmp_path / "slurm", monkeypatch)
    srun = fake.folder / "srun"
    srun.write_text(f'#!/bin/sh\nshift 2\necho $$ > {fake.folder}/step\nexec "$@"\n')
    srun.chmod(0o755)
    scancel = fake.folder / "scancel"
    scancel.write_text(
        f'#!/bin/sh\necho "scancel $@" >> {fake.folder}/calls\nkill -TERM $(cat {fake.folder}/step)\n'
    )
    (fake.folder / "jobs" / "5").write_text("5|superserve:default:router|RUNNING|0:01|n5|None")
    return fake


def _roles(folder: Path, *routers: str) -> Path:
    """Return the folder with what roles were started with, these routers among them."""
    roles = folder / "shared" / "roles"
    roles.mkdir(parents=True, exist_ok=True)
    ends = ("--client-endpoint", "tcp://0.0.0.0:5555", "--worker-endpoint", "tcp://0.0.0.0:5556")
    for name in routers:
        role = Started(name, "router", "a", ends, (), "", 0, "", 5.0)
        (roles / f"{name}.json").write_text(json.dumps(asdict(role)))
    return roles


class Kept:
    """A keeper as its job starts it, whose output is read line by line."""

    def __init__(self, folder: Path, *argv: str, look_s: float = 30.0, name: str = "worker-a-0") -> None:
        kind = name.partition("-")[0]
        role = Started(name, kind, "a", ("-c", *argv), (("A", "1"),), "", 0, sys.executable, 5.0)
        path = _roles(folder) / f"{name}.json"
        path.write_text(json.dumps(asdict(role)))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _KEEPER.format(look_s=look_s), str(path), "default"],
            env={**os.environ, "SLURM_JOB_ID": "7", "PYTHONPATH": str(ROOT)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def read_until(self, words: str) -> str:
        """Return the first line with these words."""
        assert self.process.stdout is not None, "it was started with a pipe"
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError(f"it ended without {words!r}")

    def end(self) -> tuple[int, str]:
        """Return its exit code and the rest of its output."""
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output


@pytest.fixture
def kept() -> Iterator[list[Kept]]:
    """Give a list: keepers in it are killed at the end."""
    found: list[Kept] = []
    yield found
    for one in found:
        one.process.kill()
        one.process.communicate()


def test_a_role_gets_the_routers_address_and_drains(
    fake: FakeSlurm, tmp_path: Path, kept: list[Kept]
) -> None:
    """SIGTERM for the job drains its step, through scancel, and the job ends well."""
    _roles(tmp_path, "router")
    kept.append(one := Kept(tmp_path, _ROLE, "{routers}"))
    assert one.read_until("role") == "role tcp://10.1.0.5:5556\n"

    one.process.send_signal(signal.SIGTERM)

    assert one.end() == (0, "drained\n")
    assert fake.calls[-1] == "scancel --signal=TERM 7"


def test_a_job_whose_time_is_up_is_queued_again(fake: FakeSlurm, tmp_path: Path, kept: list[Kept]) -> None:
    """After its role has drained; it waits for Slurm to end it, here by SIGTERM."""
    kept.append(one := Kept(tmp_path, _ROLE))
    one.read_until("role")
    (fake.folder / "jobs" / "7").write_text("7|x|RUNNING|0:01|n7|None")

    one.process.send_signal(signal.SIGUSR1)

    one.read_until("drained")
    one.read_until("queued again")
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == (0, "")
    assert fake.calls[-1] == "scontrol requeue 7"


def test_a_role_that_crashes_is_started_again(fake: FakeSlurm, tmp_path: Path, kept: list[Kept]) -> None:
    """After a pause that is said; with the variables of the file."""
    del fake
    mark = tmp_path / "mark"
    crash = f"import os, pathlib, sys\nm = pathlib.Path({str(mark)!r})\nprint('A', os.environ['A'])\n"
    crash += "if m.exists(): sys.exit(0)\nm.touch()\nsys.exit(3)\n"
    kept.append(one := Kept(tmp_path, crash))

    code, output = one.end()

    assert code == 0
    assert output == "A 1\nworker-a-0: ended with exit code 3; starting it again in 0.5 s\nA 1\n"


def test_a_worker_follows_the_router_to_another_node(
    fake: FakeSlurm, tmp_path: Path, kept: list[Kept]
) -> None:
    """It drains, and starts again with the new address; while the router is nowhere, it stays."""
    _roles(tmp_path, "router")
    kept.append(one := Kept(tmp_path, _ROLE, "{routers}", look_s=0.1))
    assert one.read_until("role") == "role tcp://10.1.0.5:5556\n"

    router = fake.folder / "jobs" / "5"
    router.write_text("5|superserve:default:router|PENDING|0:00||BeginTime")
    seen = len(fake.calls)
    while len(fake.calls) < seen + 3:  # it has looked, found nothing, and looked again
        assert one.process.poll() is None
    assert not any(call.startswith("scancel") for call in fake.calls)
    router.write_text("5|superserve:default:router|RUNNING|0:01|n6|None")

    assert one.read_until("drained") == "drained\n"
    assert one.read_until("role") == "role tcp://10.1.0.6:5556\n"
    one.process.send_signal(signal.SIGTERM)
    assert one.end()[0] == 0


def test_a_router_is_told_where_the_others_are(fake: FakeSlurm, tmp_path: Path, kept: list[Kept]) -> None:
    """As soon as one runs, and no longer once it was taken away; the router itself runs on."""
    roles = _roles(tmp_path, "router-b-0")
    jobs = fake.folder / "jobs"
    (jobs / "5").write_text("5|superserve:default:router-b-0|PENDING|0:00||Resources")
    (jobs / "7").write_text("7|superserve:default:router-a-0|RUNNING|0:01|n7|None")
    argv = ("--client-endpoint", "tcp://0.0.0.0:5557", "--worker-endpoint", "tcp://0.0.0.0:5558", "{listed}")
    kept.append(one := Kept(tmp_path, _ROLE, *argv, look_s=600.0, name="router-a-0"))
    listed = Path(one.read_until("role").split()[-1])
    assert json.loads(listed.read_bytes()) == {"routers": []}

    (jobs / "5").write_text("5|superserve:default:router-b-0|RUNNING|0:01|n5|None")
    while not (routers := json.loads(listed.read_bytes())["routers"]):
        assert one.process.poll() is None
    assert [each["client"] for each in routers] == ["tcp://10.1.0.7:5557", "tcp://10.1.0.5:5555"]
    (roles / "router-b-0.json").unlink()
    while json.loads(listed.read_bytes())["routers"]:
        assert one.process.poll() is None
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == (0, "drained\n")


def test_pauses_double_until_another_start_would_not_help() -> None:
    """And begin again after good service."""
    backoff = Backoff(Timing(first_backoff_s=0.5, most_restarts=3, good_service_s=60.0))

    assert [backoff.after(1.0) for _ in range(4)] == [0.5, 1.0, 2.0, None]
    assert backoff.after(61.0) == 0.5
