"""Triton's own clients against the gateway, unmodified: HTTP and gRPC, sync and async, every call.

Both serve the digits supernet here, so what comes back is compared with what the system's own client gets.
"""

from __future__ import annotations

import asyncio
import json
import queue
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from superserve import Client
from superserve.roles.processes import ProcessGroup
from tests.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.e2e

EXAMPLES = ROOT / "examples"
SLO_US = 10_000_000
MODEL = "digits"
SYNC = {"http": tritonclient.http, "grpc": tritonclient.grpc}
PROTOCOLS = tuple(SYNC)


@dataclass
class Served:
    """Where the gateway and its router are."""

    router: str
    http: str
    grpc: str
    metrics: str

    def url(self, protocol: str) -> str:
        """Return what a Triton client takes."""
        return self.http.removeprefix("http://") if protocol == "http" else self.grpc


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Serve the digits supernet behind a gateway of two processes for HTTP and one for gRPC."""
    with ProcessGroup() as group:
        router = group.start("router", ["-m", "router"])
        group.wait_ready(30)
        group.start(
            "worker",
            ["-m", "gpu_worker", "--connect", router.ready["worker"], "--supernet", MODEL, "--device", "cpu",
             "--threads", "1"],
        )  # fmt: skip
        gateway = group.start(
            "gateway",
            ["-m", "gateway", "--connect", router.ready["client"], "--http-port", "0", "--grpc-port", "0",
             "--http-processes", "2", "--metrics-port", "0", "--drain-notice-s", "0"],
        )  # fmt: skip
        group.wait_ready(60)
        _wait_until_ready(gateway.ready["http"])
        yield Served(
            router.ready["client"], gateway.ready["http"], gateway.ready["grpc"], gateway.ready["metrics"]
        )


def _wait_until_ready(http: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{http}/v2/models/{MODEL}/ready", timeout=5):
                return
        except urllib.error.HTTPError:
            time.sleep(0.05)
    pytest.fail("the gateway did not become ready")


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, Any]:
    """Three images."""
    return np.random.default_rng(7).random((3, 1, 20, 20), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(served: Served, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What the system's own client gets for the images from the largest subnet."""
    with Client(served.router) as client:
        futures = [client.submit(one, slo_ms=10_000, min_accuracy=97) for one in images]
        return np.stack([future.result(20).output for future in futures])


def asked(module: Any, images: np.ndarray[Any, Any], **options: Any) -> list[Any]:
    """Return a client's input for the images."""
    tensor = module.InferInput("input", images.shape, "FP32")
    tensor.set_data_from_numpy(images, **options)
    return [tensor]


def floor(protocol: str) -> dict[str, Any]:
    """Return options of `infer` for an answer by the largest subnet."""
    number: Any = 97.0 if protocol == "http" else "97.0"
    return {"timeout": SLO_US, "parameters": {"min_accuracy": number}}


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    """One of the two."""
    return str(request.param)


@pytest.fixture
def client(served: Served, protocol: str) -> Iterator[Any]:
    """A client without asyncio."""
    with SYNC[protocol].InferenceServerClient(served.url(protocol)) as one:
        yield one


def as_json(answer: Any, protocol: str) -> dict[str, Any]:
    """Return an answer as a dictionary."""
    if protocol == "http":
        found: dict[str, Any] = answer
        return found
    from google.protobuf import json_format  # noqa: PLC0415

    message: dict[str, Any] = json_format.MessageToDict(answer, preserving_proto_field_name=True)
    return message


