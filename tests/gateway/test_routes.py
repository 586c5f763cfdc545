"""Requests to answers: paths, statuses, terms, batches, cancellation and what is counted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest

from gateway.calls.access import Access, KnownCaller
from gateway.http.exchange import HttpRequest
from gateway.http.routes import Routes
from gateway.v2.verdicts import OF_ERRORS, verdict_of
from superserve.errors import (
    CancelledQueryError,
    ExpiredError,
    InfeasibleError,
    InvalidQueryError,
    ModelFailedError,
    OverloadedError,
    QueryError,
    UnansweredError,
    WorkerLostError,
)
from tests.gateway.fakes import ANY, DIGITS, FakeClient, backend

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.calls.backend import Backend, CallUnderWay
    from gateway.http.exchange import HttpAnswer

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TOKEN = "secret"
DIGEST = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"


def infer_body(n_rows: int = 1, **more: Any) -> bytes:
    """Return an inference of `n_rows` rows of zeros and ones."""
    tensor = {"name": "input", "shape": [n_rows, 1, 2, 2], "datatype": "FP32", "data": [1.0] * (4 * n_rows)}
    return orjson.dumps({"inputs": [tensor], **more})


class Door:
    """Routes on a fake client, and their answers."""

    def __init__(self, folder: Path, client: FakeClient | None = None, **access: Any) -> None:
        self.client = FakeClient() if client is None else client
        self.backend: Backend = backend(self.client, folder, access.pop("default_slo_ns", None))
        tokens = access.pop("tokens", None)
        self.routes = Routes(self.backend, Access(**access), "1.2", tokens)
        self.answers: list[HttpAnswer] = []

    def ask(
        self, method: str, target: str, body: bytes = b"", name: str | None = None, **headers: str
    ) -> CallUnderWay | None:
        """Send a request; underscores of header names become dashes."""
        request = HttpRequest(time.monotonic_ns())
        request.method, request.target, request.body = method, target.encode(), body
        request.headers = {key.replace("_", "-"): value for key, value in headers.items()}
        return self.routes.handle(request, name, self.answers.append)

    def infer(self, body: bytes, **headers: str) -> CallUnderWay | None:
        """Send an inference with a second to answer."""
        headers.setdefault("superserve_slo_ms", "1000")
        return self.ask("POST", "/v2/models/digits/infer", body, **headers)

    @property
    def last(self) -> tuple[int, Any]:
        """The last answer's status and JSON."""
        answer = self.answers[-1]
        return answer.status, orjson.loads(answer.body) if answer.body else None


@pytest.fixture
def door(tmp_path: Path) -> Door:
    """Return open routes to the digits model."""
    return Door(tmp_path)


@pytest.mark.parametrize(
    ("method", "target", "status", "expected"),
    [
        ("GET", "/v2", 200, {"name": "superserve", "version": "1.2"}),
        ("GET", "/v2/", 200, {"name": "superserve"}),
        ("GET", "/v2/health/live", 200, None),
        ("GET", "/v2/health/ready", 200, None),
        ("GET", "/v2/models/digits", 200, {"name": "digits", "versions": ["1"]}),
        ("GET", "/v2/models/digits/versions/1", 200, {"name": "digits"}),
        ("GET", "/v2/models/digits/ready?x=1", 200, None),
        ("GET", "/v2/models/%64igits/config", 200, {"name": "digits", "max_batch_size": 4096}),
        ("GET", "/v2/models/digits/versions/1/stats", 200, {}),
        ("GET", "/v2/models/stats", 200, {}),
        ("POST", "/v2/repository/index", 200, None),
        ("GET", "/openapi.json", 200, {"openapi": "3.1.0"}),
        ("GET", "/v2/models/other", 404, {}),
        ("GET", "/v2/models/digits/versions/2", 404, {}),
        ("GET", "/v2/models/digits/versions/1/", 200, {}),
        ("GET", "/v2/models/digits/metrics", 404, {}),
        ("GET", "/v2/models/digits/infer/more", 404, {}),
        ("GET", "/v2/models/", 404, {}),
        ("GET", "/", 404, {}),
        ("GET", "/v1/models/digits", 404, {}),
        ("POST", "/v2", 405, {}),
        ("GET", "/v2/models/digits/infer", 405, {}),
        ("DELETE", "/v2/models/digits", 405, {}),
        ("POST", "/v2/models/digits/infer", 400, {}),
    ],
)
def test_paths(door: Door, method: str, target: str, status: int, expected: dict[str, Any] | None) -> None:
    """Every path of the protocol, and what is none."""
    door.ask(method, target)

    found, body = door.last
    assert found == status
    if status >= 400:
        assert set(body) == {"error"}
    elif expected is not None:
        assert {key: body[key] for key in expected} == expected


