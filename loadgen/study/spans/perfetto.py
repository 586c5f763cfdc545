"""A flight record as a Chrome trace: one JSON file, for ui.perfetto.dev and chrome://tracing.

Three groups: GPUs, a track each, with their batches; the router's counters (queries that wait, accuracy of
what it sends, batches in flight); queries as spans with their parts: each that missed, and one in N others.

Format: "Trace Event Format", JSON object form; instants and durations are microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from loadgen.study.explain.causes import cause_of
from loadgen.study.explain.story import BEFORE, story_of
from superserve.errors import ConfigError
from superserve.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loadgen.study.explain.flight import Flight, FlownQuery
    from superserve.wire import Status

GPUS, ROUTER, QUERIES = 1, 2, 3
"""The groups: "processes" of the format."""

_US = 1_000


def trace_of(flight: Flight, one_in: int = 100, from_ns: int | None = None) -> dict[str, Any]:
    """Return a record as a Chrome trace.

    Args:
        flight: The record.
        one_in: Of the queries that ended OK, one in this many has a span.
        from_ns: The instant that is 0 in the trace; by default, when the first query was sent.
    """
    zero_ns = from_ns or min((query.sent_ns for query in flight.queries.values()), default=0)
    events = [*_names(flight), *_batches(flight, zero_ns), *_counters(flight, zero_ns)]
    for query in flight.queries.values():
        if query.missed is not None or query.query_id % one_in == 0:
            events += _query(flight, query, zero_ns)
    events.sort(key=lambda event: (event["ph"] != "M", event.get("ts", 0.0)))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"policy": flight.policy}}


def write_trace(path: Path, flight: Flight, one_in: int = 100) -> None:
    """Write a record's trace to a file."""
    try:
        write_whole(path, orjson.dumps(trace_of(flight, one_in)))
    except OSError as error:
        raise ConfigError(f"{path}: expected a path that can be written: {error.strerror}") from error


def _names(flight: Flight) -> Iterator[dict[str, Any]]:
    for pid, name in ((GPUS, "GPUs"), (ROUTER, f"router ({flight.policy})"), (QUERIES, "queries")):
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    for gpu in range(len(flight.gpus)):
        args = {"name": flight.gpu_name(gpu)}
        yield {"ph": "M", "name": "thread_name", "pid": GPUS, "tid": gpu, "args": args}


def _batches(flight: Flight, zero_ns: int) -> Iterator[dict[str, Any]]:
    free_ns: dict[int, int] = {}
    for batch_id, sent in flight.batches.items():
        report = flight.reports.get(batch_id)
        if report is None:
            continue  # lost, or still running
        # How the way splits is assumed, so make sure that no batch begins before the last one's end.
        start_ns = max(sent.dispatched_ns + report.to_start_ns, free_ns.get(sent.gpu, 0))
        free_ns[sent.gpu] = start_ns + report.executing_ns
        row = flight.profile(sent.gpu).subnets[sent.subnet]
        yield {
            "ph": "X", "cat": "batch", "name": row.name, "pid": GPUS, "tid": sent.gpu,
            "ts": (start_ns - zero_ns) / _US, "dur": report.executing_ns / _US,
            "args": {
                "batch": batch_id, "queries": sent.n, "accuracy": row.accuracy,
                "profiled_ms": sent.profiled_ns / 1e6, "waited_ms": report.waited_ns / 1e6,
            },
        }  # fmt: skip


def _counters(flight: Flight, zero_ns: int) -> Iterator[dict[str, Any]]:
    """Yield the counters at each change: an arrival adds to the queue, dispatch and refusal take from it."""
    waits: list[tuple[int, int]] = []
    for query in flight.queries.values():
        until_ns = None
        if query.batches:
            until_ns = flight.batches[query.batches[0]].dispatched_ns
        elif query.missed is not None:
            until_ns = query.missed.at_ns
        if until_ns is not None:
            waits += [(query.arrived_ns, 1), (until_ns, -1)]
    yield from _sums("queue", waits, zero_ns)
    runs: list[tuple[int, int]] = []
    for batch_id, sent in flight.batches.items():
        ended = flight.reports.get(batch_id)
        if ended is not None:
            runs += [(sent.dispatched_ns, 1), (ended.at_ns, -1)]
        accuracy = flight.profile(sent.gpu).subnets[sent.subnet].accuracy
        yield _counter("accuracy, %", sent.dispatched_ns - zero_ns, accuracy)
    yield from _sums("batches in flight", runs, zero_ns)


def _sums(name: str, changes: list[tuple[int, int]], zero_ns: int) -> Iterator[dict[str, Any]]:
    total = 0
    changes.sort()
    for i, (at_ns, change) in enumerate(changes):
        total += change
        if i + 1 == len(changes) or changes[i + 1][0] != at_ns:
            yield _counter(name, at_ns - zero_ns, total)


def _counter(name: str, at_ns: int, value: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": ROUTER, "tid": 0, "ts": at_ns / _US, "args": {"value": value}}


def _query(flight: Flight, query: FlownQuery, zero_ns: int) -> list[dict[str, Any]]:
    """Return a query's span and those of its parts, one after the other."""
    story = story_of(flight, query)
    cause = cause_of(flight, story)
    common = {"cat": "query", "id": query.name, "pid": QUERIES, "tid": 0}
    name = "in time" if query.missed is None else _word(story.status)
    args = {
        "query": query.query_id, "client": query.client, "slack_ms": query.slack_ns / 1e6,
        "cause": cause.kind.value, "words": cause.words, "batch": story.batch and story.batch.batch_id,
    }  # fmt: skip
    at_ns = query.sent_ns - zero_ns
    events = [{**common, "ph": "b", "name": name, "ts": at_ns / _US, "args": args}]
    for part in story.parts:
        if part.name == BEFORE or part.ns <= 0:
            continue
        events.append(
            {**common, "ph": "b", "name": part.name, "ts": at_ns / _US, "args": {"more": part.more}}
        )
        at_ns += part.ns
        events.append({**common, "ph": "e", "name": part.name, "ts": at_ns / _US, "args": {}})
    return [*events, {**common, "ph": "e", "name": name, "ts": at_ns / _US, "args": {}}]


def _word(status: Status | None) -> str:
    return "not ended" if status is None else status.name.lower()
