"""SuperServe: deadline-aware inference serving; the part that applications embed.

Start at `Client`, from threads, or `AsyncClient`, from asyncio.
"""

from superserve.client.aio import AsyncClient, AsyncQueryFuture
from superserve.client.client import Client
from superserve.client.futures import QueryFuture
from superserve.client.reply import Reply, Timeline
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
    UsageError,
    WireError,
    WorkerLostError,
)

__all__ = [
    "AsyncClient",
    "AsyncQueryFuture",
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
    "UsageError",
    "WireError",
    "WorkerLostError",
]
