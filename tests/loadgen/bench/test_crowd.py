"""The crowd of small callers: what it sends is what each server expects, and every answer is counted once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from loadgen.bench.rows import messages
from loadgen.bench.rows.messages import Callers, CrowdRun, Server, crowd
from loadgen.bench.rows.row import SkippedError
from loadgen.bench.senders.cost import threads_of
from loadgen.bench.senders.crowd import CrowdPlan
from loadgen.bench.senders.framings import FRAMINGS, Echo, Http, SuperServe
from loadgen.live.run import Emulation, emulated
from superserve import wire
from superserve.errors import ConfigError, ProcessError
from superserve.net import zmtp
from superserve.wire import Group, Queries, Results, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = np.arange(7, 13, dtype=np.uint64)
SLO_NS = 60_000_000_000
PLAN = CrowdPlan("127.0.0.1", 0, "", "", seconds=0.3, warm_s=0.1, n_connections=8, slo_ns=SLO_NS)


class _GivesBack(BaseHTTPRequestHandler):
    """Answers every POST with its body."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def web_server() -> Iterator[Server]:
    """CrowdRun a small HTTP server in threads of this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _GivesBack) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Server(server.server_address[1], "http", [])
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def small_router() -> Iterator[Server]:
    """CrowdRun this system with two GPUs."""
    with emulated(Emulation("cnn-8gpu-modelled", 2, "mincost")) as cluster:
        assert cluster.router is not None
        yield Server(int(cluster.client_endpoint.rpartition(":")[2]), "superserve", [cluster.router.pid])


@pytest.mark.parametrize(
    ("n_each", "rate_qps"), [(1, 0.0), pytest.param(1, 300.0, marks=pytest.mark.slow), (4, 400.0)]
)
def test_every_query_is_answered_by_the_router(n_each: int, rate_qps: float) -> None:
    """Closed and open loop, one query a message and several; the router's cost is read."""
    with small_router() as server:
        run = crowd(server, replace(PLAN, n_each=n_each, rate_qps=rate_qps))
    assert run.unanswered == 0
    assert run.share == 1.0
    assert run.cpu_us > 0
    assert run.own_us > 0


def test_every_query_is_answered_by_the_echo() -> None:
    """The same messages come back."""
    with messages.echo() as server:
        run = crowd(server, PLAN)
    assert (run.unanswered, run.share) == (0, 1.0)


@pytest.mark.parametrize("rate_qps", [pytest.param(0.0, marks=pytest.mark.slow), 200.0])
def test_every_query_is_answered_over_http(rate_qps: float) -> None:
    """By any server that keeps connections."""
    with web_server() as server:
        run = crowd(replace(server, pids=[os.getpid()]), replace(PLAN, rate_qps=rate_qps))
    assert (run.unanswered, run.share) == (0, 1.0)


