"""Each cause is made to happen in the simulator, and `explain` names it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadgen.simulator.faults import Fault, jitter_faults
from loadgen.study.explain.causes import Why, cause_of
from loadgen.study.explain.show import body_of, lines_of, summary_lines
from loadgen.study.explain.story import LOST, QUEUED, story_of
from router.core.events import CoreSettings
from superserve.clock import MS
from superserve.wire import Status
from tests.loadgen.study.explain.flown import LARGEST, drawn, even, fly, spike

if TYPE_CHECKING:
    from loadgen.study.explain.causes import Cause
    from tests.loadgen.study.explain.flown import Flown


def causes(flown: Flown) -> list[Cause]:
    """Return the cause of each query that missed."""
    flight = flown.flight
    return [cause_of(flight, story_of(flight, query)) for query in flight.missed()]


def kinds(flown: Flown) -> Counter[Why]:
    """Return how often each kind of cause was named."""
    return Counter(cause.kind for cause in causes(flown))


def test_queries_whose_way_took_their_slack_came_late() -> None:
    """A client's connection is cut for longer than the SLO: what it held back arrives with no slack left."""
    flown = fly(even(400), faults=[Fault("partition", 100 * MS, "client:0", 60 * MS)])

    found = kinds(flown)
    assert found[Why.CAME_LATE] >= 8  # 24 queries were held for longer than 36 ms less what an answer takes
    assert found[Why.CAME_LATE] >= 0.8 * found.total()


def test_an_impossible_slo_came_late() -> None:
    """With an SLO below the quickest answer every query comes late, and the words have both times."""
    flown = fly(even(100, 0.2), slo_ns=MS)

    found = causes(flown)
    assert len(found) == 20
    assert {cause.kind for cause in found} == {Why.CAME_LATE}
    assert "were left when it arrived" in found[0].words


def test_a_query_that_lost_most_of_its_time_on_its_way_came_late() -> None:
    """What a cut connection held back arrives with less than half of its slack, and is refused."""
    faults = [Fault("partition", 100 * MS, "client:0", 30 * MS)]
    flown = fly(even(8_000, 0.3), gpus=4, policy=LARGEST, faults=faults)

    half = 0
    for query in flown.flight.missed():
        cause = cause_of(flown.flight, story_of(flown.flight, query))
        assert query.missed is not None
        way_ns, left_ns = query.arrived_ns - query.sent_ns, query.deadline_ns - query.arrived_ns
        if not query.missed.batch_id and 2 * way_ns > query.slack_ns:
            half += left_ns >= query.missed.quickest_ns
            assert cause.kind is Why.CAME_LATE
            assert f"{way_ns / MS:.2f} ms had gone on the way" in cause.words
    assert half > 5


def test_what_met_busy_gpus_is_not_said_to_stand_behind_queries() -> None:
    """A short SLO among long ones: no earlier deadline is before it, and the words say what was."""
    trace = even(3_000, 0.4)
    slo_ns = np.full(trace.n, 200 * MS)
    slo_ns[::10] = 6 * MS
    flown = fly(trace, gpus=2, policy=LARGEST, slo_ns=slo_ns)

    found = [
        (story.n_ahead, cause_of(flown.flight, story).words)
        for story in (story_of(flown.flight, query) for query in flown.flight.missed())
        if cause_of(flown.flight, story).kind is Why.QUEUE
    ]
    alone = [words for n_ahead, words in found if not n_ahead]
    assert alone
    assert all("no earlier deadline stood before it; the GPUs were busy" in words for words in alone)
    assert not any(words.startswith("0 ") for _, words in found)


