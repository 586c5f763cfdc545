"""Every target sends by the one open-loop sender: on schedule, one query at a time, each answered once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadgen.bench import table as bench
from loadgen.bench.senders.offer import offer_singly
from loadgen.live.records import SenderPlan
from loadgen.live.run import Emulation, emulated
from loadgen.traces.trace import load_trace
from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(60), pytest.mark.e2e]

SLO_NS = 20_000 * MS  # what else this machine does makes nothing late
TARGETS = ("echo", "client", "async-client")


@contextlib.contextmanager
def peer(target: str) -> Iterator[str]:
    """Run what a target sends to; give its endpoint."""
    if target == "echo":
        with bench.echo_server() as (endpoint, _):
            yield endpoint
        return
    with emulated(Emulation(bench.PROFILE, 2, bench.RATE_POLICY)) as cluster:
        yield cluster.client_endpoint


@pytest.mark.parametrize(("target", "least_sleep_ns"), [("echo", 0), *((one, MS // 2) for one in TARGETS)])
def test_a_target_sends_each_query_when_it_is_due(target: str, least_sleep_ns: int) -> None:
    """From two processes, their columns in the trace's order; none before it is due, all answered after."""
    trace = load_trace("poisson:rate=400", duration_s=0.5)
    with peer(target) as endpoint:
        plan = SenderPlan(endpoint, SLO_NS, target=target, least_sleep_ns=least_sleep_ns)
        offered = offer_singly(plan, trace, n_senders=2)

    assert np.array_equal(offered.due_ns, trace.due_ns)
    assert (offered.sent_ns >= trace.due_ns).all()
    assert (offered.answered_ns >= offered.sent_ns).all()
    assert len(offered.latency_ns) == trace.n
