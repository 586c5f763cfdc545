"""What tests of engines that choose the machines share: load, roles, and a host that is cut off."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]  # it ships no types

from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.netns import Net

    Command = Callable[..., tuple[int, str]]

_PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def text(engine: str, settings: str, n: int, routers: int | None = None) -> str:
    """Return a hosts file: emulated GPUs, no keys; a list of routers if it says how many."""
    several = ", ".join(["{host: gpu}"] * (routers or 0))
    head = "router: {host: gpu}" if routers is None else f"routers: [{several}]"
    return (
        f"engine: {engine}\n{engine}: {settings}\n{head}\nemulate: cnn-8gpu-modelled\n"
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


def shares(command: Command) -> dict[str, int]:
    """Return how many GPUs each of several routers has that answers, by its endpoint for clients."""
    status = _status(command)["status"]
    routers = [] if status is None else status.get("routers") or []
    return {router["endpoint"]: router["gpus"] for router in routers if router["answers"]}


@contextlib.contextmanager
def load(here: Net, endpoint: str, host: str = "op", *, slo_ms: int = 10_000) -> Iterator[None]:
    """Offer queries while the block runs; every one of them must be answered in time."""
    with here.start(sys.executable, "-m", "tests.e2e.steady", endpoint, str(slo_ms), host=host) as offered:
        assert offered.stdout is not None, "it was started with a pipe"
        line = offered.stdout.readline()
        assert line == "begun\n", line + offered.communicate(timeout=60)[0]
        try:
            yield
        finally:
            offered.send_signal(signal.SIGINT)  # to `ip netns exec`, which it has become
            output, _ = offered.communicate(timeout=60)
    ends = json.loads(output.splitlines()[-1])
    assert ends.keys() == {"ok"}, ends


def follow_page(here: Net, name: str, python: Path, host: str, *changes: tuple[str, str]) -> None:
    """Type a section of docs/engines.md: save its hosts file, and run its commands, which must succeed.

    Args:
        here: The hosts.
        name: As in the comment before the commands.
        python: What runs the commands of this package.
        host: Where they are typed.
        changes: Words of the hosts file, and what stands for them in this test.
    """
    found = re.search(
        rf"^```yaml\n([^`]*)^```\n\n<!-- runs: {name} -->\n```sh\n(.*?)^```$", _PAGE, re.MULTILINE | re.DOTALL
    )
    assert found is not None, name
    text = found[1]
    for words, instead in changes:
        assert words in text, words
        text = text.replace(words, instead)
    (here.folder / "hosts.yaml").write_text(text)
    for line in found[2].splitlines():
        word, _, rest = line.partition(" ")
        shell = f"cd {here.folder} && {python} -P -m {word} {rest}"
        code, output = here.run("sh", "-c", shell, host=host)
        # On a busy machine `loadgen` exits 1 after its table: its run is disturbed.
        assert code == 0 or (word == "loadgen" and "SLO attainment" in output), f"{line}\n{output}"


def processes(here: Net, host: str) -> dict[str, int]:
    """Return the workers' processes in a host's namespace, by name: cheaper than to ask `cluster status`."""
    found = {}
    for pid in _pids(here, host):
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(int(pid)).cmdline()
            if "gpu_worker" in words and "srun" not in words[0]:
                found[words[words.index("--name") + 1]] = int(pid)
    return found


def routers(here: Net) -> dict[int, int]:
    """Return the routers' processes on all hosts, by the port for clients that each binds."""
    found = {}
    for host in here.hosts:
        for pid in _pids(here, host):
            with contextlib.suppress(psutil.Error):
                words = psutil.Process(int(pid)).cmdline()
                if "router" in words and "srun" not in words[0] and "--client-endpoint" in words:
                    end = words[words.index("--client-endpoint") + 1]
                    found[int(end.rpartition(":")[2])] = int(pid)
    return found


def everywhere(here: Net, *but: str) -> dict[str, int]:
    """Return the workers' processes on all hosts but some."""
    return {
        name: pid for host in here.hosts if host not in but for name, pid in processes(here, host).items()
    }


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
