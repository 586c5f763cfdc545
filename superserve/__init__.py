"""SuperServe: deadline-aware inference serving; the part that applications embed. Start at `Client`."""

from superserve.client import Client, QueryFuture, Reply, Timeline
from superserve.errors import (
    CancelledQueryError,
    ConfigError,
    DrainingError,
    ExpiredError,
    InfeasibleError,
    InvalidQueryError,
    ModelFailedError,
    OverloadedError,
    ProcessError,
    ProfileError,
    QueryError,
    SuperServeError,
    TraceError,
    UnansweredError,
    WireError,
    WorkerLostError,
)

__all__ = [
    "CancelledQueryError",
    "Client",
    "ConfigError",
    "DrainingError",
    "ExpiredError",
    "InfeasibleError",
    "InvalidQueryError",
    "ModelFailedError",
    "OverloadedError",
    "ProcessError",
    "ProfileError",
    "QueryError",
    "QueryFuture",
    "Reply",
    "SuperServeError",
    "Timeline",
    "TraceError",
    "UnansweredError",
    "WireError",
    "WorkerLostError",
]
