"""Key files: made with the right modes, read with suspicion, never overwritten."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest

from superserve.errors import ConfigError
from superserve.net import keys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a router's folder with a client and a worker."""
    folder = tmp_path / "keys"
    keys.make_ring(folder)
    keys.add_peer(folder, "client", "web")
    keys.add_peer(folder, "worker", "gpu-1")
    return folder


def modes(folder: Path) -> dict[str, int]:
    """Return each file's mode, by its path below the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in files}


def test_secrets_are_their_owners_alone(folder: Path) -> None:
    """A secret is 0600 from the start, and no other file is left behind."""
    assert modes(folder) == {
        "router.key": 0o600, "router.pub": 0o644, "operator.key": 0o600, "operators/operator.pub": 0o644,
        "clients/web.key": 0o600, "clients/web.pub": 0o644,
        "workers/gpu-1.key": 0o600, "workers/gpu-1.pub": 0o644,
    }  # fmt: skip


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_secret_that_others_may_read_is_refused(folder: Path, mode: int) -> None:
    """The error says chmod 600, for a peer's file and for the router's."""
    for path in (folder / "clients" / "web.key", folder / "router.key"):
        path.chmod(mode)
    with pytest.raises(ConfigError, match=r"web.key.*chmod 600"):
        keys.peer_keys(folder / "clients" / "web.key")
    with pytest.raises(ConfigError, match=r"router.key.*chmod 600"):
        keys.router_keys(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of root")
def test_a_group_may_read_a_secret_of_root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So Kubernetes hands a secret to a process that is not root; for root itself the rule stays."""
    path = folder / "clients" / "web.key"
    path.chmod(0o440)
    with pytest.raises(ConfigError, match="0440"):
        keys.peer_keys(path)

    monkeypatch.setattr(os, "geteuid", lambda: 10_001)
    assert keys.peer_keys(path) is not None
    for mode in (0o444, 0o460, 0o640 | 0o010):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"{mode:04o}"):
            keys.peer_keys(path)
    path.chmod(0o440)
    os.chown(path, 10_001, 10_001)
    with pytest.raises(ConfigError, match="0440"):
        keys.peer_keys(path)


def test_a_routers_secret_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Where secrets are mounted on their own; the folder's own one is not read then."""
    public = keys.router_keys(folder).public
    (folder / "router.key").rename(tmp_path / "secret")
    assert keys.router_keys(folder, tmp_path / "secret").public == public
    with pytest.raises(ConfigError, match="elsewhere: expected a key file: No such file"):
        keys.router_keys(folder, tmp_path / "elsewhere")


def test_what_was_made_is_read(folder: Path) -> None:
    """A peer's file holds the key that is listed, and the router's."""
    ring, problems = keys.read_ring(folder)
    own = keys.peer_keys(folder / "clients" / "web.key")
    assert own is not None
    assert own.router == keys.router_keys(folder).public
    assert ring.clients == {own.public: "web"}
    assert list(ring.workers.values()) == ["gpu-1"]
    assert list(ring.operators.values()) == ["operator"]
    assert problems == []


