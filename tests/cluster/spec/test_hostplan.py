"""What each host of a file is to run: command lines, ports and files; and what is refused."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest

from cluster.spec.hostplan import HostsPlan, is_loopback, plan_of
from cluster.spec.hosts import load_hosts
from cluster.spec.hosts_file import dump
from cluster.spec.roles import Target
from profiles.table import load_profile
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

REAL = """
router: {host: a, address: router.example, client_port: 7000, worker_port: 7001}
hosts:
  - {name: a, address: 10.0.0.1, gpus: [0, 3], env: {NCCL_DEBUG: WARN}}
  - {name: b, address: gpu-b, user: serve, port: 2222, workers: 2, device: cpu, threads: 4}
supernet: digits
security: none
metrics: {router: 9100, workers: 9101}
log: {megabytes: 1, files: 2}
"""


def planned(tmp_path: Path, text: str) -> HostsPlan:
    """Return the plan of a file with this text."""
    path = tmp_path / "hosts.yaml"
    path.write_text(text)
    return plan_of(load_hosts(path), path)


def argv(plan: HostsPlan, host: str, role: str) -> str:
    """Return a role's command line as it is on its host."""
    return " ".join(next(found.argv for found in plan.roles_of(host, f"/s/{host}") if found.name == role))


def test_every_host_gets_its_roles(tmp_path: Path) -> None:
    """A worker for each GPU or process; the router where it is said; loopback on its own host."""
    plan = planned(tmp_path, REAL)

    assert [want.roles for want in plan.wanted] == [
        ("router", "worker-a-0", "worker-a-1"), ("worker-b-0", "worker-b-1")
    ]  # fmt: skip
    assert "--client-endpoint tcp://0.0.0.0:7000" in argv(plan, "a", "router")
    assert "--metrics-port 9100 --metrics-address 127.0.0.1" in argv(plan, "a", "router")
    first = argv(plan, "a", "worker-a-1")
    assert "--connect tcp://127.0.0.1:7001" in first
    assert "--device cuda:3" in first
    assert "--metrics-port 9102" in first
    other = argv(plan, "b", "worker-b-0")
    assert "--connect tcp://router.example:7001" in other
    assert "--device cpu --threads 4" in other
    assert plan.client_endpoint == "tcp://router.example:7000"
    assert plan.roles[0][1].env == (("NCCL_DEBUG", "WARN"),)
    assert (plan.log_bytes, plan.log_files) == (1 << 20, 2)


def test_workers_of_a_family_are_given_its_file(tmp_path: Path) -> None:
    """Instead of a supernet; its profile is sent, and its models are on the hosts."""
    text = REAL.replace("supernet: digits", "family: /srv/f.yaml\nprofile: digits-cpu")
    plan = planned(tmp_path, text)

    worker = argv(plan, "b", "worker-b-0")
    assert "--family /srv/f.yaml --profile digits-cpu --device cpu --threads 4" in worker
    assert "--supernet" not in worker
    assert all(want.serves_family for want in plan.wanted)
    assert not any(want.serves_family for want in planned(tmp_path, REAL).wanted)


@pytest.mark.parametrize(
    ("address", "bound", "own", "others", "looked_up"),
    [
        ("10.0.0.1", "0.0.0.0", "127.0.0.1", "10.0.0.1", ""),
        ("fd00::7", "[::]", "[::1]", "[fd00::7]", ""),
        ("'[fd00::7]'", "[::]", "[::1]", "[fd00::7]", ""),
        ("'::1'", "[::1]", "[::1]", "[::1]", ""),
        ("router.example", "0.0.0.0", "127.0.0.1", "router.example", "router.example"),
    ],
)
def test_the_routers_address_may_be_of_either_kind(
    tmp_path: Path, address: str, bound: str, own: str, others: str, looked_up: str
) -> None:
    """IPv6 stands in brackets wherever a port follows; only a name is looked up, and by other hosts."""
    text = (
        f"router: {{host: a, address: {address}}}\nemulate: cnn-8gpu-modelled\nsecurity: none\n"
        f"hosts: [{{name: a, workers: 1}}, {{name: b, workers: 1}}]\n"
    )
    plan = planned(tmp_path, text)
    assert f"--client-endpoint tcp://{bound}:5555" in argv(plan, "a", "router")
    assert f"--connect tcp://{own}:5556" in argv(plan, "a", "worker-a-0")
    assert f"--connect tcp://{others}:5556" in argv(plan, "b", "worker-b-0")
    assert plan.client_endpoint == f"tcp://{others}:5555"
    assert [want.router for want in plan.wanted] == ["", looked_up]


def test_every_host_is_looked_at_for_what_it_needs(tmp_path: Path) -> None:
    """Ports of router and metrics, the GPUs by their numbers, and the way ssh takes."""
    a, b = planned(tmp_path, REAL).wanted
    assert (a.ports, a.gpus) == ((7000, 7001, 9100, 9101, 9102), (0, 3))
    assert (b.ports, b.gpus, b.target) == ((9101, 9102), (), Target("gpu-b", "serve", 2222))


