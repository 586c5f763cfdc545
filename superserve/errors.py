"""The error tree: everything this project raises on purpose.

    SuperServeError
    ├── WireError              a message that does not follow superserve.wire
    │   └── VersionError       its sender speaks no wire version that this release speaks
    ├── ConfigError            a file, option or field that is not what it should be
    │   ├── ProfileError       a profile that is malformed or not monotone
    │   └── TraceError         a trace that is missing, malformed or impossible
    ├── ProcessError           a role that did not start, or stopped
    ├── UsageError             a client used where it cannot work: after a fork, on a loop, in a thread
    └── QueryError             a query without an OK answer; the class names its status
        ├── InvalidQueryError      INVALID       the query is not what the model takes
        ├── InfeasibleError        INFEASIBLE    no subnet can meet the slack, even alone
        ├── OverloadedError        OVERLOADED    a bound on outstanding work is reached
        ├── ExpiredError           EXPIRED       the deadline passed in the queue
        ├── ModelFailedError       FAILED        the model raised on this query
        ├── WorkerLostError        WORKER_LOST   its worker died and no slack was left
        ├── CancelledQueryError    CANCELLED     the client cancelled it
        ├── DrainingError          DRAINING      the router or the client is shutting down
        └── UnansweredError        (local)       the router gave no answer in time, or is absent

A message names the field, file, host or query at fault and what was expected.
"""

from __future__ import annotations


class SuperServeError(Exception):
    """The root: catch this to catch everything this project raises on purpose."""


class WireError(SuperServeError):
    """A message that does not follow the wire protocol; it is counted and dropped."""


class VersionError(WireError):
    """The peer speaks no wire version that this release speaks.

    Args:
        ours: The lowest and the highest wire version that this release speaks.
        theirs: The peer's lowest and highest, as far as known.
        version: The version that the peer wrote in: it can read a REFUSED in this version.
    """

    def __init__(self, ours: tuple[int, int], theirs: tuple[int, int], version: int) -> None:
        super().__init__(
            f"wire version: expected {_versions(ours)}, got {_versions(theirs)}: "
            f"both sides need releases that share one"
        )
        self.ours = ours
        self.theirs = theirs
        self.version = version


def _versions(span: tuple[int, int]) -> str:
    lowest, highest = span
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


class ConfigError(SuperServeError):
    """A file, option or field that is not what it should be."""


class NoRouterError(ConfigError):
    """No router answers at an endpoint, or none that speaks our version."""


class ProfileError(ConfigError):
    """A profile that is malformed, not monotone or not pareto."""


class TraceError(ConfigError):
    """A trace that is missing, malformed or impossible."""


class ProcessError(SuperServeError):
    """A role's process did not start, or stopped when it should not have."""


class UsageError(SuperServeError):
    """A client used where it cannot work: after a fork, on a running event loop, from another loop."""


class QueryError(SuperServeError):
    """A query without an OK answer."""


class InvalidQueryError(QueryError):
    """The query's payload, slack or options are not what the model takes."""


class InfeasibleError(QueryError):
    """No subnet can meet the slack, even alone in a batch."""


class OverloadedError(QueryError):
    """A bound on outstanding queries or bytes is reached."""


class ExpiredError(QueryError):
    """The deadline passed while the query waited."""


class ModelFailedError(QueryError):
    """The model raised, or ran out of memory, on this query."""


class WorkerLostError(QueryError):
    """The worker died and no slack was left to try another."""


class CancelledQueryError(QueryError):
    """The client cancelled the query."""


class DrainingError(QueryError):
    """The router, or this client, is shutting down and takes no new work."""


class UnansweredError(QueryError):
    """The router is absent, or gave no answer by the deadline and its grace."""
