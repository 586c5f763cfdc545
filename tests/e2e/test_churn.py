"""Clients that come and go leave nothing in the router."""

from __future__ import annotations

import pytest

from loadgen.bench.rows.churn import churn
from loadgen.live.run import Emulation, emulated

pytestmark = pytest.mark.e2e


def test_clients_that_come_and_go_are_answered_and_forgotten() -> None:
    """Sixty clients, a few at once: every query gets its output, and the router knows none of them after."""
    with emulated(Emulation("cnn-8gpu-modelled", 8, "maxbatch")) as cluster:
        assert cluster.router is not None
        seen = churn(cluster.client_endpoint, cluster.router.pid, n_clients=60, n_each=50)

    assert (seen.n_queries, seen.n_failed, seen.clients_left) == (3_000, 0, 0)
    assert seen.growth_mb < 8, "3,000 queries of 64 bytes"