def test_a_server_that_is_not_there_is_named() -> None:
    """In one line, with its address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ProcessError, match=rf"127\.0\.0\.1:{port}: .*refused"):
            crowd(Server(port, "echo", []), PLAN)


# --- framings -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["superserve", "echo"])
@pytest.mark.parametrize("n", [1, 3])
def test_messages_are_this_wires(name: str, n: int) -> None:
    """Each decodes as QUERIES with its own ids, the slack, and the instant that is entered at sending."""
    framing = FRAMINGS[name](64, n)
    rows = framing.messages(IDS, 36)
    assert framing.stamp_at is not None
    ids: list[int] = []
    for row in rows:
        row[framing.stamp_at : framing.stamp_at + 8] = np.frombuffer((5).to_bytes(8, "little"), np.uint8)
        ((flags, start, end, _),) = zmtp.frames_in(row.tobytes())
        message = wire.decode([row.tobytes()[start:end]])
        assert isinstance(message, Queries)
        assert (message.sent_ns, message.slack_ns(), message.n_bytes()) == (5, [36] * n, 64 * n)
        assert flags in (0, zmtp.LONG)
        ids += wire.uint64s(message.ids)
    assert ids == IDS.tolist()


def _group(status: Status, ids: list[int]) -> Group:
    output, each = (b"ab" * len(ids), 2) if status is Status.OK else (b"too late", 8)
    return Group(len(ids), status, 0, 1, 70.0, 1, 2, 3, 4, np.array(ids, "<u8").tobytes(), each, output)


def test_results_are_read_by_group() -> None:
    """Ids with an output are answered, others only counted; the router may merge and split messages."""
    groups = [_group(Status.OK, [1, 2]), _group(Status.EXPIRED, [3]), _group(Status.OK, [4])]
    (frame,) = wire.encode_results(Results(1, groups))
    framing = SuperServe(64)
    assert framing.count(bytes(frame)) == 4
    assert framing.answered(bytes(frame)) == [1, 2, 4]


def test_answers_are_cut_wherever_packets_end() -> None:
    """A PONG goes back for each PING, of ZeroMQ and of the wire; nothing else counts as an answer."""
    (results,) = wire.encode_results(Results(1, [_group(Status.OK, [1])]))
    (ping,) = wire.encode_ping(wire.Ping(77))
    stream = (
        zmtp.frame_of(bytes(results))
        + zmtp.frame_of(bytes(ping))
        + zmtp.PING
        + zmtp.frame_of(bytes(results) * 5)
    )
    (pong,) = wire.encode_pong(wire.Pong(77, 77))
    expected_back = zmtp.frame_of(bytes(pong)) + zmtp.frame_of(b"\x04PONG", command=True)
    for at in range(len(stream) + 1):
        framing, left, answers, back = SuperServe(64), b"", [], b""
        for part in (stream[:at], stream[at:]):
            if part:
                found, left, said = framing.cut(left + part)
                answers += found
                back += said
        assert answers == [bytes(results), bytes(results) * 5]
        assert (left, back) == (b"", expected_back)


def test_a_response_is_cut_wherever_packets_end() -> None:
    """Whatever capitals the server writes; an error is an answer without an output."""
    body = (9).to_bytes(8, "little") + bytes(8)
    for head in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 16\r\nx: y\r\n\r\n",
    ):
        whole, framing = head + body, Http(16)
        for at in range(len(whole)):
            assert framing.cut(whole[:at]) == ([], whole[:at], b"")
        assert framing.cut(whole) == ([whole], b"", b"")
        assert framing.answered(whole) == [9]
    assert Http(16).answered(b"HTTP/1.1 503 Busy\r\ncontent-length: 16\r\n\r\n" + body) == []
    assert Echo(64).count(b"") == 1


def test_cost_is_what_a_thread_has_used() -> None:
    """Of every thread of a process, and none of a process that is gone."""
    before = threads_of(os.getpid())
    end_s = time.thread_time() + 0.02
    while time.thread_time() < end_s:
        pass
    assert threads_of(os.getpid()).since(before).cpu_s >= 0.015
    assert threads_of(2**22 + 1).cpu_ns == {}


# --- rows -----------------------------------------------------------------------------------


def _run(qps: float, share: float = 1.0, cpu_us: float = 10.0) -> CrowdRun:
    return CrowdRun(qps, share, 1.0, 2.0, cpu_us, 1.0, 5.0, 0.1, 0)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Replace the servers by names; record each run as (server, rate), which holds up to 500 q/s."""
    runs: list[tuple[str, float]] = []

    def play(server: Server, plan: CrowdPlan) -> CrowdRun:
        runs.append((server.framing, plan.rate_qps))
        closed = {"superserve": 1_000.0, "echo": 800.0, "mosec": 500.0}[server.framing] + len(runs)
        return _run(plan.rate_qps, 1.0 if plan.rate_qps <= 500 else 0.9) if plan.rate_qps else _run(closed)

    def named(name: str) -> Any:
        return lambda: contextlib.nullcontext(Server(1, name, [1]))

    monkeypatch.setattr(messages, "SERVERS", {name: named(name) for name in messages.SERVERS})
    monkeypatch.setattr(messages, "crowd", play)
    return runs


def test_servers_have_their_turns(played: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of three rounds; the median counts, and the rounds serve every row."""
    monkeypatch.setenv(messages.MOSEC_VARIABLE, "python-with-mosec")
    callers = Callers(1.0, lambda _: None)
    row = callers.callers_over_mosec()
    assert [name for name, _ in played] == ["superserve", "echo", "superserve", "mosec"] * 3
    assert (row.value, row.reference_value) == (1_005.0, 508.0)
    assert callers.packed_over_mosec().value == 1_007.0
    assert callers.message_per_query_us().ratio == 1.0
    assert len(played) == 12


def test_a_rate_counts_if_it_holds_in_an_open_loop(played: list[tuple[str, float]]) -> None:
    """Parts of the highest rate are tried downwards, for either server, until one holds."""
    row = Callers(1.0, lambda _: None).message_per_query_qps()
    opened = [(name, round(rate / 100)) for name, rate in played if rate]
    assert opened == [
        *(("superserve", tenth) for tenth in (9, 8, 7, 6, 5, 4)),
        *(("echo", tenth) for tenth in (7, 6, 6, 5)),
    ]
    assert row.value == pytest.approx(402, abs=2)
    assert row.reference_value == pytest.approx(483, abs=2)


def test_without_mosec_its_rows_are_skipped_by_name(
    played: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is measured for them."""
    monkeypatch.delenv(messages.MOSEC_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SkippedError, match="mosec is not installed"):
        Callers(1.0, lambda _: None).packed_over_mosec()
    assert played == []


def test_a_crowd_without_an_answer_is_an_error() -> None:
    """Not a rate of zero: every query of this one has too little time."""
    with small_router() as server, pytest.raises(ConfigError, match=r"none of \d+ queries was answered"):
        crowd(server, replace(PLAN, rate_qps=200.0, slo_ns=1_000))
