"""The parts of a query's story sum to its latency, as the client measured it."""

from __future__ import annotations

import numpy as np

from loadgen.simulator.faults import jitter_faults
from loadgen.study.explain.story import BACK, BEHIND, QUEUED, RUNNING, TO_GPU, story_of
from superserve.clock import MS
from superserve.wire import Status
from tests.loadgen.study.explain.flown import SLO_NS, drawn, fly


def test_the_parts_of_a_thousand_late_queries_sum_to_their_latency() -> None:
    """Ways to the workers that take up to 20 ms make 1,000 queries late: within 0.1 ms for all of them."""
    # The router reads each message when it arrives, so the quickest one says how long the way is.
    faults = jitter_faults(20 * MS, n_processes=2, n_clients=0)
    trace = drawn("poisson:rate=1500", 2.75)
    flown = fly(trace, gpus=4, each=2, policy="slackfit", faults=faults, rest_ns=0)

    flight, columns = flown.flight, flown.simulated.columns
    late = np.flatnonzero(columns["status"] == Status.LATE)
    assert len(late) >= 1_000
    measured_ns = columns["answered_ns"] - columns["due_ns"]
    for place in late.tolist():
        story = story_of(flight, flight.queries[1, place], SLO_NS)
        assert story.status is Status.LATE
        parts_ns = sum(part.ns for part in story.parts)
        assert abs(parts_ns - measured_ns[place]) < MS // 10, (place, story.parts)
        # Not by one part that takes up the rest: each is the record's, and none is negative.
        assert all(part.ns >= 0 for part in story.parts)
        assert story.part(RUNNING) == columns["executing_ns"][place]
        if len(story.query.batches) == 1:
            assert story.part(QUEUED) == columns["queued_ns"][place]
        assert story.part(TO_GPU) + story.part(BACK) + story.part(BEHIND) > 0
