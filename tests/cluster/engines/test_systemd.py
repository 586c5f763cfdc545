"""Units have every role of a host, its secrets as credentials, and nothing that systemd would replace."""

from __future__ import annotations

import configparser
from typing import TYPE_CHECKING

import pytest

from cluster.engines import systemd
from cluster.engines.containers import RenderOptions
from superserve.errors import ConfigError
from tests.cluster.engines.described import TWO_HOSTS, TWO_ROUTERS, described, with_keys

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.engines.describe import Description


def units(description: Description) -> dict[str, dict[str, list[str]]]:
    """Return each unit's settings of [Service], by its path."""
    found = {}
    for file in systemd.render(description, RenderOptions()):
        settings: dict[str, list[str]] = {}
        for line in file.text.split("[Service]")[-1].splitlines():
            key, equals, value = line.partition("=")
            if equals:
                settings.setdefault(key, []).append(value)
        if file.name.endswith(".service"):
            found[file.name] = settings
    return found


def test_each_process_has_a_unit_on_its_host(tmp_path: Path) -> None:
    """Workers keep the devices and the router's address of the file: nothing is placed anew."""
    found = units(described(tmp_path, TWO_HOSTS.replace("name: a,", "name: a, address: 10.0.0.1,")))

    assert list(found) == [
        "a/superserve-router.service",
        "a/superserve-worker-a-0.service",
        "b/superserve-worker-b-0.service",
        "b/superserve-worker-b-1.service",
    ]
    (start,) = found["b/superserve-worker-b-1.service"]["ExecStart"]
    assert "--connect tcp://10.0.0.1:5556 --name worker-b-1" in start
    assert "--device cuda:1" in start
    (own,) = found["a/superserve-worker-a-0.service"]["ExecStart"]
    assert "--connect tcp://127.0.0.1:5556" in own
    for unit in found.values():
        assert unit["Restart"] == ["on-failure"]
        assert unit["Type"] == ["notify"]
    assert "PrivateDevices" not in found["b/superserve-worker-b-1.service"]


def test_each_router_has_a_unit_and_the_list(tmp_path: Path) -> None:
    """Each worker begins with another router; the list is a file, which a router reads again."""
    description = described(tmp_path, TWO_ROUTERS)
    found = units(description)
    files = {file.name: file for file in systemd.render(description, RenderOptions())}

    for host, own in (("a", "10.0.0.1"), ("b", "10.0.0.2")):
        (start,) = found[f"{host}/superserve-router-{host}-0.service"]["ExecStart"]
        assert "--routers /etc/superserve/default/files/routers.json" in start
        listed = files[f"{host}/default/files/routers.json"]
        assert listed.is_beside
        assert f"tcp://{own}:5555" in listed.text
    for host, i, connect in (
        ("a", 0, "127.0.0.1:5556,tcp://10.0.0.2:5556"),
        ("a", 1, "10.0.0.2:5556,tcp://127.0.0.1:5556"),
        ("b", 0, "10.0.0.1:5556,tcp://127.0.0.1:5556"),
    ):
        (worker,) = found[f"{host}/superserve-worker-{host}-{i}.service"]["ExecStart"]
        assert f"--connect tcp://{connect} " in worker


def test_a_target_starts_the_units_of_its_host(tmp_path: Path) -> None:
    """It is what `systemctl enable` is typed for, so that a server that boots serves."""
    files = {f.name: f.text for f in systemd.render(described(tmp_path, TWO_HOSTS), RenderOptions())}
    target = configparser.ConfigParser()
    target.read_string(files["b/superserve.target"])

    assert target["Unit"]["Wants"] == "superserve-worker-b-0.service superserve-worker-b-1.service"
    assert target["Install"]["WantedBy"] == "multi-user.target"


def test_secrets_are_credentials_and_lists_are_files(tmp_path: Path) -> None:
    """Each unit is given its own secret; the router reads lists where they can change."""
    description = with_keys(tmp_path, TWO_HOSTS)
    found = units(description)
    files = systemd.render(description, RenderOptions())

    router, worker = found["a/superserve-router.service"], found["b/superserve-worker-b-0.service"]
    assert router["LoadCredential"] == ["router.key:/etc/superserve/default/keys/router.key"]
    assert (
        "--keys /etc/superserve/default/keys --router-key ${CREDENTIALS_DIRECTORY}/router.key"
        in router["ExecStart"][0]
    )
    assert worker["LoadCredential"] == ["worker.key:/etc/superserve/default/keys/worker.key"]
    assert "--keys ${CREDENTIALS_DIRECTORY}/worker.key" in worker["ExecStart"][0]
    on_b = [file.name for file in files if file.name.startswith("b/") and file.is_beside]
    assert on_b == ["b/default/keys/worker.key"]


def test_nothing_is_replaced_in_what_the_file_says(tmp_path: Path) -> None:
    """There are specifiers, variables and quotes in units, and none in a hosts file."""
    text = TWO_HOSTS.replace("env: {TZ: UTC}", """env: {A: '100%, "$HOME" \\'}, python: /opt/a$b/python3""")
    unit = units(described(tmp_path, text))["a/superserve-worker-a-0.service"]

    assert unit["Environment"][0] == r'"A=100%%, \"$HOME\" \\"'
    assert unit["ExecStart"][0].startswith('"/opt/a$$b/python3" -P -m gpu_worker')


def test_clusters_beside_each_other_have_units_of_their_own(tmp_path: Path) -> None:
    """The name of any but the default one is in its units' names."""
    files = systemd.render(described(tmp_path, TWO_HOSTS + "cluster: prod\n"), RenderOptions())
    assert files[0].name == "a/superserve-prod.target"
    assert "Wants=superserve-prod-router.service" in files[0].text
    assert "PartOf=superserve-prod.target" in files[1].text


def test_a_file_without_keys_is_refused_as_by_up(tmp_path: Path) -> None:
    """Beyond loopback nothing listens without keys or leave."""
    text = TWO_HOSTS.replace("security: none\n", "")
    with pytest.raises(ConfigError, match="security: without keys nothing listens beyond loopback"):
        systemd.render(described(tmp_path, text), RenderOptions())
