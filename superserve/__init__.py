"""SuperServe: deadline-aware inference serving; the part that applications embed.

Start at `Client`, from threads, or `AsyncClient`, from asyncio.

The client is imported when it is first named: commands import this package before anything else, and do not
pay for it, nor for numpy and ZeroMQ, before they can say that those cannot be loaded.
"""

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from superserve.client.aio import AsyncClient, AsyncQueryFuture
    from superserve.client.client import Client
    from superserve.client.futures import QueryFuture
    from superserve.client.reply import Reply, Timeline

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

_OF_CLIENT = frozenset({"AsyncClient", "AsyncQueryFuture", "Client", "QueryFuture", "Reply", "Timeline"})


def __getattr__(name: str) -> object:
    """Import the client when one of its names is first asked for."""
    if name == "client":
        return importlib.import_module("superserve.client")
    if name not in _OF_CLIENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module("superserve.client"), name)
    globals()[name] = found  # asked once
    return found


def __dir__() -> list[str]:
    """List the client's names as well."""
    return sorted({*globals(), *__all__})
