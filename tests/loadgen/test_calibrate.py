"""What the load generator does alone: the null sink, calibration, and where it is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from loadgen.bench_generator import LAG_P99_NS, offer
from loadgen.calibrate import Calibration, calibrate
from loadgen.cli import cli
from loadgen.null_sink import EPOCH, answer
from loadgen.report import write_report
from loadgen.run import RunSettings
from loadgen.stats import load_run
from superserve import wire
from superserve.wire import Control, Kind, Ping, Pong, Queries, Results, Status

if TYPE_CHECKING:
    from pathlib import Path

MS = 1_000_000


def test_the_sink_answers_every_query_of_a_message_with_one_group() -> None:
    """Ids come back as they were sent; no output, and status OK."""
    ids = (7).to_bytes(8, "little") + (9).to_bytes(8, "little")

    frames = answer(Queries(EPOCH, 0, 2, ids, bytes(16), 0, (b"",), framed=False), 5)

    assert frames is not None
    results = wire.decode(frames)
    assert isinstance(results, Results)
    assert [(group.count, group.status, bytes(group.ids)) for group in results.groups] == [
        (2, Status.OK, ids)
    ]


def test_the_sink_keeps_the_protocol() -> None:
    """It welcomes, answers PING and STATUS, and has nothing to say to a BYE."""
    welcome = answer(Control(Kind.HELLO, {"role": "client"}), 0)
    pong = answer(Ping(3), 4)
    status = answer(Control(Kind.STATUS, {}), 0)

    assert welcome is not None
    assert pong is not None
    assert status is not None
    said = wire.decode(welcome)
    assert isinstance(said, Control)
    assert (said.kind, said.body["epoch"]) == (Kind.WELCOME, EPOCH)
    assert wire.decode(pong) == Pong(3, 4)
    told = wire.decode(status)
    assert isinstance(told, Control)
    assert told.body["router"]["pid"] > 0
    assert answer(Control(Kind.BYE, {}), 0) is None


@pytest.mark.e2e
@pytest.mark.timeout(60)
def test_a_calibration_accounts_for_what_it_sent() -> None:
    """All of a low rate is sent, by as many senders as asked, and answered by the sink."""
    found = calibrate(400.0, RunSettings(36 * MS, n_senders=2), seconds=0.5)

    assert (found.unsent, found.senders) == (0, 2)
    assert found.sent_qps == pytest.approx(400.0, rel=0.3)
    assert found.latency_ms["p50"] is not None
    assert found.send_lag_ms["p50"] is not None
    assert 0 <= found.send_lag_ms["p50"] <= found.latency_ms["p50"]
    assert "null sink" in found.to_lines()[0]


def test_a_generator_that_is_asked_too_much_is_told() -> None:
    """The line says that no run at this rate would count."""
    found = Calibration(1e6, 4e5, 1.0, 1, {"p50": 3.0, "p99": None}, {}, None, 10, valid=False)

    assert "would NOT count" in found.to_lines()[0]
    assert "p50 3.000 ms, noise p99.9 -" in found.to_lines()[1]


@pytest.mark.e2e
@pytest.mark.timeout(60)
def test_the_bench_judges_a_rate_by_lag_and_by_what_was_not_sent() -> None:
    """A probe's verdict is that of its own figures."""
    probe = offer(500.0, 0.4)

    assert probe.holds == (probe.n_unsent == 0 and probe.lag_ns <= LAG_P99_NS)
    assert 0.0 < probe.share <= 1.0


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_run_tells_what_the_generator_did_alone(tmp_path: Path) -> None:
    """`--calibrate` puts it into the file and onto the page; without it neither has any."""
    path = tmp_path / "run.json"
    options = ["run", "--trace", "poisson:rate=100", "--duration", "1", "--emulate", "cnn-8gpu-modelled:1"]

    result = CliRunner().invoke(cli, [*options, "--json", str(path), "--calibrate"])

    assert "its send lag" in result.output, result.output
    run = load_run(path)
    assert run.calibration is not None
    assert run.calibration["senders"] == 1
    assert json.loads(path.read_text())["calibration"]["rate_qps"] == pytest.approx(100, rel=0.5)
    write_report(tmp_path / "page.html", [run], ["run"])
    assert "the generator alone, against a null sink" in (tmp_path / "page.html").read_text()
