"""The image, the compose files and the manifests, run by podman and asked queries through a mapped port."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from superserve.client.client import Client
from superserve.errors import QueryError, SuperServeError
from superserve.net.connection import ask_status
from tests.cluster.engines.conftest import PAGE, commands
from tests.cluster.engines.described import ONE_HOST
from tests.cluster.engines.real import IMAGE, require, run
from tests.docs.reader import free_port
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from superserve.client.futures import QueryFuture
    from superserve.status import RouterStatus
    from tests.cluster.engines.real import Podman, Tools

# Alone: a killed container did not always come back while others made and removed networks.
pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(900)]

WAIT_S = 240.0  # reached only when something is broken
PYTHON = [sys.executable, "-P", "-m"]


def wait_for(what: Callable[[], bool], words: str) -> None:
    """Wait until something is true; fail after WAIT_S."""
    until_s = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < until_s, words
        time.sleep(0.05)


def status(port: str, keys: Path | str = "") -> RouterStatus | None:
    """Return the STATUS of the router behind a port of this machine; None if it does not answer."""
    try:
        return ask_status(f"tcp://127.0.0.1:{port}", 2.0, keys=keys)
    except SuperServeError:
        return None


def workers(port: str, keys: Path | str = "") -> set[str]:
    """Return the names of the workers that take work."""
    found = status(port, keys)
    return set() if found is None else {gpu.name for gpu in found.workers if gpu.state == "ready"}


def wait_for_workers(port: str, n: int, keys: Path | str = "") -> None:
    """Wait until so many workers take work."""
    wait_for(lambda: len(workers(port, keys)) == n, f"{n} workers")


def cluster(line: str, cwd: Path) -> None:
    """Run `cluster` with these words."""
    run([*PYTHON, "cluster", *line.split()], cwd=cwd)


def load(line: str, *more: str, cwd: Path = ROOT) -> tuple[int, int]:
    """Run a `loadgen run`, and return how many queries it sent and how many were answered."""
    # On a busy machine it exits 1 after its table: its run is disturbed, its queries are answered.
    done = subprocess.run(
        [*PYTHON, *line.split(), *more], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    return answers(done.stdout + done.stderr)


def answers(printed: str) -> tuple[int, int]:
    """Return how many queries a `loadgen run` sent, by what it printed, and how many were answered.

    In time or late: here only a machine that is busy makes an answer late.
    """
    found = re.search(r"queries +([\d,]+): (.*)", printed)
    assert found is not None, printed
    ends = dict(re.findall(r"(\w+) ([\d,]+)", found[2]))
    assert "ok" in ends, found[0]
    n_sent, *n_answered = (int(n.replace(",", "")) for n in (found[1], ends["ok"], ends.get("late", "0")))
    return n_sent, sum(n_answered)


class Compose:
    """A reader's `docker compose`, which is podman-compose here.

    Args:
        tools: With podman-compose.
        podman: What it drives.
        cwd: Where the reader types.
    """

    def __init__(self, tools: Tools, podman: Podman, cwd: Path) -> None:
        self.env = {**tools.env, **podman.env, "SUPERSERVE_IMAGE": IMAGE}
        self._words = tools.command("podman-compose")
        self._cwd = cwd

    def __call__(self, line: str, *services: str) -> None:
        """Run a line of the documentation, for these services alone if any are given."""
        variables, docker, words = line.partition("docker compose ")
        assert docker, line
        # Kept for `down`, since podman-compose removes as many as the file has.
        for variable in variables.split():
            name, _, value = variable.partition("=")
            self.env[name] = value
        typed = words.replace("--build", "--no-build").split()
        run([*self._words, *typed, *services], env=self.env, cwd=self._cwd)


@pytest.fixture
def clean(podman: Podman) -> Iterator[None]:
    """Remove the containers of a test that failed."""
    yield
    podman("pod", "rm", "--force", "--all")
    podman("rm", "--force", "--all", "--time=0")
    podman("network", "prune", "--force")


def test_the_image_is_nobody_in_particular_and_can_install_nothing(podman: Podman) -> None:
    """Not root, a read-only root file system, no pip, no torch, and the command that it is for."""
    asked = (
        "import importlib.util as u, os; print(os.getuid(), os.getgid(), "
        "[name for name in ('pip', 'torch', 'superserve', 'cluster') if u.find_spec(name)])"
    )
    limits = ("run", "--rm", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--network=none", IMAGE)

    assert podman(*limits, "-c", asked).strip() == "10001 10001 ['superserve', 'cluster']"
    assert "superserve-router" in podman(*limits)
    assert "Read-only file system" in podman(*limits, "-c", "open('/opt/superserve/x', 'w')", fails=True)
    inspected: Any = json.loads(podman("image", "inspect", IMAGE))
    assert inspected[0]["Size"] < 250e6, "90 MB of Debian's, 100 of ours, without torch"


def scraped(podman: Podman, network: str) -> Callable[[], set[str]]:
    """Start Debian's Prometheus with deploy's configuration; return what asks which roles it sees."""
    shutil.copy(ROOT / "cluster/dashboards/alerts.yml", podman.folder)
    shutil.copy(ROOT / "deploy/monitoring/prometheus.yml", podman.folder)
    podman(
        "run", "--detach", "--name=prometheus", f"--network={network}", "--rootfs", "/:O", "prometheus",
        f"--config.file={podman.folder}/prometheus.yml", "--storage.tsdb.path=/tmp/superserve-prometheus",
    )  # fmt: skip
    (inspected,) = json.loads(podman("inspect", "prometheus"))
    (address,) = (found["IPAddress"] for found in inspected["NetworkSettings"]["Networks"].values())

    def up() -> set[str]:
        try:
            with urllib.request.urlopen(f"http://{address}:9090/api/v1/query?query=up", timeout=5) as page:
                found = json.load(page)["data"]["result"]
        except (urllib.error.URLError, OSError):
            return set()
        return {each["metric"]["instance"] for each in found if each["value"][1] == "1"}

    return up


@pytest.mark.usefixtures("clean")
def test_the_first_cluster_of_the_page_answers(
    tools: Tools, podman: Podman, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, a load through the mapped port, what Prometheus sees, a third worker, the end."""
    require("prometheus")
    up, run_load, scale, down = commands("compose")
    port = free_port()
    monkeypatch.setenv("CLIENT_PORT", port)
    compose = Compose(tools, podman, ROOT)

    compose(up, "router", "worker")
    wait_for_workers(port, 2)
    sent, answered = load(run_load.replace("5555", port))
    assert sent > 500
    assert answered == sent
    seen = scraped(podman, "superserve_default")
    wait_for(lambda: len(seen()) == 3, "a router and two workers in Prometheus")

    compose(scale, "router", "worker")
    wait_for_workers(port, 3)
    podman("rm", "--force", "prometheus")
    compose(down)
    assert podman("ps", "--all", "--quiet") == ""