def test_health(client: Any) -> None:
    """Live, ready, and the model too."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")


def test_metadata(client: Any, protocol: str) -> None:
    """Of the server and of the model."""
    assert as_json(client.get_server_metadata(), protocol)["name"] == "superserve"
    found = as_json(client.get_model_metadata(MODEL), protocol)
    shape = [int(size) for size in found["inputs"][0]["shape"]]
    assert (found["name"], found["inputs"][0]["datatype"], shape) == (MODEL, "FP32", [-1, 1, 20, 20])
    assert [int(size) for size in found["outputs"][0]["shape"]] == [-1, 10]


def test_config(client: Any, protocol: str) -> None:
    """As far as it means something here."""
    found = as_json(client.get_model_config(MODEL), protocol)
    config = found if protocol == "http" else found["config"]
    assert config["max_batch_size"] == 4096
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert "digits-97.04=97.04" in config["parameters"]["subnets"]["string_value"]


def test_the_repository(client: Any, protocol: str) -> None:
    """One model, ready."""
    found = as_json(client.get_model_repository_index(), protocol)
    models: Any = found if protocol == "http" else found["models"]
    assert [(one["name"], one["state"]) for one in models] == [(MODEL, "READY")]


@pytest.mark.parametrize("name", [MODEL, ""])
def test_statistics(client: Any, protocol: str, name: str, images: np.ndarray[Any, Any]) -> None:
    """The same whichever process answers, and they grow by what was asked."""

    def totals() -> tuple[int, int, int]:
        found = as_json(client.get_inference_statistics(name), protocol)["model_stats"][0]
        success = found.get("inference_stats", {}).get("success", {})
        # Protobuf's JSON leaves zeros out.
        return int(found.get("inference_count", 0)), int(success.get("count", 0)), int(success.get("ns", 0))

    rows, requests, ns = totals()
    for _ in range(3):
        client.infer(MODEL, asked(SYNC[protocol], images), timeout=SLO_US)
    more_rows, more_requests, more_ns = totals()
    assert (more_rows - rows, more_requests - requests) == (9, 3)
    assert 0 < more_ns - ns < 30e9


def test_infer(
    client: Any, protocol: str, images: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> None:
    """A batch, binary both ways: the outputs are those of the system's own client."""
    module = SYNC[protocol]
    outputs = [module.InferRequestedOutput("output")]
    result = client.infer(MODEL, asked(module, images), outputs=outputs, request_id="7", **floor(protocol))

    np.testing.assert_allclose(result.as_numpy("output"), expected, rtol=1e-4, atol=1e-4)
    response = as_json(result.get_response(), protocol)
    assert response["id"] == "7"
    accuracy: Any = response["parameters"]["accuracy"]
    assert (accuracy if protocol == "http" else accuracy["double_param"]) == pytest.approx(97.04)


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
def test_infer_in_json(
    served: Served,
    images: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    *,
    binary_in: bool,
    binary_out: bool,
) -> None:
    """HTTP's JSON form in either direction."""
    http = tritonclient.http
    with http.InferenceServerClient(served.url("http")) as client:
        result = client.infer(
            MODEL, asked(http, images, binary_data=binary_in),
            outputs=[http.InferRequestedOutput("output", binary_data=binary_out)], **floor("http"),
        )  # fmt: skip
    np.testing.assert_allclose(result.as_numpy("output"), expected, rtol=1e-4, atol=1e-4)


