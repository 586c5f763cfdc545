"""A recorded run replays to the same directives, and a log that was touched does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest
from click.testing import CliRunner

from loadgen.cli import cli as loadgen
from router.cli import cli as router
from router.core.events import CancelAsked, ClientJoined, CoreSettings, DrainRouter, WorkerLeft
from router.serve.recording import Recorder, replay
from superserve.errors import ConfigError
from superserve.wire import Cancel
from tests.superserve.test_files import full_after

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


Lines = list[Any]


def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once; what was written whole before replays."""
    path = tmp_path / "log"
    recorder = Recorder(path, "slackfit", CoreSettings())
    with full_after(100_000):
        for serial in range(20_000):
            recorder.event(serial, ClientJoined(serial.to_bytes(8, "big"), 0))
    recorder.close()

    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: recording stops here: File too large"
    ]
    assert path.read_bytes().endswith(b"\n")
    assert 0 < replay(path).n_events < 20_000


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the event log of a live run."""
    folder = tmp_path_factory.mktemp("logs")
    result = CliRunner().invoke(
        loadgen,
        ["run", "--trace", "poisson:rate=400", "--duration", "1", "--emulate", "cnn-8gpu-modelled:4",
         "--logs", str(folder)],
    )  # fmt: skip
    assert "no violations" in result.output, result.output
    return (folder / "router.jsonl").read_bytes()


def replayed(path: Path, log: bytes) -> tuple[int, str]:
    """Run the command on a log; return its exit code and what it said."""
    path.write_bytes(log)
    result = CliRunner().invoke(router, ["replay", str(path)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.e2e
def test_a_recorded_run_replays_to_the_same_directives(tmp_path: Path, recorded: bytes) -> None:
    """Exit code 0; every directive of the run was compared."""
    exit_code, output = replayed(tmp_path / "log", recorded)
    n_directives = sum(len(line[2]) for line in parsed(recorded)[1:] if line[1] == "advance")

    assert n_directives > 10
    assert exit_code == 0
    assert f": {n_directives} directives are the same" in output


@pytest.mark.e2e
def test_a_run_that_sees_demand_replays_too(tmp_path: Path) -> None:
    """What is known of demand is learnt from the log's events alone.

    The SLO is so long that all are served, however busy the machine: in batches of 16, in some 150 or more.
    """
    result = CliRunner().invoke(
        loadgen,
        ["run", "--trace", "poisson:rate=2500", "--duration", "1", "--emulate", "cnn-8gpu-modelled:2",
         "--policy", "demandfit", "--slo-ms", "20000", "--logs", str(tmp_path)],
    )  # fmt: skip
    assert "no violations" in result.output, result.output

    found = replay(tmp_path / "router.jsonl")

    assert found.n_directives > 50
    assert found.mismatches == ()


def parsed(log: bytes) -> Lines:
    """Return the lines of a log."""
    return [orjson.loads(line) for line in log.splitlines()]


def other_subnet(lines: Lines) -> None:
    """Have a directive name another subnet than was chosen."""
    directive = next(line[2][0] for line in lines[1:] if line[1] == "advance" and line[2])
    directive[3] = 0 if directive[3] else 1


def lost_directive(lines: Lines) -> None:
    """Leave a directive out."""
    next(line for line in lines[1:] if line[1] == "advance" and line[2])[2] = []


def later_queries(lines: Lines) -> None:
    """Have every query come with its SLO nearly over."""
    for line in lines[1:]:
        if line[1] == "QueriesArrived":
            line[2]["transit_ns"] += 33_000_000


@pytest.mark.e2e
@pytest.mark.parametrize("tamper", [other_subnet, lost_directive, later_queries])
def test_a_tampered_log_is_noticed(tmp_path: Path, recorded: bytes, tamper: Callable[[Lines], None]) -> None:
    """Exit code 1, and the line at which the core decides otherwise."""
    lines = parsed(recorded)
    tamper(lines)
    exit_code, output = replayed(tmp_path / "log", b"\n".join(map(orjson.dumps, lines)) + b"\n")

    assert exit_code == 1
    assert f"{tmp_path / 'log'}:" in output
    assert "directives differ" in output


@pytest.mark.e2e
def test_a_log_cut_short_is_a_clear_error(tmp_path: Path, recorded: bytes) -> None:
    """A killed router leaves half a line: the error names it and says why it may be so."""
    n_lines = recorded.count(b"\n")
    exit_code, output = replayed(tmp_path / "log", recorded[:-9])

    assert exit_code == 1
    assert f"log:{n_lines}: expected a line of JSON" in output
    assert "cut short" in output
    assert len(output.splitlines()) == 1


HEADER = b'{"schema":2,"policy":"slackfit","settings":{}}\n'


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (b"", "expected an event log, got an empty file"),
        (b"no log\n", "log:1: expected a line of JSON"),
        (b"[1]\n", "log:1: expected an event log of schema 2"),
        (b'{"schema":1}\n', "log:1: expected an event log of schema 2"),
        (b'{"schema":2}\n', "log:1: expected policy and settings of this version"),
        (b'{"schema":2,"policy":"x","settings":{"y":1}}\n', "log:1: expected policy and settings"),
        (HEADER + b"7\n", r"log:2: expected \[now_ns, name, body\], got 7"),
        (HEADER + b'[1,"advance",null]\n', r"log:2: expected \[now_ns, name, body\]"),
        (HEADER + b'[1,"Unheard",{}]\n', "log:2: no event Unheard that this version knows"),
        (HEADER + b'[1,"ClientJoined",{"client":"a"}]\n', "log:2: no event ClientJoined that"),
        (
            HEADER + b'[1,"Finished",{"peer":"a","message":{"epoch":1,"rows":[{}]}}]\n',
            "log:2: no event Finished that",
        ),
        (
            HEADER + b'[1,"CancelAsked",{"client":"a","message":{"epoch":1,"n":1,"ids":"xyz"}}]\n',
            "log:2: no event CancelAsked",
        ),
        (HEADER + b'[0,"profile",{}]\n', "log:2"),
    ],
)
def test_what_is_no_event_log_is_a_clear_error(tmp_path: Path, log: bytes, message: str) -> None:
    """It names the file and the line, whatever is in it."""
    path = tmp_path / "log"
    path.write_bytes(log)

    with pytest.raises(ConfigError, match=message):
        replay(path)


def test_events_without_queries_come_back_as_they_were(tmp_path: Path) -> None:
    """Keys are bytes live and text in the log; no decision looks inside."""
    path = tmp_path / "log"
    recorder = Recorder(path, "slackfit", CoreSettings())
    recorder.event(1, ClientJoined(b"\x00a", 7))
    recorder.event(2, CancelAsked(b"\x00a", Cancel(1, 1, memoryview(bytes(8)))))
    recorder.event(3, WorkerLeft(b"nobody", orderly=True))
    recorder.event(4, DrainRouter())
    recorder.advance(5, [])
    recorder.close()

    result = replay(path)
    assert (result.n_events, result.n_directives, result.mismatches) == (4, 0, ())


def test_an_event_that_broke_the_protocol_live_replays_too(tmp_path: Path, recorded: bytes) -> None:
    """The server refused that worker and went on; so does the replay."""
    lines = parsed(recorded)
    joined = next(line for line in lines[1:] if line[1] == "WorkerJoined")
    row = next(line for line in lines[1:] if line[1] == "Pulled")[2]["message"]["rows"][0]
    pull = {"epoch": joined[2]["epoch"], "rows": [row | {"slot": 999}]}
    bad = [joined[0], "Pulled", {"peer": joined[2]["peer"], "message": pull}]
    lines.insert(lines.index(joined) + 1, bad)
    exit_code, output = replayed(tmp_path / "log", b"\n".join(map(orjson.dumps, lines)) + b"\n")

    assert exit_code == 0, output


def test_a_log_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    """Said before anything is served."""
    with pytest.raises(ConfigError, match="expected a path that can be written: No such file"):
        Recorder(tmp_path / "no" / "log", "slackfit", CoreSettings())


def test_a_router_that_cannot_begin_leaves_no_log(tmp_path: Path) -> None:
    """Nothing was served, so there is nothing to replay; what lay there before is not removed."""
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    old.write_text("kept by name\n")
    for path in (new, old):
        result = CliRunner().invoke(
            router, ["--record", str(path), "--client-endpoint", f"ipc://{tmp_path}/none/socket"]
        )
        assert result.exit_code == 1
    assert not new.exists()
    assert old.exists()
