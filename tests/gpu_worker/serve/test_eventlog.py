"""The event log keeps what emulated GPUs ran, and its checker sees every impossibility."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.core.batches import Outcome
from gpu_worker.core.played import Pace, PlayedGpu, PlayedGpus
from gpu_worker.serve.eventlog import RECORD, EventLogHeader, EventLogWriter, check_logs, cli, read_log
from profiles.table import load_profile
from superserve.clock import SECOND
from superserve.errors import ConfigError
from tests.superserve.test_files import full_after

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gpu_worker.core.batches import EndedBatch


HEADER = EventLogHeader(
    worker="worker-0", profile="toy", batch_sizes=(1, 4, 16), latency_ns=((10, 20, 40), (30, 60, 120))
)
Entry = tuple[int, int, int, int, int, int]
"""gpu, batch_id, subnet, batch_size, started_ns, ended_ns: the order of add()."""

POSSIBLE: list[Entry] = [
    (0, 1, 0, 1, 0, 10),
    (1, 2, 1, 16, 5, 130),
    (0, 3, 1, 4, 10, 70),
    (0, 4, 0, 3, 80, 100),
]
ENTRIES = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
)


def write(path: Path, entries: Sequence[Entry]) -> Path:
    """Write a log with HEADER and these entries."""
    with EventLogWriter(path, HEADER) as log:
        for entry in entries:
            log.add(*entry)
    return path


@given(entries=st.lists(ENTRIES, max_size=20))
def test_what_was_added_is_read_back(entries: list[Entry], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Header and records survive the file, whatever the numbers."""
    path = write(tmp_path_factory.mktemp("log") / "w.log", entries)

    header, records = read_log(path)

    assert header == HEADER
    columns = ("gpu", "batch_id", "subnet", "batch_size", "started_ns", "ended_ns")
    assert list(zip(*(records[column].tolist() for column in columns), strict=True)) == entries


