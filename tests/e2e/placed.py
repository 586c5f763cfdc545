"""What tests of engines that choose the machines share: load, roles, and a host that is cut off."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]  # it ships no types

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.netns import Net

    Command = Callable[..., tuple[int, str]]

_SLO_MS = 10_000  # no test's noise takes that long: what fails then has failed
_RATE_QPS = 100


def text(engine: str, settings: str, n: int) -> str:
    """Return a hosts file: emulated GPUs, no keys."""
    return (
        f"engine: {engine}\n{engine}: {settings}\nrouter: {{host: gpu}}\nemulate: cnn-8gpu-modelled\n"
        f"security: none\nhosts:\n  - {{name: gpu, workers: {n}}}\n"
    )


def done(command: Command, *args: str) -> str:
    """Run a command of `cluster`, which must succeed; return what it printed."""
    code, output = command(*args)
    assert code == 0, output
    return output


def seen(command: Command) -> dict[str, dict[str, Any]]:
    """Return each role, from `cluster status --json`."""
    return {role["name"]: role for role in _status(command)["roles"]}


def well(command: Command) -> set[str]:
    """Return the workers to which the router gives work."""
    status = _status(command)["status"]
    workers = [] if status is None else status["workers"]
    return {gpu["name"] for gpu in workers if (gpu["process"], gpu["state"]) == ("live", "ready")}


def _status(command: Command) -> dict[str, Any]:
    code, output = command("status", "--json")
    assert code in (0, 1), output
    body: dict[str, Any] = json.loads(
        output[output.index("{\n") :]
    )  # what was printed on stderr is before it
    return body


def node(role: dict[str, Any]) -> str:
    """Return where a role is: the last word of "job 3 on n1", "pid 7 on 10.77.0.2"."""
    return str(role["place"]).split()[-1] if " on " in role["place"] else ""


@contextlib.contextmanager
def load(here: Net, endpoint: str, host: str = "op") -> Iterator[Path]:
    """Offer queries while the block runs; every one of them must be answered in time."""
    path = here.folder / "run.json"
    began_s = time.monotonic()
    with here.start(
        sys.executable, "-m", "loadgen", "run", "--connect", endpoint, "--trace",
        f"poisson:rate={_RATE_QPS}", "--duration", "600", "--slo-ms", str(_SLO_MS),
        "--json", str(path), "--json-lines",
        host=host,
    ) as offered:  # fmt: skip
        try:
            assert offered.stdout is not None, "it was started with a pipe"
            while '"second"' not in offered.stdout.readline():  # the first line of figures
                assert offered.poll() is None, "the load generator ended"
            yield path
        finally:
            offered.send_signal(signal.SIGINT)  # to `ip netns exec`, which it has become
            output, _ = offered.communicate(timeout=90)
    queries = json.loads(path.read_text())["queries"]
    took_s = time.monotonic() - began_s
    assert queries["total"] > _RATE_QPS * took_s / 3, "the load lasted as long as the block"
    assert (queries["ok"], queries["unsent"]) == (queries["total"], 0), (queries, output)


def kill(here: Net, name: str) -> int:
    """Kill a worker's process by SIGKILL; return its number."""
    pids = {int(pid) for host in here.hosts for pid in _pids(here, host)}
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.pid in pids and "gpu_worker" in words and name in words and "srun" not in words[0]:
            process.kill()
            return int(process.pid)
    raise AssertionError(f"{name}: no such process")


def workers_on(here: Net, host: str) -> list[int]:
    """Return the workers' processes in a host's namespace."""
    found = []
    for pid in _pids(here, host):
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(int(pid)).cmdline()
            if "gpu_worker" in words and words[0] != "srun":
                found.append(int(pid))
    return found


def _pids(here: Net, host: str) -> list[str]:
    said = subprocess.run(
        ["ip", "netns", "pids", here.namespace(host)], capture_output=True, text=True, check=False
    )
    return said.stdout.split()


def cut(here: Net, host: str, *, off: bool) -> None:
    """Cut a host off from all others, or let it back."""
    wire = f"v{here.hosts.index(host)}"
    code, output = here.run("ip", "link", "set", wire, "down" if off else "up")
    assert code == 0, output
