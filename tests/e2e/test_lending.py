"""Two live routers, and all clients at one of them: the other's workers lend it their credits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import orjson
import pytest

from superserve.client.client import Client
from superserve.net.connection import ask_status
from tests.e2e.router_faults import TwoRouters

if TYPE_CHECKING:
    from pathlib import Path

    from superserve.client.futures import QueryFuture

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(120)]

RATE_QPS, SECONDS, SLO_MS = 120.0, 6.0, 8_000.0


class Skewed(TwoRouters):
    """Two routers, of which clients know only the first: the other's workers have nothing to do."""

    def list_of(self, i: int) -> Path:
        """Return a list in which the second router has an endpoint for clients that nobody listens at."""
        path = super().list_of(i)
        body = orjson.loads(path.read_bytes())
        body["routers"][1]["client"] = "tcp://127.0.0.1:1"
        skewed = self.folder / f"skewed{i}.json"
        skewed.write_bytes(orjson.dumps(body))
        return skewed


def test_workers_lend_their_credits_to_the_router_with_all_the_load(tmp_path: Path) -> None:
    """Batches run on GPUs of the other router, and every query ends once, with its output."""
    # Slow GPUs: a busy machine lets every loop come late by more than a batch of fast ones takes.
    with Skewed(tmp_path, 4, speed=0.1) as two, Client(two.clients[0]) as client:
        futures: list[QueryFuture] = []
        ended: list[int] = []
        begin_s = time.monotonic()
        while (passed_s := time.monotonic() - begin_s) < SECONDS:
            for _ in range(int(passed_s * RATE_QPS) - len(futures)):
                future = client.submit(bytes(64), slo_ms=SLO_MS)
                future.add_done_callback(lambda one: ended.append(one.query_id))
                futures.append(future)
            time.sleep(0.001)  # the pace of the load
        for future in futures:
            future.result(SLO_MS / 1e3 + 10)

        first, second = (ask_status(endpoint, 2.0) for endpoint in two.clients)

    assert sorted(ended) == sorted(one.query_id for one in futures), "a query ended twice, or not at all"
    assert second.queries.received == 0, "the load was not skewed"
    assert first.counts["borrowed_batches"] > 20, first.counts
    assert first.queries.answered.ok == len(futures)
    assert first.workers_ready == second.workers_ready == 2, "guests count as a router's own"
    assert len(first.workers) == 2
