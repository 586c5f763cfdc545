"""Many small callers: one query a message from 256 connections, beside the bare echo and mosec.

The generator is `senders.crowd`, the same for all. Each server has its turn in each round, so that an hour's
noise meets all of them; what is reported is the median of the rounds. In a closed loop each caller waits for
its answer before it sends the next query: one run shows a server's highest rate. Open loop, at a part of that
rate, then shows that it holds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import psutil  # type: ignore[import-untyped]  # it has no stubs

from loadgen.bench.rows.row import BenchRow, SkippedError
from loadgen.bench.senders.crowd import CrowdPlan
from loadgen.live.run import Emulation, emulated
from superserve.clock import MS
from superserve.errors import ConfigError, ProcessError
from superserve.roles.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

N_CALLERS = 256
N_PACKED_CALLERS, N_EACH = 16, 16
N_GPUS = 24
"""Emulated: enough for any rate tried, in full batches."""
N_ROUNDS = 3
SLO_NS = 36 * MS
_LONG_NS = 2_000 * MS
"""A closed loop has no deadline: a server is asked for its rate, and how long it takes is seen beside it."""
_STEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Parts of the highest rate that are tried in an open loop, until one holds."""
_ENOUGH = 0.999
_LEAST_CORES = 0.9
"""A rate counts as the server's only if the server used this much of a processor."""
_START_S = 20.0
MOSEC_VARIABLE = "SUPERSERVE_BENCH_MOSEC"
"""Environment variable: a Python that has mosec, if this one does not."""


@dataclass(frozen=True, slots=True)
class Server:
    """What a crowd talks to.

    Attributes:
        port: On this machine.
        framing: How to talk to it.
        pids: Its processes; the first one is measured, or all of them if `counts_all`.
        counts_all: Whether all are the server: mosec's are, while a GPU's are not the router.
    """

    port: int
    framing: str
    pids: list[int]
    counts_all: bool = False


@dataclass(frozen=True, slots=True)
class CrowdRun:
    """One run of a crowd.

    Attributes:
        qps: Queries answered a second.
        share: Share of the queries that were answered within the plan's SLO.
        p50_ms: Latency, from sent or due to answered.
        p99_ms: The same.
        cpu_us: Processor time that the measured server took for each query in its better moments: a quarter
            of the run's tenths took less. Beside other work caches are cold, and a thread pays for that.
        cores: Processors that it used, over the whole run.
        own_us: Processor time that the generator took for each query, in microseconds.
        lag_ms: The generator's p99.9 of sending late.
        unanswered: Queries without an answer.
    """

    qps: float
    share: float
    p50_ms: float | None
    p99_ms: float | None
    cpu_us: float
    cores: float
    own_us: float
    lag_ms: float | None
    unanswered: int


def mosec_python() -> str:
    """Return a Python that has mosec.

    Raises:
        SkippedError: None is known.
    """
    named = os.environ.get(MOSEC_VARIABLE)
    if named:
        return named
    if importlib.util.find_spec("mosec") is None:
        raise SkippedError(f"mosec is not installed: pip install mosec, or name a Python in {MOSEC_VARIABLE}")
    return sys.executable


@contextlib.contextmanager
def router() -> Iterator[Server]:
    """Run this system: a router and emulated GPUs."""
    with emulated(Emulation("cnn-8gpu-modelled", N_GPUS, "mincost")) as cluster:
        assert cluster.router is not None, "a private cluster has a router of its own"
        pids = [cluster.router.pid, *(worker.pid for worker in cluster.workers)]
        yield Server(_port_of(cluster.client_endpoint), "superserve", pids)


@contextlib.contextmanager
def echo() -> Iterator[Server]:
    """Run the bare echo."""
    with ProcessGroup() as group:
        server = group.start("echo", ["-m", "loadgen.bench.senders.echo"])
        group.wait_ready(_START_S)
        yield Server(_port_of(server.ready["endpoint"]), "echo", [server.pid])


