"""What large payloads cost is measured on the whole path, in a closed loop."""

from __future__ import annotations

import os

import pytest

from loadgen.bench.rows.payloads import OUTSTANDING, echo_cost, payload_costs
from loadgen.bench.table import echo_server
from loadgen.live.run import Emulation, emulated
from superserve.errors import ProcessError
from superserve.net.context import new_context
from superserve.net.sockets import bind_router

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_each_way_has_its_cost() -> None:
    """Every query is answered, on each way, and takes CPU time of several processes."""
    costs = payload_costs(
        echo_server, lambda: emulated(Emulation("cnn-8gpu-modelled", 4, "mincost")), 70_000, OUTSTANDING, 1
    )

    assert list(costs) == ["echo", "messages", "shared_memory"]
    assert all(cost > 0 for cost in costs.values())


def test_an_echo_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names how far it came, instead of waiting for ever."""
    monkeypatch.setattr("loadgen.bench.rows.payloads._STUCK_NS", 1)
    with new_context() as context:
        socket, endpoint = bind_router(context, "tcp://127.0.0.1:*")
        try:
            with pytest.raises(ProcessError, match="no answer for"):
                echo_cost(endpoint, os.getpid(), 70_000, 10)
        finally:
            socket.close(0)
