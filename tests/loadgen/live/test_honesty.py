"""What a run must not hide: a server that froze, a sender that was starved, a machine that was busy."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import zmq

from loadgen.live.records import COLUMNS, Records
from loadgen.live.run import RunSettings, run_trace, summarise
from loadgen.live.sink import Sink, sink_server
from loadgen.traces.trace import Trace, load_trace
from superserve.clock import MS
from superserve.net.sockets import bind_router, wait

SLO_NS = 36 * MS
FREEZE_NS = 500 * MS


def serve_with_a_freeze(
    socket: zmq.Socket[bytes], freeze: threading.Event, stop: threading.Event
) -> None:  # fmt: skip
    """Answer like the sink, and stand still once for `FREEZE_NS` on request."""
    sink = Sink(socket)
    while not stop.is_set():
        if freeze.is_set():
            freeze.clear()
            stop.wait(FREEZE_NS / 1e9)
        wait((socket,), 20 * MS)
        sink.drain()
    socket.close(0)


@pytest.mark.e2e
def test_a_server_that_froze_for_500_ms_shows_in_full() -> None:
    """An open loop goes on: the query due as it froze waited for all of it, those behind it for the rest."""
    freeze, stop = threading.Event(), threading.Event()

    def on_progress(told: dict[str, int]) -> None:
        if told["answered"] and not stop_told:
            stop_told.append(True)
            freeze.set()

    stop_told: list[bool] = []
    with zmq.Context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        server = threading.Thread(target=serve_with_a_freeze, args=(socket, freeze, stop))
        server.start()
        try:
            trace = load_trace("constant:rate=1000", duration_s=1.5)
            run = run_trace(trace, RunSettings(SLO_NS), endpoint, on_progress)
        finally:
            stop.set()
            server.join()
    latency = run.result.latency_ms

    assert run.result.queries["unsent"] == run.result.queries["unanswered"] == 0
    assert latency["p99_9"] is not None
    # Queries are due each millisecond, and the p99.9 is the second longest wait.
    assert latency["p99_9"] > FREEZE_NS / MS - 25
    late = int((run.columns["answered_ns"] - run.columns["due_ns"] > 250 * MS).sum())
    assert late > 200  # a loop that waited for its answers would have charged it to one


def pids_of_senders() -> list[int]:
    """Return the processes of this run's senders: our children that run that module."""
    tasks = Path("/proc/self/task").iterdir()
    children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [pid for pid in children if b"loadgen.live.sender" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.e2e
def test_a_starved_sender_makes_the_run_invalid() -> None:
    """It is given no CPU for 700 ms while the machine is idle; the server is not blamed."""
    timers: list[threading.Timer] = []

    def on_progress(told: dict[str, int]) -> None:
        if told["answered"] and not timers:
            (pid,) = pids_of_senders()
            os.kill(pid, signal.SIGSTOP)
            timers.append(threading.Timer(0.7, os.kill, (pid, signal.SIGCONT)))
            timers[0].start()

    with sink_server() as endpoint:
        trace = load_trace("constant:rate=500", duration_s=2.0)
        result = run_trace(trace, RunSettings(SLO_NS), endpoint, on_progress).result
    timers[0].join()

    assert not result.valid
    assert not result.disturbed
    (reason,) = result.invalid_because
    assert "send lag p99.9 was" in reason
    assert result.send_lag_ms["max"] is not None
    assert result.send_lag_ms["max"] > 500


@pytest.mark.parametrize(
    ("noise_ns", "valid", "disturbed"), [(5 * MS, True, True), (1 * MS, False, False), (None, False, False)]
)
def test_the_same_lag_is_the_machines_or_the_senders(
    noise_ns: int | None, valid: bool, disturbed: bool
) -> None:
    """A lag of 8 ms: disturbed where the probe alone explains it, invalid where it does not."""
    due_ns = np.arange(100, dtype=np.int64) * MS
    records = Records(100)
    columns = {name: getattr(records, name) for name in COLUMNS}
    columns |= {"due_ns": due_ns, "sent_ns": due_ns + 8 * MS, "answered_ns": due_ns + 9 * MS}
    columns |= {"status": np.zeros(100, np.uint8), "batch_size": np.ones(100, np.uint16)}
    trace = Trace("steps", due_ns, 100 * MS, "made for a test")
    result = summarise(trace, SLO_NS, "none", columns, [("none", 0.0)], noise_ns)

    assert (result.valid, result.disturbed) == (valid, disturbed)
