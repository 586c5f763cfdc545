"""A cluster on Slurm: a controller and three nodes, each a network namespace with its own slurmd."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.engines.describe import describe
from cluster.engines.slurm_script import render
from tests.e2e import placed
from tests.e2e.slurm_net import SlurmNet, slurm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def nodes() -> Iterator[SlurmNet]:
    """Give three nodes and a controller; nothing of them is left."""
    with slurm("n1", "n2", "n3") as here:
        yield here


def _file(here: SlurmNet, *options: str, n: int = 2) -> Path:
    path = here.net.folder / "hosts.yaml"
    more = f"{{folder: {here.net.folder}/shared, worker_options: [{', '.join(('--gres=gpu:1', *options))}]}}"
    path.write_text(placed.text("slurm", more, n))
    return path


def test_a_cluster_on_slurm_from_up_to_down(nodes: SlurmNet) -> None:
    """Under load: a worker is killed, a node cut off, the fleet scaled up and down; no query fails."""
    here, cluster = nodes.net, nodes.net.cluster
    path = str(_file(nodes))
    output = placed.done(cluster, "up", path)
    assert "job" in output
    roles = placed.seen(cluster)
    assert {role["state"] for role in roles.values()} == {"RUNNING"}
    places = {name: placed.node(role) for name, role in roles.items()}
    assert len(set(places.values())) == 3, places

    with placed.load(here, f"tcp://{here.address(places['router'])}:5555"):
        os.kill(placed.everywhere(here)["worker-gpu-0"], signal.SIGKILL)
        log = here.folder / "shared" / "worker-gpu-0.log"
        here.until(lambda: log.read_text().count("welcomed") == 2)

        lost = places["worker-gpu-1"]
        placed.cut(here, lost, off=True)
        here.until(lambda: "worker-gpu-1" in placed.everywhere(here, lost))  # Slurm has moved its job
        here.until(lambda: "worker-gpu-1" in placed.well(cluster))
        placed.cut(here, lost, off=False)
        here.until(
            lambda: "worker-gpu-1" not in placed.processes(here, lost)
        )  # Slurm ends what it had given up

        output = placed.done(cluster, "scale", "3")
        assert "worker-gpu-2: live again" in output
        assert placed.well(cluster) == {f"worker-gpu-{i}" for i in range(3)}
        placed.done(cluster, "scale", "1")
        assert placed.well(cluster) == {"worker-gpu-0"}
        placed.done(cluster, "status")  # those that rest are no problem
        with Path(path).open("a") as file:
            file.write("policy: slackfit\nmax_queries: 5000\n")
        assert "policy: planfit -> slackfit" in placed.done(cluster, "apply", path)
        assert placed.done(cluster, "scale", "1") == "1 worker runs already\n"

    assert "left alone" in placed.done(cluster, "up", path)
    assert placed.well(cluster) == {"worker-gpu-0", "worker-gpu-1"}
    output = placed.done(cluster, "down")
    assert "no process of it is left" in output
    assert placed.everywhere(here) == {}
    assert not re.search(r"RUNNING|PENDING", nodes.call("squeue", "-h", "-o", "%T"))


def test_a_preempted_worker_drains_within_its_grace_and_comes_back(nodes: SlurmNet) -> None:
    """A job of a better partition takes its GPUs: it drains, and serves again after that."""
    here, cluster = nodes.net, nodes.net.cluster
    placed.done(cluster, "up", str(_file(nodes, "--partition=spare", n=2)))
    roles = placed.seen(cluster)
    where = placed.node(roles["router"])
    with placed.load(here, f"tcp://{here.address(where)}:5555"):
        taken = placed.node(roles["worker-gpu-0"])
        nodes.call(
            "sbatch", "--parsable", f"--nodelist={taken}", "--gres=gpu:2", "--wrap=sleep 2",
            "--output=/dev/null", "--job-name=other",
        )  # fmt: skip
        log = here.folder / "shared" / "worker-gpu-0.log"
        here.until(lambda: log.read_text().count("dropped: nothing") == 1)
        here.until(lambda: log.read_text().count("welcomed") == 2)
        here.until(lambda: placed.well(cluster) == {"worker-gpu-0", "worker-gpu-1"})
    text = log.read_text()
    assert "drained for another job" in text or "queued again" in text, text
    placed.done(cluster, "down")


def test_a_killed_router_of_two_is_back_and_no_query_fails(nodes: SlurmNet) -> None:
    """On Slurm; a third one is added, and taken away again, and no worker restarts."""
    here, cluster = nodes.net, nodes.net.cluster
    path = here.folder / "hosts.yaml"
    settings = f"{{folder: {here.folder}/shared, worker_options: [--gres=gpu:1]}}"
    path.write_text(placed.text("slurm", settings, 4, routers=2))
    placed.done(cluster, "up", str(path))
    here.until(lambda: sorted(placed.shares(cluster).values()) == [2, 2])
    roles = placed.seen(cluster)
    assert {role["state"] for role in roles.values()} == {"RUNNING"}
    workers, first = placed.everywhere(here), placed.routers(here)
    assert first.keys() == {5555, 5557}

    with placed.load(here, next(iter(placed.shares(cluster))), slo_ms=5_000):
        os.kill(first[5557], signal.SIGKILL)
        here.until(lambda: placed.routers(here).get(5557, first[5557]) != first[5557])
        here.until(lambda: sorted(placed.shares(cluster).values()) == [2, 2])

        path.write_text(placed.text("slurm", settings, 4, routers=3))
        placed.done(cluster, "up", str(path))
        here.until(lambda: sorted(placed.shares(cluster).values()) == [1, 1, 2])
        path.write_text(placed.text("slurm", settings, 4, routers=2))
        placed.done(cluster, "up", str(path))
        here.until(lambda: sorted(placed.shares(cluster).values()) == [2, 2])

    assert placed.everywhere(here) == workers
    assert placed.routers(here)[5555] == first[5555]
    assert "no process of it is left" in placed.done(cluster, "down")


def test_the_rendered_job_of_two_routers_serves_and_drains(nodes: SlurmNet) -> None:
    """Components of one job, which Slurm puts on nodes of their own; a killed router is back."""
    here = nodes.net
    path = here.folder / "hosts.yaml"
    path.write_text(
        "routers: [{host: gpu}, {host: more}]\nemulate: cnn-8gpu-modelled\nsecurity: none\nhosts:\n"
        f"  - {{name: gpu, workers: 1, python: {sys.executable}}}\n"
        f"  - {{name: more, address: more, workers: 0, python: {sys.executable}}}\n"
    )
    script = here.folder / "ss.sbatch"
    script.write_text(render(describe(path)))
    job = nodes.call("sbatch", "--parsable", f"--chdir={here.folder}", str(script)).strip()
    log = here.folder / f"superserve-default-{job}.log"
    here.until(lambda: log.exists() and log.read_text().count("welcomed") >= 1)
    node = dict(line.split() for line in nodes.call("squeue", "-h", "-o", "%i %N").splitlines())[f"{job}+1"]
    with placed.load(here, f"tcp://{here.address(node)}:5557", slo_ms=5_000):
        killed = placed.routers(here)[5557]
        os.kill(killed, signal.SIGKILL)
        here.until(lambda: placed.routers(here).get(5557, killed) != killed)
    nodes.call("scancel", "--batch", "--signal=TERM", job)
    here.until(lambda: not nodes.call("squeue", "-h", f"--job={job}", "-o", "%T").strip())
    assert log.read_text().count("dropped: nothing") >= 1, log.read_text()


def test_the_rendered_job_serves_and_drains(nodes: SlurmNet) -> None:
    """`sbatch` takes the heterogeneous job as printed; SIGTERM for its shell drains it, router first."""
    here = nodes.net
    path = here.folder / "hosts.yaml"
    path.write_text(
        "router: {host: gpu}\nemulate: cnn-8gpu-modelled\nsecurity: none\n"
        f"hosts:\n  - {{name: gpu, workers: 2, python: {sys.executable}}}\n"
    )
    script = here.folder / "ss.sbatch"
    script.write_text(render(describe(path)))
    job = nodes.call("sbatch", "--parsable", f"--chdir={here.folder}", str(script)).strip()
    log = here.folder / f"superserve-default-{job}.log"
    here.until(lambda: log.exists() and log.read_text().count("welcomed") == 2)
    node = nodes.call("squeue", "-h", f"--job={job}+0", "-o", "%N").split()[0]
    with placed.load(here, f"tcp://{here.address(node)}:5555"):
        pass  # some hundred queries
    nodes.call("scancel", "--batch", "--signal=TERM", job)
    here.until(lambda: not nodes.call("squeue", "-h", f"--job={job}", "-o", "%T").strip())
    assert log.read_text().count("dropped: nothing") == 2


def test_the_page_is_true(nodes: SlurmNet) -> None:
    """The commands of docs/engines.md, from a hosts file to the end."""
    folder = ("/shared/superserve", str(nodes.net.folder / "shared"))
    partition = ("--partition=gpu", "--partition=main")
    placed.follow_page(nodes.net, "slurm", Path(sys.executable), "op", folder, partition)
