"""Traces of a running router: a Chrome trace of a run, and spans that a collector receives meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

import numpy as np
import orjson
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from loadgen.live.run import Emulation, emulated
from superserve import Client
from superserve.roles.processes import ProcessGroup
from tests.loadgen.study.spans.test_otel import collector
from tests.paths import ROOT
from tests.superserve.client.fakes import poll

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e


def started(*words: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def through_the_gateway(endpoint: str, over_http: str, over_grpc: str) -> None:
    """Send two queries through a gateway, each with a context."""
    with ProcessGroup() as group:
        one = group.start(
            "gateway",
            ["-m", "gateway", "--connect", endpoint, "--http-port", "0", "--grpc-port", "0", "--model", "m",
             "--default-slo-ms", "2000"],
        )  # fmt: skip
        group.wait_ready(30)
        with InferenceServerClient(one.ready["grpc"]) as client:
            while not client.is_server_ready():
                time.sleep(0.05)
            value = InferInput("input", [1], "BYTES")
            value.set_data_from_numpy(np.array([b"12345678"], object))
            client.infer("m", [value], headers={"traceparent": over_grpc})
        tensor = {"name": "input", "shape": [1], "datatype": "BYTES", "data": ["12345678"]}
        request = urllib.request.Request(
            f"{one.ready['http']}/v2/models/m/infer", orjson.dumps({"inputs": [tensor]}),
            {"traceparent": over_http},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert orjson.loads(answer.read())["parameters"]["trace_id"] == over_http.split("-")[1]


def test_spans_continue_the_trace_of_a_client_and_of_a_caller_of_the_gateway() -> None:
    """What a client, HTTP and gRPC give reaches the collector; a malformed context does not."""
    contexts = {
        name: f"00-{name.encode().hex():0<32}-00f067aa0ba902b7-01" for name in ("client", "http", "grpc")
    }
    with emulated(Emulation("cnn-8gpu-modelled", 2, "slackfit")) as cluster, collector() as (url, spans):
        connect = ("--connect", cluster.client_endpoint)
        words = ("cluster", "trace", *connect, "--otlp", url, "--one-in", "1000000")
        with started(*words) as spanning:
            assert spanning.stdout is not None
            assert "spans of" in spanning.stdout.readline()
            with Client(cluster.client_endpoint) as client:
                client.infer(b"12345678", slo_ms=2_000)
                client.infer(b"12345678", slo_ms=2_000, traceparent=contexts["client"] + "-bad")
                client.infer(b"12345678", slo_ms=2_000, traceparent=contexts["client"])
                assert client.ignored_traceparents == 1
            through_the_gateway(cluster.client_endpoint, contexts["http"], contexts["grpc"])
            poll(lambda: sum(span.name == "query" for span in spans) >= 3, 60.0)
            spanning.send_signal(signal.SIGINT)
            spanning.communicate(timeout=60)

    whole = {span.trace_id.hex(): span for span in spans if span.name == "query"}
    assert sorted(whole) == sorted(text.split("-")[1] for text in contexts.values())
    assert {span.parent_span_id.hex() for span in whole.values()} == {"00f067aa0ba902b7"}


def test_a_run_is_traced_to_a_file_and_to_a_collector(tmp_path: Path) -> None:
    """`loadgen run --perfetto` has the run's queries; `cluster trace` has them as spans and as a file."""
    with emulated(Emulation("cnn-8gpu-modelled", 2, "slackfit")) as cluster, collector() as (url, spans):
        connect = ("--connect", cluster.client_endpoint)
        with (
            started(
                "cluster", "trace", *connect, "--otlp", url, "--one-in", "1", "--seconds", "12"
            ) as spanning,
            started(
                "cluster", "trace", *connect, "--perfetto", f"{tmp_path}/now.json", "--seconds", "12"
            ) as now,
        ):
            assert spanning.stdout is not None
            assert "spans of" in spanning.stdout.readline()  # it reads: the run may begin
            run = started(
                "loadgen", "run", *connect, "--trace", "poisson:rate=100", "--duration", "2",
                "--perfetto", f"{tmp_path}/run.json",
            )  # fmt: skip
            said, _ = run.communicate(timeout=60)
            assert "open it at ui.perfetto.dev" in said, said
            words, _ = spanning.communicate(timeout=60)
            assert now.wait(60) == 0

    trace = orjson.loads((tmp_path / "run.json").read_bytes())["traceEvents"]
    queries = sum(int(one["args"]["queries"]) for one in trace if one["ph"] == "X")
    assert queries > 100
    whole = [span for span in spans if span.name == "query"]
    assert len(whole) >= queries
    assert f"{len(spans):,} spans" in words
    seen = orjson.loads((tmp_path / "now.json").read_bytes())["traceEvents"]
    assert 0 < sum(int(one["args"]["queries"]) for one in seen if one["ph"] == "X") <= len(whole)
