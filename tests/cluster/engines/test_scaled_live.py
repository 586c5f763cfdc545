"""The query of the chart's ScaledObject, evaluated by a real Prometheus that scrapes a router under load."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING

import pytest
import yaml

from loadgen.simulator.workloads import slowed
from profiles.table import load_profile
from superserve.client.client import Client
from superserve.net.connection import ask_status
from superserve.roles import processes
from tests.cluster.engines.real import require, run
from tests.docs.reader import free_port
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(400)]

WAIT_S = 120.0  # reached only when something is broken
RATE_QPS = 100
LABELS = {"namespace": "default", "pod": "ss-superserve-router-0"}


def _trigger(helm: Path) -> tuple[str, int]:
    """Return the ScaledObject's query, and how much of it is one replica's."""
    values = "emulate=cnn-8gpu-modelled,security=none,autoscaling.engine=keda"
    text = run([helm, "template", "ss", ROOT / "deploy/chart", "--set", values])
    text = text[text.index("---\n") :]  # warnings of helm are before it
    (scaled,) = (each for each in yaml.safe_load_all(text) if each and each["kind"] == "ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    return trigger["metadata"]["query"], int(trigger["metadata"]["threshold"])


@contextlib.contextmanager
def _prometheus(folder: Path, target: str) -> Iterator[Callable[[str], float | None]]:
    """Run Prometheus on loopback; give what evaluates a query, None without a result."""
    scrape = {"job_name": "pods", "static_configs": [{"targets": [target], "labels": LABELS}]}
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address={address}"], stdout=log, stderr=log,
        )  # fmt: skip

    def evaluate(query: str) -> float | None:
        url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found = json.load(answer)["data"]["result"]
        except (urllib.error.URLError, OSError):
            return None
        return float(found[0]["value"][1]) if found else None

    try:
        yield evaluate
    finally:
        server.kill()
        server.wait()


def test_a_real_prometheus_scales_by_the_charts_own_query(helm: Path, tmp_path: Path) -> None:
    """One replica while idle; under a load of several GPUs as many as STATUS says are needed."""
    require("prometheus")
    query, per_replica = _trigger(helm)
    profile = slowed(load_profile("cnn-8gpu-modelled"), 50.0)
    (tmp_path / "slow.json").write_bytes(profile.to_json())

    def replicas(value: float | None) -> int:
        return 0 if value is None else max(1, math.ceil(value / per_replica))

    with processes.ProcessGroup() as group:
        router = group.start("router", ["-m", "router", "--metrics-port", "0"])
        processes.wait_ready(router, WAIT_S)
        argv = [
            "-m",
            "gpu_worker",
            "--connect",
            router.ready["worker"],
            "--emulate",
            str(tmp_path / "slow.json"),
        ]
        processes.wait_ready(group.start("worker", argv), WAIT_S)
        with (
            _prometheus(tmp_path, router.ready["metrics"]) as evaluate,
            Client(router.ready["client"]) as client,
        ):
            give_up_s = time.monotonic() + WAIT_S
            while replicas(evaluate(query)) != 1:
                assert time.monotonic() < give_up_s, (tmp_path / "log").read_text()
                time.sleep(0.2)
            give_up_s = time.monotonic() + WAIT_S
            while (n := replicas(evaluate(query))) < 3:
                assert time.monotonic() < give_up_s, n
                for _ in range(RATE_QPS // 10):
                    client.submit(bytes(8), slo_ms=3_000)
                time.sleep(0.1)
            needed = ask_status(router.ready["client"], WAIT_S).workers_needed
            assert n <= math.ceil(max(needed.as_served, needed.at_least)) + 2
