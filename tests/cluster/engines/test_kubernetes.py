"""Manifests have every role, its probes, its secrets and nothing that a pod cannot have."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cluster.engines import kubernetes
from cluster.engines.containers import RenderOptions
from cluster.engines.kubesecrets import secrets_of
from profiles.table import load_profile
from superserve.errors import ConfigError
from tests.cluster.engines.described import ONE_HOST, TWO_HOSTS, TWO_ROUTERS, described, with_keys

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.engines.describe import Description

Manifest = dict[str, Any]


def manifests(description: Description) -> dict[tuple[str, str], Manifest]:
    """Return what is rendered, Secrets too, by kind and name."""
    found = {}
    for file in kubernetes.render(description, RenderOptions("registry/superserve:1")):
        for manifest in yaml.safe_load_all(file.text):
            found[manifest["kind"], manifest["metadata"]["name"]] = manifest
    return found


def pods(found: dict[tuple[str, str], Manifest]) -> dict[str, Manifest]:
    """Return the template of each kind of pod, by its controller's name."""
    return {
        name: manifest["spec"]["template"]
        for (kind, name), manifest in found.items()
        if kind in ("StatefulSet", "Deployment")
    }


def test_a_host_of_the_file_is_a_deployment(tmp_path: Path) -> None:
    """Kubernetes places its pods; each has as many replicas as the host has workers, one GPU each."""
    found = manifests(described(tmp_path, TWO_HOSTS))

    assert found["StatefulSet", "superserve-router"]["spec"]["replicas"] == 1
    for host, n, gpus in (("a", 1, None), ("b", 2, 1)):
        deployment = found["Deployment", f"superserve-worker-{host}"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert deployment["spec"]["replicas"] == n
        assert container["resources"].get("limits", {}).get("nvidia.com/gpu") == gpus
        assert container["image"] == "registry/superserve:1"
    rolling = found["Deployment", "superserve-worker-b"]["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": 1}


def test_workers_find_a_router_that_is_not_ready_yet(tmp_path: Path) -> None:
    """It is ready once it has a worker: behind an ordinary Service the two would wait for each other."""
    found = manifests(described(tmp_path, TWO_HOSTS))
    behind = found["Service", "superserve-router"]["spec"]
    (container,) = pods(found)["superserve-worker-a"]["spec"]["containers"]

    assert behind["publishNotReadyAddresses"] is True
    assert behind["clusterIP"] == "None"
    assert "tcp://superserve-router:5556" in container["args"]
    assert found["StatefulSet", "superserve-router"]["spec"]["serviceName"] == "superserve-router"
    ports = found["Service", "superserve"]["spec"]["ports"]
    assert [port["port"] for port in ports] == [5555]


def test_routers_are_pods_of_one_set_that_know_each_other(tmp_path: Path) -> None:
    """Workers have one name with all addresses; a node gives up one at a time, which leaves, then drains."""
    found = manifests(described(tmp_path, TWO_ROUTERS))
    routers = found["StatefulSet", "superserve-router"]["spec"]
    (container,) = routers["template"]["spec"]["containers"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "routers"]
    listed = json.loads(found["ConfigMap", "superserve-routers"]["data"]["routers.json"])["routers"]

    assert (routers["replicas"], routers["podManagementPolicy"]) == (2, "Parallel")
    assert [each["worker"] for each in listed] == [
        f"tcp://superserve-router-{i}.superserve-router:5556" for i in range(2)
    ]
    path = container["args"][container["args"].index("--routers") + 1]
    assert path == f"{mount['mountPath']}/routers.json"
    assert found["PodDisruptionBudget", "superserve-router"]["spec"]["maxUnavailable"] == 1
    leaves_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1].rpartition("(")[2].rstrip(")"))
    assert routers["template"]["spec"]["terminationGracePeriodSeconds"] >= leaves_s + 8
    (worker,) = pods(found)["superserve-worker-a"]["spec"]["containers"]
    assert worker["args"][worker["args"].index("--connect") + 1] == "tcp://superserve-router:5556"


