"""SuperServe: deadline-aware inference serving; the part that applications embed.

    from superserve import Client

    with Client("tcp://127.0.0.1:5555") as client:
        reply = client.infer(image, slo_ms=36)
"""

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
