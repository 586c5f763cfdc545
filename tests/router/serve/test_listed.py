"""The list of routers: read, read again when it changes, and refused when malformed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from router.serve.listed import ALONE, RouterList
from superserve.clock import SECOND
from superserve.errors import ConfigError
from superserve.wire import Kind
from tests.router.serve.test_server import Net, Peer, role

if TYPE_CHECKING:
    from pathlib import Path

A = {"client": "tcp://a:1", "worker": "tcp://a:2"}
B = {"client": "tcp://b:1", "worker": "tcp://b:2"}


def test_a_router_alone_has_no_list() -> None:
    """Nothing is read, and nothing is listed."""
    found = RouterList(None)
    found.load()

    assert not found.look(SECOND)
    assert found.listed == ALONE


def test_a_list_that_changes_is_read_again(tmp_path: Path) -> None:
    """And one that becomes malformed leaves the last one in force."""
    path = tmp_path / "routers.json"
    path.write_text(json.dumps({"routers": [A]}))
    found = RouterList(path)
    found.load()
    assert found.listed.clients == ("tcp://a:1",)

    fresh = tmp_path / "new"
    fresh.write_text(json.dumps({"routers": [A, B]}))
    fresh.replace(path)
    assert found.look(SECOND)
    assert found.listed.workers == ("tcp://a:2", "tcp://b:2")

    fresh.write_text("{")
    fresh.replace(path)
    assert not found.look(2 * SECOND)
    assert found.listed.workers == ("tcp://a:2", "tcp://b:2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", r'expected \{"routers"'),
        ('{"routers": [{"client": "tcp://a:1"}]}', r"routers\[0\].worker: expected tcp://HOST:PORT"),
        (json.dumps({"routers": [A, A]}), r"routers\[1\].client: tcp://a:1 is listed twice"),
        ("{", "expected JSON"),
    ],
)
def test_a_malformed_list_is_an_error_that_names_the_entry(tmp_path: Path, text: str, said: str) -> None:
    """At the start it ends the router."""
    path = tmp_path / "routers.json"
    path.write_text(text)

    with pytest.raises(ConfigError, match=said):
        RouterList(path).load()


@pytest.mark.e2e
def test_a_worker_that_knows_one_router_is_told_of_others(tmp_path: Path) -> None:
    """It asks for none itself: there was no other to compare with."""
    path = tmp_path / "routers.json"
    path.write_text('{"routers": []}')
    net = Net()
    try:
        with role("--routers", str(path)) as router:
            worker = Peer(net, router.ready["worker"])
            assert "routers" not in worker.join()
            fresh = tmp_path / "new"
            fresh.write_text(json.dumps({"routers": [A, B]}))
            fresh.replace(path)
            assert worker.control(Kind.STATUS)["routers"] == ["tcp://a:2", "tcp://b:2"]
    finally:
        net.close()
