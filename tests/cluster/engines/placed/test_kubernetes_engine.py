"""The engine of Kubernetes on a kubectl that a script plays: what is applied, read, drained and reported."""

from __future__ import annotations

import base64
import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.engines.containers import RenderOptions
from cluster.engines.describe import describe
from cluster.engines.kubernetes import render
from cluster.engines.placed import placing
from cluster.engines.placed.kubernetes_engine import KubernetesEngine
from cluster.engines.placed.podseen import seen_in
from cluster.remote.shell import RemoteError
from cluster.spec.hostkeys import complete
from cluster.spec.hosts import load_hosts
from superserve.errors import ConfigError
from superserve.net.keys import add_peer, make_ring, revoke
from tests.cluster.engines.placed.fake_kubectl import FakeKubectl, install

if TYPE_CHECKING:
    from pathlib import Path

FILE = """\
engine: kubernetes
kubernetes: {context: prod, namespace: serving, image: "r.example/ss:1"}
router: {host: a}
emulate: cnn-8gpu-modelled
security: none
hosts:
  - {name: a, workers: 1, env: {A: "$(X)"}}
  - {name: b, workers: 2, gpus_per_worker: 2}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    """Give kubectl, and a state folder."""
    monkeypatch.setenv("SUPERSERVE_STATE", str(tmp_path / "state"))
    return install(tmp_path / "kubectl", monkeypatch)


def _applied(tmp_path: Path, text: str = FILE) -> tuple[KubernetesEngine, dict[str, dict[str, str]]]:
    """Apply a file; return the engine and what was done, by host."""
    path = tmp_path / "hosts.yaml"
    path.write_text(text)
    complete(load_hosts(path))
    description = describe(path)
    folder = placing.folder_of(description)
    plans, files = placing.plans_of(description, folder, "")
    engine = KubernetesEngine(placing.record_of(description, folder))
    done = engine.apply(plans, files)
    assert [one.error for one in done.values()] == [""] * len(done)
    return engine, {host: one.changed for host, one in done.items()}


def _container(made: dict[str, Any]) -> dict[str, Any]:
    (container,) = made["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_each_role_is_an_object_of_its_own(fake: FakeKubectl, tmp_path: Path) -> None:
    """With its Services, who reaches it, and how many may be taken at a time."""
    engine, done = _applied(tmp_path)

    assert done["b"] == {"worker-b-0": "started", "worker-b-1": "started"}
    assert fake.names == {
        "service-superserve", "service-superserve-router", "statefulset-superserve-router",
        "networkpolicy-superserve-router", "networkpolicy-superserve-worker",
        "poddisruptionbudget-superserve-worker", "poddisruptionbudget-superserve-router",
        next(name for name in fake.names if name.startswith("secret-superserve-router-")),
        *(f"deployment-superserve-{name}" for name in ("worker-a-0", "worker-b-0", "worker-b-1")),
    }  # fmt: skip
    worker = _container(fake.object("deployment-superserve-worker-a-0"))
    assert worker["image"] == "r.example/ss:1"
    assert worker["args"][:6] == [
        "-m", "gpu_worker", "--connect", "tcp://superserve-router:5556", "--name", "worker-a-0",
    ]  # fmt: skip
    assert {"name": "A", "value": "$$(X)"} in worker["env"]
    assert engine.record.client_endpoint == "tcp://superserve:5555"


def test_pods_are_those_that_render_prints(fake: FakeKubectl, tmp_path: Path) -> None:
    """But for their names and the router's settings: both are confined, probed and end alike."""
    _applied(tmp_path)
    import yaml  # noqa: PLC0415  as the tests of the renderer read it

    (text,) = (
        file.text for file in render(describe(tmp_path / "hosts.yaml"), RenderOptions(image="r.example/ss:1"))
    )
    rendered = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}

    own = (
        "worker-b-0", "$(POD_NAME)", "--settings", "/run/superserve/files/router.json", "--policy", "planfit",
        "--routers", "/run/superserve/routers/routers.json",  # its file says that it is the only one
    )  # fmt: skip

    def plain(made: dict[str, Any]) -> dict[str, Any]:
        spec = {key: value for key, value in made["spec"]["template"]["spec"].items() if key != "tolerations"}
        files = ("files-0", "routers")
        spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] not in files]
        container = dict(spec["containers"][0])
        container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] not in files]
        container["args"] = [word for word in container["args"] if word not in own]
        container.pop("env", None)
        return {**spec, "containers": [container]}

    for ours, theirs in (
        ("deployment-superserve-worker-b-0", ("Deployment", "superserve-worker-b")),
        ("statefulset-superserve-router", ("StatefulSet", "superserve-router")),
    ):
        assert plain(fake.object(ours)) == plain(rendered[theirs])


