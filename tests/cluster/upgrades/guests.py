"""Engines that the command upgrades clusters on, each with the few words that are its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from loadgen.simulator.workloads import slowed
from profiles.table import load_profile
from tests.e2e import placed
from tests.paths import ROOT

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.cluster.kubernetes.rig import Kubernetes
    from tests.e2e.netns import Net
    from tests.e2e.ray_net import RayNet
    from tests.e2e.slurm_net import SlurmNet

N_WORKERS = 6
SLOWDOWN = 9.0
"""Of the emulated GPUs: two shared processors must not be what is measured."""
LOAD = 0.7
_NOTICED_S = 2.0  # after that the router has noticed that a worker is gone
PROFILE = slowed(load_profile("cnn-8gpu-modelled"), SLOWDOWN)


def rate_qps() -> float:
    """Return the load: a share of what the workers serve at most."""
    best = max(size / PROFILE.latency_p99_ns(0, size) for size in PROFILE.batch_sizes)
    return LOAD * N_WORKERS * best * 1e9


class Guest(ABC):
    """A cluster on an engine, upgraded through `cluster`.

    Attributes:
        engine: Its name in a hosts file.
        settings: Of that engine, in the hosts file.
    """

    engine: str
    settings: str

    def __init__(self, net: Net) -> None:
        self.net = net
        self.file = net.folder / "hosts.yaml"
        (net.folder / "slow.json").write_bytes(PROFILE.to_json())

    @abstractmethod
    def endpoint(self) -> str:
        """Return where clients connect."""

    def cluster(self, *args: str) -> tuple[int, str]:
        """Run `python -m cluster ...`; return its exit code and all that it printed."""
        return self.net.run(sys.executable, "-P", "-m", "cluster", *args)

    def start_load(self, rate: float, n: int) -> subprocess.Popen[str]:
        """Start the load."""
        return self.net.start(*load_words(self.endpoint(), rate, n))

    def up(self) -> None:
        """Start the cluster."""
        text = placed.text(self.engine, self.settings, N_WORKERS)
        self.file.write_text(text.replace("cnn-8gpu-modelled", "slow.json"))
        self._done("up", str(self.file), "--ready-timeout-s", "180")

    def upgrade(self) -> None:
        """Replace every worker, one at a time."""
        self._done("restart", "--rolling")

    def reload(self) -> None:
        """Let the router take other bounds and another margin, and the first ones again."""
        text = self.file.read_text()
        self.file.write_text(f"{text}margin_ms: 0.5\nmax_queries: 50000\n")
        self._done("apply", str(self.file))
        self.file.write_text(text)
        self._done("apply", str(self.file))

    def drain(self) -> None:
        """Drain a worker, and start it again."""
        self._done("drain", "worker-gpu-1")
        self._done("restart", "worker-gpu-1")

    def scale(self) -> None:
        """Scale up by one, and down again."""
        self._done("scale", str(N_WORKERS + 1))
        self._done("scale", str(N_WORKERS))

    def kill(self) -> None:
        """Kill a worker's process."""
        os.kill(_worker_pid("worker-gpu-2"), signal.SIGKILL)

    def wait_back(self, killed_s: float, timeout_s: float) -> None:
        """Wait until the router gives work to as many workers as before the kill."""
        give_up_s = killed_s + timeout_s
        time.sleep(_NOTICED_S)
        while len(placed.well(self.cluster)) < N_WORKERS:
            assert time.time() < give_up_s, "the killed worker did not come back"

    def down(self) -> None:
        """Stop the cluster."""
        self._done("down")

    def _done(self, *args: str) -> None:
        placed.done(self.cluster, *args)


class OnSlurm(Guest):
    """A job for each role."""

    engine = "slurm"

    def __init__(self, slurm: SlurmNet) -> None:
        super().__init__(slurm.net)
        self.settings = f"{{folder: {slurm.net.folder}/shared}}"

    def endpoint(self) -> str:
        """Return the router's node."""
        return f"tcp://{self.net.address(placed.node(placed.seen(self.cluster)['router']))}:5555"


class OnRay(Guest):
    """An actor for each role."""

    engine = "ray"

    def __init__(self, ray: RayNet) -> None:
        super().__init__(ray.net)
        self._ray = ray
        self._first = ray.net.address(ray.head)
        self.settings = f'{{address: "{ray.address}", router_node: {self._first}, spread: true}}'

    def endpoint(self) -> str:
        """Return the first node."""
        return f"tcp://{self._first}:5555"

    def cluster(self, *args: str) -> tuple[int, str]:
        """Run `python -m cluster ...` on Ray's first node."""
        return self._ray.cluster(*args)

    def start_load(self, rate: float, n: int) -> subprocess.Popen[str]:
        """Start the load on Ray's first node."""
        return self.net.start(*load_words(self.endpoint(), rate, n), host=self._ray.head)


class OnKubernetes(Guest):
    """An object for each role."""

    engine = "kubernetes"
    settings = "{image: localhost/superserve}"

    def __init__(self, kubernetes: Kubernetes) -> None:
        super().__init__(kubernetes.net)
        self._kubernetes = kubernetes

    def endpoint(self) -> str:
        """Return the address of the Service for clients."""
        return f"tcp://{self._kubernetes.address('superserve')}:5555"


def load_words(endpoint: str, rate: float, n: int) -> list[str]:
    """Return the command of the load."""
    return [
        sys.executable, "-m", "tests.cluster.upgrades.load", endpoint, "--rate", f"{rate:.0f}", "--n", str(n),
    ]  # fmt: skip


def _worker_pid(name: str) -> int:
    """Return the process of a worker on this machine, in whichever namespace; not what has started it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "gpu_worker" in words and name in words and "python" in Path(words[0]).name:
                return int(path.parent.name)
    raise AssertionError(f"{name}: no such process")


@contextlib.contextmanager
def loaded(guest: Guest, rate: float, n: int) -> Iterator[list[str]]:
    """Offer a load while the block runs; what it printed is in the list after that."""
    printed: list[str] = []
    with guest.start_load(rate, n) as load:
        assert load.stdout is not None, "it was started with a pipe"
        line = load.stdout.readline()
        assert line == "begun\n", line + load.communicate(timeout=60)[0]
        try:
            yield printed
        finally:
            load.send_signal(signal.SIGINT)
            output, _ = load.communicate(timeout=600)
            printed.append(output.splitlines()[-1])


def environment() -> dict[str, str]:
    """Return the environment of a command of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def now_s() -> float:
    """Return the time of day, which two processes of a machine share."""
    return time.time()