def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The worker goes on and logs it once; the event log is readable up to there."""
    path = tmp_path / "w.log"
    with full_after(300_000), EventLogWriter(path, HEADER) as log:
        for batch_id in range(20_000):
            log.add(0, batch_id, 0, 1, batch_id * 10, batch_id * 10 + 10)

    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: the event log ends here: File too large"
    ]
    assert 4_096 < len(read_log(path)[1]) < 20_000


def test_full_buffers_reach_the_file_before_the_log_is_closed(tmp_path: Path) -> None:
    """A worker killed later loses less than one buffer."""
    path = tmp_path / "w.log"
    with EventLogWriter(path, HEADER) as log:
        for batch_id in range(10_000):
            log.add(0, batch_id, 0, 1, batch_id * 10, batch_id * 10 + 10)
        assert len(read_log(path)[1]) == 2 * 4_096
        log.flush()
        assert len(read_log(path)[1]) == 10_000


@given(lost=st.integers(0, 4 * RECORD.itemsize))
def test_a_truncated_log_is_read_up_to_its_last_whole_record(
    lost: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However a writer was cut off, the whole records before the cut count."""
    path = write(tmp_path_factory.mktemp("log") / "w.log", POSSIBLE)
    whole = path.read_bytes()
    _, records = read_log(path)
    path.write_bytes(whole[: len(whole) - lost])

    header, kept = read_log(path)

    assert header == HEADER
    assert len(kept) == len(POSSIBLE) - -(-lost // RECORD.itemsize)
    np.testing.assert_array_equal(kept, records[: len(kept)])
    assert not check_logs([path]).violations


def test_a_possible_log_has_no_violations(tmp_path: Path) -> None:
    """Back to back batches are allowed, and the figures add up by hand."""
    report = check_logs([write(tmp_path / "w.log", POSSIBLE)])

    assert report.violations == ()
    assert report.n_violations == 0
    assert (report.n_logs, report.n_gpus, report.n_batches, report.n_queries) == (1, 2, 4, 24)
    assert report.busy_ns == 10 + 125 + 60 + 20
    assert report.idle_ns == 10
    assert (report.idle_p50_ns, report.idle_p99_ns) == (0, 10)
    assert report.busy_share == pytest.approx(215 / 225)


@pytest.mark.parametrize("pace", [Pace(0.5), Pace(2.0), Pace(0.8, -0.9, 7), Pace(1.0, 1.0)])
def test_gpus_are_honest_at_the_pace_that_they_state(pace: Pace, tmp_path: Path) -> None:
    """What played GPUs of any pace run is possible, and a nanosecond less is not."""
    profile = load_profile("cnn-8gpu-modelled")
    table = tuple(subnet.latency_ns for subnet in profile.subnets)
    header = EventLogHeader("w", profile.name, profile.batch_sizes, table, pace)
    ended: list[EndedBatch] = []
    gpus = PlayedGpus([PlayedGpu(profile, _all_run, pace=pace)], ended.extend)
    now_ns = 0
    for batch_id in range(1, 60):
        gpus.submit(Played(batch_id, batch_id % profile.n_subnets), now_ns)
        now_ns = (gpus.next_event_ns() or 0) + 10 * SECOND
        gpus.finish_due(now_ns)
    for less_ns in (0, 1):
        with EventLogWriter(tmp_path / "w.log", header) as log:
            for one in ended:
                log.add(0, one.row.batch_id, one.subnet, one.n_run, one.started_ns, one.ended_ns - less_ns)
        report = check_logs([tmp_path / "w.log"])
        assert report.n_violations == (len(ended) if less_ns else 0), report.violations
    assert read_log(tmp_path / "w.log")[0] == header


@dataclass(frozen=True, slots=True)
class Played:
    """A batch of four for a played GPU."""

    batch_id: int
    subnet: int
    epoch: int = 1
    slot: int = 0
    n: int = 4


def _all_run(order: Played, _waited_ns: int) -> Outcome:
    return Outcome(order.n, 0, b"")


@pytest.mark.parametrize("pace", ["[]", '{"speed":"2"}', '{"speed":0}'])
def test_a_pace_that_is_none_is_refused(pace: str, tmp_path: Path) -> None:
    """A header cannot excuse quick batches by nonsense."""
    path = write(tmp_path / "w.log", POSSIBLE)
    data = path.read_bytes()
    blob = re.sub(rb'"pace":\{[^}]*\}', b'"pace":' + pace.encode(), data[12:-128])
    path.write_bytes(data[:8] + struct.pack("<I", len(blob)) + blob)

    with pytest.raises(ConfigError, match=r"pace|speed"):
        read_log(path)


def test_an_empty_log_is_possible(tmp_path: Path) -> None:
    """A worker that never got a batch broke no rule."""
    report = check_logs([write(tmp_path / "w.log", [])])

    assert report.violations == ()
    assert (report.n_gpus, report.n_batches, report.busy_share) == (0, 0, None)
    assert "no violations" in report.to_text()


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        pytest.param((0, 9, 0, 1, 99, 120), "gpu 0: batch 9 started 1 ns before", id="overlap"),
        pytest.param((1, 9, 0, 1, 20, 30), "gpu 1: batch 9 started 110 ns before", id="nested"),
        pytest.param((0, 9, 0, 1, 200, 209), "took 9 ns, expected at least 10", id="quick"),
        pytest.param((0, 9, 1, 5, 200, 319), "took 119 ns, expected at least 120", id="quick, padded"),
        pytest.param((0, 9, 0, 1, 200, 200), "ended 0 ns after it started", id="instant"),
        pytest.param((0, 9, 0, 1, 200, 190), "ended -10 ns after it started", id="backwards"),
        pytest.param((0, 9, 2, 1, 200, 900), "has subnet 2 and size 1", id="unknown subnet"),
        pytest.param((0, 9, 0, 17, 200, 900), "has subnet 0 and size 17", id="too large"),
        pytest.param((0, 9, 0, 0, 200, 900), "has subnet 0 and size 0", id="no query"),
        pytest.param((1, 3, 0, 1, 200, 900), "gpu 1: batch 3 is also", id="repeated"),
    ],
)
def test_an_impossible_batch_is_found(entry: Entry, expected: str, tmp_path: Path) -> None:
    """Each rule, broken by one batch, is one violation that names file, GPU and batch."""
    path = write(tmp_path / "w.log", [*POSSIBLE, entry])

    report = check_logs([path])

    assert report.n_violations == 1, report.violations
    assert len(report.violations) == 1
    assert expected in report.violations[0]
    assert str(path) in report.violations[0]


def test_a_batch_may_not_begin_while_any_earlier_one_runs(tmp_path: Path) -> None:
    """The batch after a nested one is still inside the outer one."""
    entries: list[Entry] = [(0, 1, 0, 1, 0, 100), (0, 2, 0, 1, 10, 20), (0, 3, 0, 1, 30, 40)]

    report = check_logs([write(tmp_path / "w.log", entries)])

    assert report.n_violations == 2
    assert "batch 3 started 70 ns before" in report.violations[1]


def test_the_order_of_records_does_not_matter(tmp_path: Path) -> None:
    """A log is in order of ends, over all GPUs; rules hold per GPU, by start."""
    path = write(tmp_path / "w.log", list(reversed(POSSIBLE)))

    assert check_logs([path]).violations == ()


def test_a_batch_run_by_two_workers_is_found(tmp_path: Path) -> None:
    """Batch numbers are one router's: none is run twice, not even by another worker."""
    first = write(tmp_path / "a.log", POSSIBLE)
    second = write(tmp_path / "b.log", [(0, 4, 0, 1, 0, 10), (0, 5, 0, 1, 10, 20)])

    report = check_logs([first, second])

    assert report.violations == (f"{second}: gpu 0: batch 4 is also {first}: gpu 0: batch 4",)
    assert report.n_gpus == 3


