"""What the worker's server and its GPUs, real or emulated, say to each other about batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from superserve.clock import MS
from superserve.wire import VARIED, Buffer, Directive, DoneRow, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from profiles.table import Profile

CAPACITY = 2
"""Batches a GPU takes at a time: one that runs, one that waits so that it need not wait for the network."""

MAX_OUTSTANDING = 16
"""A router keeps to its credit, so more than `CAPACITY` is its fault; from here on batches are refused."""


class QueueState(NamedTuple):
    """What one GPU tells the router of its queue.

    Attributes:
        credit: Batches it can take.
        held: Batches that wait.
        running: Batches that run: 0 or 1.
        last_batch: Highest batch id received in this epoch; 0 before the first.
        free_in_ns: Time until nothing is left to run, by the profile; 0 if idle.
    """

    credit: int
    held: int
    running: int
    last_batch: int
    free_in_ns: int


class Outcome(NamedTuple):
    """How a batch's queries ended, as DONE holds it.

    Attributes:
        n_run: Queries that took time of the GPU.
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
        epoch: The epoch it was sent under: no other router may be told.
        row: What DONE says of it.
        subnet: Row of the profile.
        n_run: Queries that took time of the GPU; 0 if all were refused.
    """

    epoch: int
    row: DoneRow
    subnet: int
    n_run: int
    started_ns: int
    ended_ns: int


class Gpus(Protocol):
    """The GPUs of one process, each a first-in first-out queue of batches."""

    @property
    def n_slots(self) -> int:
        """Number of GPUs."""
        ...

    def submit(self, directive: Directive, received_ns: int) -> bool:
        """Take a batch; False if its GPU has `MAX_OUTSTANDING` already."""
        ...

    def next_event_ns(self) -> int | None:
        """Return when `finish_due` will next have something to report; None if that is not known."""
        ...

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that have ended since the last call, each GPU's in order."""
        ...

    def state(self, slot: int, now_ns: int) -> QueueState:
        """Return what one GPU tells the router."""
        ...

    def forget_held(self) -> int:
        """Drop the batches that have not started, begin counting anew; return how many were dropped."""
        ...

    def is_idle(self) -> bool:
        """Tell whether no GPU holds anything."""
        ...


def free_in_ns(profile: Profile, first_ends_ns: int, held: Iterable[Directive], now_ns: int) -> int:
    """Return how long it takes until all is done, if the running batch ends at `first_ends_ns`."""
    waiting_ns = sum(profile.latency_ns(batch.subnet, batch.n) for batch in held)
    return max(0, first_ends_ns - now_ns) + waiting_ns


def unexpired(directive: Directive, waited_ns: int) -> npt.NDArray[np.bool_] | None:
    """Return which queries still have slack after `waited_ns` here, shape (n,); None if all have."""
    if directive.least_slack_left_ns() > waited_ns:
        return None
    return directive.slack_left_ns() > waited_ns


def expired_reason(waited_ns: int) -> bytes:
    """Return what a query is told that the worker refused."""
    return f"expired on the way: no slack was left after {waited_ns / MS:.2f} ms at the worker".encode()


def mixed(statuses: Sequence[Status], outputs: Sequence[Buffer], n_run: int) -> Outcome:
    """Return the outcome of a batch whose queries ended differently."""
    lengths = np.fromiter(map(len, outputs), "<u4", len(outputs)).tobytes()
    return Outcome(n_run, VARIED, b"".join(outputs), bytes(statuses), lengths)


def refused(directive: Directive, status: Status, reason: str) -> Outcome:
    """Return the outcome of a batch none of whose queries was run."""
    return mixed([status] * directive.n, [reason.encode()] * directive.n, 0)


def finished(
    directive: Directive,
    outcome: Outcome,
    state: QueueState,
    *,
    received_ns: int,
    started_ns: int,
    ended_ns: int,
) -> EndedBatch:
    """Return a batch's report; `state` is its GPU's after it."""
    row = DoneRow(
        batch_id=directive.batch_id,
        slot=directive.slot,
        credit=state.credit,
        held=state.held,
        n=directive.n,
        waited_ns=started_ns - received_ns,
        executing_ns=ended_ns - started_ns,
        last_batch=state.last_batch,
        free_in_ns=state.free_in_ns,
        output_bytes=outcome.output_bytes,
        output=outcome.output,
        statuses=outcome.statuses,
        lengths=outcome.lengths,
    )
    return EndedBatch(directive.epoch, row, directive.subnet, outcome.n_run, started_ns, ended_ns)
