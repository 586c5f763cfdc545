"""`cluster render` prints what an engine takes, and writes secrets for their owner alone."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner

from cluster.cli import cli
from cluster.cli.render import ENGINES, write
from cluster.engines.registry import RENDERERS
from cluster.engines.text import Rendered
from superserve.net.keys import add_peer, make_ring, revoke
from tests.cluster.engines.described import ONE_HOST, TWO_HOSTS

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


@pytest.fixture
def hosts_file(tmp_path: Path) -> Path:
    """Return a hosts file with keys, of which only the router's are made."""
    make_ring(tmp_path / "keys")
    path = tmp_path / "hosts.yaml"
    path.write_text(ONE_HOST.replace("security: none", "keys: keys"))
    return path


def run(*words: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_the_command_offers_what_is_registered() -> None:
    """The names are written twice, since reading the registry takes half a second of every command."""
    assert set(ENGINES) == set(RENDERERS)


@pytest.mark.parametrize("engine", RENDERERS)
def test_what_is_printed_has_no_secret(hosts_file: Path, engine: str) -> None:
    """It may go to a terminal, a log or a repository; the same file gives the same text."""
    first, second = run("render", engine, hosts_file), run("render", engine, hosts_file)

    assert first.exit_code == second.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert first.stdout.strip()
    secrets = [path.read_text() for path in (hosts_file.parent / "keys").rglob("*.key")]
    values = [line.split(" = ")[1] for text in secrets for line in text.splitlines() if "secret =" in line]
    assert len(values) == 4
    assert not any(value in first.output for value in values)
    assert "made" in first.stderr
    # Slurm's script leads to the folder of keys, and is all there is.
    assert ("--out DIR writes all" in first.stderr) == (engine != "slurm")


def test_images_are_named_by_an_option(hosts_file: Path) -> None:
    """A registry of the user's own, and a version."""
    said = run("render", "compose", hosts_file, "--image", "registry.example.com/ss:1.2").stdout
    assert yaml.safe_load(said)["services"]["router"]["image"] == "registry.example.com/ss:1.2"


@pytest.mark.parametrize("engine", RENDERERS)
def test_files_are_written_whole_and_secrets_for_their_owner(hosts_file: Path, engine: str) -> None:
    """A second call replaces them, and takes a revoked peer off the lists."""
    folder, keys = hosts_file.parent / "out", hosts_file.parent / "keys"
    add_peer(keys, "client", "web")
    said = run("render", engine, hosts_file, "--out", folder)
    assert said.exit_code == 0, said.output
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {line.removeprefix("wrote ") for line in said.stdout.splitlines()} == {str(path) for path in files}
    for path in files:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o600 if path.suffix == ".key" or path.name == "keys.yaml" else 0o644), path

    revoke(keys, "web")
    assert run("render", engine, hosts_file, "--out", folder).exit_code == 0
    assert not list(folder.rglob("web.pub"))
    assert "web.pub" not in "".join(path.read_text() for path in folder.rglob("keys.yaml"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands files over")
def test_root_hands_files_to_the_user_of_the_image(hosts_file: Path) -> None:
    """The containers' user reads them, and needs no root for it."""
    folder = hosts_file.parent / "out"
    assert run("render", "compose", hosts_file, "--out", folder).exit_code == 0
    owners = {path.name: path.stat().st_uid for path in folder.rglob("*") if path.is_file()}
    assert owners.pop("compose.yaml") == 0
    assert set(owners.values()) == {10_001}


def test_errors_are_one_line_each_and_exit_1(tmp_path: Path) -> None:
    """Of the file, of what an engine cannot express, and of a folder that cannot be written."""
    path = tmp_path / "hosts.yaml"
    path.write_text(TWO_HOSTS)
    said = run("render", "compose", path)
    assert said.exit_code == 1
    assert f"Error: {path}:4: hosts[1]: compose runs on one machine" in said.stderr

    path.write_text(TWO_HOSTS.replace("gpus", "gpu"))
    assert "did you mean 'gpus'" in run("render", "kubernetes", path).stderr

    path.write_text(TWO_HOSTS)
    (tmp_path / "taken").write_text("")
    said = run("render", "systemd", path, "--out", tmp_path / "taken" / "out")
    assert said.exit_code == 1
    assert "cannot be written: Not a directory" in said.stderr


def test_a_file_that_cannot_be_written_leaves_none_half_done(tmp_path: Path) -> None:
    """The one that is there stays as it was."""
    write(tmp_path, [Rendered("a", "old")])
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path, [Rendered("a", "new\udc80")])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_keys_are_printed_as_secrets_for_kubectl(hosts_file: Path) -> None:
    """For the chart: a pipe takes them, and they are named as its value says."""
    keys = hosts_file.parent / "keys"
    add_peer(keys, "worker", "pool")
    said = run("keys", "--out", keys, "secrets", "ss")

    names = [secret["metadata"]["name"] for secret in yaml.safe_load_all(said.stdout)]
    assert names == ["ss-router", "ss-clients", "ss-workers", "ss-operators", "ss-worker-pool"]
    assert "no such file" in run("keys", "--out", hosts_file.parent / "none", "secrets", "ss").stderr