@contextlib.contextmanager
def mosec() -> Iterator[Server]:
    """Run mosec with a model that gives queries back.

    Raises:
        SkippedError: It is not installed.
        ProcessError: It does not start.
    """
    script = Path(__file__).parents[1] / "senders" / "mosec_null.py"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [
        mosec_python(),
        str(script),
        "--address",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        _await_port(process, port)
        tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        yield Server(port, "http", tree, counts_all=True)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a query is answered."""
    give_up_s = time.monotonic() + _START_S
    while time.monotonic() < give_up_s and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
            link.sendall(b"POST /inference HTTP/1.1\r\nHost: here\r\nContent-Length: 8\r\n\r\n12345678")
            if link.recv(64).startswith(b"HTTP/1.1 200"):
                return
        time.sleep(0.05)
    raise ProcessError(f"mosec answered no query within {_START_S:g} s")


def _port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def crowd(server: Server, plan: CrowdPlan) -> CrowdRun:
    """Let a crowd play a plan against a server.

    Raises:
        ProcessError: The generator failed.
        ConfigError: Nothing was answered.
    """
    with tempfile.TemporaryDirectory(prefix="superserve-crowd-") as name, ProcessGroup() as group:
        folder = Path(name)
        report = folder / "report.json"
        plan = replace(plan, port=server.port, framing=server.framing, report=str(report), pids=server.pids)
        (folder / "plan.json").write_bytes(orjson.dumps(asdict(plan)))
        process = group.start("crowd", ["-m", "loadgen.bench.senders.crowd", str(folder / "plan.json")])
        group.wait_ready(60.0)
        while process.poll() is None:
            time.sleep(0.02)
        if process.poll():
            group.check()
        found: dict[str, Any] = orjson.loads(report.read_bytes())
    n, seconds = found["n_answered"], found["seconds"]
    if not n:
        raise ConfigError(f"{server.framing}: none of {found['n_counted']} queries was answered")
    n_measured = len(server.pids) if server.counts_all else 1

    def quarter_us(first: int, last: int) -> float:
        costs: list[float] = [
            sum(part["cpu_s"][first:last]) / part["n"] for part in found["parts"] if part["n"]
        ]
        return 1e6 * sorted(costs)[len(costs) // 4]

    cpu_s = sum(cost["cpu_s"] for cost in found["costs"][:n_measured])
    return CrowdRun(
        n / seconds, found["share_in_time"], found["latency_p50_ms"], found["latency_p99_ms"],
        quarter_us(0, n_measured), cpu_s / seconds, quarter_us(len(server.pids), len(server.pids) + 1),
        found["lag_p99_9_ms"], found["n_unanswered"],
    )  # fmt: skip


SERVERS: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {
    "superserve": router, "echo": echo, "mosec": mosec,
}  # fmt: skip


class Callers:
    """Measures the rows of this page; the rounds that they share are played once.

    Args:
        seconds: How long each run counts.
        say: Receives what is being done.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._say = say

    @functools.cached_property
    def _rounds(self) -> dict[str, list[CrowdRun]]:
        """Return the closed-loop runs of every server, the servers in turn."""
        runs: dict[str, list[CrowdRun]] = {"superserve": [], "echo": [], "packed": []}
        with contextlib.suppress(SkippedError):
            mosec_python()
            runs["mosec"] = []
        for _ in range(N_ROUNDS):
            for name, found in runs.items():
                plan = self._plan(slo_ns=_LONG_NS)
                if name == "packed":
                    plan = replace(plan, n_connections=N_PACKED_CALLERS, n_each=N_EACH, most_qps=400_000.0)
                with SERVERS["superserve" if name == "packed" else name]() as server:
                    found.append(crowd(server, plan))
                self._say(f"  {name}: {_words(found[-1])}")
        return runs

    def _plan(self, *, slo_ns: int, rate_qps: float = 0.0) -> CrowdPlan:
        return CrowdPlan(
            "127.0.0.1", 0, "", "", rate_qps, self._seconds, n_connections=N_CALLERS, slo_ns=slo_ns
        )

    def _held(self, name: str) -> tuple[float | None, list[dict[str, Any]]]:
        """Return the highest part of a server's rate that holds in an open loop, and what was tried."""
        top_qps = _median(self._rounds[name], "qps")
        tried = []
        for step in _STEPS:
            with SERVERS[name]() as server:
                run = crowd(server, self._plan(slo_ns=SLO_NS, rate_qps=step * top_qps))
            tried.append({"rate_qps": round(step * top_qps), **asdict(run)})
            holds = run.share >= _ENOUGH
            verdict = "holds" if holds else "fails"
            self._say(f"  {name}, open loop, {step * top_qps:,.0f} q/s {verdict}: {_words(run)}")
            if holds:
                return step * top_qps, tried
        return None, tried

    def message_per_query_qps(self) -> BenchRow:
        """The highest rate of callers that each send a query as one message, beside the echo's."""
        ours, tried = self._held("superserve")
        echo_qps, echo_tried = self._held("echo")
        conditions = self._conditions("superserve", "echo") | {
            "open_loop": tried,
            "echo_open_loop": echo_tried,
        }
        return BenchRow("message_per_query_qps", ours, "q/s", "echo, same crowd", echo_qps, conditions)

    def message_per_query_us(self) -> BenchRow:
        """What a query in a message of its own costs the router's process, beside the echo's."""
        rounds = self._rounds
        ours, reference = _median(rounds["superserve"], "cpu_us"), _median(rounds["echo"], "cpu_us")
        conditions = self._conditions("superserve", "echo")
        return BenchRow("message_per_query_us", ours, "us", "echo, same crowd", reference, conditions)

    def callers_over_mosec(self) -> BenchRow:
        """The rate of callers with one query in flight each, beside mosec's."""
        return self._over_mosec("callers_over_mosec", "superserve")

    def packed_over_mosec(self) -> BenchRow:
        """The rate of sixteen callers that send sixteen queries a message, beside mosec's."""
        return self._over_mosec("packed_over_mosec", "packed")

    def _over_mosec(self, name: str, ours: str) -> BenchRow:
        mosec_python()
        rounds = self._rounds
        value, reference = _median(rounds[ours], "qps"), _median(rounds["mosec"], "qps")
        conditions = self._conditions(ours, "mosec")
        return BenchRow(name, value, "q/s", "mosec, 256 callers", reference, conditions)

    def crowd_us(self) -> BenchRow:
        """What the generator itself takes for a query, beside what the echo takes for it."""
        rounds = self._rounds
        own, reference = _median(rounds["echo"], "own_us"), _median(rounds["echo"], "cpu_us")
        return BenchRow("crowd_us", own, "us", "echo, same crowd", reference, self._conditions("echo"))

    def _conditions(self, *names: str) -> dict[str, Any]:
        """Return how it was measured, and every round; which server was full in it."""
        rounds = {name: [asdict(run) for run in self._rounds[name]] for name in names}
        return {
            "callers": f"{N_CALLERS} connections, one query each under way; packed: "
            f"{N_PACKED_CALLERS} connections, {N_EACH} queries each",
            "seconds": self._seconds, "rounds": "servers in turn", "payload_bytes": 64, "gpus": N_GPUS,
            "closed_loop": rounds,
            "was_full": {
                name: all(run.cores >= _LEAST_CORES for run in self._rounds[name]) for name in names
            },
        }  # fmt: skip


def _median(runs: list[CrowdRun], what: str) -> float:
    return statistics.median(float(getattr(run, what)) for run in runs)


def _words(run: CrowdRun) -> str:
    p50 = "-" if run.p50_ms is None else f"{run.p50_ms:.1f}"
    return (
        f"{run.qps:,.0f} q/s, {run.share:.5f} in time, p50 {p50} ms, {run.cpu_us:.1f} us a query on "
        f"{run.cores:.2f} cores, generator {run.own_us:.1f} us"
    )
