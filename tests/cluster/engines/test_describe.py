"""A description has every role of a hosts file, what each may read, and no place in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.engines.describe import RolePlace, describe
from cluster.spec.hostkeys import complete
from cluster.spec.hosts import load_hosts
from profiles.table import load_profile
from superserve.errors import ConfigError
from superserve.net.keys import add_peer, revoke
from tests.cluster.engines.described import TWO_HOSTS, described, with_keys

if TYPE_CHECKING:
    from pathlib import Path


def test_a_group_for_the_router_and_one_for_each_host_with_workers(tmp_path: Path) -> None:
    """Each has its processes, their devices and variables; CPU workers need no GPU."""
    found = described(tmp_path, TWO_HOSTS)

    assert [(group.name, group.n, group.gpus) for group in found.groups] == [
        ("router", 1, 0),
        ("worker-a", 1, 0),
        ("worker-b", 2, 1),
    ]
    assert found.routers[0].ports == (("clients", 5555), ("workers", 5556))
    assert [process.device for process in found.workers[1].processes] == ["cuda:0", "cuda:1"]
    assert [process.name for process in found.workers[1].processes] == ["worker-b-0", "worker-b-1"]
    assert found.routers[0].env == found.workers[0].env == (("TZ", "UTC"),)
    assert [group.serves for group in found.workers] == ["digits on a CPU", "digits on a GPU"]
    assert found.n_workers == 3


def test_command_lines_are_of_the_place(tmp_path: Path) -> None:
    """What only an engine knows is filled in, and nothing of the hosts' own addresses is left."""
    found = described(tmp_path, TWO_HOSTS)
    router = found.argv(found.routers[0], RolePlace("/run/ss", metrics=("0.0.0.0", 9400)))
    worker = found.argv(
        found.workers[1], RolePlace("/run/ss", ("tcp://ss:5556",), name="one", device="cuda:0")
    )

    assert " ".join(router) == (
        "-m router --client-endpoint tcp://0.0.0.0:5555 --worker-endpoint tcp://0.0.0.0:5556 "
        "--policy planfit --security none --metrics-port 9400 --metrics-address 0.0.0.0"
    )
    assert " ".join(worker) == (
        "-m gpu_worker --connect tcp://ss:5556 --name one --supernet digits --profile digits-cpu "
        "--device cuda:0 --threads 2"
    )
    unnamed = found.argv(found.workers[1], RolePlace("/run/ss", connect=("tcp://[fd00::1]:5556",)))
    assert "--name" not in unnamed
    assert "tcp://[fd00::1]:5556" in unnamed


def test_each_role_reads_its_own_keys_only(tmp_path: Path) -> None:
    """The router's secret is the router's, a host's key its workers', and nobody gets a client's."""
    found = with_keys(tmp_path, TWO_HOSTS)
    paths = [[file.path for file in group.files] for group in found.groups]

    assert paths[0] == [
        "keys/clients/web.pub",
        "keys/operators/cluster-up.pub",
        "keys/operators/operator.pub",
        "keys/router.key",
        "keys/router.pub",
        "keys/workers/a.pub",
        "keys/workers/b.pub",
    ]
    assert paths[1:] == [["keys/worker.key"]] * 2
    assert [file.path for file in found.routers[0].files if file.is_secret] == ["keys/router.key"]
    assert all(file.is_secret for group in found.workers for file in group.files)
    assert found.workers[0].files[0].content == (tmp_path / "keys/workers/a.key").read_bytes()
    assert "--keys /run/ss/keys" in " ".join(found.argv(found.routers[0], RolePlace("/run/ss")))
    assert "--keys /run/ss/keys/worker.key" in " ".join(found.argv(found.workers[0], RolePlace("/run/ss")))
    assert "secret =" not in repr(found)


def test_a_digest_is_of_what_a_role_reads_once(tmp_path: Path) -> None:
    """Another list changes nothing, since routers watch theirs; another key does."""
    before = with_keys(tmp_path, TWO_HOSTS)
    add_peer(tmp_path / "keys", "client", "phone")
    revoke(tmp_path / "keys", "b")
    complete(load_hosts(tmp_path / "hosts.yaml"))
    after = describe(tmp_path / "hosts.yaml")

    assert after.routers[0].digest == before.routers[0].digest
    assert after.workers[0].digest == before.workers[0].digest
    assert after.workers[1].digest != before.workers[1].digest


def test_a_profile_of_the_users_own_is_a_file_beside_the_workers(tmp_path: Path) -> None:
    """Its path is in their command line; the router reads none."""
    profile = load_profile("cnn-8gpu-modelled")
    (tmp_path / "mine.json").write_bytes(profile.to_json())
    found = described(
        tmp_path, "router: {host: a}\nhosts: [{name: a, workers: 1}]\nemulate: mine.json\nsecurity: none\n"
    )
    (file,) = found.workers[0].files

    assert found.routers[0].files == ()
    assert (file.content, file.is_secret) == (profile.to_json(), False)
    assert f"/run/ss/{file.path}" in found.argv(found.workers[0], RolePlace("/run/ss", ("tcp://ss:5556",)))


def test_errors_name_file_line_and_field(tmp_path: Path) -> None:
    """A value that the file leaves out is reported where it would stand."""
    found = described(tmp_path, TWO_HOSTS)
    path = tmp_path / "hosts.yaml"

    assert str(found.error(("hosts", 1, "gpus"), "expected one")) == f"{path}:4: hosts[1].gpus: expected one"
    assert str(found.error(("hosts", 1, "env"), "no")) == f"{path}:4: hosts[1].env: no"
    with pytest.raises(ConfigError, match=r"hosts\.yaml:1: router\.port: unknown key"):
        described(tmp_path, TWO_HOSTS.replace("{host: a}", "{host: a, port: 1}"))


def test_metrics_have_a_port_of_the_file_or_a_default(tmp_path: Path) -> None:
    """The file's ports count up along a host's workers, as on the host itself."""
    plain = described(tmp_path, TWO_HOSTS)
    assert [group.metrics for group in plain.groups] == [None] * 3
    assert [group.metrics_or_default for group in plain.groups] == [9400, 9401, 9401]

    given = described(tmp_path, TWO_HOSTS + "metrics: {router: 8000, workers: 8100}\n")
    assert [group.metrics_or_default for group in given.groups] == [8000, 8100, 8100]
    assert [process.metrics for process in given.workers[1].processes] == [8100, 8101]