def test_on_a_run_that_nobody_tuned_each_miss_has_a_cause_and_its_parts_sum() -> None:
    """Jitter, classes, floors, mixed SLOs, a slow GPU, a worker that dies: each miss is explained."""
    trace = drawn("bursty:base=400,variant=1600,cv2=8", 3.0, seed=23)
    draw = np.random.default_rng(23)
    faults = [*jitter_faults(6 * MS, n_processes=3, n_clients=3), Fault("kill", 1_203 * MS, "worker:1")]
    flown = fly(
        trace, gpus=3, each=1, policy="planfit", faults=faults, n_clients=3, slow={2: 1.8},
        slo_ns=draw.choice([12, 20, 36, 120], trace.n) * MS,
        priority=draw.integers(0, 3, trace.n).astype(np.uint8),
        min_accuracy=draw.choice([0, 76, 79], trace.n).astype(np.float32),
    )  # fmt: skip

    flight, found = flown.flight, Counter[Why]()
    for query in flight.missed():
        story = story_of(flight, query)
        cause = cause_of(flight, story)
        found[cause.kind] += 1
        assert query.missed is not None
        assert sum(part.ns for part in story.parts) == story.latency_ns
        # The simulator reads several messages as one, at the mean of their instants: a wait may be below 0.
        assert all(part.ns >= 0 for part in story.parts if part.name != QUEUED), story.parts
        if query.missed.batch_id:  # it ran: the record has when its answer left
            assert story.latency_ns >= query.missed.at_ns - query.sent_ns
            # Late as the router usually finds the way to the client, of which it knows nothing more.
            assert query.missed.at_ns + query.missed.to_client_ns > query.deadline_ns
            assert "LATE by -" not in lines_of(story, cause)[0]
        else:
            assert story.latency_ns == query.missed.at_ns - query.sent_ns
        assert cause.words
    assert found[Why.UNKNOWN] == found[Why.IN_TIME] == 0
    assert found[Why.BOUND] == 0, "no bound was set: what a policy lets go at once met none"
    assert {Why.TRANSPORT, Why.SLOW_GPU, Why.CAME_LATE, Why.QUEUE} <= set(found), found
    assert sum(found.values()) > 100


def test_a_spike_is_a_queue() -> None:
    """A hundred queries due together, on the largest subnet: those behind stood behind earlier ones."""
    flown = fly(spike(100), gpus=2, policy=LARGEST)

    found = causes(flown)
    assert len(found) > 20
    assert {cause.kind for cause in found} == {Why.QUEUE}
    flight = flown.flight
    stories = [story_of(flight, query) for query in flight.missed()]
    assert max(story.n_ahead for story in stories) > 10
    assert all(story.n_ahead + story.n_behind == sum(one.n for one in story.ahead) for story in stories)


def test_overload_is_too_few_gpus_and_is_shed() -> None:
    """Twice what four GPUs do on the smallest subnet: the default policy sheds, as GPUs are too few."""
    flown = fly(drawn("poisson:rate=16000", 0.5), policy="planfit")

    found = causes(flown)
    shed = [cause for cause in found if cause.is_shed]
    assert len(shed) > 500
    few = [cause for cause in shed if cause.kind is Why.FEW_GPUS]
    assert len(few) > 0.9 * len(shed)
    assert "4 took work" in few[-1].words


def test_a_device_twice_as_slow_is_named() -> None:
    """The load fits four GPUs as profiled, and not on GPUs three times as slow."""
    flown = fly(drawn("poisson:rate=5500", 0.6), factor=3.0)

    found = kinds(flown)
    assert found[Why.SLOW_GPUS] > 0.8 * found.total() > 0