def test_a_router_more_restarts_nothing(tmp_path: Path) -> None:
    """The pods of routers and workers are the same; only the list and the number are others."""
    one, two = (
        manifests(described(tmp_path, text))
        for text in (TWO_ROUTERS.replace(", {host: b}]", "]"), TWO_ROUTERS)
    )
    assert pods(one) == pods(two)
    assert one["ConfigMap", "superserve-routers"]["data"] == {"routers.json": '{"routers":[]}'}


def test_selectors_select_what_they_are_for(tmp_path: Path) -> None:
    """Services, budgets and policies find the pods of their role, and no others."""
    found = manifests(described(tmp_path, TWO_HOSTS))
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(found).items()}

    def selected(selector: dict[str, str]) -> set[str]:
        return {name for name, own in labels.items() if selector.items() <= own.items()}

    for (kind, name), manifest in found.items():
        spec = manifest.get("spec", {})
        if kind == "Service":
            assert selected(spec["selector"]) == {"superserve-router"}, name
        elif kind in ("StatefulSet", "Deployment", "PodDisruptionBudget"):
            assert selected(spec["selector"]["matchLabels"]) == {name}
    of = {name: found["NetworkPolicy", f"superserve-{name}"]["spec"] for name in ("router", "worker")}
    assert selected(of["router"]["podSelector"]["matchLabels"]) == {"superserve-router"}
    workers = {"superserve-worker-a", "superserve-worker-b"}
    assert selected(of["worker"]["podSelector"]["matchLabels"]) == workers
    (source,) = of["router"]["ingress"][1]["from"]
    assert selected(source["podSelector"]["matchLabels"]) == workers
    assert of["router"]["ingress"][1]["ports"] == [{"protocol": "TCP", "port": 5556}]


def test_pods_are_confined_and_asked_for_their_health(tmp_path: Path) -> None:
    """Not root, nothing writable but memory, no token, probes on the port that metrics are on."""
    for name, pod in pods(manifests(described(tmp_path, TWO_HOSTS))).items():
        spec = pod["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        by_name = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert str(by_name["metrics"]) == container["args"][container["args"].index("--metrics-port") + 1]
        assert container["livenessProbe"]["httpGet"] == {"path": "/live", "port": "metrics"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}
        assert container["startupProbe"]["httpGet"]["path"] == "/live"
        assert spec["terminationGracePeriodSeconds"] > (8 if name.endswith("router") else 5)
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in spec["volumes"]}


def test_each_role_mounts_its_own_secrets(tmp_path: Path) -> None:
    """The router's secret goes to the router alone, lists as folders that update, no file by subPath."""
    description = with_keys(tmp_path, TWO_HOSTS)
    found = manifests(description)
    mounted = {
        name: {
            volume["secret"]["secretName"]: (mount["mountPath"], volume["secret"]["defaultMode"])
            for volume in pod["spec"]["volumes"]
            for mount in pod["spec"]["containers"][0]["volumeMounts"]
            if "secret" in volume and mount["name"] == volume["name"]
        }
        for name, pod in pods(found).items()
    }

    assert mounted == {
        "superserve-router": {
            "superserve-router": ("/run/superserve/router", 0o400),
            "superserve-clients": ("/run/superserve/keys/clients", 0o400),
            "superserve-workers": ("/run/superserve/keys/workers", 0o400),
            "superserve-operators": ("/run/superserve/keys/operators", 0o400),
        },
        "superserve-worker-a": {"superserve-worker-a": ("/run/superserve/keys", 0o400)},
        "superserve-worker-b": {"superserve-worker-b": ("/run/superserve/keys", 0o400)},
    }
    (router,) = pods(found)["superserve-router"]["spec"]["containers"]
    assert "--keys /run/superserve/keys --router-key /run/superserve/router/router.key" in " ".join(
        router["args"]
    )
    own = base64.b64decode(found["Secret", "superserve-router"]["data"]["router.key"])
    assert own == (tmp_path / "keys/router.key").read_bytes()
    assert set(found["Secret", "superserve-clients"]["data"]) == {"web.pub"}
    assert not any("subPath" in str(pod) for pod in pods(found).values())


def test_the_keys_of_a_folder_are_the_same_secrets(tmp_path: Path) -> None:
    """`cluster keys secrets` makes for the chart what `cluster render kubernetes` makes of the file."""
    found = manifests(with_keys(tmp_path, TWO_HOSTS))
    of_folder = {secret["metadata"]["name"]: secret for secret in secrets_of("superserve", tmp_path / "keys")}

    assert of_folder == {name: manifest for (kind, name), manifest in found.items() if kind == "Secret"}


