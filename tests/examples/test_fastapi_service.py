"""The FastAPI example answers correctly or gives a reason, in time, whatever happens behind it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import json
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from superserve import errors
from superserve.errors import QueryError
from superserve.net.connection import ask_status
from tests.examples.cluster import serving
from tests.examples.service import (
    EXAMPLES,
    HANGS_S,
    JSON,
    Outcome,
    bodies,
    from_tasks,
    from_threads,
    service,
    summary,
    wrong,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from superserve.status import RouterStatus
    from tests.examples.cluster import DigitsCluster

N = 1_000
SLO_MS = 10_000.0  # 64 at a time, on two cores that others use too: nobody has to fail
HTTP_MS = 10_000.0
"""What HTTP may add to the service's own SLO and grace: up to 700 ms were seen on a quick machine, since 64
callers whose queries fail at once share two cores with the service. A caller that is forgotten waits three
times as long, for HANGS_S."""

BEFORE_THE_KILL = 300

SLOS_MS = [400.0, 4_000.0] * (N // 2)
"""Some that outlive a router's restart, and some that do not."""

LIVE = (pytest.mark.e2e, pytest.mark.timeout(180))


def live(test: Any) -> Any:
    """Mark a test that starts a cluster and the service."""
    for mark in LIVE:
        test = mark(test)
    return test


def load_example() -> Any:
    """Import the example as a module; it connects to nothing until it runs."""
    spec = importlib.util.spec_from_file_location("fastapi_service", EXAMPLES / "fastapi_service.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def url(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the URL of the service, in front of a cluster that stays up."""
    with service(endpoint, tmp_path_factory.mktemp("service") / "log") as url:
        yield url


def test_each_way_in_which_a_query_can_end_has_a_status() -> None:
    """No class of the error tree falls through to a bare 500."""
    classes = {
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, QueryError) and one is not QueryError
    }

    assert set(load_example().STATUSES) == classes


@pytest.mark.parametrize(("status", "retry_after"), [(422, None), (502, None), (503, "1"), (504, None)])
def test_only_a_503_says_when_to_come_back(status: int, retry_after: str | None) -> None:
    """Every error's answer has its status and a body with class and text."""
    example = load_example()
    for kind in [kind for kind, its_status in example.STATUSES.items() if its_status == status]:
        answer = asyncio.run(example.refuse(None, kind("because")))

        assert answer.status_code == status
        assert answer.headers.get("Retry-After") == retry_after
        assert json.loads(answer.body) == {"error": kind.__name__, "detail": "because"}


@live
@pytest.mark.parametrize("callers", [from_tasks, pytest.param(from_threads, marks=pytest.mark.slow)])
def test_a_thousand_requests_are_answered_rightly(callers: Any, url: str) -> None:
    """From 64 threads, and from a thousand tasks: each answer is what its subnet makes of its image."""
    outcomes = callers(url, [SLO_MS] * N)

    said = summary(outcomes)
    assert [one.status for one in outcomes] == [200] * N, said
    assert wrong(outcomes) == []
    assert not any(one.body["is_late"] for one in outcomes)


@live
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("callers", [from_threads, from_tasks])
def test_a_router_killed_in_the_middle_leaves_nobody_waiting(callers: Any, tmp_path: Path) -> None:
    """Each request is answered rightly, or refused with its cause by its deadline; then all is well again."""
    grace_ms = load_example().GRACE_MS
    with serving() as cluster, service(cluster.client_endpoint, tmp_path / "log") as url:
        outcomes = with_a_restart(callers, url, cluster)
        (afterwards,) = callers(url, [SLO_MS])

    said = summary(outcomes)
    assert len(outcomes) == N
    assert wrong(outcomes) == []
    failed = [one for one in outcomes if one.status != 200]
    assert all(one.is_clear_error for one in failed), failed
    assert failed, said
    assert afterwards.status == 200, afterwards
    assert all(one.elapsed_ms <= one.slo_ms + grace_ms + HTTP_MS for one in outcomes), said