def test_a_batch_that_takes_longer_than_profiled_is_a_slow_gpu() -> None:
    """For a moment a GPU takes 2.5 times as long: the batch that starts then ends late."""
    flown = fly(
        even(300), gpus=2, each=1, policy=LARGEST,
        faults=[Fault("slow", 100 * MS, "worker:0", 20 * MS, 2.5)], slo_ns=11 * MS,
    )  # fmt: skip

    flight = flown.flight
    late = [query for query in flight.missed() if query.missed and query.missed.status == Status.LATE]
    found = [cause_of(flight, story_of(flight, query)) for query in late]
    assert [cause.kind for cause in found].count(Why.SLOW_GPU) >= max(1, len(found) // 2), found
    assert any("times as long on worker:0:0" in cause.words for cause in found)


def test_a_slow_message_is_a_transport_spike() -> None:
    """The way to and from a worker takes 15 ms longer for a moment: what was sent then is late."""
    fault = Fault("delay", 200 * MS, "worker:0", 5 * MS, 15 * MS)
    flown = fly(even(500), gpus=2, each=2, slo_ns=16 * MS, faults=[fault])

    flight = flown.flight
    late = [query for query in flight.missed() if query.missed and query.missed.status == Status.LATE]
    assert late
    found = [cause_of(flight, story_of(flight, query)) for query in late]
    assert {cause.kind for cause in found} == {Why.TRANSPORT}
    assert "on the way to worker:0" in found[0].words


def test_ways_that_take_long_for_all_are_slow_transport() -> None:
    """Every message takes up to 80 ms, so that none is a spike: queues and GPUs are not blamed."""
    flown = fly(
        even(60, 2.0), gpus=2, each=2, rest_ns=0,
        faults=jitter_faults(80 * MS, n_processes=1, n_clients=0),
    )  # fmt: skip
    found = Counter(
        cause_of(flown.flight, story_of(flown.flight, query)).kind
        for query in flown.flight.missed()
        if query.missed and query.missed.batch_id
    )

    assert found[Why.SLOW_WAY] > 5
    assert set(found) <= {Why.SLOW_WAY, Why.TRANSPORT, Why.REDISPATCHED}, found


def test_a_lost_worker_is_a_second_try() -> None:
    """A worker is killed: what it held is dispatched again or lost, and that time is a part."""
    flown = fly(even(1_200), gpus=2, each=1, policy=LARGEST, faults=[Fault("kill", 203 * MS, "worker:0")])

    flight = flown.flight
    again = [query for query in flight.queries.values() if len(query.batches) > 1]
    lost = [query for query in flight.missed() if query.missed and query.missed.status == Status.WORKER_LOST]
    assert again or lost
    for query in [*again, *lost]:
        story = story_of(flight, query)
        cause = cause_of(flight, story)
        assert cause.kind is Why.REDISPATCHED
        assert "worker:0:0 was lost or overran" in cause.words
        assert story.part(LOST) > 0


def test_a_full_queue_is_a_bound() -> None:
    """A router that may hold ten queries refuses the rest of a spike."""
    flown = fly(spike(100), gpus=2, core=replace(CoreSettings(), max_queries=10))

    assert kinds(flown)[Why.BOUND] >= 80


def test_words_name_the_query_its_parts_and_the_cause() -> None:
    """The lines for a terminal, and the JSON, have the same."""
    flown = fly(spike(100), gpus=2, policy=LARGEST)
    flight = flown.flight
    query = flight.missed()[-1]
    story = story_of(flight, query)
    cause = cause_of(flight, story)

    lines = lines_of(story, cause)
    assert lines[0].startswith(f"query 1:{query.query_id}: INFEASIBLE after")
    assert lines[-1].startswith("  cause            queue: ")
    body = body_of(flight, story, cause, [])
    assert sum(part["ms"] for part in body["parts"]) == pytest.approx(body["latency_ms"])
    assert body["cause"] == "queue"
    total = len(flight.missed())
    assert summary_lines(flight, flight.missed())[1].split() == [f"{total:,}", "queue"]


def test_a_query_in_time_says_how_much_was_left() -> None:
    """Queries that were answered in time have a story too."""
    flown = fly(even(100, 0.1))
    query = flown.flight.find("3")

    story = story_of(flown.flight, query)
    assert story.status is Status.OK
    assert cause_of(flown.flight, story).kind is Why.IN_TIME
    assert story.batch is not None
    assert story.batch not in story.ahead  # nor are those that shared its batch before it
    assert story.late_ns < 0
