"""Where routers are, on engines that choose the machines: what roles are given, and when it changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cluster.engines.describe import apart
from cluster.engines.placed.routing import LISTED, ROUTERS, RouterAt, RoutersKnown, router_at
from tests.cluster.engines.described import TWO_ROUTERS, described

if TYPE_CHECKING:
    from pathlib import Path


def _at(i: int) -> RouterAt:
    return RouterAt(f"tcp://10.0.0.{i}:5555", f"tcp://10.0.0.{i}:5556")


def _listed(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_bytes())["routers"]
    return found


def test_a_worker_waits_for_one_router_and_begins_with_another_than_its_neighbour(tmp_path: Path) -> None:
    """One is enough: that names the others."""
    worker = RoutersKnown("worker-a-1", ("--connect", ROUTERS), tmp_path / "list")

    assert worker.started({}) is None
    assert worker.started({"router-a-0": _at(1), "router-b-0": _at(2)}) == (
        "--connect", "tcp://10.0.0.2:5556,tcp://10.0.0.1:5556",
    )  # fmt: skip
    assert not (tmp_path / "list").exists()


def test_a_worker_is_started_again_only_if_it_can_know_none(tmp_path: Path) -> None:
    """It hears of those that come from those that stay; where none is known to run, it waits."""
    worker = RoutersKnown("worker-a-0", ("--connect", ROUTERS), tmp_path / "list")
    worker.started({"router-a-0": _at(1)})

    assert not worker.has_moved({})
    assert not worker.has_moved({"router-a-0": _at(1), "router-b-0": _at(2)})
    assert not worker.has_moved({"router-b-0": _at(2)})
    assert worker.has_moved({"router-b-0": _at(3)})


def test_a_routers_list_follows_the_others(tmp_path: Path) -> None:
    """It names none while there is one alone, and is kept if nothing is known."""
    path = tmp_path / "deep" / "list"
    router = RoutersKnown("router-a-0", ("--routers", LISTED), path)

    assert router.started({}) == ("--routers", str(path))
    assert _listed(path) == []
    router.has_moved({"router-a-0": _at(1), "router-b-0": _at(2)})
    assert [each["client"] for each in _listed(path)] == ["tcp://10.0.0.1:5555", "tcp://10.0.0.2:5555"]
    router.has_moved({})
    assert len(_listed(path)) == 2
    router.has_moved({"router-a-0": _at(1), "router-b-0": _at(3)})
    assert _listed(path)[1] == {"client": "tcp://10.0.0.3:5555", "worker": "tcp://10.0.0.3:5556"}
    router.has_moved({"router-a-0": _at(1)})
    assert _listed(path) == []


def test_where_a_router_is_found_is_in_what_it_was_started_with() -> None:
    """Its ports, at the machine's address."""
    argv = ("--client-endpoint", "tcp://0.0.0.0:5557", "--worker-endpoint", "tcp://0.0.0.0:5558")
    assert router_at(argv, "fd00::1") == RouterAt("tcp://[fd00::1]:5557", "tcp://[fd00::1]:5558")


def test_routers_that_may_share_a_machine_have_ports_apart(tmp_path: Path) -> None:
    """Those of the file where they can, else the next free ones."""
    text = TWO_ROUTERS.replace("{host: b}]", "{host: b, client_port: 7000, worker_port: 5556}]")

    assert apart(described(tmp_path, TWO_ROUTERS).routers) == [(5555, 5556), (5557, 5558)]
    assert apart(described(tmp_path, text).routers) == [(5555, 5556), (7002, 5558)]