def with_a_restart(callers: Any, url: str, cluster: DigitsCluster) -> list[Outcome]:
    """Send a thousand queries; kill the router after 300, start one after the first failure."""
    seen: list[Outcome] = []
    middle, failure = threading.Event(), threading.Event()

    def watch(outcome: Outcome) -> None:
        seen.append(outcome)
        if len(seen) >= BEFORE_THE_KILL:
            middle.set()
        if outcome.status != 200:
            failure.set()

    def give_up(_: object) -> None:
        middle.set()
        failure.set()

    # The cluster's processes belong to this thread, so the callers get another.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        calling = pool.submit(callers, url, SLOS_MS, watch)
        # If it ends early, what it raised is what is wrong: nothing more is waited for.
        calling.add_done_callback(give_up)
        assert middle.wait(HANGS_S), len(seen)
        cluster.kill_router()
        assert failure.wait(HANGS_S), len(seen)
        cluster.start_router()
        outcomes: list[Outcome] = calling.result()
    return outcomes


@live
def test_a_wrong_query_is_the_callers_fault(url: str) -> None:
    """422 for a body, an SLO or an accuracy that cannot be served."""
    with httpx.Client(base_url=url, timeout=HANGS_S) as client:
        assert client.post("/classify", json={"pixels": [[0.0]]}).status_code == 422
        assert client.post("/classify", content=b"not JSON", headers=JSON).status_code == 422
        assert ask(client, slo_ms=-1).status_code == 422
        refused = ask(client, min_accuracy=99.99)

    assert refused.status_code == 422
    assert refused.json()["error"] == "InvalidQueryError"


@live
def test_too_little_time_is_a_504_and_health_is_a_query(url: str) -> None:
    """An impossible SLO is refused with the reason; a healthy cluster names the subnet that answered."""
    with httpx.Client(base_url=url, timeout=HANGS_S) as client:
        refused = ask(client, slo_ms=0.05)
        healthy = client.get("/health")

    assert refused.status_code == 504
    assert refused.json()["error"] in ("InfeasibleError", "ExpiredError")
    assert healthy.status_code == 200
    assert healthy.json()["status"] == "ok"


@live
def test_a_caller_that_hangs_up_cancels_its_query(tmp_path: Path) -> None:
    """With room for one query and no worker: the next is a 503, until the first one's caller is gone."""
    with (
        serving("--max-queries", "1", has_worker=False) as cluster,
        service(cluster.client_endpoint, tmp_path / "log") as url,
        httpx.Client(base_url=url, timeout=HANGS_S) as client,
    ):
        with contextlib.closing(hold_a_query(url)):
            until(cluster, lambda status: status.queue.length == 1)
            refused = ask(client, slo_ms=SLO_MS)
        until(cluster, lambda status: status.queries.answered.cancelled == 1)
        sick = client.get("/health")

    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"] == "OverloadedError"
    assert sick.status_code == 503
    assert sick.json()["error"] in ("ExpiredError", "UnansweredError")


def ask(client: httpx.Client, **options: float) -> httpx.Response:
    """Send the first image."""
    return client.post("/classify", params=options, content=bodies()[0], headers=JSON)


def hold_a_query(url: str) -> socket.socket:
    """Send a query that no worker will answer, and return the connection to hang up."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), HANGS_S)
    head = f"POST /classify?slo_ms=60000 HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(bodies()[0])}\r\n\r\n".encode() + bodies()[0])
    return connection


def until(cluster: DigitsCluster, holds: Callable[[RouterStatus], bool]) -> None:
    """Ask the router for its STATUS until something holds, for a bounded time."""
    give_up_s = time.monotonic() + HANGS_S
    while not holds(status := ask_status(cluster.client_endpoint)):
        assert time.monotonic() < give_up_s, status