def test_what_runs_as_asked_for_is_left_alone(fake: FakeKubectl, tmp_path: Path) -> None:
    """Another image restarts everything, one worker less only ends that one."""
    _applied(tmp_path)
    assert _applied(tmp_path)[1] == {"a": {}, "b": {}}

    _, done = _applied(tmp_path, FILE.replace("workers: 2", "workers: 1"))
    assert done == {"a": {}, "b": {"worker-b-1": "stopped"}}
    assert "deployment-superserve-worker-b-1" not in fake.names
    _, done = _applied(tmp_path, FILE.replace("ss:1", "ss:2").replace("workers: 2", "workers: 1"))
    assert done == {
        "a": {"router": "restarted", "worker-a-0": "restarted"}, "b": {"worker-b-0": "restarted"},
    }  # fmt: skip


def test_keys_are_secrets_and_lists_stay_where_they_are(fake: FakeKubectl, tmp_path: Path) -> None:
    """Each role mounts its own; a further client changes a list and restarts nothing."""
    ring = tmp_path / "keys"
    make_ring(ring)
    add_peer(ring, "client", "web")
    text = FILE.replace("security: none", "keys: keys")
    _applied(tmp_path, text)

    router = fake.object("statefulset-superserve-router")
    mounted = {volume["secret"]["secretName"] for volume in router["spec"]["template"]["spec"]["volumes"][1:]}
    lists = {"superserve-clients", "superserve-workers", "superserve-operators"}
    assert lists < mounted
    own = [set(fake.object(f"secret-{name}")["data"]) for name in sorted(mounted - lists)]
    assert own == [{"router.json"}, {"router.key", "router.pub"}]
    args = _container(router)["args"]
    assert args[args.index("--keys") + 1] == "/run/superserve/keys"
    assert args[args.index("--router-key") + 1] == "/run/superserve/router/router.key"
    worker = fake.object("deployment-superserve-worker-b-0")["spec"]["template"]["spec"]["volumes"][1:]
    (theirs,) = (volume["secret"]["secretName"] for volume in worker)
    assert set(fake.object(f"secret-{theirs}")["data"]) == {"worker.key"}
    assert "web.pub" in fake.object("secret-superserve-clients")["data"]

    revoke(ring, "web")
    assert _applied(tmp_path, text)[1] == {"a": {}, "b": {}}
    assert "web.pub" not in fake.object("secret-superserve-clients")["data"]


def test_what_kubectl_shows_is_reported(fake: FakeKubectl, tmp_path: Path) -> None:
    """Each state in supervisor's words, with the pod, its node, and why it waits or failed."""
    engine, _ = _applied(tmp_path)
    fake.set_pod(
        "superserve-worker-a-0", spec={},
        status={"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: insufficient nvidia.com/gpu"},
        ]},
    )  # fmt: skip
    fake.set_pod(
        "superserve-worker-b-0",
        status={"phase": "Running", "containerStatuses": [
            {"restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
             "lastState": {"terminated": {"exitCode": 3}}},
        ]},
    )  # fmt: skip

    (router, a), (b0, b1) = (host.roles for host in engine.roles())
    assert (router.state, router.place) == ("RUNNING", "pod superserve-router-0 on n1")
    assert (a.state, a.why) == ("STARTING", "0/3 nodes: insufficient nvidia.com/gpu")
    assert (b0.state, b0.why, b0.restarts, b0.exit_code) == (
        "BACKOFF",
        "CrashLoopBackOff: back-off; its log ends: two",
        4,
        3,
    )
    assert b0.tail == ("one", "two")
    assert b1.is_up
    with pytest.raises(ConfigError, match="expected a role of 'default'"):
        engine.logs("worker-c-0")


