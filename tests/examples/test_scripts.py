"""The examples that are scripts run as they stand, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run_example(name: str, endpoint: str) -> str:
    """Run a script against the cluster at `endpoint`; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), endpoint],
        cwd=EXAMPLES, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_threaded_worker_serves_every_job(endpoint: str) -> None:
    """Each of its 400 jobs has one end, and most of the digits are read right."""
    (line,) = run_example("threaded_worker.py", endpoint).splitlines()

    assert line.startswith("400 jobs: ")
    ends = {end: int(n) for n, end in re.findall(r"(\d+) (\w+)(?:,|$)", line.partition(":")[2])}
    assert sum(ends.values()) == 400
    n_read = ends["right"] + ends.get("wrong", 0)
    assert n_read > 200, line  # the others were refused in time, each with its cause
    assert ends["right"] >= 0.75 * n_read, line  # the smallest subnet alone has 83 %


def test_the_notebook_tells_how_deadlines_and_subnets_go_together(endpoint: str) -> None:
    """Every cell runs; of each hundred queries all ended; the tables have their rows."""
    printed = run_example("notebook.py", endpoint)

    assert re.search(r"This is a \d; it was drawn as a \d", printed)
    assert re.search(r"\d+ of 100 right", printed)
    rows = re.findall(r"^ *(\d+) ms +(\d+) +(\d+) +(\d+) +(?:[\d.]+ %|-)  (.+)$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [200, 50, 20, 10, 5, 2, 1]
    assert all(sum(map(int, row[1:4])) == 100 for row in rows)
    assert all((reason == "-") == (int(refused) == 0) for *_, refused, reason in rows)
    shown = [int(n) for n in re.findall(r"^d\S+ +(\d+) +[\d.]+ +[\d.]+  #*$", printed, re.MULTILINE)]
    assert sum(shown) == 100 + sum(int(row[1]) + int(row[2]) for row in rows)
    assert re.search(r"^d\S+ has 9[5-9]\.\d %$", printed, re.MULTILINE)
