"""CPU time of large payloads, per query: of the whole path and of the bare echo, each in a closed loop.

A fixed number of queries is outstanding, so that other work on the machine makes a round longer, not dearer:
these figures are comparable where rates are not.
"""

from __future__ import annotations

import statistics
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil  # type: ignore[import-untyped]  # it has no stubs

from superserve.clock import MS, SECOND
from superserve.errors import ProcessError
from superserve.net.connection import Connection
from superserve.net.context import new_context
from superserve.net.sockets import Waiter, connect_dealer, is_readable
from superserve.wire import HAS_OUTPUT, Queries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from loadgen.live.run import Cluster

OUTSTANDING = 200
"""Queries without an answer: those of 36 ms at 5,500 queries/s."""
WARM_UP = 500
"""Queries before those that count: they fault the memory in, and the worker proves that it sees it."""
_SLACK_NS = 60 * SECOND
_STUCK_NS = 30 * SECOND
_INDEX = struct.Struct("<Q")


class PayloadCost(NamedTuple):
    """CPU time a query: of the process that sends, and of all processes, microseconds."""

    sender_us: float
    total_us: float


def payload_costs(
    echoes: Callable[[], AbstractContextManager[tuple[str, int]]],
    clusters: Callable[[], AbstractContextManager[Cluster]],
    n_bytes: int,
    n_queries: int,
    n_rounds: int = 3,
) -> dict[str, float]:
    """Return CPU us a query of all processes: of the echo, and of the path without and with shared memory.

    Args:
        echoes: Runs the bare echo; gives its endpoint and process.
        clusters: Runs a router and workers.
        n_bytes: Bytes of a payload.
        n_queries: Queries of a round.
        n_rounds: Rounds, interleaved; each figure is their median.

    Raises:
        ProcessError: A query got no output, or no answer.
    """
    found: dict[str, list[float]] = {"echo": [], "messages": [], "shared_memory": []}
    for _ in range(n_rounds):
        with echoes() as (endpoint, pid):
            found["echo"].append(echo_cost(endpoint, pid, n_bytes, n_queries).total_us)
        for name, is_shared in (("messages", False), ("shared_memory", True)):
            with clusters() as cluster:
                assert cluster.router is not None, "it is a private cluster"
                pids = [one.pid for one in (cluster.router, *cluster.workers)]
                cost = payload_cost(
                    cluster.client_endpoint, pids, n_bytes, n_queries, shared_memory=is_shared
                )
            found[name].append(cost.total_us)
    return {name: statistics.median(totals) for name, totals in found.items()}


def echo_cost(endpoint: str, pid: int, n_bytes: int, n_queries: int) -> PayloadCost:
    """Return the cost of messages to the bare echo and back; `pid` is its process.

    Raises:
        ProcessError: It stopped answering.
    """
    with new_context() as context:
        socket = connect_dealer(context, endpoint)
        padding = bytes(n_bytes - _INDEX.size)

        def send(lo: int, hi: int) -> bool:
            for i in range(lo, hi):
                socket.send_multipart([_INDEX.pack(i), padding], copy=False)
            return True

        def take() -> Iterator[int]:
            while is_readable(socket):
                socket.recv()
                socket.recv(copy=False)
                yield 1

        try:
            return _closed_loop(send, take, Waiter((socket,)), [pid], n_queries)
        finally:
            socket.close(0)


def payload_cost(
    endpoint: str, pids: Sequence[int], n_bytes: int, n_queries: int, *, shared_memory: bool
) -> PayloadCost:
    """Return the cost of queries through a router and its workers, whose processes are `pids`.

    Raises:
        ProcessError: A query got no output, or no answer.
    """
    with new_context() as context:
        connection = Connection(endpoint, context, shared_memory=shared_memory)
        payload = memoryview(bytes(n_bytes))

        def send(lo: int, hi: int) -> bool:
            connection.tick(time.monotonic_ns())
            if connection.epoch is None or connection.model is None:
                return False
            n = hi - lo
            slacks = np.full(n, _SLACK_NS, "<i8").tobytes()
            ids = np.arange(lo, hi, dtype="<u8").tobytes()
            return connection.send_queries(
                Queries(connection.epoch, time.monotonic_ns(), n, ids, slacks, n_bytes, [payload] * n, True)
            )

        def take() -> Iterator[int]:
            for results in connection.receive():
                for group in results.groups:
                    if group.status not in HAS_OUTPUT:
                        raise ProcessError(f"{endpoint}: expected outputs, got {bytes(group.output)!r}")
                    yield group.count

        try:
            return _closed_loop(send, take, Waiter((connection.socket,)), pids, n_queries)
        finally:
            connection.close()


def _closed_loop(
    send: Callable[[int, int], bool],
    take: Callable[[], Iterator[int]],
    waiter: Waiter,
    pids: Sequence[int],
    n_queries: int,
) -> PayloadCost:
    """Keep `OUTSTANDING` queries in flight until `n_queries` have been answered after the warm-up."""
    n_sent = n_answered = 0
    before: tuple[float, float] | None = None
    heard_ns = time.monotonic_ns()
    while n_answered < WARM_UP + n_queries:
        hi = min(n_answered + OUTSTANDING, WARM_UP + n_queries)
        if hi > n_sent and send(n_sent, hi):
            n_sent = hi
        n_new = sum(take())
        n_answered += n_new
        now_ns = time.monotonic_ns()
        if n_new:
            heard_ns = now_ns
        elif now_ns - heard_ns > _STUCK_NS:
            raise ProcessError(f"no answer for {_STUCK_NS / SECOND:g} s, after {n_answered} of them")
        else:
            waiter.wait(20 * MS)
        if before is None and n_answered >= WARM_UP:
            before, n_before = _cpu_s(pids), n_answered
    assert before is not None, "the warm-up is shorter"
    after, n = _cpu_s(pids), n_answered - n_before
    own_us, others_us = ((z - a) * 1e6 / n for a, z in zip(before, after, strict=True))
    return PayloadCost(own_us, own_us + others_us)


def _cpu_s(pids: Sequence[int]) -> tuple[float, float]:
    """Return the CPU time so far of this process, and of others together."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return time.process_time(), sum(one.user + one.system for one in times)
