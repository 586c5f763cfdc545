"""The engine of Ray on a Ray that is an object, and its actor on a real process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from cluster.engines.describe import describe
from cluster.engines.placed import placing, ray_actor
from cluster.engines.placed.base import Started
from cluster.engines.placed.ray_actor import RoleActor
from cluster.engines.placed.ray_engine import RayEngine, connected
from superserve.errors import ConfigError
from superserve.net.keys import make_ring
from tests.cluster.engines.placed.fake_ray import FakeRay, Handle
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = """\
engine: ray
ray: {{address: "10.0.0.1:6379", spread: true, worker_cpus: 0.5{more}}}
router: {{host: a}}
supernet: digits
keys: keys
hosts: [{{name: a, gpus: [4, 5]}}]
"""


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Give a Ray without actors, and a state folder."""
    monkeypatch.setenv("SUPERSERVE_STATE", str(tmp_path / "state"))
    _keep_values(monkeypatch)
    return FakeRay()


def _keep_values(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """Give Ray's control store; return what it holds."""
    held: dict[bytes, bytes] = {}

    def put(key: bytes, value: bytes, *, overwrite: bool) -> None:
        assert overwrite
        held[key] = value

    store = SimpleNamespace(
        _internal_kv_put=put, _internal_kv_get=held.get, _internal_kv_del=lambda key: held.pop(key, None)
    )
    monkeypatch.setitem(sys.modules, "ray.experimental", SimpleNamespace(internal_kv=store))
    return held


def _applied(tmp_path: Path, ray: FakeRay, more: str = "") -> tuple[RayEngine, dict[str, str], str]:
    """Apply a file with keys; return the engine, what was done, and the error."""
    from cluster.spec.hostkeys import complete  # noqa: PLC0415  they need a file
    from cluster.spec.hosts import load_hosts  # noqa: PLC0415

    if not (tmp_path / "keys").exists():
        make_ring(tmp_path / "keys")
    path = tmp_path / "hosts.yaml"
    path.write_text(FILE.format(more=more))
    complete(load_hosts(path))
    description = describe(path)
    folder = placing.folder_of(description)
    plans, files = placing.plans_of(description, folder, "")
    engine = RayEngine(placing.record_of(description, folder), ray)
    done = engine.apply(plans, files)["a"]
    return engine, done.changed, done.error


def test_each_role_is_a_detached_actor_with_its_gpu(tmp_path: Path, ray: FakeRay) -> None:
    """Restarted for ever; a worker has one GPU and its own key, the router neither."""
    _, done, error = _applied(tmp_path, ray)

    assert (error, done) == ("", dict.fromkeys(("router", "worker-a-0", "worker-a-1"), "started"))
    actor, options = ray.actors["worker-a-1"]
    assert (options["namespace"], options["lifetime"], options["max_restarts"]) == (
        "superserve-default", "detached", -1,
    )  # fmt: skip
    assert (options["num_gpus"], options["num_cpus"], options["scheduling_strategy"]) == (1, 0.5, "SPREAD")
    assert "cuda:0" in actor.role["argv"]
    assert [name.rpartition("/")[2] for name in actor.files] == ["worker.key"]
    router, options = ray.actors["router"]
    assert (options["num_gpus"], options["num_cpus"], options["scheduling_strategy"]) == (0, 0, "DEFAULT")
    assert any(name.endswith("keys/router.key") for name in router.files)
    assert not any("worker.key" in name for name in router.files)


def test_what_runs_is_left_alone_and_what_differs_is_replaced(tmp_path: Path, ray: FakeRay) -> None:
    """By settings too: they decide where an actor is placed."""
    _applied(tmp_path, ray)
    before = ray.actors["router"][0]
    assert _applied(tmp_path, ray)[1] == {}

    for actor, _ in ray.actors.values():
        actor.stop = lambda actor=actor: ray.actors.pop(actor.role["name"])  # drained at once
    _, done, _ = _applied(tmp_path, ray, more=", spread: false".replace("spread: false", "router_node: null"))
    assert done == {}
    path = tmp_path / "hosts.yaml"
    path.write_text(path.read_text().replace("worker_cpus: 0.5", "worker_cpus: 2"))
    description = describe(path)
    folder = placing.folder_of(description)
    plans, files = placing.plans_of(description, folder, "")
    engine = RayEngine(placing.record_of(description, folder), ray)
    assert engine.apply(plans, files)["a"].changed == {"worker-a-0": "restarted", "worker-a-1": "restarted"}
    assert ray.actors["router"][0] is before
    assert ray.actors["worker-a-0"][1]["num_cpus"] == 2.0


def test_actors_are_reported_where_they_are(tmp_path: Path, ray: FakeRay) -> None:
    """One that waits for a place says that."""
    engine, _, _ = _applied(tmp_path, ray)
    ray.waiting.add("worker-a-1")
    del ray.actors["worker-a-0"]

    router, gone, waiting = engine.roles()[0].roles
    assert (router.state, router.place) == ("RUNNING", "pid 7 on 10.0.0.1")
    assert gone.state == "STOPPED"
    assert (waiting.state, waiting.why) == ("STARTING", "Ray has not placed its actor, or restarts it")
    assert engine.router_addresses() == {"router": "10.0.0.1"}
    assert engine.logs("router", 1) == ["two"]
    engine.scale("worker-a-1", 0)  # it has nothing to drain
    assert "worker-a-1" not in ray.actors
    with pytest.raises(ConfigError, match="no --follow with engine: ray"):
        engine.follow("router", 5)


def test_a_router_is_pinned_to_a_node_that_there_is(tmp_path: Path, ray: FakeRay) -> None:
    """Another one is an error that lists those."""
    _, done, error = _applied(tmp_path, ray, more=", router_node: 10.0.0.9")

    assert "router" not in done
    assert error == (
        "a: router: ray: router_node: expected a node of the cluster, one of 10.0.0.1, got '10.0.0.9'"
    )


def test_other_settings_are_sent_and_outlive_the_actor(
    tmp_path: Path, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router's actor gets them now, and again if Ray starts it again; `down` forgets them."""
    held = _keep_values(monkeypatch)
    engine, _, _ = _applied(tmp_path, ray)
    sent: list[dict[str, bytes]] = []
    ray.actors["router"][0].put = sent.append

    engine.tune(b'{"policy": "maxacc"}')

    (files,) = sent
    (settings,) = (content for name, content in files.items() if name.endswith("/router.json"))
    assert settings == b'{"policy": "maxacc"}'
    assert ray_actor.kept_files("default", "router") == files
    ray.waiting.add("router")
    engine.tune(b"{}")  # an actor without a place is no error: it takes what is kept
    engine.gone(["router"])
    assert held == {}


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing but this engine imports it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tmp_path / "hosts.yaml"
    path.write_text("engine: ray\nrouter: {host: a}\nsecurity: none\nhosts: [{name: a, workers: 1}]\n")
    record = placing.record_of(describe(path), tmp_path)

    with pytest.raises(ConfigError, match=r"pip install 'superserve\[ray\]'"), connected(record):
        pass
    code = (
        "import sys, cluster.cli, cluster.engines.placed.ray_engine, cluster.engines.placed.ray_actor\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


# --- the actor --------------------------------------------------------------------------------

_ROLE = """\
import signal, sys, time
print("role", *sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(60)
"""


class _Module:
    """Ray as an actor sees it: itself, and a router's actor."""

    def __init__(self) -> None:
        self.routers: dict[str, str] = {"router": "10.0.0.5"}
        self.killed: list[Any] = []
        self.exceptions = FakeRay().exceptions
        self.util = FakeRay().util
        self.util.list_named_actors = self._named

    def _named(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        """Return the actors of this cluster, and of others."""
        assert all_namespaces
        ours = [*self.routers, "worker-a-0"]
        found = [{"name": name, "namespace": "superserve-default"} for name in ours]
        return [*found, {"name": "router", "namespace": "superserve-other"}]

    def get_actor(self, name: str, namespace: str) -> Any:
        """Return a router."""
        assert namespace == "superserve-default"
        return Handle(FakeRay(), name)

    def wait(self, asked: list[Any], num_returns: int, timeout: float) -> None:
        """Wait for nothing."""

    def get(self, asked: tuple[Handle, str, tuple[Any, ...]], timeout: float) -> tuple[str, str]:
        """Return where a router is reached."""
        del timeout
        handle, method, _ = asked
        assert method == "ends"
        if handle.name not in self.routers:
            raise self.exceptions.RayActorError
        address = self.routers[handle.name]
        return f"tcp://{address}:5555", f"tcp://{address}:5556"

    def get_runtime_context(self) -> Any:
        """Return something with the actor itself."""
        return type("Context", (), {"current_actor": "me"})

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        """Note that an actor ended for good."""
        assert no_restart
        self.killed.append(actor)


def _until(condition: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> _Module:
    """Give what `import ray` gives in an actor; looks for the router are quick."""
    module = _Module()
    monkeypatch.setitem(sys.modules, "ray", module)
    _keep_values(monkeypatch)
    monkeypatch.setattr(ray_actor, "_LOOK_S", 0.05)
    monkeypatch.setattr(ray_actor, "_FIND_S", 0.05)
    return module


def test_an_actor_holds_its_role(module: _Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the router, follows it, gives the role its files, and ends for good once drained."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module.routers = {}
    argv = ("-c", _ROLE, "{routers}", "/f/files/a/keys/worker.key")
    role = Started("worker-a-0", "worker", "a", argv, (), "", 0, sys.executable, 5.0)
    left = Path(tempfile.gettempdir()) / "superserve@default@worker-a-0@killed"
    other = Path(tempfile.gettempdir()) / "superserve@default@worker-a-0-1@lives"
    for folder in (left, other):
        folder.mkdir(exist_ok=True)
    actor = RoleActor("default", asdict(role), "/f", {"files/a/keys/worker.key": b"secret"})
    assert actor.state()["state"] == "STARTING"
    assert not left.exists()
    other.rmdir()

    module.routers = {"router": "10.0.0.5"}
    _until(lambda: actor.tail(1))
    _, address, key = actor.tail(1)[0].split()
    assert address == "tcp://10.0.0.5:5556"
    with open(key, "rb") as file:  # noqa: PTH123  a plain path from the log
        assert file.read() == b"secret"
    assert os.stat(key).st_mode & 0o777 == 0o600  # noqa: PTH116  the same
    first = actor.state()
    assert (first["state"], first["node"]) == ("RUNNING", "10.0.0.1")

    module.routers = {"router": "10.0.0.6"}
    _until(lambda: "10.0.0.6" in actor.tail(1)[0])
    assert actor.state()["pid"] != first["pid"]

    actor.stop()
    _until(lambda: module.killed)
    assert module.killed == ["me"]
    assert not os.path.exists(key)  # noqa: PTH110  the same


def test_a_routers_actor_lists_the_others(
    module: _Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At their nodes, with its own ports; the role reads the list again, and is not started again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module.routers = {"router-a-0": "10.0.0.9"}
    ends = ("--client-endpoint", "tcp://0.0.0.0:5557", "--worker-endpoint", "tcp://0.0.0.0:5558")
    argv = ("-c", _ROLE, *ends, "--routers", "{listed}")
    role = Started("router-a-0", "router", "a", argv, (), "", 0, sys.executable, 5.0)
    actor = RoleActor("default", asdict(role), "/f", {})
    _until(lambda: actor.tail(1))
    listed = Path(actor.tail(1)[0].split()[-1])
    pid = actor.state()["pid"]

    module.routers["router-b-0"] = "10.0.0.5"
    _until(lambda: b"10.0.0.5:5556" in listed.read_bytes())
    assert b"tcp://10.0.0.1:5557" in listed.read_bytes()
    assert actor.state()["pid"] == pid
    actor.stop()
    _until(lambda: module.killed)