@pytest.mark.usefixtures("clean")
def test_a_cluster_with_keys_of_the_page_answers_and_is_watched(
    tools: Tools, podman: Podman, tmp_path: Path
) -> None:
    """Only listed keys get in; a killed worker is back; a revoked client is out without a restart."""
    _, make, add, render, up, run_load, down = commands("keys")
    section = PAGE[PAGE.index("## Containers") : PAGE.index("## Kubernetes")]
    (text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    port = free_port()
    (tmp_path / "hosts.yaml").write_text(
        text.replace("10.0.0.1", "127.0.0.1").replace("{host: here}", f"{{host: here, client_port: {port}}}")
    )
    render += f" --image {IMAGE}"
    for line in (make, add, render):
        run([*PYTHON, *line.split()], cwd=tmp_path)
    compose, keys = Compose(tools, podman, tmp_path), tmp_path / "keys/clients/web.key"

    compose(up)
    wait_for_workers(port, 2, keys)
    assert status(port) is None
    sent, answered = load(run_load.replace("10.0.0.1:5555", f"127.0.0.1:{port}"), cwd=tmp_path)
    assert answered == sent

    before = workers(port, keys)
    victim = min(before).partition("-")[0]  # a worker's name begins with its container's
    os.kill(int(podman("inspect", "--format={{.State.Pid}}", victim)), signal.SIGKILL)
    wait_for(lambda: len(now := workers(port, keys)) == 2 and now != before, "a worker in its place")

    cluster("keys --out keys revoke web", tmp_path)
    operator = tmp_path / "keys/operators/cluster-up.key"
    kept = tmp_path / "web.key"
    cluster("keys --out keys add client web", tmp_path)
    shutil.copy(keys, kept)
    run([*PYTHON, *render.split()], cwd=tmp_path)
    wait_for(lambda: status(port, kept) is not None, "the new key is listed")
    cluster("keys --out keys revoke web", tmp_path)
    run([*PYTHON, *render.split()], cwd=tmp_path)
    wait_for(lambda: status(port, kept) is None, "the revoked key is cut off")
    assert len(workers(port, operator)) == 2
    compose(down)


class Sender:
    """Queries at a steady rate with an SLO of 5 s, from a thread, until the block ends.

    Args:
        endpoint: Of one router: it names the others.
    """

    def __init__(self, endpoint: str) -> None:
        self._client = Client(endpoint)
        self._futures: list[QueryFuture] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sender:
        self._client.infer(bytes(64), slo_ms=1_000 * WAIT_S)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.01):  # the pace of the load
            self._futures.append(self._client.submit(bytes(64), slo_ms=5_000))

    def failed(self) -> list[str]:
        """Return how queries ended that were not answered; some were sent."""
        assert len(self._futures) > 100
        found = []
        for future in self._futures:
            try:
                future.result(WAIT_S)
            except QueryError as error:
                found.append(f"{type(error).__name__}: {error}")
        self._client.close()
        return found


