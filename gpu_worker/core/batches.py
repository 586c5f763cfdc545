"""Batches at a worker: which are taken, how they end, and their rows of DONE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from superserve.clock import MS
from superserve.wire import VARIED, Buffer, Directive, DoneRow, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from gpu_worker.core.queue import QueueReport, TakenBatch
    from profiles.table import Profile


class BatchOrder(Protocol):
    """A batch as a host carries it: the wire's `Directive`, or the router core's `Dispatch`."""

    @property
    def epoch(self) -> int:
        """The epoch it was sent under."""
        ...

    @property
    def batch_id(self) -> int:
        """The router's number for it; ascending."""
        ...

    @property
    def slot(self) -> int:
        """Which GPU of the process."""
        ...

    @property
    def subnet(self) -> int:
        """Row of the profile."""
        ...

    @property
    def n(self) -> int:
        """Queries in it."""
        ...


class Outcome(NamedTuple):
    """How a batch's queries ended, in the form of DONE.

    Attributes:
        n_run: Queries that took GPU time.
        output_bytes: Bytes of each output, or VARIED.
        output: Outputs, or UTF-8 reasons, end to end.
        statuses: n u8, None if all are OK.
        lengths: n u32 when VARIED, else None.
    """

    n_run: int
    output_bytes: int
    output: Buffer
    statuses: bytes | None = None
    lengths: bytes | None = None


@dataclass(slots=True)
class EndedBatch:
    """A batch that has ended; instants are of this process's clock.

    Attributes:
        epoch: The epoch it was sent under; None if that is over, because no router may receive its report.
        row: Its row of DONE.
        subnet: Row of the profile.
        n_run: Queries that took GPU time; 0 if all were refused.
        source: Which router sent it: see `gpu_worker.core.queue`.
    """

    epoch: int | None
    row: DoneRow
    subnet: int
    n_run: int
    started_ns: int
    ended_ns: int
    source: int = 0


class Refusal(NamedTuple):
    """How all queries of a batch end that a GPU does not take."""

    status: Status
    reason: str


FULL = Refusal(Status.OVERLOADED, "the worker's queue is full")


def fault_of(profile: Profile, order: BatchOrder) -> Refusal | None:
    """Return why a GPU of this profile cannot run a batch, or None."""
    if order.subnet >= profile.n_subnets:
        reason = f"subnet: expected 0 to {profile.n_subnets - 1}, got {order.subnet}"
    elif order.n > profile.max_batch_size:
        reason = f"batch: expected at most {profile.max_batch_size} queries, got {order.n}"
    else:
        return None
    return Refusal(Status.FAILED, reason)


def unexpired(directive: Directive, waited_ns: int) -> npt.NDArray[np.bool_] | None:
    """Return which queries still have slack after `waited_ns` here, shape (n,); None if all have."""
    if directive.least_slack_left_ns() > waited_ns:
        return None
    return directive.slack_left_ns() > waited_ns


def expired_reason(waited_ns: int) -> bytes:
    """Return the reason for a query that expired before it ran."""
    return f"expired on the way: no slack was left after {waited_ns / MS:.2f} ms at the worker".encode()


def mixed(statuses: Sequence[Status], outputs: Sequence[Buffer], n_run: int) -> Outcome:
    """Return the outcome of a batch whose queries ended differently."""
    lengths = np.fromiter(map(len, outputs), "<u4", len(outputs)).tobytes()
    return Outcome(n_run, VARIED, b"".join(outputs), bytes(statuses), lengths)


def refused(order: BatchOrder, status: Status, reason: str) -> Outcome:
    """Return the outcome of a batch that was not run."""
    return mixed([status] * order.n, [reason.encode()] * order.n, 0)


def end_of(
    batch: TakenBatch[Any], outcome: Outcome, report: QueueReport, started_ns: int, ended_ns: int
) -> EndedBatch:
    """Return a batch's end; `report` is its GPU's report after it, to the router that sent it."""
    order = batch.order
    row = DoneRow(
        order.batch_id, order.slot, report.credit, report.held, order.n, started_ns - batch.received_ns,
        ended_ns - started_ns, report.last_batch, report.running_batch, report.running_for_ns,
        outcome.output_bytes, outcome.output, outcome.statuses, outcome.lengths,
    )  # fmt: skip
    epoch = None if batch.is_given_up else order.epoch
    return EndedBatch(epoch, row, order.subnet, outcome.n_run, started_ns, ended_ns, batch.source)
