"""What the router exports: complete, consistent, and equal to what its core counts."""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.core import RouterCore
from router.core.events import Answer
from router.policies.registry import make_policy
from router.report.load import FleetSize, Load, fleet, workers_needed
from router.report.metrics import METRICS, RouterMetrics, pages
from router.serve.loop import RouterServer, ServerSettings
from superserve.clock import SECOND
from superserve.errors import ConfigError
from superserve.roles import exposition
from superserve.roles import pages as page_server
from superserve.roles.exposition import MetricHistogram
from superserve.roles.pages import Page, UnavailableError, serve_pages
from superserve.status import LONG_S, SHORT_S, GpusNeeded
from superserve.wire import Status
from tests.metrics import exported
from tests.router.core.harness import CNN, World
from tests.superserve.statuses import WINDOW

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def running() -> Iterator[tuple[RouterServer, RouterMetrics]]:
    """Run a router in a thread, with metrics."""
    metrics = RouterMetrics()
    server = RouterServer(ServerSettings(), metrics=metrics)
    server.open()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server, metrics
    finally:
        server.stop()
        thread.join()
        gc.enable()  # a router collects in its own time
        gc.unfreeze()


def get(where: str, path: str = "/metrics") -> tuple[int, str]:
    """Return status and body of a GET."""
    try:
        with urllib.request.urlopen(f"http://{where}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize(("n_bytes", "status"), [(7_000, b"200 OK"), (9_000, b"431 "), (300_000, b"431 ")])
def test_a_request_that_is_too_long_is_refused_with_the_reason(n_bytes: int, status: bytes) -> None:
    """Though the peer is still sending: the answer reaches it before the connection ends."""
    with serve_pages({"/live": lambda: Page(200, b"alive")}) as where:
        host, port = where.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as peer:
            peer.sendall(b"GET /live HTTP/1.1\r\nX-Long: " + b"x" * n_bytes + b"\r\n\r\n")
            peer.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: peer.recv(4096), b""))

    assert answer.startswith(b"HTTP/1.0 " + status)
    assert b"alive" in answer or b"8192 bytes" in answer


@pytest.mark.e2e
def test_a_scrape_gives_every_metric_of_the_table_with_help_and_no_other() -> None:
    """A new router's scrape has exactly the names in the table."""
    with running() as (server, metrics), serve_pages(pages(server.core, metrics)) as where:
        status, text = get(where)
    families = {family.name: family for family in text_string_to_metric_families(text)}

    assert status == 200
    # The parser calls an info a gauge that ends so.
    assert set(families) == {m.name + ("_info" if m.kind == "info" else "") for m in METRICS}
    assert all(family.documentation for family in families.values())
    names = {name for metric in METRICS for name in exported(metric)}
    assert {sample.name for family in families.values() for sample in family.samples} <= names


