"""A cluster of containers: compose starts it, and `podman stop` and `start` do what an operator would.

Containers have no engine that keeps a number of them, so an upgrade here is a loop over the workers, and a
killed one comes back by its restart policy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from router.serve.settings_file import RouterSettings
from superserve.errors import SuperServeError
from superserve.net.connection import ask_status
from tests.cluster.engines.real import IMAGE, PODMAN_PROGRAMS, Podman, Tools, require, run
from tests.cluster.upgrades.guests import N_WORKERS, PROFILE, Guest, environment, load_words
from tests.docs.reader import free_port
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILE = """\
cluster: upgraded
router: {{host: here, client_port: {port}}}
hosts: [{{name: here, address: 127.0.0.1, workers: {n}}}]
emulate: slow.json
security: none
"""
_WAIT_S = 120.0


class OnPodman(Guest):
    """Containers of this machine.

    Args:
        podman: What runs them.
        tools: With podman-compose.
        folder: For its files.
    """

    engine = "compose"

    def __init__(self, podman: Podman, tools: Tools, folder: Path) -> None:
        self._podman, self._tools, self._folder = podman, tools, folder
        self._port = free_port()
        (folder / "slow.json").write_bytes(PROFILE.to_json())

    def endpoint(self) -> str:
        """Return the mapped port."""
        return f"tcp://127.0.0.1:{self._port}"

    def start_load(self, rate: float, n: int) -> subprocess.Popen[str]:
        """Start the load."""
        return subprocess.Popen(
            load_words(self.endpoint(), rate, n), env=environment(), cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def up(self) -> None:
        """Render the file, and start its services."""
        (self._folder / "hosts.yaml").write_text(_FILE.format(port=self._port, n=N_WORKERS))
        words = ["render", "compose", "hosts.yaml", "--image", IMAGE, "--out", "rendered"]
        run(self._cluster(*words), cwd=self._folder)
        self._compose("up", "--detach", "--no-build")
        self._wait(N_WORKERS)

    def upgrade(self) -> None:
        """Stop and start every worker, one at a time."""
        for worker in self._workers():
            self._again(worker)

    def reload(self) -> None:
        """Let the router take another bound, and the first one again: its file lies beside compose.yaml."""
        text = (self._folder / "hosts.yaml").read_text()
        for more, bound in (("max_queries: 50000\n", 50_000), ("", RouterSettings().max_queries)):
            (self._folder / "hosts.yaml").write_text(text + more)
            words = ["render", "compose", "hosts.yaml", "--image", IMAGE, "--out", "rendered"]
            run(self._cluster(*words), cwd=self._folder)
            self._until(lambda bound=bound: self._bound() == bound)

    def drain(self) -> None:
        """Stop a worker, and start it again."""
        self._again(self._workers()[1])

    def scale(self) -> None:
        """Start one more, and stop that one."""
        like = self._workers()[0]
        name = "one-more"
        image, network = (
            self._podman("inspect", f"--format={what}", like).strip()
            for what in ("{{.ImageName}}", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}")
        )
        mounts = self._podman(
            "inspect", "--format={{range .Mounts}}{{.Source}}:{{.Destination}}:ro {{end}}", like
        ).split()
        args = self._podman("inspect", "--format={{range .Config.Cmd}}{{.}}\n{{end}}", like).split()
        volumes = [f"--volume={each}" for each in mounts if each.split(":")[1] != "/tmp"]
        self._podman(
            "run", "--detach", f"--name={name}", f"--network={network}", "--read-only", "--tmpfs=/tmp",
            *volumes, image, *args,
        )  # fmt: skip
        self._wait(N_WORKERS + 1)
        self._podman("stop", "--time=10", name)
        self._wait(N_WORKERS)
        self._podman("rm", name)

    def kill(self) -> None:
        """Kill a worker's process; podman restarts its container."""
        pid = self._podman("inspect", "--format={{.State.Pid}}", self._workers()[2]).strip()
        os.kill(int(pid), signal.SIGKILL)

    def wait_back(self, killed_s: float, timeout_s: float) -> None:
        """Wait until the router gives work to all workers again."""
        del killed_s
        time.sleep(2.0)  # it has noticed that one is gone
        self._wait(N_WORKERS, timeout_s)

    def down(self) -> None:
        """Stop everything."""
        self._compose("down")

    # --- steps --------------------------------------------------------------------------------

    def _cluster(self, *args: str) -> list[str]:
        import sys  # noqa: PLC0415

        return ["env", f"PYTHONPATH={ROOT}", sys.executable, "-P", "-m", "cluster", *args]

    def _compose(self, *words: str) -> None:
        run(
            [*self._tools.command("podman-compose"), "-f", "rendered/compose.yaml", *words],
            env={**self._tools.env, **self._podman.env}, cwd=self._folder,
        )  # fmt: skip

    def _workers(self) -> list[str]:
        names = self._podman("ps", "--all", "--format={{.Names}}").split()
        return sorted(name for name in names if "worker" in name)

    def _again(self, worker: str) -> None:
        self._podman("stop", "--time=10", worker)
        self._wait(N_WORKERS - 1)
        self._podman("start", worker)
        self._wait(N_WORKERS)

    def _bound(self) -> int:
        try:
            return ask_status(self.endpoint(), 2.0).router.max_queries
        except SuperServeError:
            return -1

    def _wait(self, n: int, timeout_s: float = _WAIT_S) -> None:
        self._until(lambda: self._ready() == n, timeout_s)

    def _ready(self) -> int:
        try:
            return ask_status(self.endpoint(), 2.0).workers_ready
        except SuperServeError:
            return -1

    def _until(self, condition: object, timeout_s: float = _WAIT_S) -> None:
        assert callable(condition)
        give_up_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < give_up_s, self._podman("ps", "--all")
            time.sleep(0.1)


@contextlib.contextmanager
def on_podman() -> Iterator[OnPodman]:
    """Give a podman of its own with the image; nothing of it is left."""
    from tests.cluster.engines.conftest import commands  # noqa: PLC0415  it needs the page
    from tests.cluster.kubernetes.programs import cache  # noqa: PLC0415

    require(*PODMAN_PROGRAMS)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        tools = Tools(folder / "tools")
        tools.folder.mkdir()
        tools.install()
        podman = Podman(folder)
        podman.set_up()
        try:
            archive = cache() / "images.tar"
            if archive.exists():
                podman("load", "--quiet", "--input", archive)
            else:
                podman.build(commands("keys")[0])
            yield OnPodman(podman, tools, folder)
        finally:
            podman.tear_down()
