"""A run reports each second while it runs, and on an interrupt ends early with the result so far."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from loadgen.cli import cli
from loadgen.live.progress import HEADER, Second, Seconds, Watch
from loadgen.live.records import LIVE_ROW, UNANSWERED
from loadgen.live.run import Emulation, RunSettings, run_emulated
from loadgen.results.histogram import Histogram
from loadgen.results.result import load_run, quantile_ns
from loadgen.results.tables import table
from loadgen.traces.trace import load_trace
from superserve.clock import MS, SECOND
from superserve.wire import Status

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt


SLO_NS = 36 * MS
START_NS = 7_000_000_000_000
RUN = ("run", "--trace", "constant:rate=200", "--emulate", "cnn-8gpu-modelled:2", "--slo-ms", "500")


def rows_of(due_ns: npt.NDArray[np.int64], outcomes: list[tuple[int, int, int]]) -> npt.NDArray[np.void]:
    """Return rows of (lag, latency, status), ns; a lag or a latency of -1 did not happen."""
    rows = np.empty(len(due_ns), LIVE_ROW)
    for i, (lag_ns, latency_ns, status) in enumerate(outcomes):
        due = START_NS + int(due_ns[i])
        rows[i] = (
            due + lag_ns if lag_ns >= 0 else -1,
            due + latency_ns if latency_ns >= 0 else -1,
            80,
            status,
        )
    return rows


class Sender:
    """Writes rows like a sender, and notifies a `Seconds`."""

    def __init__(
        self, folder: Path, name: str, due_ns: list[int], outcomes: list[tuple[int, int, int]]
    ) -> None:
        self.name, self.path = name, folder / f"{name}.rows"
        self.due_ns = np.array(due_ns, np.int64)
        self.path.write_bytes(rows_of(self.due_ns, outcomes).tobytes())

    def tell(self, seconds: Seconds, until_ns: int) -> None:
        """Report that every row due before this instant is written."""
        seconds.read(self.name, int(np.searchsorted(self.due_ns, until_ns)), until_ns)


def seconds_of(senders: list[Sender], duration_ns: int, told: list[Second]) -> Seconds:
    """Return what reads these senders."""
    feeds = {sender.name: (sender.path, sender.due_ns) for sender in senders}
    return Seconds(feeds, start_ns=START_NS, duration_ns=duration_ns, slo_ns=SLO_NS, on_second=told.append)


def test_a_second_is_told_once_all_senders_have_passed_it(tmp_path: Path) -> None:
    """Not before: the slower one's rows belong to that second too."""
    ok = (0, 9 * MS, Status.OK)
    one = Sender(tmp_path, "one", [0, SECOND // 2, SECOND, 2 * SECOND], [ok] * 4)
    two = Sender(tmp_path, "two", [5, SECOND - 1, SECOND + 1], [ok] * 3)
    told: list[Second] = []
    seconds = seconds_of([one, two], 5 * SECOND // 2, told)

    one.tell(seconds, 2 * SECOND)
    assert told == []
    two.tell(seconds, SECOND - 1)
    assert told == []
    two.tell(seconds, SECOND)
    assert [(second.end_s, second.this.due) for second in told] == [(1.0, 4)]
    two.tell(seconds, 5 * SECOND // 2)
    one.tell(seconds, 5 * SECOND // 2)
    assert [(second.end_s, second.this.due) for second in told] == [(1.0, 4), (2.0, 2), (2.5, 1)]
    assert [second.so_far.due for second in told] == [4, 6, 7]
    assert told[-1].this.to_dict()["rate_qps"] == 2  # one query in the half second that is left


def test_a_second_has_the_figures_of_the_queries_due_in_it(tmp_path: Path) -> None:
    """In time by our own clock, whatever the router called it; missed where refused, unsent or silent."""
    outcomes = [
        (1 * MS, 10 * MS, Status.OK), (2 * MS, 36 * MS, Status.LATE), (1 * MS, 36 * MS + 1, Status.OK),
        (3 * MS, 20 * MS, Status.EXPIRED), (-1, -1, UNANSWERED),
    ]  # fmt: skip
    sender = Sender(tmp_path, "one", [0, 1, 2, 3, 4], outcomes)
    told: list[Second] = []
    sender.tell(seconds_of([sender], SECOND, told), SECOND)
    (second,) = told

    found = second.this.to_dict()
    assert (found["due"], found["sent"], found["ok"], found["unanswered"]) == (5, 4, 2, 0)
    assert found["slo_attainment"] == 0.4
    assert found["mean_accuracy"] == 80
    assert found["latency_p99_ms"] == pytest.approx(36.000001)
    assert found["send_lag_p99_ms"] == 3
    assert second.to_line().split()[:6] == ["1.0", "4", "0.40000", "80.00", "36.00", "3.00"]
    assert HEADER.index("|") == second.to_line().index("|")


def test_a_query_without_an_answer_is_slower_than_all_others(tmp_path: Path) -> None:
    """A server that froze does not look quick: there is no p99 while those at it are not answered."""
    frozen = [(0, 5 * MS, Status.OK)] * 98 + [(0, -1, UNANSWERED)] * 2
    sender = Sender(tmp_path, "one", list(range(100)), frozen)
    told: list[Second] = []
    sender.tell(seconds_of([sender], SECOND, told), SECOND)

    for figures in (told[0].this, told[0].so_far):
        assert figures.unanswered == 2
        assert figures.latency_p99_ns is None


def test_a_second_without_queries_has_no_figures(tmp_path: Path) -> None:
    """They are shown as such, and not as zeros."""
    sender = Sender(tmp_path, "one", [0], [(0, 5 * MS, Status.OK)])
    told: list[Second] = []
    sender.tell(seconds_of([sender], 2 * SECOND, told), 2 * SECOND)

    assert told[1].this.to_dict()["slo_attainment"] is None
    assert told[1].to_line().split("|")[0].split()[2:] == ["-", "-", "-", "-"]
    assert told[1].so_far.ok == 1


@given(
    ns=st.lists(st.integers(0, 10**12), max_size=60),
    n_slower=st.integers(0, 3),
    permille=st.sampled_from([1, 500, 990, 1000]),
)
def test_a_histograms_quantile_is_a_little_more_than_the_exact_one(
    ns: list[int], n_slower: int, permille: int
) -> None:
    """By one bin at most, 0.8 %; and None exactly where it is among those still slower."""
    histogram = Histogram()
    for one in ns:
        histogram.add(np.array([one]))
    exact = quantile_ns(np.array([*ns, *[10**18] * n_slower], np.int64), permille)
    found = histogram.quantile_ns(permille, n_slower=n_slower)

    if exact is None or exact == 10**18:
        assert found is None
    else:
        assert found is not None
        assert max(exact, 1) * 0.9999 - 1 <= found <= max(exact, 1) * 1.012 + 1


@pytest.mark.e2e
def test_the_seconds_of_a_run_sum_to_its_result() -> None:
    """Every query is in one second, from however many senders."""
    told: list[Second] = []
    trace = load_trace("poisson:rate=300", duration_s=2.3)
    run, _ = run_emulated(
        trace, RunSettings(500 * MS, 2), Emulation("cnn-8gpu-modelled", 2), watch=Watch(told.append)
    )

    assert [second.end_s for second in told] == [1.0, 2.0, 2.3]
    assert sum(second.this.due for second in told) == trace.n == told[-1].so_far.due
    assert told[-1].so_far.ok == run.result.queries["ok"]
    assert run.result.mean_accuracy == pytest.approx(
        told[-1].so_far.accuracy_sum / told[-1].so_far.ok, rel=1e-6
    )
    assert run.result.partial is None


@pytest.mark.e2e
def test_a_run_that_is_stopped_reports_the_trace_up_to_there() -> None:
    """Nothing due before that instant is unsent or unanswered, and nothing due later counts."""
    told: list[Second] = []

    def on_second(second: Second) -> None:
        told.append(second)
        watch.stop.set()

    watch = Watch(on_second)

    trace = load_trace("constant:rate=300", duration_s=50)
    run, report = run_emulated(
        trace, RunSettings(500 * MS, 2), Emulation("cnn-8gpu-modelled", 2), watch=watch
    )
    result = run.result

    assert result.partial is True
    assert 1 < result.duration_s < 50
    assert result.queries["total"] == (trace.due_ns < round(result.duration_s * SECOND)).sum()
    assert len(run.columns["due_ns"]) == result.queries["total"] == told[-1].so_far.due
    assert (result.queries["unsent"], result.queries["unanswered"]) == (0, 0)
    assert any("PARTIAL, interrupted after" in line for line in table(result))
    assert report.n_violations == 0


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_the_partial_report(tmp_path: Path, number: signal.Signals) -> None:
    """After the first second: exit code 128 + N, and a result file that says that it is partial."""
    path = tmp_path / "run.json"
    with subprocess.Popen(
        [sys.executable, "-m", "loadgen", *RUN, "--duration", "50", "--json", str(path), "--json-lines"],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(number)
        *_, last = map(json.loads, process.stdout.read().splitlines())
        assert process.wait(30) == 128 + number

    result = load_run(path)
    assert (first["kind"], first["end_s"]) == ("second", 1)
    assert (last["kind"], last["partial"]) == ("result", True)
    assert result.partial is True
    assert result.queries["total"] == last["queries"]["total"] < 200 * 50


@pytest.mark.e2e
@pytest.mark.parametrize("more", [["--json-lines"], []], ids=["JSON lines", "table"])
def test_a_reader_that_leaves_gives_the_partial_report(tmp_path: Path, more: list[str]) -> None:
    """As `loadgen run ... | head` does: exit code 141, that of SIGPIPE, and the file is written."""
    path = tmp_path / "run.json"
    with subprocess.Popen(
        [sys.executable, "-m", "loadgen", *RUN, "--duration", "50", "--json", str(path), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(30) == 128 + signal.SIGPIPE
    assert load_run(path).partial is True
    assert "Traceback" not in errors
    assert "Error" not in errors


@pytest.mark.e2e
def test_a_run_that_is_killed_leaves_no_empty_file(tmp_path: Path) -> None:
    """A result is there whole or not at all: what was there before stays."""
    new, old = tmp_path / "new.json", tmp_path / "old.html"
    old.write_text("the last run's")
    with subprocess.Popen(
        [sys.executable, "-m", "loadgen", *RUN, "--duration", "50", "--json", str(new), "--report", str(old)],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.html"]
    assert old.read_text() == "the last run's"


@pytest.mark.e2e
def test_a_command_line_that_is_not_utf8_is_refused_before_the_run(tmp_path: Path) -> None:
    """In one line, where the result could not have been written after it."""
    path = os.fsencode(tmp_path) + b"/r\xe9sultat.json"
    done = subprocess.run(
        [sys.executable, "-m", "loadgen", *RUN, "--json", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.endswith("r\\xe9sultat.json: expected UTF-8: rename it, or link to it\n")


@pytest.mark.e2e
def test_json_lines_are_all_that_stdout_has(tmp_path: Path) -> None:
    """A program reads a second a line, then the result; people find the rest on stderr."""
    path = tmp_path / "run.json"
    told = CliRunner().invoke(
        cli, [*RUN, "--duration", "1.5", "--json-lines", "--json", str(path)], catch_exceptions=False
    )
    *seconds, result = map(json.loads, told.stdout.splitlines())

    assert [second["end_s"] for second in seconds] == [1, 1.5]
    assert seconds[-1]["so_far"]["due"] == result["queries"]["total"] == 300
    assert result == {"kind": "result", "timeline": None} | json.loads(path.read_bytes()) | {"timeline": None}
    assert "SLO attainment" in told.stderr
    assert str(path) in told.stderr
