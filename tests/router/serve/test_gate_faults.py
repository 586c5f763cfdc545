"""A folder of keys with things in it that are no keys: the gate names them, and goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zmq

from router.serve.gate import Gate, _peer_of
from superserve.errors import ConfigError
from superserve.net import keys


def _n_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a router's folder that lists the client `a`."""
    keys.make_ring(tmp_path / "keys")
    keys.add_peer(tmp_path / "keys", "client", "a")
    return tmp_path / "keys"


@pytest.mark.parametrize("name", [b"\xff.pub", b"-x.pub", b"two words.pub"])
def test_a_name_that_could_not_be_shown_is_left_out(folder: Path, name: bytes) -> None:
    """STATUS shows names; one that is no text, in an otherwise good file, would end the router."""
    good = (folder / "clients" / "a.pub").read_text().replace("name = a", "name = b")
    public = zmq.curve_keypair()[0].decode("ascii")
    lines = [f"public = {public}" if line.startswith("public") else line for line in good.splitlines()]
    (folder / "clients" / os.fsdecode(name)).write_text("\n".join(lines))
    ring, problems = keys.read_ring(folder)
    assert list(ring.clients.values()) == ["a"]
    assert len(problems) == 1
    assert "expected 1 to 64 letters" in problems[0]


def test_a_pipe_in_a_list_is_left_out_and_not_waited_for(folder: Path) -> None:
    """Opening a pipe waits for its writer: no key would be admitted or cut off meanwhile."""
    os.mkfifo(folder / "clients" / "pipe.pub")
    ring, problems = keys.read_ring(folder)
    assert list(ring.clients.values()) == ["a"]
    assert problems == [f"{folder / 'clients' / 'pipe.pub'}: expected a file"]


def test_a_list_that_is_no_folder_is_an_error_that_names_it(folder: Path) -> None:
    """The router says which path is wrong, rather than a traceback."""
    (folder / "workers").rmdir()
    (folder / "workers").write_text("")
    with (
        zmq.Context() as context,
        pytest.raises(ConfigError, match="workers: cannot be read: Not a directory"),
    ):
        Gate(context, folder)


def test_asking_for_the_peer_of_what_is_no_socket_keeps_no_descriptor(tmp_path: Path) -> None:
    """ZeroMQ may have closed the connection, and its number may be a file's by the time it is asked."""
    with (tmp_path / "file").open("w") as file:
        before = _n_open()
        assert [_peer_of(file.fileno()) for _ in range(8)] == ["an address that was gone too soon"] * 8
        assert _n_open() == before