@pytest.mark.e2e
def test_a_path_that_is_not_there_is_answered_with_those_that_are() -> None:
    """404 names the pages, and other methods are refused."""
    with running() as (server, metrics), serve_pages(pages(server.core, metrics)) as where:
        assert get(where, "/nothing") == (404, f"expected one of {', '.join(pages(server.core, metrics))}\n")
        request = urllib.request.Request(f"http://{where}/metrics", method="DELETE")
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request, timeout=10)
        refusal.value.close()
        assert (refusal.value.code, refusal.value.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.e2e
def test_a_router_without_workers_lives_and_is_not_ready() -> None:
    """Three questions, each with an answer of its own and its reason."""
    with running() as (server, metrics), serve_pages(pages(server.core, metrics)) as where:
        assert get(where, "/live") == (200, "the loop passes\n")
        assert get(where, "/ready") == (503, "no GPU takes work\n")
        assert get(where, "/slo") == (503, "nothing ended in the last 10 s; no GPU takes work\n")


def test_a_page_that_cannot_be_given_is_503_with_the_reason() -> None:
    """Scrapers see a loop that hangs: they get no stale values."""

    def hangs() -> Page:
        raise UnavailableError("the loop has not answered")

    with serve_pages({"/metrics": hangs}) as where:
        assert get(where) == (503, "the loop has not answered\n")


def test_a_loop_that_does_not_pass_gives_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request ends after a bounded time, and the next one asks the loop again."""
    monkeypatch.setattr("router.report.metrics._WAIT_S", 0.01)
    metrics = RouterMetrics()

    with pytest.raises(UnavailableError, match="loop has not answered"):
        metrics.ask()
    assert not metrics.is_wanted


def test_a_taken_port_is_named() -> None:
    """Two exporters on one port: the second says which port it could not have."""
    with serve_pages({}) as where:
        port = int(where.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"metrics at 127.0.0.1:{port}"), serve_pages({}, port=port):
            pass


def test_a_slow_page_occupies_its_share_and_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that takes for ever does not take the process."""
    monkeypatch.setattr(page_server, "MAX_PAGES_AT_ONCE", 1)
    entered, leave = threading.Event(), threading.Event()

    def slow() -> Page:
        entered.set()
        assert leave.wait(10)
        return Page(200, b"done")

    with serve_pages({"/slow": slow, "/": lambda: Page(200, b"")}) as where:
        answers: list[tuple[int, str]] = []
        first = threading.Thread(target=lambda: answers.append(get(where, "/slow")))
        first.start()
        assert entered.wait(10)
        second = threading.Thread(target=lambda: answers.append(get(where, "/")))
        second.start()
        leave.set()
        first.join()
        second.join()
    assert sorted(answers) == [(200, ""), (200, "done")]


def opened(where: str, n: int, stack: ExitStack) -> list[socket.socket]:
    """Return connections that are open and send nothing."""
    host, _, port = where.rpartition(":")
    return [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(n)]


def test_a_probe_is_answered_beside_idle_connections() -> None:
    """A thousand silent connections do not make an orchestrator restart a healthy router."""
    with (
        enough_files(3_000),
        serve_pages({"/live": lambda: Page(200, b"lives")}) as where,
        ExitStack() as stack,
    ):
        opened(where, 1_000, stack)
        took_s = []
        for _ in range(20):
            began_s = time.monotonic()
            assert get(where, "/live") == (200, "lives")
            took_s.append(time.monotonic() - began_s)

    assert sorted(took_s)[10] < 0.1, took_s


def test_connections_beyond_the_bound_cost_the_oldest_of_the_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is let in."""
    monkeypatch.setattr(page_server, "MAX_CONNECTIONS", 3)
    with serve_pages({"/live": lambda: Page(200, b"lives")}) as where, ExitStack() as stack:
        oldest, *younger = opened(where, 3, stack)
        assert get(where, "/live") == (200, "lives")
        oldest.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert oldest.recv(1) == b""
        younger[-1].sendall(b"GET /live HTTP/1.0\r\n\r\n")
        assert younger[-1].recv(100).startswith(b"HTTP/1.0 200 OK")


@pytest.mark.parametrize(
    "request_bytes", [b"x" * 10_000, b"GET /live", b"\r\n\r\n", b"GET\r\n\r\n", b"\0\xff\r\n\r\n"]
)
def test_what_is_no_request_ends_its_own_connection(request_bytes: bytes) -> None:
    """The next one is answered."""
    with serve_pages({"/live": lambda: Page(200, b"lives")}) as where, ExitStack() as stack:
        (one,) = opened(where, 1, stack)
        one.sendall(request_bytes)
        one.shutdown(socket.SHUT_WR)
        one.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while one.recv(1_000):
                pass
        assert get(where, "/live") == (200, "lives")


@contextlib.contextmanager
def enough_files(n: int) -> Iterator[None]:
    """Limit the files that this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(n, hard)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_buckets_hold_what_was_added_up_to_and_with_their_edge() -> None:
    """A value on an edge belongs below it, as Prometheus' `le` says; the last bucket takes the rest."""
    histogram = MetricHistogram((1.0, 2.0))
    histogram.add(1.0)
    histogram.add(1.5, n=3)
    histogram.add(99.0)

    assert histogram.copy() == ((1.0, 2.0), (1, 3, 1), 104.5)


def test_latency_edges_run_from_1_ms_to_10_s_without_a_gap() -> None:
    """No two neighbours are more than a factor of 2.5 apart: what a quantile may err by."""
    bounds = exposition.LATENCY_BOUNDS_S

    assert (bounds[0], bounds[-1]) == (0.001, 10.0)
    assert all(1 < b / a <= 2.5 for a, b in pairwise(bounds))


def test_exported_names_follow_the_conventions() -> None:
    """Counters end in _total; times, sizes and shares name base units; nothing is in ms or percent."""
    for metric in METRICS:
        assert metric.name.startswith("superserve_router_")
        assert not metric.name.endswith(("_ms", "_ns", "_percent", "_total"))
        assert metric.help.endswith(".")


# --- what the core counts ---------------------------------------------------------------------


def test_the_core_counts_what_its_answers_say() -> None:
    """Accuracy of OK answers, queries and time executed, and bytes: the sums of single reports."""
    world = World()
    world.join("w", CNN, CNN, speed=1.1)
    world.submit_spaced(40.0, n=50, gap_ms=1.0)
    world.submit(0.1)  # which nothing can serve
    world.run(200.0)
    answers = [action for _, action in world.actions if isinstance(action, Answer)]
    ok = [(answer, answer.ran) for answer in answers if answer.status is Status.OK]
    core, gpus = world.core, list(world.core.workers())

    assert core.answered[Status.OK] == sum(answer.n for answer, _ in ok) == 50
    assert core.ok_accuracy == pytest.approx(sum(a.n * ran.accuracy for a, ran in ok if ran is not None))
    assert core.n_executed == sum(gpu.n_queries for gpu in gpus) == 50
    assert core.busy_ns == sum(gpu.busy_ns for gpu in gpus) > 0
    assert core.payload_bytes_in == 51 * 8
    assert {gpu.last_subnet for gpu in gpus} <= {action.batch.subnet for action in world.dispatches()}


def test_a_worker_process_that_is_lost_is_counted_and_one_that_leaves_is_not() -> None:
    """Lost means silent or unreachable."""
    world = World()
    for name in ("stays", "falls silent"):
        world.join(name, CNN)
    world.kill("falls silent", seen=False)
    world.run(2_000.0)

    assert world.core.n_lost_peers == 1
    left = fleet(world.core)
    assert left.ready == 1
    assert left.least_s == pytest.approx(CNN.latency_ns(0, 16) / 16 / SECOND)


# --- the recent past, and the GPUs that it asks for -------------------------------------------


def test_the_recent_past_is_a_difference_of_counters_over_its_window() -> None:
    """What came before the window is not in it; `seconds` says how long it really is."""
    core, load = RouterCore(partial(make_policy, "slackfit")), Load()
    for second in range(100):
        core.ledger.received = 7 * second
        load.note(core, second * SECOND)

    short = load.recent(core, 99 * SECOND, SHORT_S)
    long = load.recent(core, 99 * SECOND, LONG_S)

    assert (short.seconds, short.received) == (10.0, 70)
    assert (long.seconds, long.received) == (60.0, 420)
    assert Load().recent(core, 5 * SECOND, SHORT_S).seconds == 0.0


def test_workers_needed_is_arrivals_times_gpu_time_over_the_target() -> None:
    """1,000 q/s at 4 ms each fill 4 GPUs; at 80 % that is 5; the smallest subnets need a quarter."""
    recent = replace(WINDOW, received=10_000, executed=5_000, busy_s=20.0)

    needed = workers_needed(recent, FleetSize(ready=8, least_s=0.001))

    assert (needed.as_served, needed.at_least) == pytest.approx((5.0, 1.25))


def test_workers_needed_is_nothing_without_arrivals_and_the_least_where_nothing_ran() -> None:
    """No arrivals need no GPU; arrivals that nobody served are counted at the unit cost."""
    stuck = replace(WINDOW, received=8_000)

    assert workers_needed(WINDOW, FleetSize(0, 0.0)) == GpusNeeded(0.0, 0.0)
    assert workers_needed(stuck, FleetSize(1, 0.001)) == GpusNeeded(1.0, 1.0)
