"""A gateway as a role of a cluster: asked for, started, restarted and stopped with the others."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from cluster.engines.describe import describe
from cluster.host.config import supervisord_conf
from cluster.remote.preflight import requirements
from cluster.remote.wheel import FOR_GATEWAY, FOR_TEXTS
from cluster.spec.gateway import gateway_on_host
from cluster.spec.hostplan import plan_of
from cluster.spec.hosts import GatewayPlace, load_hosts
from cluster.spec.plan import CLIENT, Options, make_plan
from cluster.spec.roles import HostPlan
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cluster.machine import Machine

EMULATED: dict[str, Any] = {"emulate": "cnn-8gpu-modelled", "n_gpus": 1}
BODY = json.dumps({"inputs": [{"name": "input", "shape": [1], "datatype": "BYTES", "data": ["x"]}]}).encode()


def test_the_role_connects_to_the_clusters_router() -> None:
    """With the ports and the SLO that were asked for; a plan without --gateway has none."""
    options = Options(**EMULATED, gateway=True, grpc_port=8001, default_slo_ms=50.0, metrics=True)
    plan = make_plan("a", options, 60.0)
    role = plan.roles[-1]
    assert (role.kind, role.name) == ("gateway", "gateway")
    words = " ".join(role.argv)
    assert f"-m gateway --connect {CLIENT} --http-port 8000 --grpc-port 8001 --default-slo-ms 50" in words
    assert "--metrics-port" in words
    assert "gateway" in plan.options
    assert not any(one.kind == "gateway" for one in make_plan("a", Options(**EMULATED), 60.0).roles)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"http_port": 80}, "--http-port: expected with --gateway only"),
        ({"default_slo_ms": 5.0}, "--default-slo-ms: expected with --gateway only"),
        ({"gateway": True, "http_port": 0}, "two ports above 0"),
        ({"gateway": True, "http_port": 7, "grpc_port": 7}, "two ports above 0"),
        ({"gateway": True, "default_slo_ms": 0.0}, "above 0"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], words: str) -> None:
    """Refused before anything starts."""
    with pytest.raises(ConfigError, match=words):
        make_plan("a", Options(**EMULATED, **given), 60.0)


def test_the_gateway_stops_first() -> None:
    """What callers have asked is answered while the router still is there."""
    plan = make_plan("a", Options(**EMULATED, gateway=True), 60.0)
    text = supervisord_conf(HostPlan("/f", "python3", "", plan.roles), min_files=100)
    order = {}
    for section in text.split("[program:")[1:]:
        name = section.partition("]")[0]
        order[name] = int(section.partition("priority=")[2].split()[0])
    assert order["gateway"] < order["router"] < order["worker-0"]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.e2e
@pytest.mark.slow
def test_a_cluster_with_a_gateway(here: Machine) -> None:
    """`up` returns when it serves; `status` shows it; `down` takes it along."""
    port = _free_port()
    code, output = here.run(
        "up",
        "--emulate",
        "cnn-8gpu-modelled:1",
        "--gateway",
        "--http-port",
        str(port),
        "--default-slo-ms",
        "5000",
    )
    assert code == 0, output
    assert f"http://127.0.0.1:{port}/v2" in output
    url = f"http://127.0.0.1:{port}/v2/models/ofa-resnet50/infer"
    with urllib.request.urlopen(urllib.request.Request(url, BODY), timeout=30) as answer:
        assert json.load(answer)["parameters"]["subnet"].startswith("cnn-")
    body = json.loads(here.run("status", "--json")[1])
    assert [(role["kind"], role["state"]) for role in body["roles"]][-1] == ("gateway", "RUNNING")
    assert body["problems"] == []

    code, output = here.run("down")
    assert code == 0, output
    assert here.processes() == []
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=5)


HOSTS = """
router: {host: a, address: router.example}
hosts:
  - {name: a, address: 10.0.0.1, workers: 1, device: cpu}
  - {name: b, address: 10.0.0.2, workers: 1, device: cpu}
supernet: digits
security: none
gateway: {grpc_port: 8001, address: 0.0.0.0, default_slo_ms: 50, processes: 2, callers: /etc/callers}
"""


def _hosts_file(folder: Path, text: str) -> Path:
    path = folder / "hosts.yaml"
    path.write_text(text)
    return path


def test_a_hosts_file_has_it_beside_the_router(tmp_path: Path) -> None:
    """On the router's host alone, with its ports checked and its packages asked for there."""
    path = _hosts_file(tmp_path, HOSTS)
    plan = plan_of(load_hosts(path), path)
    assert [want.roles for want in plan.wanted] == [("router", "worker-a-0", "gateway"), ("worker-b-0",)]
    words = " ".join(plan.roles_of("a", "/s")[-1].argv)
    assert "--connect tcp://127.0.0.1:5555 --address 0.0.0.0 --http-port 8000 --http-processes 2" in words
    assert "--grpc-port 8001 --grpc-processes 2 --default-slo-ms 50 --callers /etc/callers" in words
    assert {8000, 8001} <= set(plan.wanted[0].ports)
    assert set(FOR_GATEWAY) <= set(requirements(plan.wanted[0]))
    assert not set(FOR_GATEWAY) & set(requirements(plan.wanted[1]))
    assert not set(FOR_TEXTS) & set(requirements(plan.wanted[0]))

    path = _hosts_file(tmp_path, HOSTS.replace("processes: 2", "tokenizer: /m/tokenizer.json"))
    plan = plan_of(load_hosts(path), path)
    assert "--tokenizer /m/tokenizer.json" in " ".join(plan.roles_of("a", "/s")[-1].argv)
    assert set(FOR_TEXTS) <= set(requirements(plan.wanted[0]))
    assert not set(FOR_TEXTS) & set(requirements(plan.wanted[1]))


def test_with_keys_it_has_the_operators() -> None:
    """Which lies on the router's host."""
    role = gateway_on_host(GatewayPlace(), "tcp://127.0.0.1:5555", "/s", has_keys=True, is_open=False, env=())
    assert role.argv[-2:] == ("--keys", "/s/keys/operator.key")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("8001", "5555", "hosts.yaml:8: gateway.grpc_port: expected each port once"),
        ("8001", "8000", "hosts.yaml:8: gateway.grpc_port: expected each port once"),
        ("grpc_port", "grcp_port", "gateway.grcp_port"),
        ("processes: 2", "processes: 0", "gateway.processes: expected 1 or more"),
        ("processes: 2", "tls_cert: /a", "expected tls_cert and tls_key"),
        ("security: none", "engine: slurm", "gateway: expected it with engine: ssh only"),
        ("callers: /etc/callers}\n", "model: m}\nkeys: k\n", "others could call without a name"),
    ],
)
def test_a_file_that_cannot_be(tmp_path: Path, old: str, new: str, words: str) -> None:
    """File, line and key, and what was expected."""
    text = HOSTS.replace(old, new, 1)
    if "keys: k" in text:
        text = text.replace("security: none\n", "")
    with pytest.raises(ConfigError) as caught:
        load_hosts(_hosts_file(tmp_path, text))
    assert words in str(caught.value)


def test_what_is_rendered_has_none(tmp_path: Path) -> None:
    """Refused, and not left out in silence."""
    with pytest.raises(ConfigError, match=r"hosts\.yaml:8: gateway: expected none"):
        describe(_hosts_file(tmp_path, HOSTS))
