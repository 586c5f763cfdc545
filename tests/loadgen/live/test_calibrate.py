"""A null sink answers every query, and calibration measures the generator alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zmq
from click.testing import CliRunner

from loadgen.bench.rows.generator import is_kept
from loadgen.cli import cli
from loadgen.cli.calibrate import calibrate_command
from loadgen.live.calibrate import Calibration, calibrate
from loadgen.live.run import RunSettings
from loadgen.live.sink import Sink
from loadgen.results.report import page
from loadgen.results.result import load_run
from loadgen.traces.trace import Trace, load_trace
from superserve import wire
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError
from superserve.net.sockets import bind_router, connect_dealer, receive, send, wait
from superserve.wire import Control, Kind, Queries, Results, Status

if TYPE_CHECKING:
    from pathlib import Path


FOUND = Calibration(
    seconds=1.0,
    offered_qps=200_000.0,
    qps=200_000.0,
    senders=2,
    payload_bytes=64,
    unsent=0,
    unanswered=0,
    lag_ms={"p50": 0.2, "p99": 0.9, "p99_9": 3.0, "max": 5.0},
    latency_p99_ms=1.0,
    noise_p99_ms=0.3,
    noise_p99_9_ms=0.5,
    disturbed=False,
    valid=True,
)


def test_the_sink_answers_each_query_of_a_message_and_outlives_nonsense() -> None:
    """Its ids come back under OK; what cannot be decoded is counted and dropped."""
    ids = np.arange(3, dtype="<u8").tobytes()
    with zmq.Context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        sink, client = Sink(socket), connect_dealer(context, endpoint)
        try:
            client.setsockopt(zmq.SNDTIMEO, 5_000)
            client.send_multipart([b"nonsense"])
            queries = Queries(1, 0, 3, ids, np.full(3, MS, "<i8").tobytes(), 2, [b"aabbcc"])
            assert send(client, wire.encode_queries(queries))
            frames = None
            while frames is None:
                wait((socket, client), 100 * MS)
                sink.drain()
                frames = receive(client)
            answer = wire.decode(frames)
        finally:
            client.close(0)
            socket.close(0)
    assert isinstance(answer, Results)
    (group,) = answer.groups
    assert (group.count, group.status, bytes(group.ids)) == (3, Status.OK, ids)
    assert sink.n_malformed == 1


def test_the_sink_agrees_on_a_wire_version_or_refuses() -> None:
    """Like a router: the highest that both speak, or none, by name."""
    with zmq.Context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        sink, client = Sink(socket), connect_dealer(context, endpoint)
        answers = []
        try:
            client.setsockopt(zmq.SNDTIMEO, 5_000)
            for span in ([2, 3], [3, 4]):
                client.send_multipart(wire.encode_control(Control(Kind.HELLO, {"wire": span})))
                frames = None
                while frames is None:
                    wait((socket, client), 100 * MS)
                    sink.drain()
                    frames = receive(client)
                answers.append(wire.decode(frames))
        finally:
            client.close(0)
            socket.close(0)
    welcome, refused = answers
    assert isinstance(welcome, Control)
    assert (welcome.kind, welcome.body["wire"]) == (Kind.WELCOME, 2)
    assert isinstance(refused, Control)
    assert (refused.kind, refused.body["code"]) == (Kind.REFUSED, "version")
    assert sink.n_malformed == 0


@pytest.mark.e2e
def test_a_calibration_sends_the_beginning_of_the_trace_and_all_of_it_is_answered() -> None:
    """Two senders at 400 q/s for a quarter of a second of a longer trace."""
    found = calibrate(load_trace("constant:rate=400", duration_s=2.0), RunSettings(36 * MS, 2), seconds=0.25)

    assert (found.unsent, found.unanswered, found.senders) == (0, 0, 2)
    assert found.offered_qps == found.qps == pytest.approx(400, rel=0.02)
    assert all(found.lag_ms[name] is not None for name in ("p50", "p99", "p99_9", "max"))
    assert "against a null sink" in found.to_line()


@pytest.mark.e2e
def test_the_command_prints_one_json_object() -> None:
    """It has the fields that a run's file has under `calibration`."""
    done = CliRunner().invoke(
        calibrate_command, ["--rate", "200", "--seconds", "0.2", "--slo-ms", "60000", "--json-lines"]
    )
    assert done.exit_code == 0, done.output
    assert '"lag_ms":{"p50":' in done.output
    assert len(done.output.splitlines()) == 1


def test_a_trace_that_begins_late_cannot_calibrate() -> None:
    """No query in the first second: the error names the trace."""
    late = Trace("late", np.array([2 * SECOND], np.int64), 3 * SECOND, "made for a test")
    with pytest.raises(ConfigError, match="trace late: expected a query in its first 1 s"):
        calibrate(late, RunSettings(36 * MS), seconds=1.0)


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (FOUND, True),
        (replace(FOUND, unsent=1), False),
        (replace(FOUND, lag_ms={**FOUND.lag_ms, "p99": 1.0}), False),
        (replace(FOUND, lag_ms=dict.fromkeys(FOUND.lag_ms)), False),
    ],
)
def test_a_rate_is_kept_to_if_all_is_sent_with_a_lag_p99_under_1_ms(found: Calibration, kept: bool) -> None:
    """Whatever the tail beyond it did."""
    assert is_kept(found) is kept


@pytest.mark.e2e
def test_a_calibrated_run_has_it_in_its_file_and_on_its_page(tmp_path: Path) -> None:
    """Opted into with `--calibrate`: the lag that the generator has alone stands beside the run's own."""
    path = tmp_path / "run.json"
    done = CliRunner().invoke(
        cli,
        ["run", "--trace", "constant:rate=100", "--duration", "1", "--emulate", "cnn-8gpu-modelled:2",
         "--calibrate", "--json", str(path)],
    )  # fmt: skip
    assert path.exists(), done.output
    result = load_run(path)

    assert result.quantiles == "exact"
    assert result.calibration is not None
    assert result.calibration["offered_qps"] == 100
    assert "alone, against a null sink" in done.output
    assert "Generator alone: lag p99.9" in page([result])
