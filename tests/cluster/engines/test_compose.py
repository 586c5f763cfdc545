"""A compose file has every role, without root, and refuses what one machine cannot be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.engines import compose
from cluster.engines.containers import RenderOptions
from superserve.errors import ConfigError
from tests.cluster.engines.described import ONE_HOST, described, with_keys
from tests.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.engines.describe import Description


def services(description: Description, options: RenderOptions | None = None) -> dict[str, dict[str, Any]]:
    """Return the services of what it renders."""
    (file, *_) = compose.render(description, options or RenderOptions())
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.text)["services"]
    return found


def test_workers_are_replicas_that_find_the_router_by_name(tmp_path: Path) -> None:
    """No worker is given a name: replicas would share it, and the router would take one for the other."""
    found = services(described(tmp_path, ONE_HOST))

    assert list(found) == ["router", "worker-a"]
    assert found["worker-a"]["deploy"] == {"mode": "replicated", "replicas": 2}
    command = found["worker-a"]["command"]
    assert command[command.index("--connect") + 1] == "tcp://router:5556"
    assert "--name" not in command
    assert found["router"]["ports"] == ["5555:5555"]
    assert "ports" not in found["worker-a"]


def test_each_router_is_a_service_that_workers_and_clients_find(tmp_path: Path) -> None:
    """Workers by the services' names, clients where they are published, which the list tells them."""
    text = ONE_HOST.replace("name: a,", "name: a, address: 10.0.0.1,").replace(
        "router: {host: a}", "routers: [{host: a}, {host: a, client_port: 6000, worker_port: 6001}]"
    )
    description = described(tmp_path, text)
    found = services(description)
    files = {file.name: file.text for file in compose.render(description, RenderOptions())}

    assert list(found) == ["router-a-0", "router-a-1", "worker-a"]
    command = found["worker-a"]["command"]
    assert command[command.index("--connect") + 1] == "tcp://router-a-0:5556,tcp://router-a-1:6001"
    assert found["worker-a"]["depends_on"] == ["router-a-0", "router-a-1"]
    for name, port in (("router-a-0", "5555"), ("router-a-1", "6000")):
        assert found[name]["ports"] == [f"{port}:{port}"]
        listed = found[name]["command"][found[name]["command"].index("--routers") + 1]
        assert listed == "/run/superserve/files/routers.json"
        assert f"./{name}/files:/run/superserve/files:ro" in found[name]["volumes"]
        routers = json.loads(files[f"{name}/files/routers.json"])["routers"]
        assert routers[1] == {"client": "tcp://10.0.0.1:6000", "worker": "tcp://router-a-1:6001"}


def test_nothing_is_root_or_writes_but_in_memory(tmp_path: Path) -> None:
    """Each service says so itself, whatever the image would do."""
    for service in services(described(tmp_path, ONE_HOST)).values():
        assert service["user"] == "10001:10001"
        assert (service["read_only"], service["tmpfs"], service["cap_drop"]) == (True, ["/tmp"], ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["stop_grace_period"].rstrip("s")) > 5


