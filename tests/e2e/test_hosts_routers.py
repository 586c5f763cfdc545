"""Routers that a hosts file gains and loses, on three hosts, each a network namespace with its own sshd."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from tests.e2e import placed
from tests.e2e.test_hosts import hosts, pids, up

if TYPE_CHECKING:
    from tests.e2e.netns import Net

__all__ = ["hosts"]  # the fixture
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

WORKERS = {f"worker-{name}-{i}" for name in "abc" for i in range(2)}


def _write(here: Net, *routers: str) -> str:
    """Write a hosts file with these hosts' routers, and two workers on each host; return its path."""
    entries = [
        f"  - {{name: {name}, address: {here.address(name)}, workers: 2, python: {sys.executable}}}"
        for name in here.hosts
    ]
    several = ", ".join(f"{{host: {name}}}" for name in routers)
    path = here.folder / "hosts.yaml"
    lines = [f"routers: [{several}]", "emulate: cnn-8gpu-modelled", "security: none", "hosts:"]
    path.write_text("\n".join([*lines, *entries, ""]))
    return str(path)


def _shares(here: Net) -> dict[str, int]:
    """Return how many GPUs each router that answers has, by its host."""
    shares = placed.shares(here.cluster)
    return {here.hosts[int(end.rpartition(":")[0].rpartition(".")[2]) - 1]: n for end, n in shares.items()}


def test_a_router_is_added_to_the_file_and_one_taken_away_under_load(hosts: Net) -> None:
    """No worker and no router that stays is restarted; what goes drains first, and no query fails at 1 s."""
    up(hosts, _write(hosts, "a"))
    before = pids(hosts)
    assert before.keys() == {"router-a-0", *WORKERS}
    with placed.load(hosts, f"tcp://{hosts.address('a')}:5555", slo_ms=5_000):
        up(hosts, _write(hosts, "a", "b"))
        hosts.until(lambda: _shares(hosts) == {"a": 3, "b": 3})
        two = pids(hosts)
        up(hosts, _write(hosts, "b", "c"))
        hosts.until(lambda: _shares(hosts) == {"b": 3, "c": 3})
        last = pids(hosts)

    assert {name: two[name] for name in before} == before
    assert last.keys() == {"router-b-0", "router-c-0", *WORKERS}
    assert {name: last[name] for name in ("router-b-0", *WORKERS)} == {
        name: two[name] for name in ("router-b-0", *WORKERS)
    }
    assert "left alone" in up(hosts, _write(hosts, "b", "c"))

    os.kill(last["worker-a-0"], signal.SIGKILL)  # started again, it is given the list as it is now
    hosts.until(lambda: pids(hosts).get("worker-a-0") not in (None, last["worker-a-0"]))
    hosts.until(lambda: placed.well(hosts.cluster) == WORKERS)
    code, output = hosts.cluster("down")
    assert code == 0, output
    assert hosts.processes() == []