def container_of(podman: Podman, *words: str) -> str:
    """Return the running container whose command has these words."""
    ids = podman("ps", "--quiet", "--no-trunc").split()
    commands = {one: json.loads(podman("inspect", "--format={{json .Config.Cmd}}", one)) for one in ids}
    (found,) = (one for one, command in commands.items() if set(words) <= set(command))
    return found


def kill(podman: Podman, container: str) -> None:
    """Kill the process of a container, as a crash would: podman itself would take that for a wish."""
    os.kill(int(podman("inspect", "--format={{.State.Pid}}", container)), signal.SIGKILL)


@pytest.mark.usefixtures("clean")
def test_a_killed_router_of_two_services_is_back_and_no_query_fails(
    tools: Tools, podman: Podman, tmp_path: Path
) -> None:
    """A client that was given one of them hears of the other, where it is published."""
    ports = free_port(), free_port()
    routers = ", ".join(
        f"{{host: here, client_port: {port}, worker_port: {worker}}}"
        for port, worker in zip(ports, (5556, 5557), strict=True)
    )
    (tmp_path / "hosts.yaml").write_text(
        f"routers: [{routers}]\nhosts: [{{name: here, address: 127.0.0.1, workers: 4}}]\n"
        "emulate: cnn-8gpu-modelled\nsecurity: none\n"
    )
    _, _, _, render, up, _, down = commands("keys")
    run([*PYTHON, *f"{render} --image {IMAGE}".split()], cwd=tmp_path)
    compose = Compose(tools, podman, tmp_path)
    both = f"{ports[0]},tcp://127.0.0.1:{ports[1]}"

    def gpus() -> list[int]:
        found = status(both)
        return sorted(share.gpus for share in (found.routers or ())) if found is not None else []

    compose(up)
    wait_for(lambda: gpus() == [2, 2], "two GPUs for each router")
    before = status(ports[0])
    assert before is not None
    with Sender(f"tcp://127.0.0.1:{ports[1]}") as sender:
        kill(podman, container_of(podman, f"tcp://0.0.0.0:{ports[0]}"))

        def is_another() -> bool:
            now = status(ports[0])
            return now is not None and now.router.epoch != before.router.epoch

        wait_for(is_another, "the killed router is back")
        wait_for(lambda: gpus() == [2, 2], "it has its GPUs again")
    assert sender.failed() == []
    compose(down)


