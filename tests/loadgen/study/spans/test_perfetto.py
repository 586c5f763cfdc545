"""The Chrome trace of a run holds to the format, and its counters and tracks are the run's."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from loadgen.study.spans.perfetto import GPUS, QUERIES, ROUTER, trace_of, write_trace
from tests.loadgen.study.explain.flown import fly, spike

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loadgen.study.explain.flown import Flown

NEEDED: dict[str, tuple[str, ...]] = {
    "M": ("name", "pid", "tid", "args"),
    "X": ("name", "cat", "pid", "tid", "ts", "dur", "args"),
    "C": ("name", "pid", "tid", "ts", "args"),
    "b": ("name", "cat", "id", "pid", "tid", "ts", "args"),
    "e": ("name", "cat", "id", "pid", "tid", "ts", "args"),
}
"""What the format asks of each phase that we use."""


@pytest.fixture(scope="module")
def flown() -> Flown:
    """Return a spike of which a part is refused."""
    return fly(spike(150), gpus=2, policy="fixed:cnn-80.16")


@pytest.fixture(scope="module")
def events(flown: Flown, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the events of its file."""
    path: Path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_trace(path, flown.flight, one_in=10)
    found = orjson.loads(path.read_bytes())
    assert found["displayTimeUnit"] == "ms"
    events: list[dict[str, Any]] = found["traceEvents"]
    return events


def test_each_event_holds_to_the_format(events: list[dict[str, Any]]) -> None:
    """Phases have their fields, times are numbers that do not decrease, async spans nest and close."""
    open_spans: dict[str, list[str]] = defaultdict(list)
    last = 0.0
    for event in events:
        assert set(event) == {"ph", *NEEDED[event["ph"]]}, event
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            continue
        assert event["ts"] >= last
        last = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] > 0
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        if event["ph"] == "b":
            open_spans[event["id"]].append(event["name"])
        if event["ph"] == "e":
            assert open_spans[event["id"]].pop() == event["name"]
    assert not any(open_spans.values())
    named = {(one["pid"], one["tid"]) for one in events if one["name"] == "thread_name"}
    assert {(one["pid"], one["tid"]) for one in events if one["ph"] == "X"} == named


def test_tracks_and_counters_are_the_runs(flown: Flown, events: list[dict[str, Any]]) -> None:
    """A box for each batch, none over another; the queue's counter goes up with the spike and back to 0."""
    flight = flown.flight
    boxes = [event for event in events if event["ph"] == "X" and event["pid"] == GPUS]
    assert len(boxes) == len(flight.batches)
    for gpu in range(2):
        ends = 0.0
        for box in sorted((one for one in boxes if one["tid"] == gpu), key=lambda one: one["ts"]):
            assert box["ts"] >= ends - 0.001
            ends = box["ts"] + box["dur"]
    queue = [one["args"]["value"] for one in events if one["ph"] == "C" and one["name"] == "queue"]
    assert max(queue) >= 110
    assert queue[-1] == 0
    assert min(queue) >= 0
    assert {one["pid"] for one in events if one["ph"] == "C"} == {ROUTER}


def test_every_miss_has_a_span_and_one_in_ten_of_the_others(
    flown: Flown, events: list[dict[str, Any]]
) -> None:
    """The spans are named by how the queries ended, and say the cause."""
    flight = flown.flight
    whole = [one for one in events if one["ph"] == "b" and "cause" in one["args"]]
    named = Counter(one["name"] for one in whole)
    missed = len(flight.missed())
    assert missed > 20
    assert sum(n for name, n in named.items() if name != "in time") == missed
    in_time = [one for one in flight.queries.values() if one.missed is None and one.query_id % 10 == 0]
    assert named["in time"] == len(in_time) > 0
    assert {one["pid"] for one in whole} == {QUERIES}


def test_an_empty_record_is_a_trace_too(flown: Flown) -> None:
    """Nothing happened: the names alone."""
    flight = flown.flight
    empty = type(flight)("slackfit", flight.gpus, flight.profiles, flight.profile_of)

    assert {one["ph"] for one in trace_of(empty)["traceEvents"]} == {"M"}