def test_a_malformed_traceparent_is_ignored_and_counted(door: Door) -> None:
    """The query runs as if there were none."""
    door.infer(infer_body(parameters={"timeout": 500_000}), traceparent=TRACEPARENT + "-more")
    door.client.answer()

    assert door.client.submitted[0].traceparent is None
    assert door.last[0] == 200
    assert "trace_id" not in door.last[1]["parameters"]
    assert door.backend.board.sum("ignored_traceparents") == 1


def test_metadata_has_the_batch_axis(door: Door) -> None:
    """-1 where a batch may have any size; the configuration's dims leave it out."""
    door.ask("GET", "/v2/models/digits")
    assert door.last[1]["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 2, 2]}]
    assert door.last[1]["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 3]}]
    door.ask("GET", "/v2/models/digits/config")
    assert door.last[1]["input"][0]["dims"] == [1, 2, 2]
    assert door.last[1]["parameters"]["subnets"]["string_value"] == "small=70,large=80"


def test_an_inference(door: Door) -> None:
    """Terms reach the client; the answer has the output, and how it was served."""
    parameters = {"priority": 1, "min_accuracy": 75, "timeout": 500_000}
    door.infer(infer_body(id="a", parameters=parameters), traceparent=TRACEPARENT)
    sent = door.client.submitted[0]
    assert (sent.payload, sent.priority, sent.min_accuracy) == (np.ones(4, "<f4").tobytes(), 255, 75)
    assert sent.traceparent == TRACEPARENT
    assert 0 < sent.slo_ms < 500  # the tightest, less the time since it arrived
    assert not door.answers

    door.client.answer(is_late=True)
    status, body = door.last
    assert status == 200
    assert body == {
        "model_name": "digits", "model_version": "1", "id": "a",
        "parameters": {
            "trace_id": TRACEPARENT.split("-")[1], "subnet": "large", "accuracy": 80.0, "is_late": True,
            "queued_us": 1500, "executing_us": 4000, "batch_size": 2,
        },
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [1, 3], "data": [0.0, 1.0, 2.0]}],
    }  # fmt: skip


def test_a_binary_answer(door: Door) -> None:
    """JSON, then the tensor; the header gives the JSON's length."""
    door.infer(infer_body(2, parameters={"binary_data_output": True}))
    door.client.answer()

    answer = door.answers[-1]
    assert answer.headers == (("inference-header-content-length", str(len(answer.body))),)
    assert bytes(answer.more) == np.arange(3, dtype="<f4").tobytes() * 2
    assert orjson.loads(answer.body)["outputs"][0]["parameters"] == {"binary_data_size": 24}


