"""The cause of a query's end: the first of these that alone explains it.

    by request          the client cancelled it, or the router was draining; the payload was wrong
    model raised        on this query
    re-dispatched       its first worker was lost or overran
    came late           it arrived with less slack than the quickest answer takes, or half of it was gone
    bound reached       the router's queue was full
    slow GPU            its batch, or the one before it on that GPU, ran longer than profiled
    transport spike     the way to the GPU or back took longer than it usually does
    slow transport      so did those of others: the way took more than half of its time
    too few GPUs        more work arrived than all GPUs do, even on the smallest subnet
    slow GPUs           the same, but not if they ran as profiled
    queue               a burst: it stood behind K queries with earlier deadlines

A query that was shed has one of the last three, and `is_shed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING

from loadgen.study.explain.story import BACK, TO_GPU, TO_ROUTER
from superserve.clock import MS, SECOND
from superserve.wire import Status

if TYPE_CHECKING:
    from loadgen.study.explain.flight import Flight
    from loadgen.study.explain.story import Story

SLOW = 1.25
"""From this ratio of measured to profiled latency on a batch counts as slow, as in `cluster doctor`."""
FULL = 0.95
"""From this share of what all GPUs could do on the smallest subnet on, there are too few."""
_LEAST_WINDOW_NS, _MOST_WINDOW_NS = SECOND // 4, 2 * SECOND
_SLACKS = 8
"""The load counts over this many times the query's slack: one moment is a burst, not a lack of GPUs."""
_BOUND = "(--max-"
"""In the reason of a refusal at a bound, which names its option."""
_USUAL_OF = 200  # batches, before and after, that say what a way usually takes


class Why(StrEnum):
    """What it was."""

    IN_TIME = "in time"
    UNKNOWN = "not ended in this record"
    REQUEST = "by request"
    RAISED = "model raised"
    REDISPATCHED = "re-dispatched"
    CAME_LATE = "came late"
    BOUND = "bound reached"
    SLOW_GPU = "slow GPU"
    TRANSPORT = "transport spike"
    SLOW_WAY = "slow transport"
    FEW_GPUS = "too few GPUs"
    SLOW_GPUS = "slow GPUs"
    QUEUE = "queue"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a query ended as it did: what it was, in words, and whether the policy shed it."""

    kind: Why
    words: str
    is_shed: bool = False


def cause_of(flight: Flight, story: Story) -> Cause:
    """Return the cause of a query's end."""
    found = _stated(flight, story)
    if found is not None:
        return found
    if story.status is Status.LATE:
        return _late_run(flight, story) or _waited(flight, story)
    return _waited(flight, story)


def _stated(flight: Flight, story: Story) -> Cause | None:
    """Return a cause that the status or the arrival states; None if the wait must be looked at."""
    query, status, missed = story.query, story.status, story.query.missed
    reason = "" if missed is None else missed.reason
    if status is None:
        return Cause(Why.UNKNOWN, "it was dispatched, and no report has come")
    if status is Status.OK and len(query.batches) < 2:
        return Cause(Why.IN_TIME, f"{-story.late_ns / MS:.1f} ms were left")
    if status in (Status.CANCELLED, Status.DRAINING, Status.INVALID):
        return Cause(Why.REQUEST, reason or status.name.lower())
    if status is Status.FAILED:
        return Cause(Why.RAISED, reason or "the model raised on this query")
    if status is Status.WORKER_LOST or len(query.batches) > 1:
        first = flight.batches[query.batches[0]] if query.batches else None
        where = "its worker" if first is None else flight.gpu_name(first.gpu)
        ended = "in time all the same" if status is Status.OK else reason or "too late for its deadline"
        return Cause(Why.REDISPATCHED, f"{where} was lost or overran; the second try: {ended}")
    if missed is not None:
        left_ns, way_ns = query.deadline_ns - query.arrived_ns, story.part(TO_ROUTER)
        # A batch ran, and even the whole slack is less than the quickest answer: the way to GPUs is slow.
        is_short = left_ns < missed.quickest_ns and not (
            missed.batch_id and query.slack_ns < missed.quickest_ns
        )
        if is_short or (not missed.batch_id and 2 * way_ns > query.slack_ns):
            words = (
                f"{left_ns / MS:.2f} ms were left when it arrived; the quickest answer of any GPU takes "
                f"{missed.quickest_ns / MS:.2f} ms"
            )
            return Cause(Why.CAME_LATE, f"{words}; {way_ns / MS:.2f} ms had gone on the way to the router")
    if status is Status.OVERLOADED and _BOUND in reason:  # a policy lets queries go as OVERLOADED too
        return Cause(Why.BOUND, reason)
    return None


