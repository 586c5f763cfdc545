"""The whole path on loopback: a router, emulated GPUs, and one client that many threads or tasks share."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadgen.live.run import Emulation, emulated
from profiles.table import load_profile
from superserve.client.aio import AsyncClient
from superserve.client.client import Client
from superserve.client.session import GRACE_NS
from superserve.clock import SECOND
from superserve.errors import ExpiredError, InfeasibleError, InvalidQueryError, UnansweredError
from superserve.net.connection import ask_status
from tests.superserve.client.fakes import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadgen.live.run import Cluster
    from superserve.client.reply import Reply

pytestmark = pytest.mark.e2e

PROFILE = load_profile("cnn-8gpu-modelled")
SLO_MS = 20_000.0
N_THREADS = 32


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Yield a router with four emulated GPUs in two processes."""
    with emulated(Emulation(PROFILE.name, 4, n_processes=2)) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    """Yield a client of it."""
    with Client(cluster.client_endpoint) as client:
        yield client


def test_a_reply_is_of_the_profile(client: Client) -> None:
    """The subnet is one of the profile's, its accuracy the profiled one, the batch within bounds."""
    reply = client.infer(np.zeros((3, 8, 8), np.float32), slo_ms=SLO_MS)

    accuracies = {subnet.name: subnet.accuracy for subnet in PROFILE.subnets}
    assert reply.accuracy == pytest.approx(accuracies[reply.subnet])
    assert 1 <= reply.batch_size <= PROFILE.max_batch_size
    assert not reply.is_late
    timeline = reply.timeline
    parts = (timeline.queued_ms, timeline.to_start_ms, timeline.executing_ms, timeline.returning_ms)
    assert min(parts) >= 0
    assert timeline.executing_ms > 0
    assert sum(parts) <= reply.latency_ms


def test_thirty_two_threads_each_get_their_own_answers(client: Client, cluster: Cluster) -> None:
    """Mixed sizes from 32 threads at once, small and framed: every query is answered, once."""
    before = ask_status(cluster.client_endpoint).queries.answered.ok

    def submit(thread: int) -> int:
        sizes = (0, 1, 64 * thread, 200_000 if thread % 8 == 0 else 9)
        futures = [client.submit(bytes([thread]) * size, slo_ms=SLO_MS) for size in sizes]
        return sum(future.result(WAIT_S).batch_size > 0 for future in futures)

    with concurrent.futures.ThreadPoolExecutor(N_THREADS) as pool:
        assert sum(pool.map(submit, range(N_THREADS))) == 4 * N_THREADS
    assert client.outstanding == client.held_bytes == 0
    after = ask_status(cluster.client_endpoint)
    assert after.queries.answered.ok - before == 4 * N_THREADS
    assert after.queue.held_bytes == 0


def test_tasks_of_one_loop_each_get_their_own_answers(cluster: Cluster) -> None:
    """Fifty tasks, one query after another each, and one that is cancelled: nothing is lost or left."""

    async def main() -> None:
        async with AsyncClient(cluster.client_endpoint) as client:

            async def ask(task: int) -> list[Reply]:
                sizes = (0, 1, 64 * task, 200_000 if task % 10 == 0 else 9)
                return [await client.infer(bytes([task]) * size, slo_ms=SLO_MS) for size in sizes]

            replies = await asyncio.gather(*map(ask, range(50)))
            assert all(reply.batch_size > 0 for answers in replies for reply in answers)
            cancelled = asyncio.ensure_future(ask(1))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert client.outstanding == client.held_bytes == 0

    asyncio.run(main())
    assert ask_status(cluster.client_endpoint).queue.held_bytes == 0


def test_a_killed_router_costs_its_queries_no_more_than_their_slo() -> None:
    """SIGKILL: what it had ends without any grace, and what comes later by its deadline."""
    with emulated(Emulation(PROFILE.name, 1)) as cluster, Client(cluster.client_endpoint) as client:
        assert cluster.router is not None
        client.infer(b"image", slo_ms=SLO_MS)
        os.kill(cluster.router.pid, signal.SIGSTOP)  # so that surely none of these is answered
        futures = [client.submit(b"image", slo_ms=1_000.0) for _ in range(100)]
        submitted_s = time.monotonic()
        cluster.router.kill()
        for future in futures:
            with pytest.raises(UnansweredError, match="no router answers at"):
                future.result(WAIT_S)
        assert time.monotonic() - submitted_s < 1.0 + GRACE_NS / SECOND  # with the grace it takes longer
        with pytest.raises(UnansweredError, match="no router answers at"):
            client.infer(b"image", slo_ms=36.0)

        async def main() -> None:
            with pytest.raises(UnansweredError, match="no router answers at"):
                await AsyncClient(cluster.client_endpoint, connect_timeout_s=0.05).connect()

        asyncio.run(main())


def test_a_floor_is_kept_and_one_out_of_reach_is_refused(client: Client) -> None:
    """min_accuracy decides the subnet; the refusal names the best there is."""
    best = PROFILE.subnets[-1]
    assert client.infer(b"image", slo_ms=SLO_MS, min_accuracy=best.accuracy).subnet == best.name
    with pytest.raises(InvalidQueryError, match=f"the most accurate subnet has {best.accuracy}"):
        client.infer(b"image", slo_ms=SLO_MS, min_accuracy=99.9)


def test_a_slack_that_nobody_can_meet_is_refused(client: Client) -> None:
    """Shorter than the smallest subnet alone: INFEASIBLE with the numbers, if it came before its deadline."""
    with pytest.raises((InfeasibleError, ExpiredError), match=r"slack .* ms|the deadline passed"):
        client.infer(b"image", slo_ms=0.5)
