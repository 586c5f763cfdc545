"""Runs over the protocol: URLs, requests, answers, inputs; and whole runs against the gateway."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest

from gateway.v2.request import RequestReader
from gateway.v2.served import ServedModel
from loadgen.live.records import UNANSWERED, Records
from loadgen.live.run import RunSettings
from loadgen.oip.answers import AnswerBook, read_http
from loadgen.oip.inputs import checked_answers, read_inputs
from loadgen.oip.model import RequestMaker, TargetModel, is_url, parsed_url, target_model
from loadgen.oip.run import run_target
from loadgen.results.run import Run
from loadgen.traces.trace import load_trace
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.roles.processes import ProcessGroup
from superserve.subnet import TensorSpec
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = TargetModel("s", "m", "input", "FP32", (1, 2, 2), "output")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://a:80/v2/models/m/infer", ("http", "a", 80, "/v2/models/m/infer")),
        (
            "http://[::1]:80/v2/models/m/versions/1/infer",
            ("http", "::1", 80, "/v2/models/m/versions/1/infer"),
        ),
        ("grpc://a:1/m", ("grpc", "a", 1, "m")),
    ],
)
def test_urls(text: str, expected: tuple[Any, ...]) -> None:
    """Each way names a model."""
    url = parsed_url(text)
    assert (url.scheme, url.host, url.port, url.path) == expected


@pytest.mark.parametrize(
    "text",
    ["http://a/v2/models/m/infer", "http://a:80/", "http://a:80/v2/models/m", "grpc://a:1", "grpc://a:1/m/x",
     "ftp://a:1/m", "http://a:99999/v2/models/m/infer", "a:80", "http://a:80/v2/models/m/infer?x=1"],
)  # fmt: skip
def test_what_is_no_url(text: str) -> None:
    """The error shows the forms."""
    with pytest.raises(ConfigError, match="expected http://HOST:PORT/v2/models/M/infer, grpc://HOST:PORT/M"):
        parsed_url(text)


def test_a_router_is_no_url() -> None:
    """Endpoints of routers keep their meaning."""
    assert not is_url("tcp://127.0.0.1:5555")
    assert is_url("grpc://a:1/m")


def split(request: bytes) -> tuple[dict[str, str], bytes]:
    """Return a request's headers and body."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in lines), body


@pytest.mark.parametrize(
    ("model", "n_bytes"), [(MODEL, 16), (TargetModel("s", "m", "input", "BYTES", (), "output"), 5)]
)
def test_requests_are_what_the_gateway_takes(model: TargetModel, n_bytes: int) -> None:
    """One row, binary, with the slack that is left; the lengths agree."""
    url = parsed_url("http://a:80/v2/models/m/infer")
    payload = bytes(range(n_bytes))
    headers, body = split(RequestMaker(url, model, n_bytes).http(payload, 36 * MS))
    assert headers["superserve-slo-ms"] == "36.000"
    assert int(headers["content-length"]) == len(body)
    spec = None if model.datatype == "BYTES" else TensorSpec("float32", (1, 2, 2))
    served = ServedModel("m", spec)
    parsed = RequestReader(served).read(body, int(headers["inference-header-content-length"]))
    assert [bytes(row) for row in parsed.rows] == [payload]
    assert parsed.is_binary


def test_a_late_query_is_sent_all_the_same() -> None:
    """Its load was due; its time is as short as can be said."""
    headers, _ = split(
        RequestMaker(parsed_url("http://a:80/v2/models/m/infer"), MODEL, 16).http(bytes(16), -5)
    )
    assert float(headers["superserve-slo-ms"]) == 0.001


def test_answers_are_entered_once() -> None:
    """A second answer to a query is a duplicate; a failure has its status and a reason."""
    records = Records(4)
    book = AnswerBook(records, (("small", 70.0),), keep_outputs=True)
    parameters = {"subnet": "large", "accuracy": 80.0, "batch_size": 4, "queued_us": 5, "executing_us": 7}
    book.answered(0, parameters, b"\x01\x02", 100)
    book.answered(0, parameters, b"\x01\x02", 200)
    book.answered(1, {}, b"\x03\x04", 150)
    book.failed(2, Status.EXPIRED, "too late", 160)
    book.lost(3, "reset")

    assert records.n_duplicates == 1
    assert records.n_ended == 4
    assert records.answered_ns.tolist() == [100, 150, 160, -1]
    assert records.status.tolist() == [Status.OK, Status.OK, Status.EXPIRED, UNANSWERED]
    assert (records.subnet[0], records.batch_size[0], records.queued_ns[0], records.executing_ns[0]) == (
        1,
        4,
        5_000,
        7_000,
    )
    assert book.subnets[:2] == [("small", 70.0), ("large", 80.0)]
    assert np.isnan(records.accuracy[1])
    assert records.outputs is not None
    assert records.outputs[:2].tolist() == [[1, 2], [3, 4]]
    assert records.reasons == {"EXPIRED": "too late", "UNANSWERED": "reset"}