@pytest.mark.usefixtures("clean")
def test_a_router_of_two_that_pods_play_is_stopped_and_no_query_fails(podman: Podman, tmp_path: Path) -> None:
    """Rendered for Kubernetes: the pod's end drains it, its worker joins the other, and it comes back."""
    (tmp_path / "hosts.yaml").write_text(
        ONE_HOST.replace("router: {host: a}", "routers: [{host: a}, {host: b}]").replace(
            "workers: 2}]", "workers: 2}, {name: b, address: b, workers: 0}]"
        )
    )
    render, _ = commands("manifests")
    run([*PYTHON, *render.replace("registry.example.com/superserve:0.1.0", IMAGE).split()], cwd=tmp_path)
    ports = free_port(), free_port()
    pods = tmp_path / "pods.yaml"
    pods.write_text(as_pods((tmp_path / "rendered/superserve.yaml").read_text(), *ports))
    podman("network", "create", "cluster")

    podman("kube", "play", "--network=cluster", pods)
    both = f"{ports[0]},tcp://127.0.0.1:{ports[1]}"

    def gpus() -> list[int]:
        found = status(both)
        return sorted(share.gpus for share in (found.routers or ())) if found is not None else []

    wait_for(lambda: gpus() == [1, 1], "a GPU for each router")
    # From outside both have to be given: the list has names that only the network knows.
    with Sender(f"tcp://127.0.0.1:{both}") as sender:
        podman("pod", "stop", "superserve-router-1")
        wait_for(lambda: gpus() == [0, 2], "both workers at the other")
        podman("pod", "start", "superserve-router-1")
        wait_for(lambda: gpus() == [1, 1], "a worker is back")
    assert sender.failed() == []
    podman("kube", "down", pods)


def as_pods(manifests: str, *ports: str) -> str:
    """Return manifests as `podman kube play` takes them, with each router's port on this machine.

    Podman has no StatefulSet and no Service: its name resolution finds a pod by its own name, which a single
    router's pod shares with its Service. Several have the names that a StatefulSet gives, in the network's
    domain instead of the Service's, and workers are given these, since none has the Service's. Podman
    publishes every port on this machine, and leaves $(POD_NAME).
    """
    found = []
    names = [f"superserve-router-{i}" for i in range(len(ports))] if len(ports) > 1 else ["superserve-router"]
    manifests = manifests.replace(
        '"tcp://superserve-router:5556"', json.dumps(",".join(f"tcp://{name}:5556" for name in names))
    ).replace(".superserve-router:", ":")
    for manifest in yaml.safe_load_all(manifests):
        if manifest["kind"] not in ("StatefulSet", "Deployment", "ConfigMap"):
            continue
        if manifest["kind"] == "ConfigMap":
            found.append(manifest)
            continue
        template = manifest["spec"]["template"]
        (container,) = template["spec"]["containers"]
        client = [each for each in container["ports"] if each["name"] == "clients"]
        container["ports"] = []
        if "--name" in container["args"]:
            at = container["args"].index("--name")
            assert container["args"].pop(at + 1) == "$(POD_NAME)"
            container["args"].pop(at)
        if manifest["kind"] == "StatefulSet":
            for name, port in zip(names, ports, strict=True):
                container["ports"] = [{**each, "hostPort": int(port)} for each in client]
                pod = {
                    "apiVersion": "v1", "kind": "Pod", "spec": copy.deepcopy(template["spec"]),
                    "metadata": {**template["metadata"], "name": name},
                }  # fmt: skip
                found.append(pod)
        else:
            found.append(manifest)
    return str(yaml.safe_dump_all(found))


