"""The client that applications embed: `Client` from threads, `AsyncClient` from asyncio.

Both are shells around one `Session`, which has no socket, thread or clock: it takes what the application
submits and what the router answers, and returns the messages to send and how each query ended.

Imports `superserve.net` and below. Data: submit -> Session -> `net.link` -> router -> Session ->
QueryFuture -> Reply.
"""

from superserve.client.aio import AsyncClient, AsyncQueryFuture
from superserve.client.client import Client
from superserve.client.futures import QueryFuture
from superserve.client.reply import Reply, Timeline

__all__ = ["AsyncClient", "AsyncQueryFuture", "Client", "QueryFuture", "Reply", "Timeline"]
