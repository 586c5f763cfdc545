"""Install, upgrade, roll back, scale and drain on a real Kubernetes, under load: `make kubernetes`.

    python -m tests.cluster.kubernetes [--json FILE]

It types the commands of docs/engines.md, offers queries throughout, and prints how long each step took and
how every query ended. Where there can be no Kubernetes it says why, and that is no failure.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.engines.conftest import PAGE, commands
from tests.cluster.engines.real import IMAGE
from tests.cluster.kubernetes.programs import opened
from tests.cluster.upgrades.guests import OnKubernetes, loaded
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cluster.kubernetes.rig import Kubernetes

_RATE = 100.0  # of one emulated GPU's 2,000 queries a second: what is judged is what fails
_WAIT_S = 240
_CHART = str(ROOT / "deploy" / "chart")
_DEPLOYMENT = "deployment/ss-superserve-worker"
_ASK = """\
import sys, time, superserve
from superserve.errors import SuperServeError
end_s = time.monotonic() + 180
while time.monotonic() < end_s:
    try:
        with superserve.Client(sys.argv[1]) as client:
            client.infer(bytes(8), slo_ms=2_000)
            sys.stdout.write("answered")
            break
    except (SuperServeError, superserve.QueryError):
        time.sleep(0.05)
"""


class Show:
    """The steps of the show.

    Args:
        here: The cluster.

    Attributes:
        seconds: How long each step took, by name.
        ends: How the queries of each load ended.
    """

    def __init__(self, here: Kubernetes) -> None:
        self._here = here
        self._guest = OnKubernetes(here)
        self.seconds: dict[str, float] = {}
        self.ends: dict[str, Any] = {}

    def timed(self, name: str, step: Callable[[], object]) -> None:
        """Do a step, and keep how long it took."""
        began_s = time.monotonic()
        step()
        self.seconds[name] = round(time.monotonic() - began_s, 1)
        _say(f"  {name}: {self.seconds[name]} s")

    # --- Helm ---------------------------------------------------------------------------------

    def with_helm(self) -> None:
        """Install, `helm test`, upgrade, roll back, scale, drain a node, and lose the router."""
        here = self._here
        *_, install, rollout, test = commands("helm")
        install = re.sub(r"--set supernet=\S+|--set keys\.prefix=\S+|--set worker\.gpus=\S+", "", install)
        install = install.replace("registry.example.com/superserve", IMAGE).replace("deploy/chart", _CHART)
        more = "--set image.tag=latest --set emulate=cnn-8gpu-modelled --set security=none"
        self.timed("helm install", lambda: self._type(f"{install} {more}", rollout))
        self.timed("helm test", lambda: self._type(test))
        endpoint = f"tcp://{here.address('ss-superserve')}:5555"
        self._guest.endpoint = lambda: endpoint  # type: ignore[method-assign]
        with loaded(self._guest, _RATE, 1) as printed:
            keep = f"helm upgrade ss {_CHART} --reuse-values"
            self.timed(
                "helm upgrade of the workers", lambda: self._type(f"{keep} {self._other_workers()}", rollout)
            )
            self.timed("helm rollback", lambda: self._type("helm rollback ss 1", rollout))
            self.timed(
                "scale 4 to 6", lambda: self._type(f"kubectl scale {_DEPLOYMENT} --replicas=6", rollout)
            )
            self.timed("scale 6 to 4", lambda: self._scaled(4))
            self.timed("drain of a node", self._drained)
        self.ends["helm"] = json.loads(printed[0])
        _say(f"  {printed[0]}")
        self.timed("router's pod deleted, until an answer", lambda: self._router_lost(endpoint))
        self._type("helm uninstall ss")

    def _other_workers(self) -> str:
        """Return values with which only the workers' pods are others."""
        return "--set worker.env[0].name=RELEASE --set-string worker.env[0].value=2"

    def _scaled(self, n: int) -> None:
        self._type(f"kubectl scale {_DEPLOYMENT} --replicas={n}")
        selector = "app.kubernetes.io/instance=ss,app.kubernetes.io/component=worker"
        self._until(lambda: len(self._here.get("pods", f"--selector={selector}")["items"]) == n)

    def _drained(self) -> None:
        """Drain the node without the router; its workers go to the other one."""
        (router,) = [
            pod
            for pod in self._here.get("pods")["items"]
            if pod["metadata"]["name"] == "ss-superserve-router-0"
        ]
        node = next(name for name in self._here.ready_nodes() if name != router["spec"]["nodeName"])
        self._type(f"kubectl drain {node} --ignore-daemonsets --delete-emptydir-data --timeout={_WAIT_S}s")
        self._type(f"kubectl rollout status {_DEPLOYMENT} --timeout={_WAIT_S}s", f"kubectl uncordon {node}")

    def _router_lost(self, endpoint: str) -> None:
        self._type("kubectl delete pod ss-superserve-router-0 --wait=false")
        self._until(self._is_router_going)
        output = self._here.call(sys.executable, "-c", _ASK, endpoint)
        assert "answered" in output, output

    def _is_router_going(self) -> bool:
        code, output = self._here.net.run("kubectl", "get", "pod", "ss-superserve-router-0", "-o", "json")
        return code != 0 or "deletionTimestamp" in output

    # --- manifests and hosts files ------------------------------------------------------------

    def with_manifests(self) -> None:
        """`cluster render kubernetes`, applied by kubectl as the page says."""
        folder = self._here.net.folder
        (folder / "hosts.yaml").write_text(
            "router: {host: a}\nhosts: [{name: a, workers: 2}]\nemulate: cnn-8gpu-modelled\nsecurity: none\n"
        )
        render, apply = commands("manifests")
        render = render.replace("registry.example.com/superserve:0.1.0", f"{IMAGE}:latest")
        self._type(render)
        # 1.20 lacks policy/v1, which came a version later.
        path = folder / "rendered" / "superserve.yaml"
        path.write_text(path.read_text().replace("policy/v1", "policy/v1beta1"))
        self.timed(
            "kubectl apply of rendered manifests",
            lambda: self._type(
                apply, f"kubectl rollout status deployment/superserve-worker-a --timeout={_WAIT_S}s"
            ),
        )
        output = self._here.call(sys.executable, "-c", _ASK, f"tcp://{self._here.address('superserve')}:5555")
        assert "answered" in output, output
        self._type("kubectl delete --filename rendered")

    def with_hosts_file(self) -> None:
        """The commands of the page with `engine: kubernetes`."""
        found = re.search(
            r"^```yaml\n([^`]*)^```\n\n<!-- runs: kubernetes -->\n```sh\n(.*?)^```$",
            PAGE,
            re.MULTILINE | re.DOTALL,
        )
        assert found is not None, "the page has it"
        text = found[1].replace("registry.example.com/superserve:0.1.0", f"{IMAGE}:latest")
        (self._here.net.folder / "hosts.yaml").write_text(text)
        for line in found[2].splitlines():
            self.timed(line, lambda line=line: self._type(line))  # type: ignore[misc]

    # --- steps --------------------------------------------------------------------------------

    def _type(self, *lines: str) -> None:
        """Type commands as the page has them."""
        for line in lines:
            word, *rest = shlex.split(line)
            ours = [sys.executable, "-P", "-m", word] if word in ("cluster", "loadgen") else [word]
            shell = f"cd {self._here.net.folder} && exec {shlex.join([*ours, *rest])}"
            code, output = self._here.net.run("sh", "-c", shell)
            # On a busy machine `loadgen` exits 1 after its table: its run is disturbed.
            assert code == 0 or "SLO attainment" in output, f"{line}\n{output}"

    def _until(self, condition: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + _WAIT_S
        while not condition():
            assert time.monotonic() < give_up_s, self._here.logs()
            time.sleep(0.2)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the show, and print its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    try:
        with opened() as here:
            show = Show(here)
            show.with_helm()
            show.with_manifests()
            show.with_hosts_file()
    except pytest.skip.Exception as reason:
        _say(str(reason) if str(reason).startswith("kubernetes") else f"kubernetes: skipped: {reason}")
        return
    ends = show.ends["helm"]
    found = {"seconds": show.seconds, "sent": ends["sent"], "ends": ends["ends"], "ms": ends["ms"]}
    _say(json.dumps(found, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(ends["ends"].get("ok", 0) != ends["sent"])


if __name__ == "__main__":
    main()