@pytest.mark.usefixtures("clean")
def test_rendered_manifests_are_played_and_drain(podman: Podman, tmp_path: Path) -> None:
    """Workers find the router by the name of its Service; pods that stop under load lose no query."""
    (tmp_path / "hosts.yaml").write_text(ONE_HOST)
    render, _ = commands("manifests")
    run([*PYTHON, *render.replace("registry.example.com/superserve:0.1.0", IMAGE).split()], cwd=tmp_path)
    port = free_port()
    pods = tmp_path / "pods.yaml"
    pods.write_text(as_pods((tmp_path / "rendered/superserve.yaml").read_text(), port))
    podman("network", "create", "cluster")

    podman("kube", "play", "--network=cluster", pods)
    wait_for_workers(port, 2)
    line = f"loadgen run --trace poisson:rate=200 --duration 8 --slo-ms 1000 --connect 127.0.0.1:{port}"
    with subprocess.Popen(
        [*PYTHON, *line.split()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as sender:
        wait_for(lambda: (now := status(port)) is not None and now.queries.answered.ok > 100, "a load")
        podman("pod", "stop", "superserve-worker-a-pod-1")
        assert len(workers(port)) == 1
        podman("pod", "start", "superserve-worker-a-pod-1")
        wait_for_workers(port, 2)
        printed, _ = sender.communicate(timeout=WAIT_S)
    sent, answered = answers(printed)
    assert answered == sent, printed
    podman("kube", "down", pods)


def test_what_helm_test_runs_passes(podman: Podman, helm: Path, tmp_path: Path) -> None:
    """The arguments of the chart's test, beside a router and a worker with the chart's arguments."""
    set_values = ["--set", "emulate=cnn-8gpu-modelled", "--set", "security=none"]
    manifests = run([helm, "template", "ss", ROOT / "deploy/chart", *set_values], env={"HOME": str(tmp_path)})
    text = manifests[manifests.index("---\n") :]
    containers = {
        manifest["kind"]: manifest["spec"].get("template", manifest)
        for manifest in yaml.safe_load_all(text)
        if manifest["kind"] in ("StatefulSet", "Deployment", "Pod")
    }
    args = {kind: pod["spec"]["containers"][0]["args"] for kind, pod in containers.items()}
    (ready,) = containers["Pod"]["spec"]["initContainers"]
    (listed,) = (each["data"] for each in yaml.safe_load_all(text) if each["kind"] == "ConfigMap")
    for name, content in listed.items():
        (tmp_path / name).write_text(content)
    tmp_path.chmod(0o755)  # the image's user is another than ours
    podman("network", "create", "chart")
    common = ("--network=chart", "--read-only", "--tmpfs=/tmp")
    try:
        names = ("ss-superserve-router-0", "ss-superserve-router", "ss-superserve")
        aliases = [f"--network-alias={name}" for name in names]
        mounted = f"--volume={tmp_path}:/run/superserve/routers:ro"
        podman("run", "--detach", "--name=router", *aliases, *common, mounted, IMAGE, *args["StatefulSet"])
        named = [word.replace("$(POD_NAME)", "pod") for word in args["Deployment"]]
        podman("run", "--detach", "--name=worker", *common, IMAGE, *named)
        # Names of podman's network have no Service in them.
        asks = [*common, IMAGE, *(word.replace(".ss-superserve-router:", ":") for word in ready["args"])]

        def is_ready() -> bool:
            state = podman("inspect", "--format={{.State.Status}}", "router").strip()
            assert state == "running", podman("logs", "router")
            return ended(podman, *asks)[0] == 0

        wait_for(is_ready, "a router that is ready")
        sent, answered = answers(ended(podman, *common, IMAGE, *args["Pod"])[1])
        assert answered == sent > 50
    finally:
        podman("rm", "--force", "--time=0", "router", "worker")
        podman("network", "rm", "chart")


def ended(podman: Podman, *words: str) -> tuple[int, str]:
    """Return the exit code of a container's command, and what it printed."""
    done = subprocess.run(
        ["podman", "run", "--rm", *words], env={**os.environ, **podman.env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout
