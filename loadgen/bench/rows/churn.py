"""Clients that come and go: a thousand of them, one after another, and how much memory the router keeps."""

from __future__ import annotations

import concurrent.futures
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it has no stubs

from superserve.client.client import Client
from superserve.errors import QueryError
from superserve.net.connection import ask_status

if TYPE_CHECKING:
    from collections.abc import Sequence

_PAYLOAD = bytes(64)
_SLO_MS = 10_000.0
"""Long, because memory is measured here, not deadlines."""


@dataclass(frozen=True, slots=True)
class Churn:
    """The router's memory.

    Attributes:
        n_queries: Queries that got an output.
        n_failed: Queries that did not.
        rss_mb: Resident memory at each tenth of the run; the first before any client.
        clients_left: Clients that the router still has once all have gone.
    """

    n_queries: int
    n_failed: int
    rss_mb: Sequence[float]
    clients_left: int

    @property
    def growth_mb(self) -> float:
        """From the middle of the run, when caches and pools are full, to its end."""
        return self.rss_mb[-1] - self.rss_mb[len(self.rss_mb) // 2]


def churn(endpoint: str, router_pid: int, *, n_clients: int, n_each: int, n_at_once: int = 4) -> Churn:
    """Make `n_clients` connect, submit `n_each` queries, await the answers and leave, a few at once."""
    router = psutil.Process(router_pid)
    rss_mb = [router.memory_info().rss / 1e6]
    n_queries = 0
    with concurrent.futures.ThreadPoolExecutor(n_at_once) as pool:
        done = pool.map(lambda _: _one_client(endpoint, n_each), range(n_clients))
        for i, n_answered in enumerate(done, start=1):
            n_queries += n_answered
            if i * 10 % n_clients < 10:
                rss_mb.append(router.memory_info().rss / 1e6)
    left = ask_status(endpoint).clients - 1  # without the one that asks
    return Churn(n_queries, n_clients * n_each - n_queries, rss_mb, left)


def _one_client(endpoint: str, n: int) -> int:
    """Return how many of the client's queries got an output."""
    n_answered = 0
    with Client(endpoint, connect_timeout_s=30.0) as client:
        for future in [client.submit(_PAYLOAD, slo_ms=_SLO_MS) for _ in range(n)]:
            try:
                future.result()
            except QueryError:
                continue
            n_answered += 1
    return n_answered
