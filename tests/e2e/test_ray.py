"""A cluster on Ray: a head and two more raylets, each in a network namespace of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import placed
from tests.e2e.ray_net import RayNet, ray

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]  # it may have to install Ray


@pytest.fixture
def nodes() -> Iterator[RayNet]:
    """Give three nodes; nothing of them is left."""
    with ray("n1", "n2", "n3") as here:
        yield here


def _file(here: RayNet, n: int = 2) -> Path:
    path = here.net.folder / "hosts.yaml"
    first = here.net.address(here.head)
    path.write_text(
        placed.text("ray", f'{{address: "{here.address}", router_node: {first}, spread: true}}', n)
    )
    return path


def test_a_cluster_on_ray_from_up_to_down(nodes: RayNet) -> None:
    """Under load: a worker is killed, a node cut off, the fleet scaled up and down; no query fails."""
    here, cluster = nodes.net, nodes.cluster
    path = str(_file(nodes))
    placed.done(cluster, "up", path)
    places = {name: placed.node(role) for name, role in placed.seen(cluster).items()}
    assert places["router"] == here.address(nodes.head)

    with placed.load(here, f"tcp://{places['router']}:5555", host=nodes.head):
        killed = placed.everywhere(here)["worker-gpu-0"]
        os.kill(killed, signal.SIGKILL)
        here.until(lambda: placed.everywhere(here).get("worker-gpu-0", killed) != killed)
        here.until(lambda: placed.well(cluster) == {"worker-gpu-0", "worker-gpu-1"})

        placed.done(cluster, "scale", "4")  # Ray spreads them: each other node has one at least
        assert placed.well(cluster) == {f"worker-gpu-{i}" for i in range(4)}
        lost = next(host for host in here.hosts[1:] if placed.processes(here, host))
        placed.cut(here, lost, off=True)
        here.until(lambda: len(placed.everywhere(here, lost)) == 4)  # Ray has made its actors elsewhere
        here.until(lambda: placed.well(cluster) == {f"worker-gpu-{i}" for i in range(4)})

        with Path(path).open("a") as file:
            file.write("policy: slackfit\nmax_queries: 5000\n")
        assert "policy: planfit -> slackfit" in placed.done(cluster, "apply", path)
        output = placed.done(cluster, "scale", "1")
        assert "1 left: worker-gpu-0" in output
        assert placed.well(cluster) == {"worker-gpu-0"}

    assert "left alone" in placed.done(cluster, "up", path)
    assert "no process of it is left" in placed.done(cluster, "down")
    assert placed.everywhere(here, lost) == {}

    _two_routers(nodes)

    # The commands of docs/engines.md, on the nodes that are left.
    placed.follow_page(here, "ray", nodes.python, nodes.head)


def _two_routers(nodes: RayNet) -> None:
    """A killed router of two is back, and no query fails; a third one restarts nothing."""
    here, cluster = nodes.net, nodes.cluster
    path = here.folder / "hosts.yaml"
    settings = f'{{address: "{nodes.address}"}}'
    path.write_text(placed.text("ray", settings, 4, routers=2))
    placed.done(cluster, "up", str(path))
    here.until(lambda: sorted(placed.shares(cluster).values()) == [2, 2])
    workers, first = placed.everywhere(here), placed.routers(here)
    assert first.keys() == {5555, 5557}

    with placed.load(here, next(iter(placed.shares(cluster))), host=nodes.head, slo_ms=5_000):
        os.kill(first[5557], signal.SIGKILL)
        here.until(lambda: placed.routers(here).get(5557, first[5557]) != first[5557])
        here.until(lambda: sorted(placed.shares(cluster).values()) == [2, 2])
        path.write_text(placed.text("ray", settings, 4, routers=3))
        placed.done(cluster, "up", str(path))
        here.until(lambda: sorted(placed.shares(cluster).values()) == [1, 1, 2])

    assert placed.everywhere(here) == workers
    assert placed.routers(here)[5555] == first[5555]
    assert "no process of it is left" in placed.done(cluster, "down")
