"""What goes into the router core and what comes out: plain values, no sockets.

A peer's message goes in as decoded, with the connection that it came on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from profiles.table import Profile
    from router.core.edf import Cohort, Stretch
    from router.core.workers import Batch
    from superserve.wire import Cancel, Done, DoneRow, Pull, Queries, Status

Key = Any
"""How the server names a connection: opaque and hashable."""


# --- in -------------------------------------------------------------------------------------


@dataclass(slots=True)
class ClientJoined:
    """A client sent HELLO. The same `session` on a new connection keeps its queries."""

    client: Key
    session: int


@dataclass(slots=True)
class ClientLeft:
    """A client sent BYE, fell silent or cannot be reached: its queries are forgotten."""

    client: Key


@dataclass(slots=True)
class QueriesArrived:
    """Queries of a client that has sent HELLO; `transit_ns` is how long they were under way."""

    client: Key
    queries: Queries
    transit_ns: int


@dataclass(slots=True)
class CancelAsked:
    """A client cancels some of its queries."""

    client: Key
    message: Cancel


@dataclass(slots=True)
class WorkerJoined:
    """A worker process sent HELLO: one profile for each of its GPUs.

    `payload_bytes` is what its model takes for each query; None means any size.
    """

    peer: Key
    name: str
    epoch: int
    profiles: Sequence[Profile]
    payload_bytes: int | None = None


@dataclass(slots=True)
class WorkerHeard:
    """Any sign of life."""

    peer: Key


@dataclass(slots=True)
class Pulled:
    """Queue states of some of a peer's GPUs."""

    peer: Key
    message: Pull


@dataclass(slots=True)
class Finished:
    """Batches that a peer finished."""

    peer: Key
    message: Done


@dataclass(slots=True)
class WorkerLeft:
    """A worker process sent BYE (`orderly`), or cannot be reached."""

    peer: Key
    orderly: bool


@dataclass(slots=True)
class DrainWorker:
    """Give no more work to these GPUs of a peer; slot None means all of them."""

    peer: Key
    slot: int | None


@dataclass(slots=True)
class DrainRouter:
    """Accept no more queries; finish the queued ones."""


Event = (
    ClientJoined
    | ClientLeft
    | QueriesArrived
    | CancelAsked
    | WorkerJoined
    | WorkerHeard
    | Pulled
    | Finished
    | WorkerLeft
    | DrainWorker
    | DrainRouter
)


# --- out ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Dispatch:
    """Send a batch to its worker, as a DIRECTIVE."""

    batch: Batch

    @property
    def peer(self) -> Key:
        """The worker process that hosts the batch's GPU."""
        return self.batch.worker.peer.key


@dataclass(slots=True)
class Ran:
    """What the answers of one batch share: the worker's report, and where the time went."""

    row: DoneRow
    subnet: int
    batch_size: int
    accuracy: float
    to_start_ns: int
    executing_ns: int
    returning_ns: int


@dataclass(slots=True)
class Answer:
    """Tell `client` how queries lo to hi of `cohort`, and those of `more`, ended.

    Attributes:
        n: Queries in all its stretches.
        queued_ns: From arrival to dispatch, or to the end if no worker was involved.
        ran: The batch's; None if no worker was involved, and then `reason` explains the end.
        at: Index of its first query in the batch.
        more: Further stretches that ended alike and follow the first one in the batch.
    """

    client: Key
    cohort: Cohort
    lo: int
    hi: int
    n: int
    status: Status
    queued_ns: int = 0
    ran: Ran | None = None
    at: int = 0
    reason: str = ""
    more: list[Stretch] | None = None

    @property
    def stretches(self) -> list[Stretch]:
        """Every stretch that it answers."""
        return [(self.cohort, self.lo, self.hi), *(self.more or ())]


@dataclass(slots=True)
class Fence:
    """Tell a worker process that its epoch is over: it must say HELLO again."""

    peer: Key
    reason: str


@dataclass(slots=True)
class Released:
    """Tell a drained worker process that it may exit: it holds no batch any more."""

    peer: Key


Action = Dispatch | Answer | Fence | Released