def test_a_profile_that_is_a_file_goes_along(tmp_path: Path) -> None:
    """The worker is given its path on the host, which changes with the content."""
    (tmp_path / "mine.json").write_bytes(load_profile("cnn-8gpu-modelled").to_json())
    text = "router: {host: a}\nhosts: [{name: a, address: 127.0.0.1, workers: 1}]\nemulate: mine.json\n"
    plan = planned(tmp_path, text)
    (name, content), settings = plan.files_of("a").items()
    assert json.loads(base64.b64decode(settings[1])) == {"policy": "planfit"}
    assert f"--emulate /s/a/{name} " in argv(plan, "a", "worker-a-0")
    (tmp_path / "sent.json").write_bytes(base64.b64decode(content))
    assert load_profile(str(tmp_path / "sent.json")) == load_profile("cnn-8gpu-modelled")


@pytest.mark.parametrize(
    ("address", "is_local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("10.0.0.1", False),
     ("gpu1", False), ("0.0.0.0", False)],
)  # fmt: skip
def test_what_counts_as_loopback(address: str, is_local: bool) -> None:
    """A name may be anything, and counts as elsewhere."""
    assert is_loopback(address) is is_local


def test_loopback_needs_no_word_on_security(tmp_path: Path) -> None:
    """Elsewhere the file says `none`, or has keys."""
    text = "router: {host: a}\nhosts: [{name: a, address: ADDRESS, workers: 1}]\nemulate: cnn-8gpu-modelled\n"
    plan = planned(tmp_path, text.replace("ADDRESS", "127.0.0.1"))
    assert "--client-endpoint tcp://127.0.0.1:5555" in argv(plan, "a", "router")
    with pytest.raises(ConfigError, match="security: none"):
        planned(tmp_path, text.replace("ADDRESS", "10.0.0.1"))


SEVERAL = """
routers: [{host: a}, {host: b, client_port: 6000, worker_port: 6001}]
hosts:
  - {name: a, address: 10.0.0.1, workers: 1}
  - {name: b, address: 10.0.0.2, workers: 2}
emulate: cnn-8gpu-modelled
security: none
"""


def test_several_routers_know_each_other_and_workers_know_all(tmp_path: Path) -> None:
    """Each worker begins its list with another router, and reaches that of its own host by loopback."""
    plan = planned(tmp_path, SEVERAL)

    assert [want.roles for want in plan.wanted] == [
        ("router-a-0", "worker-a-0"), ("router-b-0", "worker-b-0", "worker-b-1")
    ]  # fmt: skip
    assert plan.client_endpoint == "tcp://10.0.0.1:5555,tcp://10.0.0.2:6000"
    assert "--routers /s/b/files/routers.json" in argv(plan, "b", "router-b-0")
    assert "--connect tcp://127.0.0.1:5556,tcp://10.0.0.2:6001" in argv(plan, "a", "worker-a-0")
    assert "--connect tcp://127.0.0.1:6001,tcp://10.0.0.1:5556" in argv(plan, "b", "worker-b-0")
    for host in "ab":
        listed = base64.b64decode(plan.files_of(host)["files/routers.json"])
        assert b'{"client":"tcp://10.0.0.2:6000","worker":"tcp://10.0.0.2:6001"}' in listed
    assert plan.wanted[1].ports == (6000, 6001)


def test_a_router_keeps_its_role_while_others_come_and_go(tmp_path: Path) -> None:
    """And its command line; routers on one host have one metrics port after the other."""
    alone = planned(tmp_path, SEVERAL.replace("[{host: a}, ", "[") + "metrics: {router: 9400}\n")
    several = planned(
        tmp_path,
        SEVERAL.replace("[{host: a}, ", "[{host: a}, {host: a, client_port: 1, worker_port: 2}, ")
        + "metrics: {router: 9400}\n",
    )

    assert argv(alone, "b", "router-b-0") == argv(several, "b", "router-b-0")
    assert "--metrics-port 9401" in argv(several, "a", "router-a-1")
    assert several.wanted[0].ports == (5555, 5556, 1, 2, 9400, 9401)
    assert base64.b64decode(alone.files_of("b")["files/routers.json"]) == b'{"routers":[]}'


def test_a_file_with_several_routers_is_dumped_and_read_back(tmp_path: Path) -> None:
    """`cluster config --effective` prints them as they are written."""
    path = tmp_path / "hosts.yaml"
    path.write_text(SEVERAL)
    hosts = load_hosts(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(hosts))

    assert load_hosts(again) == hosts
    assert [place.address for place in hosts.places] == ["10.0.0.1", "10.0.0.2"]
