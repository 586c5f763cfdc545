"""The lanes of a run's worst two seconds, from the record to the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadgen.results.lanes import lanes_from
from loadgen.results.report import page
from loadgen.study.spans.remembered import RunMemory, lanes_of
from superserve.errors import ConfigError
from tests.loadgen.results.test_report import result_of
from tests.loadgen.study.explain.flown import even, fly, spike


def test_the_lanes_hold_the_worst_moment() -> None:
    """Each batch of the spike that made queries miss is in them, on its GPU."""
    flight = fly(spike(200), gpus=2, policy="fixed:cnn-80.16").flight
    lanes = lanes_from(lanes_of(flight))

    assert lanes.missed == len(flight.missed()) > 50
    assert lanes.gpus == ("worker:0:0", "worker:0:1")
    assert len(lanes.batches) == len(flight.batches)  # the run lasts half a second
    assert {gpu for gpu, *_ in lanes.batches} == {0, 1}
    assert sum(n for *_, n in lanes.batches) == sum(sent.n for sent in flight.batches.values())


def test_without_misses_they_are_the_end() -> None:
    """The last two seconds, up to the last report."""
    lanes = lanes_from(lanes_of(fly(even(100, 3.0)).flight))

    assert lanes.missed == 0
    assert 150 <= sum(n for *_, n in lanes.batches) <= 210
    assert max(start + took for _, start, took, *_ in lanes.batches) == pytest.approx(2_000, abs=5)


def test_the_page_draws_them() -> None:
    """Two runs side by side; a file with a GPU that it does not name is refused."""
    lanes = lanes_of(fly(spike(60), gpus=2).flight)
    results = [
        replace(result_of(100, policy=name, seed=i), lanes=lanes) for i, name in enumerate(("one", "two"))
    ]

    text = page(results)
    assert text.count("Missed then") == 1
    assert "gpus-1-" in text
    broken = {**lanes, "gpus": []}
    with pytest.raises(ConfigError, match=r"lanes\.batches"):
        page([replace(results[0], lanes=broken)])


def test_a_run_counts_without_a_record() -> None:
    """If the router does not answer any more there are no lanes, and the trace's line says why."""
    memory = RunMemory("", is_needed=True)
    assert memory.on_end is not None
    memory._why = "no router answers"
    said: list[str] = []

    assert memory.lanes() is None
    memory.write_trace(None, said.append)  # type: ignore[arg-type]
    assert said == ["  no trace         no router answers"]
    assert RunMemory("", is_needed=False).on_end is None