def test_secrets_are_a_file_of_their_own(tmp_path: Path) -> None:
    """What is printed, or kept in a repository, has none."""
    shown, keys = kubernetes.render(with_keys(tmp_path, TWO_HOSTS), RenderOptions())

    assert (keys.name, keys.is_secret, shown.is_secret) == ("keys.yaml", True, False)
    assert all(manifest["kind"] != "Secret" for manifest in yaml.safe_load_all(shown.text))


def test_another_key_replaces_pods_and_another_list_does_not(tmp_path: Path) -> None:
    """A pod's annotation changes with what it reads once."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first, second = (pods(manifests(with_keys(tmp_path / name, ONE_HOST))) for name in "12")
    for name in first:
        assert first[name]["metadata"]["annotations"] != second[name]["metadata"]["annotations"]


def test_a_profile_of_the_users_own_is_a_config_map(tmp_path: Path) -> None:
    """Its file is mounted where the command line says."""
    profile = load_profile("cnn-8gpu-modelled")
    (tmp_path / "mine.json").write_bytes(profile.to_json())
    found = manifests(described(tmp_path, ONE_HOST.replace("cnn-8gpu-modelled", "mine.json")))
    (container,) = pods(found)["superserve-worker-a"]["spec"]["containers"]
    path = container["args"][container["args"].index("--emulate") + 1]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "files"]

    data = found["ConfigMap", "superserve-files"]["data"]
    assert path.removeprefix(mount["mountPath"] + "/") in data
    assert list(data.values()) == [profile.to_json().decode()]


def test_variables_of_kubernetes_are_not_replaced(tmp_path: Path) -> None:
    """Only the pod's name is: it names the worker."""
    text = ONE_HOST.replace("workers: 2", "workers: 2, env: {A: $(HOME)}")
    (container,) = pods(manifests(described(tmp_path, text)))["superserve-worker-a"]["spec"]["containers"]

    assert {"name": "A", "value": "$$(HOME)"} in container["env"]
    assert container["args"][container["args"].index("--name") + 1] == "$(POD_NAME)"
    assert container["env"][0]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TWO_HOSTS.replace("[0, 1]", "[1, 3]"), r":4: hosts\[1\]\.gpus: kubernetes chooses the devices"),
        (TWO_HOSTS.replace("name: b", "name: B"), r":4: hosts\[1\]\.name: expected a name of Kubernetes"),
        (TWO_HOSTS + "cluster: my_cluster\n", r":6: cluster: expected a name of Kubernetes"),
        (TWO_HOSTS + "weights: /data/w.safetensors\n", r":6: weights: a pod has no path of its host"),
        (TWO_HOSTS + "family: /data/f.yaml\nprofile: digits-cpu\n", r":6: family: a pod has no files of its"),
        (
            TWO_ROUTERS.replace("workers: 1}", "env: {}}").replace("workers: 2", "workers: 1"),
            r":1: routers: a router without a worker is never ready",
        ),
        (
            TWO_ROUTERS.replace("workers: 1}", "workers: 1, env: {A: B}}"),
            r":1: routers\[1\]\.host: routers are",
        ),
        (TWO_HOSTS.replace("security: none\n", ""), r":1: security: on kubernetes roles reach each other"),
    ],
)
def test_what_kubernetes_has_not_is_refused_by_line(tmp_path: Path, text: str, expected: str) -> None:
    """The error names the file, the line, the field, and what would do."""
    with pytest.raises(ConfigError, match=f"hosts.yaml{expected}"):
        kubernetes.render(described(tmp_path, text), RenderOptions())


def test_a_profile_that_no_config_map_holds_is_refused(tmp_path: Path) -> None:
    """Its name becomes a key there."""
    (tmp_path / "my profile.json").write_bytes(load_profile("cnn-8gpu-modelled").to_json())
    (tmp_path / "hosts.yaml").write_text("")
    text = TWO_HOSTS + "profile: 'my profile.json'\n"
    with pytest.raises(ConfigError, match=r"hosts.yaml:6: profile: expected"):
        kubernetes.render(described(tmp_path, text), RenderOptions())