def test_rows_are_queries_with_one_deadline(door: Door) -> None:
    """The answer waits for all of them, in their order."""
    door.infer(infer_body(3))
    first, second, third = door.client.submitted
    assert first.slo_ms == pytest.approx(third.slo_ms, rel=0.2)
    for value, one in ((2, third), (1, second)):
        one.future.set_result(_reply(value))
    assert not door.answers
    first.future.set_result(_reply(0, subnet="small"))

    _, body = door.last
    assert body["outputs"][0]["data"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (body["parameters"]["subnet"], body["parameters"]["accuracy"]) == ("small,large", 70.0)


def _reply(value: int, subnet: str = "large") -> Any:
    from tests.gateway.fakes import reply  # noqa: PLC0415

    return reply(np.full(3, value, np.float32), subnet=subnet)


@pytest.mark.parametrize(
    ("error", "status", "retries"),
    [
        (InvalidQueryError("x"), 400, False),
        (OverloadedError("x"), 503, True),
        (InfeasibleError("x"), 504, False),
        (ExpiredError("x"), 504, False),
        (ModelFailedError("x"), 500, False),
        (WorkerLostError("x"), 502, False),
        (UnansweredError("x"), 503, True),
        (CancelledQueryError("x"), 499, False),
    ],
)
def test_how_queries_end_is_a_status(door: Door, error: QueryError, status: int, *, retries: bool) -> None:
    """Refused at once or later: the same status, and Retry-After where it helps."""
    door.infer(infer_body())
    door.client.submitted[0].future.set_exception(error)
    door.client.refusal = error
    door.infer(infer_body())

    for answer in door.answers:
        assert answer.status == status
        assert (("retry-after", "1") in answer.headers) == retries
    assert len(door.answers) == 2


def test_every_outcome_has_a_status() -> None:
    """No error of a query is an internal one by oversight."""
    assert {kind for kind in QueryError.__subclasses__()} == set(OF_ERRORS)  # noqa: C416
    assert verdict_of(ValueError()).http == 500


def test_one_failed_row_fails_the_request_and_cancels_the_others(door: Door) -> None:
    """The message names the row; nothing is left at the router."""
    door.infer(infer_body(3))
    _, second, third = door.client.submitted
    second.future.set_exception(ExpiredError("too late"))

    assert door.last == (504, {"error": "row 1 of 3: too late"})
    assert third.future.cancelled()
    assert door.backend.board.totals().fail.count == 1
    assert len(door.answers) == 1


def test_a_batch_that_is_refused_midway_leaves_nothing(door: Door) -> None:
    """The rows before the refused one are cancelled."""
    door.client.refusal, door.client.refuse_from = OverloadedError("full"), 2
    door.infer(infer_body(3))

    assert door.last[0] == 503
    assert all(one.future.cancelled() for one in door.client.submitted)
    assert len(door.client.submitted) == 2


def test_a_caller_that_leaves_cancels_its_queries(door: Door) -> None:
    """They are counted, and no answer is made."""
    call = door.infer(infer_body(2))
    assert call is not None
    call.cancel()

    assert all(one.future.cancelled() for one in door.client.submitted)
    assert not door.answers
    totals = door.backend.board.totals()
    assert (totals.cancelled.count, totals.fail.count) == (1, 0)


def test_without_a_deadline_a_request_is_refused(door: Door, tmp_path: Path) -> None:
    """The refusal names the ways to give one; a default makes it unnecessary."""
    door.ask("POST", "/v2/models/digits/infer", infer_body())
    status, body = door.last
    assert status == 400
    for way in ("parameters.timeout", "superserve-slo-ms", "grpc-timeout", "--default-slo-ms"):
        assert way in body["error"]

    folder = tmp_path / "other"
    folder.mkdir()
    lenient = Door(folder, default_slo_ns=10**9)
    lenient.ask("POST", "/v2/models/digits/infer", infer_body())
    assert lenient.client.submitted


def test_time_counts_from_arrival(door: Door) -> None:
    """A request that took longer than its time to arrive is not submitted."""
    request = HttpRequest(arrived_ns=1)  # long ago
    request.method, request.target, request.body = "POST", b"/v2/models/digits/infer", infer_body()
    request.headers = {"superserve-slo-ms": "50"}
    door.routes.handle(request, None, door.answers.append)

    assert door.last[0] == 504
    assert not door.client.submitted


@pytest.mark.parametrize(
    ("changed", "status"), [({"is_connected": False}, 503), ({"model": None}, 503), ({}, 200)]
)
def test_readiness_is_that_of_the_router(tmp_path: Path, changed: dict[str, Any], status: int) -> None:
    """Not ready without a router or a model; and live all the same."""
    door = Door(tmp_path, FakeClient(**changed))
    for target in ("/v2/health/ready", "/v2/models/digits/ready"):
        door.ask("GET", target)
        assert door.last[0] == status
    door.infer(infer_body())
    assert door.client.submitted or door.last[0] == 503
    door.ask("GET", "/v2/health/live")
    assert door.last[0] == 200


def test_readiness_knows_lost_workers_and_drains(door: Door) -> None:
    """Zero GPUs ready, or a gateway that drains, is not ready; an unknown number is no reason."""
    for n_ready, is_draining, status in (
        (0, False, 503),
        (None, False, 200),
        (3, False, 200),
        (3, True, 503),
    ):
        door.backend.board.set_workers(n_ready)
        door.backend.is_draining = is_draining
        door.ask("GET", "/v2/health/ready")
        assert door.last[0] == status


def test_statistics_add_up(door: Door) -> None:
    """Counts, and times that are those of the replies."""
    for _ in range(3):
        door.infer(infer_body(2))
        door.client.answer()
    door.infer(infer_body())
    door.client.submitted[-1].future.set_exception(ExpiredError("x"))
    door.ask("GET", "/v2/models/digits/stats")

    stats = door.last[1]["model_stats"][0]
    assert (stats["inference_count"], stats["execution_count"]) == (6, 3)  # two rows share a batch of two
    spans = stats["inference_stats"]
    assert (spans["success"]["count"], spans["fail"]["count"]) == (3, 1)
    assert spans["queue"] == {"count": 3, "ns": 4_500_000}
    assert spans["compute_infer"] == {"count": 3, "ns": 12_000_000}


def test_bytes_models(tmp_path: Path) -> None:
    """Any bytes in, any bytes out: elements of BYTES."""
    door = Door(tmp_path, FakeClient(model=ANY))
    tensor = {"name": "input", "shape": [2], "datatype": "BYTES", "data": ["a", "bc"]}
    door.ask("POST", "/v2/models/any/infer", orjson.dumps({"inputs": [tensor]}), superserve_slo_ms="50")
    door.client.answer(b"out")

    assert [one.payload for one in door.client.submitted] == [b"a", b"bc"]
    assert door.last[1]["outputs"] == [
        {"name": "output", "datatype": "BYTES", "shape": [2], "data": ["out", "out"]}
    ]


def test_a_model_that_changes_is_seen(door: Door) -> None:
    """A WELCOME with another model changes metadata and checks."""
    door.client.model = ANY
    door.ask("GET", "/v2/models/any")
    assert door.last[0] == 200
    door.client.model = DIGITS
    door.ask("GET", "/v2/models/any")
    assert door.last[0] == 404


def test_callers(tmp_path: Path) -> None:
    """A token or a certificate names the caller; probes need neither; a rate is a 429."""
    callers = {f"token:{DIGEST}": KnownCaller("app", 2.0), "cert:search": KnownCaller("search")}
    door = Door(tmp_path, callers=callers)
    for name, headers, status in (
        (None, {}, 401), (None, {"authorization": "Bearer wrong"}, 401),
        (None, {"authorization": "Basic x"}, 401),
        ("other", {}, 401), ("search", {}, 200), (None, {"authorization": f"bearer {TOKEN}"}, 200),
    ):  # fmt: skip
        door.ask("GET", "/v2", b"", name, **headers)
        assert door.last[0] == status
        assert (("www-authenticate", "Bearer") in door.answers[-1].headers) == (status == 401)
    door.ask("GET", "/v2/health/ready")
    assert door.last[0] == 200

    for _ in range(3):
        door.infer(infer_body(), authorization=f"Bearer {TOKEN}")
    assert len(door.client.submitted) == 2
    assert door.last[0] == 429
