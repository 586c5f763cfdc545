"""A frame: what the page shows of a quarter of a second, as JSON with short keys.

Instants are milliseconds of the router's clock. Keys are short because a recording has hundreds of frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadgen.study.explain.causes import cause_of
from loadgen.study.explain.story import story_of
from superserve.clock import MS

if TYPE_CHECKING:
    from cluster.operate.doctor import Finding
    from loadgen.study.explain.flight import Flight, FlownQuery
    from superserve.status import EndCounts, GpuStatus, RecentWindow

MOST_MISSES = 12
"""Explained in one frame; more are only counted."""
MOST_BATCHES = 600
"""Drawn in one frame."""


def attainment_of(counts: EndCounts) -> float | None:
    """Return the share that ended OK, of those that were not cancelled."""
    return counts.ok / counts.wanted if counts.wanted else None


def accuracy_of(window: RecentWindow) -> float | None:
    """Return the mean accuracy of what ended OK."""
    return window.ok_accuracy / window.answered.ok if window.answered.ok else None


def finding_of(found: Finding) -> dict[str, str]:
    """Return a finding of doctor."""
    return {"verdict": found.verdict.value, "text": found.text, "fix": found.fix}


def worker_of(gpu: GpuStatus) -> dict[str, Any]:
    """Return a row of the table of workers."""
    return {
        "name": f"{gpu.name}:{gpu.slot}",
        "process": gpu.name,
        "host": gpu.host,
        "state": gpu.condition,
        "subnet": gpu.last_subnet,
        "queries": gpu.queries,
        "busy_s": gpu.busy_s,
        "slowdown": gpu.slowdown,
        "transport_ms": gpu.transport_ms,
        "temperature_c": gpu.gauges.get("temperature_c"),
        "version": gpu.version,
    }


def miss_of(flight: Flight, query: FlownQuery) -> dict[str, Any]:
    """Return a late or refused query, with where its time went and why."""
    story = story_of(flight, query)
    cause = cause_of(flight, story)
    missed = query.missed
    return {
        "name": query.name,
        "at": (0 if missed is None else missed.at_ns) / MS,
        "status": "" if story.status is None else story.status.name.lower(),
        "slack": query.slack_ns / MS,
        "took": story.latency_ns / MS,
        "parts": [[part.name, round(part.ns / MS, 2)] for part in story.parts],
        "cause": cause.kind.value + (", shed" if cause.is_shed else ""),
        "words": cause.words,
    }


def batches_of(flight: Flight, ids: list[int]) -> list[list[float]]:
    """Return batches that have ended: GPU, start, duration, subnet, queries."""
    found = []
    for batch_id in ids[-MOST_BATCHES:]:
        sent, report = flight.batches.get(batch_id), flight.reports[batch_id]
        if sent is not None:
            start_ns = sent.dispatched_ns + report.to_start_ns
            found.append(
                [sent.gpu, round(start_ns / MS, 2), round(report.executing_ns / MS, 2), sent.subnet, sent.n]
            )
    return found