def test_http_answers() -> None:
    """Binary and JSON data, and the words of an error, also of a server that has none."""
    text = orjson.dumps({"parameters": {"accuracy": 5}, "outputs": [{"name": "o", "datatype": "FP32"}]})
    headers = {"inference-header-content-length": str(len(text))}
    assert read_http(200, headers, text + b"abcd") == ({"accuracy": 5}, b"abcd", "")
    body = orjson.dumps({"outputs": [{"name": "o", "datatype": "FP32", "data": [1.5]}]})
    assert read_http(200, {}, body)[1] == np.float32(1.5).tobytes()
    assert read_http(503, {}, b'{"error": "full"}')[2] == "full"
    assert read_http(502, {}, b"<html>")[2].startswith("HTTP 502")


def test_inputs_and_labels(tmp_path: Path) -> None:
    """Answers in time are compared by class; late ones are not."""
    path = tmp_path / "f.npz"
    np.savez(path, input=np.zeros((3, 2), np.float32), labels=np.array([0, 1, 2]))
    found = read_inputs(path, is_labelled=True)
    assert found.payloads.shape == (3, 8)
    assert found.labels is not None
    logits = np.eye(3, dtype=np.float32)[[2, 1, 1, 2]]
    columns: dict[str, Any] = {
        "due_ns": np.zeros(4, np.int64), "answered_ns": np.array([1, 1, 1, 99]),
        "status": np.zeros(4, np.uint8),
        "payload": np.array([2, 1, 0, 2]), "outputs": logits.view(np.uint8),
    }  # fmt: skip
    result: Any = None
    checked = checked_answers(Run(result, columns, []), found.labels, 10, "float32")
    assert (checked.checked, checked.right) == (3, 2)
    assert checked.accuracy == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.zeros(2), "b": np.zeros(2)}, "expected an array `input`"),
        ({"input": np.zeros((0, 2))}, "expected an array `input`"),
        ({"input": np.array(["x"])}, "expected an array `input`"),
        ({"input": np.zeros((2, 2))}, "expected an array `labels` of 2"),
        ({"input": np.zeros((2, 2)), "labels": np.zeros(3, int)}, "expected an array `labels` of 2"),
    ],
)
def test_inputs_that_are_none(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    """The error names the file and the array."""
    path = tmp_path / "f.npz"
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match=words):
        read_inputs(path, is_labelled=True)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"expected an \.npz file"):
        read_inputs(path, is_labelled=False)


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """Serve emulated GPUs behind a gateway: its URLs for HTTP and gRPC."""
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        group.wait_ready(30)
        group.start(
            "worker",
            ["-m", "gpu_worker", "--connect", router.ready["worker"], "--emulate", "cnn-8gpu-modelled",
             "--gpus", "8"],
        )  # fmt: skip
        gateway = group.start(
            "gateway",
            ["-m", "gateway", "--connect", router.ready["client"], "--http-port", "0", "--grpc-port", "0",
             "--model", "m", "--drain-notice-s", "0"],
        )  # fmt: skip
        group.wait_ready(30)
        http, grpc = f"{gateway.ready['http']}/v2/models/m/infer", f"grpc://{gateway.ready['grpc']}/m"
        deadline = time.monotonic() + 20
        while True:
            try:
                target_model(http)
                target_model(grpc)
                break
            except ConfigError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield http, grpc


@pytest.mark.e2e
@pytest.mark.parametrize("which", [0, 1])
def test_a_run_over_the_protocol(urls: tuple[str, str], which: int) -> None:
    """Every query has an outcome; subnets and accuracies are the router's; the schedule is kept."""
    trace = load_trace("constant:rate=100", rate_qps=None, duration_s=1.0, seed=0)
    run = run_target(trace, RunSettings(2_000 * MS), urls[which])

    result = run.result
    assert result.queries["total"] == trace.n
    assert result.queries["ok"] == trace.n, run.reasons
    assert result.mean_accuracy is not None
    assert 73 < result.mean_accuracy < 81
    assert {name for name, _ in run.subnets} >= {"cnn-80.16"}
    assert sum(result.subnet_share.values()) == pytest.approx(1)
    assert (run.columns["executing_ns"] > 0).all()
    assert run.n_duplicates == 0


@pytest.mark.e2e
def test_a_target_that_is_not_there() -> None:
    """One sentence, before anything is sent."""
    trace = load_trace("constant:rate=100", rate_qps=None, duration_s=1.0, seed=0)
    with pytest.raises(ConfigError, match="expected its metadata"):
        run_target(trace, RunSettings(MS), "http://127.0.0.1:9/v2/models/m/infer")
