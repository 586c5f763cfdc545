"""The engine of Slurm on commands that a script plays: what is submitted, read, drained and reported."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.engines.describe import describe
from cluster.engines.placed import placing
from cluster.engines.placed import slurm_commands as slurm
from cluster.engines.placed.base import PlacedEngine
from cluster.engines.placed.routing import LISTED, ROUTERS
from cluster.engines.placed.slurm import SlurmEngine
from cluster.remote import record as records
from cluster.remote.shell import RemoteError
from superserve.errors import ConfigError
from tests.cluster.engines.placed.fake_slurm import FakeSlurm, install

if TYPE_CHECKING:
    from pathlib import Path

FILE = """\
engine: slurm
slurm: {{folder: {folder}, options: [--account=ml], worker_options: [--partition=gpu]}}
router: {{host: a}}
emulate: cnn-8gpu-modelled
security: none
metrics: {{workers: 9500}}
hosts:
  - {{name: a, workers: 1, env: {{A: "1"}}}}
  - {{name: b, workers: {n}, gpus_per_worker: 2}}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Give Slurm's commands, and a state folder."""
    monkeypatch.setenv("SUPERSERVE_STATE", str(tmp_path / "state"))
    return install(tmp_path / "slurm", monkeypatch)


def _applied(tmp_path: Path, text: str = FILE, n: int = 1) -> tuple[SlurmEngine, dict[str, dict[str, str]]]:
    """Apply a file; return the engine and what was done, by host."""
    path = tmp_path / "hosts.yaml"
    path.write_text(text.format(folder=tmp_path / "shared", n=n))
    description = describe(path)
    folder = placing.folder_of(description)
    plans, files = placing.plans_of(description, folder, "/py")
    engine = SlurmEngine(placing.record_of(description, folder))
    done = engine.apply(plans, files)
    assert [one.error for one in done.values()] == [""] * len(done)
    return engine, {host: one.changed for host, one in done.items()}


def test_each_role_is_a_job_of_its_own(fake: FakeSlurm, tmp_path: Path) -> None:
    """The router's first; each with its log, its options, a notice before its end, and its own role."""
    engine, done = _applied(tmp_path)

    assert done == {
        "a": {"router": "started", "worker-a-0": "started"}, "b": {"worker-b-0": "started"},
    }  # fmt: skip
    router, worker = fake.script(1).splitlines(), fake.script(3).splitlines()
    assert "#SBATCH --job-name=superserve:default:router" in router
    assert "#SBATCH --partition=gpu" not in router
    for line in (
        "#SBATCH --job-name=superserve:default:worker-b-0", "#SBATCH --partition=gpu",
        "#SBATCH --account=ml", "#SBATCH --requeue", "#SBATCH --signal=B:USR1@60",
        f"#SBATCH --output={tmp_path}/shared/worker-b-0.log", "#SBATCH --open-mode=append",
    ):  # fmt: skip
        assert line in worker
    assert not any("gres" in line for line in worker), "an emulated GPU is none"
    assert worker[-1].startswith("exec /py -P -m cluster.engines.placed.slurm_keeper")
    role = engine.last("worker-b-0")
    assert ROUTERS in role.argv
    assert role.argv[role.argv.index("--metrics-port") + 1] == "9501", "the workers of a node need two"


def test_a_real_gpu_is_asked_for(fake: FakeSlurm, tmp_path: Path) -> None:
    """By --gres; the worker sees it as the first one, whatever number the file has."""
    text = FILE.replace("emulate: cnn-8gpu-modelled", "supernet: digits").replace("workers: 1", "gpus: [3]")
    engine, _ = _applied(tmp_path, text.replace(", gpus_per_worker: 2", ""))

    assert "#SBATCH --gres=gpu:1" in fake.script(2)
    assert "cuda:0" in engine.last("worker-a-0").argv
    assert "--gres" not in fake.script(1)


def test_what_runs_as_asked_for_is_left_alone(fake: FakeSlurm, tmp_path: Path) -> None:
    """Another option restarts those that it is for, another number starts the rest."""
    _applied(tmp_path)
    assert _applied(tmp_path)[1] == {"a": {}, "b": {}}

    _, done = _applied(tmp_path, n=2)
    assert done == {"a": {}, "b": {"worker-b-1": "started"}}
    _, done = _applied(tmp_path, FILE.replace("--partition=gpu", "--partition=big"))
    assert done == {
        "a": {"worker-a-0": "restarted"},
        "b": {"worker-b-0": "restarted", "worker-b-1": "stopped"},
    }
    assert "scancel --batch --signal=TERM 3" in fake.calls


def test_what_squeue_shows_is_reported(fake: FakeSlurm, tmp_path: Path) -> None:
    """Each state in supervisor's words, with the job, its node, and why it waits or failed."""
    engine, _ = _applied(tmp_path)
    (tmp_path / "shared" / "worker-b-0.log").write_text("one\n\ntwo\n")
    fake.set(2, state="PENDING", node="", reason="Resources", up="0:00")
    fake.set(3, state="TIMEOUT", reason="TimeLimit")
    fake.set(1, up="1-02:03:04")

    (router, a), (b,) = (host.roles for host in engine.roles())
    assert (router.state, router.place, router.up_s) == ("RUNNING", "job 1 on n1", 93_784)
    assert (a.state, a.place, a.why) == ("STARTING", "job 2", "job 2 is PENDING: Resources")
    assert (b.state, b.why, b.tail) == ("FATAL", "job 3 is TIMEOUT: TimeLimit", ("one", "two"))
    assert engine.logs("worker-b-0", 1) == ["two"]
    with pytest.raises(ConfigError, match="expected a role of 'default'"):
        engine.logs("worker-c-0")


