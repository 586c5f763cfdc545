"""A router is added to two, and then one of the first is taken away, under load: no query fails."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from superserve.client.client import Client
from superserve.net.connection import ask_status
from tests.e2e.router_faults import TwoRouters

if TYPE_CHECKING:
    from pathlib import Path

    from superserve.client.futures import QueryFuture

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]

RATE_QPS, SLO_MS = 60.0, 10_000.0


class Load:
    """Queries at a steady rate from a thread, until it is stopped."""

    def __init__(self, client: Client) -> None:
        self.futures: list[QueryFuture] = []
        self.ended: list[int] = []
        self._client = client
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        begin_s = time.monotonic()
        while not self._stop.wait(0.002):  # the pace of the load
            for _ in range(int((time.monotonic() - begin_s) * RATE_QPS) - len(self.futures)):
                future = self._client.submit(bytes(64), slo_ms=SLO_MS)
                future.add_done_callback(lambda one: self.ended.append(one.query_id))
                self.futures.append(future)


def test_a_router_is_added_and_another_taken_away(tmp_path: Path) -> None:
    """Workers and clients hear of the new one, use it, and lose nothing when an old one drains."""
    with TwoRouters(tmp_path, 3) as three, Client(three.clients) as client, Load(client) as load:
        three.write_list(0, 1, 2)
        three.routers.append(three.start_router(2))
        three.await_shares(0, 1, 2)
        n_before = len(load.futures)
        three.write_list(1, 2)
        three.routers[0].send_signal(signal.SIGTERM)
        assert three.routers[0].wait(60) == 0
        three.await_shares(1, 2)
        n_after = len(load.futures) + int(RATE_QPS)
        while len(load.futures) < n_after:
            time.sleep(0.05)  # until a second's queries have met the two that are left
        load.__exit__()
        for future in load.futures:
            future.result(SLO_MS / 1e3 + 10)
        new = ask_status(three.all_clients[2], 5.0)

    assert n_before > 0
    assert sorted(load.ended) == sorted(one.query_id for one in load.futures), "a query ended twice, or never"
    assert new.queries.answered.ok > 0, "the new router has answered nothing"
