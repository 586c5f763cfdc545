"""One query's story: where its time went, part by part, and which batches ran while it waited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from loadgen.study.explain.flight import Flight, FlownQuery
    from superserve.wire.flight import RanBatch, SentBatch


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a query's time: what happened, for how long, and a word more."""

    name: str
    ns: int
    more: str = ""


@dataclass(frozen=True, slots=True)
class Story:
    """Where a query's time went.

    Attributes:
        query: Whose.
        status: How it ended; None if the record does not have its end.
        parts: In order; they sum to `latency_ns`.
        latency_ns: From sending until its answer is with the client, as far as known, or it was refused.
        batch: The batch that answered it, or the last that it was in; None if it was in none.
        report: That batch's.
        until_ns: When its wait in the queue ended, by dispatch or refusal.
        ahead: The batches dispatched while it waited.
        n_ahead: Their queries with an earlier deadline.
        n_behind: Their other queries.
        gpus_ahead: The GPUs that ran them.
    """

    query: FlownQuery
    status: Status | None
    parts: tuple[Part, ...]
    latency_ns: int
    batch: SentBatch | None
    report: RanBatch | None
    until_ns: int
    ahead: tuple[SentBatch, ...]
    n_ahead: int
    n_behind: int
    gpus_ahead: int

    @property
    def late_ns(self) -> int:
        """By how much it missed its deadline; negative if it was in time, or was refused before."""
        return self.latency_ns - self.query.slack_ns

    @property
    def waited_ns(self) -> int:
        """How long it waited in the queue, until it was dispatched for the first time or refused."""
        return self.until_ns - self.query.arrived_ns

    def part(self, name: str) -> int:
        """Return how long a part took; 0 if there is none of that name."""
        return next((part.ns for part in self.parts if part.name == name), 0)


BEFORE, TO_ROUTER, QUEUED, LOST = (
    "before it was sent",
    "to the router",
    "in the queue",
    "at a worker, in vain",
)
TO_GPU, BEHIND, RUNNING = "to the GPU", "behind the batch before it", "running"
BACK, TO_CLIENT = "back to the router", "to the client, at least"


def story_of(flight: Flight, query: FlownQuery, slo_ns: int | None = None) -> Story:
    """Tell a query's story.

    Args:
        flight: The record.
        query: One of its queries.
        slo_ns: From the instant that it was due to its deadline, if known: what passed before it was sent is
            a part then.
    """
    missed = query.missed
    tries = [flight.batches[batch_id] for batch_id in query.batches]
    answered_by = missed.batch_id if missed is not None and missed.batch_id else None
    if answered_by is None:
        answered_by = next((one.batch_id for one in tries if one.batch_id in flight.reports), None)
    batch = flight.batches.get(answered_by or 0) or (tries[-1] if tries else None)
    report = None if batch is None else flight.reports.get(batch.batch_id)
    if missed is not None and not missed.batch_id:
        report = None  # refused, or lost: no report ended it
    parts = []
    if slo_ns is not None and slo_ns > query.slack_ns:
        parts.append(Part(BEFORE, slo_ns - query.slack_ns, "due, and not sent yet"))
    parts.append(Part(TO_ROUTER, query.arrived_ns - query.sent_ns))
    first_ns = tries[0].dispatched_ns if tries else None
    if missed is not None and not missed.batch_id:
        ends_ns = missed.at_ns
        parts += _unanswered(flight, query, tries, ends_ns)
    elif batch is not None:
        parts += _ran(flight, query, batch, report, tries)
    until_ns = first_ns if first_ns is not None else missed.at_ns if missed is not None else query.arrived_ns
    status: Status | None = None if report is None else Status.OK
    if missed is not None:
        status = Status(missed.status)
    if report is not None:
        # Of this way the router knows nothing; its queries' least way is without the wait for a busy router.
        parts.append(Part(TO_CLIENT, flight.least_way_ns(query.client), "as its quickest message took"))
    ahead = _ahead(flight, query, until_ns, None if batch is None else batch.batch_id)
    deadline_ns = query.deadline_ns
    due_first = sum(sum(d <= deadline_ns for one in sent.queries for d in one.deadlines_ns) for sent in ahead)
    return Story(
        query, status, tuple(parts), sum(part.ns for part in parts) - _before(parts), batch, report, until_ns,
        ahead, due_first, sum(sent.n for sent in ahead) - due_first, len({sent.gpu for sent in ahead}),
    )  # fmt: skip


def _before(parts: list[Part]) -> int:
    """Return the time before sending: lateness counts from there, since the slack does."""
    return parts[0].ns if parts[0].name == BEFORE else 0


def _unanswered(flight: Flight, query: FlownQuery, tries: list[SentBatch], ends_ns: int) -> list[Part]:
    if not tries:
        return [Part(QUEUED, ends_ns - query.arrived_ns, "until it was refused")]
    names = ", ".join(flight.gpu_name(one.gpu) for one in tries)
    return [
        Part(QUEUED, tries[0].dispatched_ns - query.arrived_ns, "until it was dispatched first"),
        Part(LOST, ends_ns - tries[0].dispatched_ns, names),
    ]


def _ran(
    flight: Flight, query: FlownQuery, batch: SentBatch, report: RanBatch | None, tries: list[SentBatch]
) -> list[Part]:
    """Return the parts from arrival until the report of the batch that answered it."""
    first = tries[0] if tries else batch
    parts = [Part(QUEUED, first.dispatched_ns - query.arrived_ns)]
    if first.batch_id != batch.batch_id:
        took_ns = batch.dispatched_ns - first.dispatched_ns
        parts.append(Part(LOST, took_ns, f"{flight.gpu_name(first.gpu)}; then dispatched again"))
    if report is None:
        return parts
    row = flight.profile(batch.gpu).subnets[batch.subnet]
    where = f"{row.name}, {batch.n} in the batch, on {flight.gpu_name(batch.gpu)}"
    ran = f"{where}; profiled {batch.profiled_ns / MS:.1f} ms"
    # The report's durations are the worker's clock, the instants the router's: what is left is the way back.
    back_ns = report.at_ns - batch.dispatched_ns - report.to_start_ns - report.executing_ns
    return [
        *parts,
        Part(TO_GPU, report.to_start_ns - report.waited_ns),
        Part(BEHIND, report.waited_ns),
        Part(RUNNING, report.executing_ns, ran),
        Part(BACK, back_ns),
    ]


def _ahead(flight: Flight, query: FlownQuery, until_ns: int, own: int | None) -> tuple[SentBatch, ...]:
    """Return the batches dispatched while a query waited, but for its own."""
    return tuple(
        sent for sent in flight.sent_between(query.arrived_ns, until_ns)
        if sent.batch_id != own and sent.batch_id not in query.batches
    )  # fmt: skip
