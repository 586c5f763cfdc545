"""Explanations in words, for a terminal and for `--json`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from loadgen.study.explain.causes import cause_of, counted
from loadgen.study.explain.story import story_of
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.study.explain.causes import Cause
    from loadgen.study.explain.flight import Flight, FlownQuery
    from loadgen.study.explain.story import Story
    from loadgen.study.explain.whatif import PlayedEnd, Replayed

_BARS = 40


def lines_of(story: Story, cause: Cause) -> list[str]:
    """Return a query's story: a line each for its end, its parts and its cause."""
    query, ended = story.query, "?" if story.status is None else story.status.name
    slack = query.slack_ns / MS
    if story.status is Status.OK:
        verdict = f"OK after {story.latency_ns / MS:.2f} ms of {slack:.2f} ms"
    elif story.status is Status.LATE and story.late_ns <= 0 and query.missed is not None:
        usual = query.missed.to_client_ns / MS
        verdict = (
            f"LATE: {story.latency_ns / MS:.2f} ms of {slack:.2f} ms, and the way to its client usually "
            f"takes {usual:.2f} ms"
        )
    elif story.status is Status.LATE:
        verdict = f"LATE by {story.late_ns / MS:.2f} ms: {story.latency_ns / MS:.2f} ms of {slack:.2f} ms"
    else:
        verdict = f"{ended} after {story.latency_ns / MS:.2f} ms; it had {slack:.2f} ms"
    lines = [f"query {query.name}: {verdict}"]
    longest = max((part.ns for part in story.parts), default=1) or 1
    for part in story.parts:
        bar = "#" * round(_BARS * max(0, part.ns) / longest)
        more = f"  {part.more}" if part.more else ""
        lines.append(f"  {part.ns / MS:>9.2f} ms  {part.name:<26} {bar}{more}")
    lines.append(f"  {story.latency_ns / MS:>9.2f} ms  in all")
    if story.ahead:
        lines.append(
            f"  before it        {counted(story.n_ahead, 'query', 'queries')} with earlier deadlines and "
            f"{counted(story.n_behind, 'other', 'others')}, in "
            f"{counted(len(story.ahead), 'batch', 'batches')} on {counted(story.gpus_ahead, 'GPU', 'GPUs')}"
        )
    shed = ", shed by the policy" if cause.is_shed else ""
    lines.append(f"  cause            {cause.kind.value}{shed}: {cause.words}")
    return lines


def change_lines(query: FlownQuery, played: Sequence[Replayed]) -> list[str]:
    """Return what would have become different for a query."""
    lines = []
    for one in played:
        end = one.ends.get((query.client, query.query_id))
        lines.append(f"  {one.change.words:<26} {'not played' if end is None else end.words}")
    return lines


def summary_lines(flight: Flight, queries: Sequence[FlownQuery]) -> list[str]:
    """Return how many of the queries that missed had which cause, for a whole record."""
    counts: Counter[str] = Counter()
    for query in queries:
        cause = cause_of(flight, story_of(flight, query))
        counts[cause.kind.value + (", shed" if cause.is_shed else "")] += 1
    n = len(flight.queries)
    if not queries:
        return [f"None of {n:,} queries of the record missed."]
    lines = [f"{len(queries):,} of {n:,} queries of the record missed:"]
    lines += [f"  {count:>9,}  {kind}" for kind, count in counts.most_common()]
    return lines


def body_of(flight: Flight, story: Story, cause: Cause, played: Sequence[Replayed]) -> dict[str, Any]:
    """Return an explanation as JSON."""
    query = story.query
    return {
        "query": query.query_id,
        "client": query.client,
        "status": None if story.status is None else story.status.name.lower(),
        "slack_ms": query.slack_ns / MS,
        "latency_ms": story.latency_ns / MS,
        "late_ms": story.late_ns / MS,
        "parts": [{"name": one.name, "ms": one.ns / MS, "more": one.more} for one in story.parts],
        "before": {
            "earlier_deadlines": story.n_ahead, "others": story.n_behind, "batches": len(story.ahead),
            "gpus": story.gpus_ahead,
        },
        "batch": None if story.batch is None else {
            "id": story.batch.batch_id, "gpu": flight.gpu_name(story.batch.gpu), "queries": story.batch.n,
            "subnet": flight.profile(story.batch.gpu).subnets[story.batch.subnet].name,
        },
        "cause": cause.kind.value, "shed": cause.is_shed, "words": cause.words,
        "changes": [_change(query, one) for one in played],
    }  # fmt: skip


def _change(query: FlownQuery, one: Replayed) -> dict[str, Any]:
    end: PlayedEnd | None = one.ends.get((query.client, query.query_id))
    return {
        "change": one.change.words,
        "status": None if end is None or end.status is None else end.status.name.lower(),
        "in_time": None if end is None else end.is_in_time,
        "late_ms": None if end is None else end.late_ns / MS,
        "accuracy": None if end is None else end.accuracy,
        "attainment": one.attainment,
    }