def test_a_gpu_has_a_service_of_its_own(tmp_path: Path) -> None:
    """Replicas of one service would all be given the same devices; each sees its own as cuda:0."""
    text = "router: {host: a}\nhosts: [{name: a, gpus: [1, 3]}]\nsecurity: none\nsupernet: digits\n"
    found = services(described(tmp_path, text))

    assert list(found) == ["router", "worker-a-0", "worker-a-1"]
    for name, gpu in (("worker-a-0", "1"), ("worker-a-1", "3")):
        (device,) = found[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": [gpu], "capabilities": ["gpu"]}
        command = found[name]["command"]
        assert command[command.index("--device") + 1] == "cuda:0"


def test_a_familys_folder_is_mounted_where_it_is(tmp_path: Path) -> None:
    """With the models beside the file; the router reads none of them."""
    text = ONE_HOST.replace("emulate: cnn-8gpu-modelled", "family: /srv/models/f.yaml\nprofile: digits-cpu")
    found = services(described(tmp_path, text))

    assert "/srv/models:/srv/models:ro" in found["worker-a"]["volumes"]
    assert "/srv/models" not in str(found["router"])
    command = found["worker-a"]["command"]
    assert command[command.index("--family") + 1] == "/srv/models/f.yaml"
    assert "--supernet" not in command


def test_a_cluster_of_loopback_is_published_there_alone(tmp_path: Path) -> None:
    """The hosts file says that only this machine reaches it; a port for metrics is published as it says."""
    text = ONE_HOST.replace("name: a,", "name: a, address: 127.0.0.1,") + "metrics: {router: 9000}\n"
    found = services(described(tmp_path, text))

    assert found["router"]["ports"] == ["127.0.0.1:5555:5555", "127.0.0.1:9000:9000"]


def test_keys_are_mounted_for_the_role_that_needs_them(tmp_path: Path) -> None:
    """They are files beside the compose file, of the user that reads them, and never in it."""
    description = with_keys(tmp_path, ONE_HOST)
    files = compose.render(description, RenderOptions(owner=(1000, 1001)))
    found = services(description, RenderOptions(owner=(1000, 1001)))

    assert found["router"]["volumes"] == [
        f"./router/{top}:/run/superserve/{top}:ro" for top in ("files", "keys")
    ]
    assert found["worker-a"]["volumes"] == ["./worker-a/keys:/run/superserve/keys:ro"]
    assert {service["user"] for service in found.values()} == {"1000:1001"}
    assert [file.name for file in files if file.is_secret] == [
        "router/keys/router.key",
        "worker-a/keys/worker.key",
    ]
    assert "secret" not in files[0].text


def test_variables_of_compose_are_not_replaced(tmp_path: Path) -> None:
    """A dollar in a value is a dollar."""
    text = ONE_HOST.replace("workers: 2", "workers: 2, env: {GREETING: $HOME}")
    assert services(described(tmp_path, text))["worker-a"]["environment"] == {"GREETING": "$$HOME"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("2}]", "2},\n  {name: b, workers: 1}]", r":3: hosts\[1\]: compose runs on one machine"),
        ("security: none", "cluster: Prod.1", ":4: cluster: expected lower-case letters"),
        ("security: none", "", ":1: security: on compose roles reach each other over a network"),
    ],
)  # fmt: skip
def test_what_compose_has_not_is_refused_by_line(
    tmp_path: Path, before: str, after: str, expected: str
) -> None:
    """The error names the file, the line, the field, and what would do."""
    text = ONE_HOST.replace(before, after)
    if "cluster:" in after:
        text += "security: none\n"
    with pytest.raises(ConfigError, match=f"hosts.yaml{expected}"):
        compose.render(described(tmp_path, text), RenderOptions())


def test_the_shipped_compose_file_runs_what_is_rendered(tmp_path: Path) -> None:
    """The file in deploy/ is for a first try, and must not come to differ from what is rendered."""
    rendered = services(described(tmp_path, ONE_HOST))
    shipped = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    defaults = {"${POLICY:-planfit}": "planfit", "${PROFILE:-cnn-8gpu-modelled}": "cnn-8gpu-modelled"}

    for ours, theirs in (("router", "router"), ("worker", "worker-a")):
        command = [defaults.get(word, word) for word in shipped[ours]["command"].split()]
        wanted = [word for word in rendered[theirs]["command"] if word not in ("--gpus", "1")]
        if "--settings" in wanted:  # the shipped one is changed by variables, not by a file
            at = wanted.index("--settings")
            wanted[at : at + 2] = ["--policy", "planfit"]
        assert command == wanted
        for key in ("user", "init", "restart", "read_only", "tmpfs", "cap_drop", "security_opt"):
            assert shipped[ours][key] == rendered[theirs][key], key
        assert shipped[ours]["healthcheck"]["test"] == rendered[theirs]["healthcheck"]["test"]
