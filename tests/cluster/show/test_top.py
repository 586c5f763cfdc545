"""`cluster top`: what it shows of a recorded STATUS, in 80 columns, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.show.top import Sample, header, page, plain, rows_of
from superserve.clock import SECOND
from superserve.status import RouterStatus
from tests.cluster.machine import Machine, machine
from tests.superserve.client.fakes import poll
from tests.superserve.statuses import ended

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.status import GpuStatus

ROOT = Path(__file__).parents[3]
BEFORE, NOW = (
    Sample(RouterStatus.from_body(each["body"]), each["at_ns"])
    for each in json.loads((Path(__file__).parent / "recorded_status.json").read_text())
)


def first(sample: Sample) -> GpuStatus:
    """Return the GPU that is shown first; the router lists processes in the order in which they joined."""
    return min(sample.status.workers, key=lambda gpu: (gpu.name, gpu.slot))


def test_a_recorded_status_is_the_page_that_the_handbook_shows() -> None:
    """docs/operating.md has the page as it is, and no line of it is longer than 80 columns."""
    text = plain(page(NOW, BEFORE))

    assert max(map(len, text.splitlines())) <= 80
    shown = "\n".join("    " + line if line else "" for line in text.splitlines())
    assert shown in (ROOT / "docs" / "operating.md").read_text()


def test_rates_are_differences_of_counters_over_the_time_between() -> None:
    """Batches, queries and busy time since the sample before; at most 100 % of it."""
    row = rows_of(NOW, BEFORE)[0]
    new, old = first(NOW), first(BEFORE)
    seconds = (NOW.at_ns - BEFORE.at_ns) / SECOND

    assert row.batches_s == pytest.approx((new.batches - old.batches) / seconds)
    assert row.queries_s == pytest.approx((new.queries - old.queries) / seconds)
    assert row.busy is not None
    assert 0.9 < row.busy <= 1.0


def test_what_one_sample_cannot_tell_is_a_dash() -> None:
    """Alone, joined since, or of another life of the router: no rate is made up."""
    alone = rows_of(NOW, None)[0]
    router = replace(BEFORE.status.router, epoch=1)
    other_life = Sample(replace(BEFORE.status, router=router), BEFORE.at_ns)
    gpu = replace(first(NOW), batches=0)
    joined_anew = Sample(replace(NOW.status, workers=(gpu,)), NOW.at_ns)
    anew = rows_of(joined_anew, BEFORE)[0]

    assert (alone.batches_s, alone.queries_s, alone.busy) == (None, None, None)
    assert rows_of(NOW, other_life)[0].queries_s is None
    assert anew.batches_s is None
    assert anew.queries_s is not None


def test_alone_a_sample_shows_the_routers_own_last_ten_seconds() -> None:
    """The first page has rates too."""
    recent = NOW.status.recent.short

    assert f"in {recent.received / recent.seconds:,.0f} q/s" in header(NOW, None)[1]


def test_attainment_is_cut_and_what_was_missed_is_named() -> None:
    """One miss in 20,000 is not 1.0000."""
    status = replace(NOW.status, recent=ended(ok=19_999, expired=1))
    lines = header(Sample(status, NOW.at_ns), None)

    assert "attainment 0.9999 over" in lines[2]
    assert lines[4] == "not ok: expired 1"


def test_a_worker_that_is_not_well_comes_first_where_there_is_no_room_for_all() -> None:
    """A thousand GPUs on 24 lines: the one to look at is on them, and the rest is counted."""
    gpu = replace(NOW.status.workers[0], slot=0)
    gpus = [replace(gpu, name=f"worker-{i:04}-of-a-long-name") for i in range(1_000)]
    gpus[777] = replace(gpus[777], process="suspect")
    sample = Sample(replace(NOW.status, workers=tuple(gpus)), NOW.at_ns)
    lines = plain(page(sample, None, max_rows=5)).splitlines()

    assert max(map(len, lines)) <= 80
    rule = next(i for i, line in enumerate(lines) if line.startswith("───"))
    assert lines[rule + 1].startswith("worker-0")
    assert "suspect" in lines[rule + 1]
    assert lines[-1] == "... and 996 more; of 1000 GPUs, 1 are not ready"


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    """Yield a state folder whose cluster is taken down at the end."""
    with machine(tmp_path) as here:
        yield here
        here.run("down")


def test_without_a_cluster_it_says_what_to_type(here: Machine) -> None:
    """One line, no traceback."""
    code, output = here.run("top")

    assert code == 1
    assert output == "Error: no cluster 'default' runs on this machine: start one with `cluster up`\n"


@pytest.mark.e2e
def test_once_is_one_plain_page(here: Machine) -> None:
    """For scripts: no colours, every GPU, exit code 0."""
    here.up()
    code, output = here.run("top", "--once", "--interval-s", "0.1")

    assert code == 0
    assert "\x1b" not in output
    assert "GPUs 2 ready of 2" in output
    assert [line.split()[0] for line in output.splitlines()[-2:]] == ["worker-0", "worker-1"]


class Terminal:
    """`cluster top` on a terminal of 80 x 24."""

    def __init__(self, here: Machine) -> None:
        self.text = ""
        self._fd, inner = pty.openpty()
        ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "top", "--interval-s", "0.1"],
            stdin=inner, stdout=inner, stderr=inner, cwd=ROOT, start_new_session=True,
            env={**here.env, "TERM": "xterm"},
        )  # fmt: skip
        os.close(inner)

    def shows(self, words: str) -> bool:
        """Read the output so far; return whether these words have been drawn."""
        if select.select([self._fd], [], [], 0.05)[0]:
            try:
                self.text += os.read(self._fd, 65_536).decode(errors="replace")
            except OSError:  # it ended
                return words in self.text
        return words in self.text

    def end(self) -> int:
        """Press Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        poll(lambda: self.shows("\x00") or self.process.poll() is not None)
        self.shows("")
        os.close(self._fd)
        return self.process.wait()


@pytest.mark.e2e
def test_on_a_terminal_it_stays_until_ctrl_c_and_says_when_the_router_is_gone(here: Machine) -> None:
    """It draws pages, keeps the last one if the router does not answer, and ends without output."""
    here.up()
    terminal = Terminal(here)
    poll(lambda: terminal.shows("GPUs 2 ready of 2"))
    assert here.run("down")[0] == 0
    poll(lambda: terminal.shows("no router answers"))
    poll(lambda: terminal.shows("s old"))

    assert terminal.end() == 0
    assert "Traceback" not in terminal.text
