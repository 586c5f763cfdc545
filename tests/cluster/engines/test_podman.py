"""The image, the compose files and the manifests, run by podman and asked queries through a mapped port."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from superserve.errors import SuperServeError
from superserve.net.connection import ask_status
from tests.cluster.engines.conftest import PAGE, commands
from tests.cluster.engines.described import ONE_HOST
from tests.cluster.engines.real import IMAGE, require, run
from tests.docs.reader import free_port
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from superserve.status import RouterStatus
    from tests.cluster.engines.real import Podman, Tools

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(600)]

WAIT_S = 60.0
PYTHON = [sys.executable, "-P", "-m"]


def wait_for(what: Callable[[], bool], words: str) -> None:
    """Wait until something is true; fail after a minute, which nothing here takes."""
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
    """Run a `loadgen run`, and return how many queries it sent and how many were answered in time."""
    # On a busy machine it exits 1 after its table: its run is disturbed, its queries are answered.
    done = subprocess.run(
        [*PYTHON, *line.split(), *more], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    found = re.search(r"queries +([\d,]+): (.*)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    ok = re.search(r"\bok ([\d,]+)", found[2])
    assert ok is not None, found[0]
    sent, answered = (int(text.replace(",", "")) for text in (found[1], ok[1]))
    return sent, answered


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


def as_pods(manifests: str, port: str) -> str:
    """Return manifests as `podman kube play` takes them.

    Podman has no StatefulSet and no Service: its name resolution finds a pod by its own name, which the
    router's pod shares with its Service. It publishes every port on this machine, and leaves $(POD_NAME).
    """
    found = []
    for manifest in yaml.safe_load_all(manifests):
        if manifest["kind"] not in ("StatefulSet", "Deployment", "ConfigMap"):
            continue
        template = manifest["spec"]["template"]
        (container,) = template["spec"]["containers"]
        ports = [{**each, "hostPort": int(port)} for each in container["ports"] if each["name"] == "clients"]
        container["ports"] = ports
        if "--name" in container["args"]:
            at = container["args"].index("--name")
            assert container["args"].pop(at + 1) == "$(POD_NAME)"
            container["args"].pop(at)
        if manifest["kind"] == "StatefulSet":
            manifest = {
                "apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
                "metadata": {**template["metadata"], "name": manifest["metadata"]["name"]},
            }  # fmt: skip
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
    found = re.search(r"queries +([\d,]+): (.*)", printed)
    assert found is not None, printed
    assert found[2] == f"ok {found[1]}", printed
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
    podman("network", "create", "chart")
    common = ("--network=chart", "--read-only", "--tmpfs=/tmp")
    try:
        aliases = ("--network-alias=ss-superserve-router", "--network-alias=ss-superserve")
        podman("run", "--detach", "--name=router", *aliases, *common, IMAGE, *args["StatefulSet"])
        named = [word.replace("$(POD_NAME)", "pod") for word in args["Deployment"]]
        podman("run", "--detach", "--name=worker", *common, IMAGE, *named)
        ready = "import urllib.request as u; u.urlopen('http://ss-superserve-router:9400/ready', timeout=5)"
        wait_for(lambda: is_done(podman, *common, IMAGE, "-c", ready), "a router that is ready")
        printed = podman("run", "--rm", *common, IMAGE, *args["Pod"])
        assert "SLO attainment   1.00000" in printed
    finally:
        podman("rm", "--force", "--time=0", "router", "worker")
        podman("network", "rm", "chart")


def is_done(podman: Podman, *words: str) -> bool:
    """Return whether a container's command succeeds."""
    env = {**os.environ, **podman.env}
    done = subprocess.run(
        ["podman", "run", "--rm", *words], env=env, capture_output=True, timeout=60, check=False
    )
    return done.returncode == 0
