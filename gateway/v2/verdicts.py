"""How an error reaches the caller: its HTTP status and its gRPC code."""

from __future__ import annotations

from typing import NamedTuple

from superserve.errors import (
    CancelledQueryError,
    DrainingError,
    ExpiredError,
    InfeasibleError,
    InvalidQueryError,
    ModelFailedError,
    OverloadedError,
    QueryError,
    SuperServeError,
    UnansweredError,
    WorkerLostError,
)


class RefusalKind(NamedTuple):
    """A kind of failure: the HTTP status, the name of gRPC's code, and whether to try again soon."""

    http: int
    grpc: str
    is_transient: bool = False


INVALID = RefusalKind(400, "INVALID_ARGUMENT")
UNKNOWN_CALLER = RefusalKind(401, "UNAUTHENTICATED")
NOT_FOUND = RefusalKind(404, "NOT_FOUND")
WRONG_METHOD = RefusalKind(405, "UNIMPLEMENTED")
TOO_SLOW = RefusalKind(408, "DEADLINE_EXCEEDED")
TOO_LARGE = RefusalKind(413, "RESOURCE_EXHAUSTED")
WRONG_ENCODING = RefusalKind(415, "INVALID_ARGUMENT")
WRONG_EXPECTATION = RefusalKind(417, "INVALID_ARGUMENT")
TOO_MANY = RefusalKind(429, "RESOURCE_EXHAUSTED", is_transient=True)
LONG_HEAD = RefusalKind(431, "INVALID_ARGUMENT")
CALLER_GONE = RefusalKind(499, "CANCELLED")
BROKEN = RefusalKind(500, "INTERNAL")
LOST = RefusalKind(502, "UNAVAILABLE")
UNAVAILABLE = RefusalKind(503, "UNAVAILABLE", is_transient=True)
TOO_LATE = RefusalKind(504, "DEADLINE_EXCEEDED")

OF_ERRORS: dict[type[QueryError], RefusalKind] = {
    InvalidQueryError: INVALID,
    InfeasibleError: TOO_LATE,
    ExpiredError: TOO_LATE,
    OverloadedError: UNAVAILABLE,
    DrainingError: UNAVAILABLE,
    UnansweredError: UNAVAILABLE,
    ModelFailedError: BROKEN,
    WorkerLostError: LOST,
    CancelledQueryError: CALLER_GONE,
}
"""By how a query ended. LATE is not here: its answer is a 200 that carries `is_late`."""

RETRY_AFTER_S = 1
"""In `Retry-After`, whole seconds: bursts that overload a router are shorter."""


class GatewayError(SuperServeError):
    """A request that gets no inference, with the kind of failure."""

    def __init__(self, verdict: RefusalKind, message: str) -> None:
        super().__init__(message)
        self.verdict = verdict


def verdict_of(error: Exception) -> RefusalKind:
    """Return the kind of failure that `error` is; BROKEN for what is no query's outcome."""
    if isinstance(error, GatewayError):
        return error.verdict
    for kind, verdict in OF_ERRORS.items():
        if isinstance(error, kind):
            return verdict
    return BROKEN


def invalid(message: str) -> GatewayError:
    """Return the error of a request that does not say what it should."""
    return GatewayError(INVALID, message)
