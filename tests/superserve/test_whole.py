"""The STATUS of several routers is the sum of theirs, with the share of each."""

from __future__ import annotations

from dataclasses import replace

import orjson

from superserve.status import EndCounts, QueueStatus, RouterShare, RouterStatus
from superserve.whole import whole_of
from tests.superserve.statuses import gpu, info, queries, status


def test_counts_are_added_and_the_earliest_head_is_first() -> None:
    """Each GPU is listed once, with whichever router it belongs to."""
    one = status(
        gpu(name="a"), queries=queries(received=10, answered=EndCounts(ok=7, late=1)),
        queue=QueueStatus(2, 30.0, 5), counts={"loops": 3},
    )  # fmt: skip
    other = status(
        gpu(name="b"), gpu(name="c"), queries=queries(received=5, answered=EndCounts(ok=5)),
        queue=QueueStatus(1, 12.0, 0), counts={"loops": 4, "malformed": 1},
    )  # fmt: skip

    whole = whole_of([("tcp://a:1", one), ("tcp://b:1", other)])

    assert whole.queries.received == 15
    assert whole.queries.answered == EndCounts(ok=12, late=1)
    assert whole.queue == QueueStatus(3, 12.0, 5)
    assert whole.counts == {"loops": 7, "malformed": 1}
    assert [one.name for one in whole.workers] == ["a", "b", "c"]
    assert whole.workers_ready == 3
    assert whole.routers == (
        RouterShare("tcp://a:1", answers=True, gpus=1, queued=2, received=10),
        RouterShare("tcp://b:1", answers=True, gpus=2, queued=1, received=5),
    )


def test_a_router_that_does_not_answer_is_listed_so() -> None:
    """And the whole is another run's once it answers again: its counters start from 0."""
    there = status(gpu(name="a"))
    alone = whole_of([("tcp://a:1", None), ("tcp://b:1", there)])
    both = whole_of([("tcp://a:1", replace(there, router=info(epoch=9))), ("tcp://b:1", there)])

    assert alone.routers is not None
    assert [share.answers for share in alone.routers] == [False, True]
    assert alone.router.epoch != both.router.epoch


def test_the_whole_drains_only_if_every_router_does() -> None:
    """One that is restarted in turn does not make the cluster refuse work."""
    draining = status(router=info(draining=True))

    assert not whole_of([("a", draining), ("b", status())]).router.draining
    assert whole_of([("a", draining), ("b", draining)]).router.draining


def test_it_travels_as_json() -> None:
    """A host asks its routers and sends the whole on."""
    whole = whole_of([("a", status(gpu(name="a"))), ("b", None)])

    assert RouterStatus.from_body(orjson.loads(orjson.dumps(whole.body()))) == whole
