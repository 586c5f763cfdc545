"""What goes into the router core, what comes out, and its settings: plain values, no sockets.

A peer's message goes in as decoded, with the connection that it came on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from profiles.table import Profile
    from router.core.edf import Cohort, Stretch
    from router.core.workers import Batch
    from router.policies import Policy
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

    `payload_bytes` is what its model takes for each query; None means any size. A guest belongs to another
    router, and only lends single credits to this one.
    """

    peer: Key
    name: str
    epoch: int
    profiles: Sequence[Profile]
    payload_bytes: int | None = None
    is_guest: bool = False


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


@dataclass(slots=True)
class Retuned:
    """Other settings hold from now on; `policy` names what `make_policy` builds, for logs.

    Of the settings, the bounds and the margin may differ.
    """

    policy: str
    make_policy: Callable[[Profile], Policy]
    settings: CoreSettings


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
    | Retuned
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


@dataclass(slots=True)
class Complaint:
    """Log that a policy's answer is wrong: once for each policy."""

    reason: str


Action = Dispatch | Answer | Fence | Released | Complaint


# --- settings ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """The core's tuning constants, each with its reason.

    Attributes:
        dispatch_ahead_ns: Decide a worker's next batch at most this long (plus the measured
            transport) before it is free. Long enough to cover a late wake-up on a busy host,
            short enough not to decide on a stale queue: a whole batch ahead costs SlackFit a point.
        least_ahead_ns: At least this long, on a machine on which the router has not come late.
        margin_ns: Slack held back, at most, for transport that the estimate has not seen yet.
        least_margin_ns: Slack held back at least, where no way took longer than nearly all of them.
        max_queries: Most queries queued or in flight; more are OVERLOADED.
        max_bytes: Most payload bytes held; more are OVERLOADED.
        heartbeat_ns: Each worker sends something at least this often.
        suspect_after: Missed heartbeats after which a worker gets no more work.
        dead_after: Missed heartbeats after which its queries are dispatched again.
        overrun_factor: A batch that takes this many times its profiled p99 has overrun.
        overrun_grace_ns: Added to that, so that a scheduler hiccup does not condemn short batches.
        give_up_ns: A batch that has no answer this long after it overran is given up.
    """

    dispatch_ahead_ns: int = 2 * MS
    least_ahead_ns: int = 2 * MS // 10
    margin_ns: int = MS
    least_margin_ns: int = MS // 10
    max_queries: int = 200_000
    max_bytes: int = 2 << 30
    heartbeat_ns: int = 100 * MS
    suspect_after: int = 3
    dead_after: int = 6
    overrun_factor: int = 3
    overrun_grace_ns: int = 10 * MS
    give_up_ns: int = 1000 * MS

    def with_margin(self, margin_ns: int) -> CoreSettings:
        """Return settings with a margin that is always the same, whatever is measured."""
        return replace(self, margin_ns=margin_ns, least_margin_ns=margin_ns)