def test_grpc_contents(served: Served, images: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """Typed contents instead of raw bytes, which the client's class does not send, but others do."""
    import grpc  # noqa: PLC0415
    from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: PLC0415

    with grpc.insecure_channel(served.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        wanted = service_pb2.ModelInferRequest(model_name=MODEL)
        tensor = wanted.inputs.add(name="input", datatype="FP32", shape=images.shape)
        tensor.contents.fp32_contents.extend(images.reshape(-1).tolist())
        wanted.parameters["min_accuracy"].double_param = 97
        response = stub.ModelInfer(wanted, timeout=10)
        output = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(3, 10)
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)

        wanted.raw_input_contents.append(images.tobytes())
        with pytest.raises(grpc.RpcError, match="got both"):
            stub.ModelInfer(wanted, timeout=10)


def test_async_infer(
    client: Any, protocol: str, images: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> None:
    """The clients' own threads: ten requests at a time."""
    inputs = asked(SYNC[protocol], images)
    options = floor(protocol)
    if protocol == "http":
        results = [
            one.get_result() for one in [client.async_infer(MODEL, inputs, **options) for _ in range(10)]
        ]
    else:
        ended: queue.Queue[Any] = queue.Queue()
        for _ in range(10):
            client.async_infer(MODEL, inputs, lambda result, error: ended.put(error or result), **options)
        results = [ended.get(timeout=30) for _ in range(10)]
    for result in results:
        np.testing.assert_allclose(result.as_numpy("output"), expected, rtol=1e-4, atol=1e-4)


def test_a_stream(served: Served, images: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    """GRPC's bidirectional stream: answers carry the request's id, and an error ends nothing."""
    grpc = tritonclient.grpc
    ended: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: ended.put(error or result))
        for i in range(5):
            client.async_stream_infer(MODEL, asked(grpc, images), request_id=str(i), **floor("grpc"))
        found = [ended.get(timeout=30) for _ in range(5)]
        client.async_stream_infer("other", asked(grpc, images), timeout=SLO_US)
        error = ended.get(timeout=30)
        client.async_stream_infer(MODEL, asked(grpc, images), **floor("grpc"))
        last = ended.get(timeout=30)
        client.stop_stream()

    assert {one.get_response().id for one in found} == set("01234")
    for one in (*found, last):
        np.testing.assert_allclose(one.as_numpy("output"), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(error, InferenceServerException)
    assert "not found" in error.message()


@pytest.mark.parametrize("module", [tritonclient.http.aio, tritonclient.grpc.aio])
def test_asyncio(
    served: Served, module: Any, images: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> None:
    """Both clients of asyncio: health, metadata, configuration, statistics, and inferences at a time."""
    protocol = "http" if "http" in module.__name__ else "grpc"

    async def scene() -> None:
        client = module.InferenceServerClient(served.url(protocol))
        try:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready(MODEL)
            for described in (
                client.get_server_metadata(), client.get_model_metadata(MODEL),
                client.get_model_config(MODEL), client.get_inference_statistics(MODEL),
                client.get_model_repository_index(),
            ):  # fmt: skip
                assert await described
            inputs = asked(module, images)
            results = await asyncio.gather(
                *[client.infer(MODEL, inputs, **floor(protocol)) for _ in range(5)]
            )
            for result in results:
                np.testing.assert_allclose(result.as_numpy("output"), expected, rtol=1e-4, atol=1e-4)
        finally:
            await client.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("case", "status", "code"),
    [
        (SimpleNamespace(model="other"), "404", "NOT_FOUND"),
        (SimpleNamespace(version="9"), "404", "NOT_FOUND"),
        (SimpleNamespace(timeout=None), "400", "INVALID_ARGUMENT"),
        (SimpleNamespace(timeout=1), "504", "DEADLINE_EXCEEDED"),
        (SimpleNamespace(priority=999), "400", "INVALID_ARGUMENT"),
        (SimpleNamespace(shape=(3, 1, 400)), "400", "INVALID_ARGUMENT"),
    ],
)
def test_errors(
    client: Any, protocol: str, images: np.ndarray[Any, Any], case: Any, status: str, code: str
) -> None:
    """A client sees the protocol's status, and words."""
    given = vars(case)
    inputs = asked(SYNC[protocol], images.reshape(given.get("shape", images.shape)))
    with pytest.raises(InferenceServerException) as caught:
        client.infer(
            given.get("model", MODEL), inputs, model_version=given.get("version", ""),
            timeout=given.get("timeout", SLO_US), priority=given.get("priority", 0),
        )  # fmt: skip
    assert caught.value.status() == (status if protocol == "http" else f"StatusCode.{code}")
    assert caught.value.message()


def test_a_grpc_deadline_is_the_slo(served: Served, images: np.ndarray[Any, Any]) -> None:
    """`client_timeout` needs no parameter; what cannot be met is refused, or the client gives up first."""
    grpc = tritonclient.grpc
    with grpc.InferenceServerClient(served.grpc) as client:
        assert client.infer(MODEL, asked(grpc, images), client_timeout=10).as_numpy("output").shape == (3, 10)
        with pytest.raises(InferenceServerException) as caught:
            client.infer(MODEL, asked(grpc, images), client_timeout=0.0005)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_what_is_not_served_is_refused(client: Any) -> None:
    """Loading models and shared memory belong to other servers: an error, no hang."""
    for call in (lambda: client.load_model(MODEL), client.get_system_shared_memory_status):
        with pytest.raises(InferenceServerException):
            call()


def test_curl_as_documented(served: Served) -> None:
    """A query by hand, and the metrics' page, which counts it."""
    tensor = {"name": "input", "shape": [1, 1, 20, 20], "datatype": "FP32", "data": [0.0] * 400}
    request = urllib.request.Request(
        f"{served.http}/v2/models/{MODEL}/infer", json.dumps({"inputs": [tensor]}).encode(),
        {"superserve-slo-ms": "10000"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert len(json.load(answer)["outputs"][0]["data"]) == 10
    with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=20) as page:
        text = page.read().decode()
    ok = next(
        line
        for line in text.splitlines()
        if line.startswith('superserve_gateway_requests_total{protocol="http",status="200"}')
    )
    assert float(ok.split()[-1]) >= 1


def test_the_example(served: Served) -> None:
    """examples/triton_client.py as it stands."""
    assert "classes [" in _run(sys.executable, "-W", "error", "triton_client.py", served.url("http"))


@pytest.mark.slow
def test_the_examples_in_other_languages(served: Served) -> None:
    """Java and Go, where there is a toolchain; without one their braces close at least."""
    for command, name in ((("java",), "Infer.java"), (("go", "run"), "infer.go")):
        if shutil.which(command[0]) is None:
            text = (EXAMPLES / name).read_text()
            assert text.count("{") == text.count("}")
            continue
        assert '"model_name":"digits"' in _run(*command, name, served.http)


def _run(*words: str) -> str:
    done = subprocess.run(words, cwd=EXAMPLES, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