def test_a_role_that_is_scaled_to_nothing_stops_and_has_stopped() -> None:
    """While its pod drains it is stopping; a new pod counts, not the one that leaves."""
    labels = {"superserve/role": "worker-a-0"}
    role = {"kind": "Deployment", "metadata": {"labels": labels}, "spec": {"replicas": 0}}
    leaving = {
        "kind": "Pod", "metadata": {"name": "p", "labels": labels, "deletionTimestamp": "x"}, "spec": {},
        "status": {"phase": "Running"},
    }  # fmt: skip
    fresh = {
        "kind": "Pod", "metadata": {"name": "q", "labels": labels}, "spec": {"nodeName": "n"},
        "status": {"containerStatuses": [{"started": True, "state": {"running": {
            "startedAt": "2026-01-01T00:00:00Z"}}}]},
    }  # fmt: skip
    now = dt.datetime(2026, 1, 1, 0, 1, tzinfo=dt.UTC)

    def found(*objects: dict[str, Any], n: int = 0) -> tuple[str, int, str]:
        one = seen_in(({**role, "spec": {"replicas": n}}, *objects), "superserve/role", now)["worker-a-0"]
        return one.state, one.up_s, one.place

    assert found(leaving) == ("STOPPING", 0, "pod p")
    assert found() == ("STOPPED", 0, "")
    assert found(leaving, n=1) == ("STARTING", 0, "")
    assert found(leaving, fresh, n=1) == ("RUNNING", 60, "pod q on n")
    assert found({**leaving, "metadata": {"name": "p", "labels": labels}, "status": {"phase": "Failed"}}) == (
        "STOPPED", 0, "",
    )  # fmt: skip


def test_a_further_worker_is_like_its_siblings(fake: FakeKubectl, tmp_path: Path) -> None:
    """With its own name, and the same port for metrics: a pod has all ports to itself."""
    engine, _ = _applied(tmp_path)
    host = engine.record.hosts[1]
    grown = replace(host, roles=(*host.roles, "worker-b-7"))
    engine.keep(replace(engine.record, hosts=(engine.record.hosts[0], grown)))

    engine.scale("worker-b-7", 1)

    args = _container(fake.object("deployment-superserve-worker-b-7"))["args"]
    assert args[args.index("--name") + 1] == "worker-b-7"
    assert args[args.index("--metrics-port") + 1] == "9401"
    engine.scale("worker-b-7", 0)
    assert fake.object("deployment-superserve-worker-b-7")["spec"]["replicas"] == 0
    assert "scale deployment/superserve-worker-b-7 --replicas=0" in fake.calls


def test_down_stops_the_router_first_and_leaves_nothing(fake: FakeKubectl, tmp_path: Path) -> None:
    """But what others have made, of the same name too."""
    engine, _ = _applied(tmp_path)
    other = {
        "kind": "Secret",
        "metadata": {"name": "x", "labels": {"app.kubernetes.io/instance": "superserve"}},
    }
    engine._kubectl.apply([other])

    done = engine.stop()

    assert done.wrong == {}
    assert set(done.stopped["a"]) == {("router", 0), ("worker-a-0", 0)}
    scaled = [call for call in fake.calls if call.startswith("scale")]
    assert scaled[0] == "scale statefulset/superserve-router --replicas=0"
    assert fake.names == {"secret-x"}