def test_a_further_worker_is_like_its_siblings(fake: FakeSlurm, tmp_path: Path) -> None:
    """With its own name and port; a role that waits is cancelled, one that runs is drained."""
    engine, _ = _applied(tmp_path)
    record = engine.record
    host = record.hosts[1]
    grown = replace(host, roles=(*host.roles, "worker-b-3"))
    engine.keep(replace(record, hosts=(record.hosts[0], grown)))

    engine.scale("worker-b-3", 1)
    argv = engine.last("worker-b-3").argv
    assert argv[argv.index("--name") + 1] == "worker-b-3"
    assert argv[argv.index("--metrics-port") + 1] == "9504"
    engine.scale("worker-b-3", 0)
    fake.set(3, state="PENDING")
    engine.scale("worker-b-0", 0)
    assert [call for call in fake.calls if call.startswith("scancel")] == [
        "scancel --batch --signal=TERM 4", "scancel 3",
    ]  # fmt: skip


def test_the_router_is_found_where_its_job_runs(fake: FakeSlurm, tmp_path: Path) -> None:
    """At the address by which Slurm reaches the node; that is kept for the next command."""
    engine, _ = _applied(tmp_path)

    assert engine.router_status() is None  # nothing answers there
    assert engine.record.client_endpoint == "tcp://10.1.0.1:5555"
    assert records.load("default") == engine.record
    fake.set(1, state="PENDING")
    assert engine.router_addresses() == {}


def test_several_routers_are_jobs_and_a_further_one_restarts_nothing(fake: FakeSlurm, tmp_path: Path) -> None:
    """Each has its own ports, and is found at its node; one that is taken away is forgotten, then drained."""
    assert fake.calls == []
    two = FILE.replace("router: {{host: a}}", "routers: [{{host: a}}, {{host: b}}]")
    engine, done = _applied(tmp_path, two)

    assert done["b"] == {"router-b-0": "started", "worker-b-0": "started"}
    argv = engine.last("router-b-0").argv
    assert "tcp://0.0.0.0:5557" in argv
    assert argv[argv.index("--routers") + 1] == LISTED
    assert engine.router_status() is None  # nothing answers there
    assert engine.record.client_endpoint == "tcp://10.1.0.1:5555,tcp://10.1.0.2:5557"
    engine.tune(b"{}")

    _, done = _applied(tmp_path, two.replace("{{host: b}}]", "{{host: b}}, {{host: b}}]"))
    assert done == {"a": {}, "b": {"router-b-1": "started"}}
    engine, done = _applied(tmp_path, two)
    assert done == {"a": {}, "b": {"router-b-1": "stopped"}}
    assert not (tmp_path / "shared" / "roles" / "router-b-1.json").exists()


def test_down_stops_the_router_first(fake: FakeSlurm, tmp_path: Path) -> None:
    """And reports what ran; jobs of other clusters are left alone."""
    engine, _ = _applied(tmp_path)
    fake.set(9, name="superserve:default2:router")

    done = engine.stop()

    assert done.wrong == {}
    assert done.stopped == {"a": (("router", 0), ("worker-a-0", 0)), "b": (("worker-b-0", 0),)}
    drains = [call for call in fake.calls if "--batch" in call]
    assert drains[0] == "scancel --batch --signal=TERM 1"
    assert len(drains) == 3


def test_errors_quote_slurm(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused job by its role; a controller that does not answer for every host; missing commands."""
    engine, _ = _applied(tmp_path)
    fake.fail("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    assert {host.error for host in engine.roles()} == {
        (
            "squeue --me --noheader --states=all --format=%i|%j|%T|%M|%N|%r: exit code 1: "
            "slurm_load_jobs error: Unable to contact slurm controller"
        )
    }
    fake.fail("sbatch", "sbatch: error: invalid partition specified: gpu")
    with pytest.raises(RemoteError, match="invalid partition specified: gpu"):
        slurm.submit("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RemoteError, match="squeue: not found: `engine: slurm` needs Slurm's commands here"):
        slurm.jobs()


def test_other_output_of_squeue_is_an_error(fake: FakeSlurm) -> None:
    """That quotes the line; a job's reason may contain anything."""
    fake.set(7, reason="(a|b)")
    assert slurm.jobs()[0].reason == "(a|b)"
    fake.set(7, id="x")
    with pytest.raises(RemoteError, match=r"squeue: expected .*, got 'x\|other"):
        slurm.jobs()


def test_a_file_without_keys_says_so(tmp_path: Path) -> None:
    """Nothing listens on a node of a shared cluster without keys unless the file allows it."""
    path = tmp_path / "hosts.yaml"
    path.write_text(FILE.format(folder=tmp_path, n=1).replace("security: none\n", ""))
    description = describe(path)

    with pytest.raises(
        ConfigError, match=r"hosts.yaml:\d+: security: engine: slurm listens on every address"
    ):
        placing.plans_of(description, tmp_path, "")


def test_a_cluster_of_another_engine_is_not_forgotten(fake: FakeSlurm, tmp_path: Path) -> None:
    """It has to be stopped first."""
    engine, _ = _applied(tmp_path)
    assert isinstance(engine, PlacedEngine)
    path = tmp_path / "hosts.yaml"
    path.write_text("engine: ray\nrouter: {host: a}\nsecurity: none\nhosts: [{name: a, workers: 1}]\n")

    with pytest.raises(ConfigError, match="the cluster 'default' runs on slurm: stop it with"):
        placing.check_engine(describe(path), engine.record)
    placing.check_engine(describe(path), None)
    del fake