def _late_run(flight: Flight, story: Story) -> Cause | None:
    """Return why a batch ended later than the router planned, if that alone made the query late."""
    batch, report, late_ns = story.batch, story.report, story.late_ns
    if batch is None or report is None:
        return None
    where = flight.gpu_name(batch.gpu)
    over_ns = report.executing_ns - batch.profiled_ns
    usual_ns = _usual_way_ns(flight, batch.batch_id)
    way_ns = story.part(TO_GPU) + story.part(BACK)
    came_ns, least_ns = story.part(TO_ROUTER), flight.least_way_ns(story.query.client)
    over_way_ns = way_ns - usual_ns + came_ns - least_ns
    before_ns = _overran_before(flight, story)
    excesses = {
        Why.SLOW_GPU: max(over_ns if report.executing_ns > SLOW * batch.profiled_ns else 0, before_ns),
        Why.TRANSPORT: over_way_ns if over_way_ns > max(usual_ns + least_ns, MS) else 0,
    }
    kind, excess_ns = max(excesses.items(), key=lambda one: one[1])
    if excess_ns < late_ns or excess_ns <= 0:
        if way_ns >= late_ns and 2 * way_ns > story.latency_ns:  # no spike: all ways are so long now
            words = f"{way_ns / MS:.2f} ms on the way to {where} and back, as others take now"
            return Cause(Why.SLOW_WAY, f"{words}: {usual_ns / MS:.2f} in the median")
        return None
    if kind is Why.TRANSPORT:
        return Cause(
            kind,
            f"{way_ns / MS:.2f} ms on the way to {where} and back, usually {usual_ns / MS:.2f}; "
            f"{came_ns / MS:.2f} ms to the router, at best {least_ns / MS:.2f}",
        )
    ratio = report.executing_ns / batch.profiled_ns
    if before_ns > over_ns:
        return Cause(kind, f"the batch before it on {where} ran {before_ns / MS:.1f} ms longer than profiled")
    return Cause(kind, f"its batch took {ratio:.2f} times as long on {where} as in the profile")


def _usual_way_ns(flight: Flight, batch_id: int) -> int:
    """Return what the ways of the batches around one take in the median, both ways."""
    ways = []
    for near in range(batch_id - _USUAL_OF, batch_id + _USUAL_OF):
        sent, report = flight.batches.get(near), flight.reports.get(near)
        if sent is not None and report is not None:
            ways.append(report.at_ns - sent.dispatched_ns - report.waited_ns - report.executing_ns)
    return int(median(ways)) if ways else 0


def _overran_before(flight: Flight, story: Story) -> int:
    """Return by how much the batch before it on its GPU overran its profile, if it was slow."""
    batch = story.batch
    assert batch is not None, "only a query that ran is asked for"
    for near in range(batch.batch_id - 1, max(0, batch.batch_id - _USUAL_OF), -1):
        sent, report = flight.batches.get(near), flight.reports.get(near)
        if sent is not None and sent.gpu == batch.gpu:
            if report is None or report.executing_ns <= SLOW * sent.profiled_ns:
                return 0
            return report.executing_ns - sent.profiled_ns
    return 0


def _waited(flight: Flight, story: Story) -> Cause:
    """Return why it waited for so long."""
    load = load_around(flight, story)
    shed = story.status is Status.OVERLOADED
    needed = f"{load.needed:.1f} GPUs were needed on the smallest subnet, {load.n_gpus} took work"
    if load.needed >= FULL * load.n_gpus:
        return Cause(Why.FEW_GPUS, f"{load.rate_qps:,.0f} q/s arrived; {needed}", shed)
    if load.needed * load.slowness >= FULL * load.n_gpus:
        words = f"the GPUs took {load.slowness:.2f} times as long as in the profile; as profiled, {needed}"
        return Cause(Why.SLOW_GPUS, words, shed)
    words = (
        f"{counted(story.n_ahead, 'query', 'queries')} with earlier deadlines stood before it, in "
        f"{counted(len(story.ahead), 'batch', 'batches')} on {counted(story.gpus_ahead, 'GPU', 'GPUs')}"
    )
    if not story.n_ahead:
        left_ns = _left_ns(story)
        words = (
            f"no earlier deadline stood before it; the GPUs were busy, and {left_ns / MS:.2f} ms were left"
        )
    if shed:
        words = f"{story.query.missed.reason if story.query.missed else ''}; {words}"
    return Cause(Why.QUEUE, words, shed)


def _left_ns(story: Story) -> int:
    """Return the time that a query had left when it reached the router."""
    return story.query.deadline_ns - story.query.arrived_ns


def counted(n: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{n:,} {one if n == 1 else many}"


@dataclass(frozen=True, slots=True)
class LoadAround:
    """The load around a query.

    Attributes:
        rate_qps: Queries that arrived a second.
        needed: GPUs that this takes on the smallest subnet in its best batches, as profiled.
        n_gpus: GPUs that ran batches.
        slowness: Measured over profiled latency of the batches, in the median.
    """

    rate_qps: float
    needed: float
    n_gpus: int
    slowness: float


def load_around(flight: Flight, story: Story) -> LoadAround:
    """Return the load of the time in which a query's wait built up."""
    query = story.query
    window_ns = min(_MOST_WINDOW_NS, max(_LEAST_WINDOW_NS, _SLACKS * query.slack_ns))
    until_ns = max(story.until_ns, query.arrived_ns)
    known_ns = until_ns - flight.first_arrived_ns  # a record that begins within the window says no more
    window_ns = max(min(window_ns, known_ns), query.slack_ns, MS)
    n = flight.n_arrived(until_ns - window_ns, until_ns)
    sent = flight.sent_between(until_ns - window_ns, until_ns)
    ratios = [
        flight.reports[one.batch_id].executing_ns / one.profiled_ns
        for one in sent
        if one.batch_id in flight.reports and one.profiled_ns
    ]
    profile = flight.profile(sent[0].gpu if sent else 0) if flight.profiles else None
    least_ns = 0.0 if profile is None else profile.least_costs_ns()[0]
    return LoadAround(
        n * SECOND / window_ns, n * least_ns / window_ns, len({one.gpu for one in sent}),
        median(ratios) if ratios else 1.0,
    )  # fmt: skip