def test_no_file_is_overwritten(folder: Path) -> None:
    """Neither a router's keys nor a peer's: the error names the file, which stays as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*.key")}
    with pytest.raises(ConfigError, match=r"router.key.*exists"):
        keys.make_ring(folder)
    with pytest.raises(ConfigError, match=r"web.key.*exists"):
        keys.add_peer(folder, "client", "web")
    assert {path: path.read_bytes() for path in folder.rglob("*.key")} == before


def test_a_secret_is_never_shown(folder: Path) -> None:
    """Not by repr, and not by the error about a file that is malformed."""
    path = folder / "clients" / "web.key"
    own = keys.peer_keys(path)
    assert own is not None
    assert own.secret not in repr(own)
    assert keys.router_keys(folder).secret not in repr(keys.router_keys(folder))
    path.write_text(path.read_text().replace(own.secret, own.secret[:-1]))
    with pytest.raises(ConfigError, match="secret: expected a key of 40") as raised:
        keys.peer_keys(path)
    assert own.secret[:-1] not in str(raised.value)


def test_a_folder_stands_for_the_file_of_its_role(folder: Path) -> None:
    """client.key before operator.key for a client, worker.key for a worker; else the error says how."""
    own = keys.peer_keys(folder)
    assert own is not None
    assert own.path == folder / "operator.key"
    keys.add_peer(folder, "client", "here", folder / "client.key")
    own = keys.peer_keys(folder)
    assert own is not None
    assert own.path == folder / "client.key"
    with pytest.raises(ConfigError, match="cluster keys add worker NAME"):
        keys.peer_keys(folder, "worker")


def test_the_environment_names_a_key_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None asks the environment; an empty path is no keys, whatever that says."""
    assert keys.peer_keys(None) is None
    monkeypatch.setenv(keys.ENVIRONMENT, str(folder / "clients" / "web.key"))
    own = keys.peer_keys(None)
    assert own is not None
    assert own.path.name == "web.key"
    assert keys.peer_keys("") is None


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "role: expected client"),
        ("role = client\n", "public: expected a key of 40"),
        ("role = client\npublic = " + "~" * 40, "public: expected a key of 40"),
        ("role = client\npublic = " + "%" * 40, "public: expected a key of 40"),
        ("role = worker\npublic = " + "0" * 40, "role: expected client, got 'worker'"),
        ("role = client\nrole = client\n", "web.pub:2: expected"),
        ("nonsense", "web.pub:1: expected"),
        ("\xff", "ASCII"),
        ("#" * 5_000, "at most 4096 bytes"),
    ],
)
def test_a_malformed_listed_key_is_left_out(folder: Path, text: str, error: str) -> None:
    """It is named with what was expected; the others are listed as before."""
    (folder / "clients" / "web.pub").write_text(text, encoding="latin-1")
    ring, problems = keys.read_ring(folder)
    assert ring.clients == {}
    assert len(ring.workers) == 1
    (problem,) = problems
    assert error in problem


def test_one_key_under_two_names_is_a_problem(folder: Path) -> None:
    """Else revoking one of them would cut nobody off."""
    text = (folder / "clients" / "web.pub").read_text()
    (folder / "clients" / "zoe.pub").write_text(text)
    ring, problems = keys.read_ring(folder)
    assert list(ring.clients.values()) == ["web"]
    assert "one file a key" in problems[0]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 65])
def test_a_name_is_a_plain_word(folder: Path, name: str) -> None:
    """Nothing that could lead out of the folder."""
    with pytest.raises(ConfigError, match="name"):
        keys.add_peer(folder, "client", name)
    with pytest.raises(ConfigError, match="name"):
        keys.revoke(folder, name)


def test_revoking_removes_the_key_and_changes_the_signature(folder: Path) -> None:
    """The list and the secret beside it; the router's own key is nobody's to revoke."""
    before = keys.signature(folder)
    gone = keys.revoke(folder, "web")
    assert [path.name for path in gone] == ["web.pub", "web.key"]
    assert keys.signature(folder) != before
    with pytest.raises(ConfigError, match="no key is listed"):
        keys.revoke(folder, "router")
    assert (folder / "router.key").exists()
    keys.revoke(folder, "operator")
    assert not (folder / "operator.key").exists()


def test_a_key_that_is_replaced_changes_the_signature(folder: Path) -> None:
    """Rotation under the same name is seen as well."""
    before = keys.signature(folder)
    keys.revoke(folder, "web")
    keys.add_peer(folder, "client", "web")
    assert keys.signature(folder) != before


def test_a_router_key_is_no_peers(folder: Path) -> None:
    """Giving the router's own secret to a client is an error."""
    with pytest.raises(ConfigError, match="the router's own secret"):
        keys.peer_keys(folder / "router.key")
    (folder / "router.key").write_text((folder / "operator.key").read_text())
    with pytest.raises(ConfigError, match="role: expected router"):
        keys.router_keys(folder)


def test_a_key_that_cannot_be_written_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: neither the file nor what was to become it."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        keys.make_ring(tmp_path / "keys")
    assert not [path for path in (tmp_path / "keys").rglob("*") if path.is_file()]


def test_a_ring_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its last file cannot be written the first goes too: else the next try finds a router's key."""
    written: list[int] = []
    sync = os.fsync

    def full_after_two(fd: int) -> None:
        written.append(fd)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(fd)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", full_after_two)
        with pytest.raises(ConfigError, match=r"operator.key: cannot be written: No space left"):
            keys.make_ring(tmp_path / "keys")
    assert not [path for path in (tmp_path / "keys").rglob("*") if path.is_file()]
    assert len(keys.make_ring(tmp_path / "keys")) == 4