def test_many_violations_are_counted_but_not_all_told(tmp_path: Path) -> None:
    """A million broken batches do not make a million lines."""
    entries: list[Entry] = [(0, batch_id, 0, 1, batch_id * 10, batch_id * 10 + 9) for batch_id in range(100)]

    report = check_logs([write(tmp_path / "w.log", entries)])

    assert report.n_violations == 100
    assert len(report.violations) == 6
    assert "and 95 more that are quicker than the profile" in report.violations[-1]


GOOD_BLOB = b'{"worker":"w","profile":"p","batch_sizes":[1,2],"latency_ns":[[1,2]]}'


def _file(blob: bytes, *, magic: bytes = b"SSEL", schema: int = 1) -> bytes:
    return struct.pack("<4sHxxI", magic, schema, len(blob)) + blob


def test_the_layout_of_the_file_is_as_documented(tmp_path: Path) -> None:
    """A file put together by hand is read: the format is what the docstring says."""
    path = tmp_path / "w.log"
    path.write_bytes(_file(GOOD_BLOB) + struct.pack("<QqqIHH", 7, 1, 2, 3, 0, 1))

    header, records = read_log(path)

    assert header == EventLogHeader("w", "p", (1, 2), ((1, 2),))
    assert records.tolist() == [(7, 1, 2, 3, 0, 1)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"", "expected an event log", id="empty"),
        pytest.param(b"SSEL", "expected an event log", id="short"),
        pytest.param(_file(GOOD_BLOB, magic=b"PK\x03\x04"), "expected an event log", id="another file"),
        pytest.param(_file(GOOD_BLOB, schema=2), "schema: expected 1, got 2", id="schema"),
        pytest.param(_file(GOOD_BLOB)[:-1], "expected a header of 81 bytes, got 80", id="cut"),
        pytest.param(_file(b"{"), "header: expected JSON", id="not JSON"),
        pytest.param(_file(b"[]"), "expected an object", id="not an object"),
        pytest.param(_file(b'{"worker":"w"}'), "profile: expected text, got nothing", id="missing"),
        pytest.param(_file(GOOD_BLOB.replace(b'"w"', b"1")), "worker: expected text, got 1", id="worker"),
        pytest.param(_file(GOOD_BLOB.replace(b"[1,2],", b"3,")), "batch_sizes: expected a list", id="sizes"),
        pytest.param(_file(GOOD_BLOB.replace(b"[1,2],", b"[2,1],")), "batch_sizes: expected asc", id="order"),
        pytest.param(
            _file(GOOD_BLOB.replace(b"[[1,2]]", b"[1]")), r"latency_ns\[0\]: expected a list", id="rows"
        ),
        pytest.param(
            _file(GOOD_BLOB.replace(b"[[1,2]]", b"[[1]]")), r"latency_ns\[0\]: expected 2", id="row"
        ),
        pytest.param(_file(GOOD_BLOB.replace(b"[[1,2]]", b"[[1,2.5]]")), r"latency_ns\[0\]", id="float"),
    ],
)
def test_a_malformed_log_is_an_error_that_names_the_file(data: bytes, expected: str, tmp_path: Path) -> None:
    """And what was expected in it."""
    path = tmp_path / "broken.log"
    path.write_bytes(data)

    with pytest.raises(ConfigError, match=rf"broken\.log: {expected}"):
        check_logs([path])


def test_a_missing_log_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """As is a path that cannot be written."""
    with pytest.raises(ConfigError, match=r"absent\.log: expected a readable event log"):
        read_log(tmp_path / "absent.log")
    with pytest.raises(ConfigError, match="expected a path that can be written"):
        EventLogWriter(tmp_path / "absent" / "w.log", HEADER).open()


def test_the_command_succeeds_on_possible_logs(tmp_path: Path) -> None:
    """`python -m gpu_worker.serve.eventlog FILE` prints the report."""
    path = write(tmp_path / "w.log", POSSIBLE)
    command = [sys.executable, "-m", "gpu_worker.serve.eventlog", str(path)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "4 batches, 24 queries" in done.stdout


def test_the_command_fails_on_impossible_and_malformed_logs(tmp_path: Path) -> None:
    """Exit code 1, with the violations or the error in words."""
    impossible = write(tmp_path / "w.log", [*POSSIBLE, (0, 9, 0, 1, 99, 120)])
    malformed = tmp_path / "broken.log"
    malformed.write_bytes(b"x")

    found = CliRunner().invoke(cli, [str(impossible)])
    failed = CliRunner().invoke(cli, [str(malformed)])

    assert found.exit_code == 1
    assert "1 violations" in found.output
    assert "batch 9 started 1 ns before" in found.output
    assert failed.exit_code == 1
    assert "expected an event log" in failed.output