def test_an_older_cluster_gets_the_version_that_it_has(fake: FakeKubectl, tmp_path: Path) -> None:
    """policy/v1 came with Kubernetes 1.21."""
    (fake.folder / "versions").write_text("apps/v1\npolicy/v1beta1\n")
    _applied(tmp_path)
    assert fake.object("poddisruptionbudget-superserve-worker")["apiVersion"] == "policy/v1beta1"


def test_errors_quote_kubectl(fake: FakeKubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every host if the API does not answer; a router that cannot be reached has no STATUS."""
    engine, _ = _applied(tmp_path)
    assert engine.router_status() is None  # the script forwards nothing
    fake.fail("get", "The connection to the server was refused")
    (error,) = {host.error for host in engine.roles()}
    assert error.endswith("exit code 1: The connection to the server was refused")
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(RemoteError, match="kubectl: not found: `engine: kubernetes` needs it here"):
        engine.start(engine.last("router"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FILE.replace("hosts:", "cluster: Big\nhosts:"), r"hosts.yaml:\d+: cluster: expected a name of Kub"),
        (
            FILE.replace("security: none\n", ""),
            "security: on kubernetes roles reach each other over a network",
        ),
        (FILE.replace("namespace: serving", "namespaces: x"), "kubernetes.namespaces: unknown"),
        (
            FILE.replace("engine: kubernetes", "engine: ray"),
            "kubernetes: expected it with engine: kubernetes",
        ),
    ],
)
def test_what_kubernetes_has_not_is_refused_by_line(tmp_path: Path, text: str, expected: str) -> None:
    """Before anything is applied."""
    with pytest.raises(ConfigError, match=expected):
        _applied(tmp_path, text)


def test_other_settings_reach_the_pod_at_once(fake: FakeKubectl, tmp_path: Path) -> None:
    """In the Secret that it mounts; a pod that changes makes its kubelet look now. No role is restarted."""
    engine, _ = _applied(tmp_path)
    (name,) = (one for one in fake.names if one.startswith("secret-superserve-router-"))

    engine.tune(b'{"policy": "maxacc"}')

    assert base64.b64decode(fake.object(name)["data"]["router.json"]) == b'{"policy": "maxacc"}'
    assert fake.calls[-1].startswith("annotate pod superserve-router-0 superserve/sent=")
    assert _applied(tmp_path, f"{FILE}policy: maxacc\n")[1] == {"a": {}, "b": {}}


def test_several_routers_are_behind_the_same_names(fake: FakeKubectl, tmp_path: Path) -> None:
    """Each is a set of its own, as `restart --router` takes them; a further one restarts nothing."""
    two = FILE.replace("router: {host: a}", "routers: [{host: a}, {host: b}]")
    engine, _ = _applied(tmp_path, two)

    for name in ("superserve", "superserve-router"):
        selector = fake.object(f"service-{name}")["spec"]["selector"]
        assert selector["app.kubernetes.io/component"] == "router"
        assert "superserve/role" not in selector
    made = fake.object("statefulset-superserve-router-b-0")["spec"]
    assert (made["replicas"], made["serviceName"]) == (1, "superserve-router")
    (secret,) = (
        fake.object(name)
        for name in fake.names
        if name.startswith("secret-superserve-router-b-0-") and name.endswith("-files")
    )
    listed = base64.b64decode(secret["data"]["routers.json"])
    assert b"tcp://superserve-router-b-0-0.superserve-router:5556" in listed
    worker = _container(fake.object("deployment-superserve-worker-b-0"))
    assert "tcp://superserve-router:5556" in worker["args"]
    assert {role.kind for role in engine.roles()[0].roles} == {"router", "worker"}

    _, done = _applied(tmp_path, two.replace("{host: b}]", "{host: b}, {host: b}]"))
    assert done == {"a": {}, "b": {"router-b-1": "started"}}
    assert "annotate pod superserve-router-a-0-0" in fake.calls[-2] + fake.calls[-3] + fake.calls[-5]
