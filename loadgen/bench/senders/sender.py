"""A sender with one query in each call: to the bare echo, or through `superserve.Client`.

The sender is `loadgen.live.sender`'s, with its schedule and its clock. That one submits in bulk; the targets
here do what an application does: one message to the echo, or one `submit`, for each query.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import zmq

from loadgen.bench.senders.clients import SingleTarget
from loadgen.live.records import Records
from loadgen.live.sender import Sender, main
from superserve.client.aio import AsyncClient
from superserve.client.client import Client
from superserve.clock import MS
from superserve.errors import OverloadedError
from superserve.net.context import new_context
from superserve.net.sockets import ZERO_COPY_BYTES, connect_dealer, wait

if TYPE_CHECKING:
    from loadgen.live.records import SenderPlan
    from superserve.client.aio import AsyncQueryFuture
    from superserve.client.futures import QueryFuture

_MAX_OUTSTANDING = 200_000
"""Far more than an SLO of tens of milliseconds leaves without an answer at any rate tried."""
_INDEX = struct.Struct("<Q")


class EchoTarget(SingleTarget):
    """One DEALER; each query is a message that begins with the query's index."""

    def __init__(self, plan: SenderPlan, records: Records, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__(plan, records)
        self._answered_ns = [-1] * len(records.sent_ns)
        self._padding = bytes(plan.payload_bytes - _INDEX.size)
        self._is_large = plan.payload_bytes >= ZERO_COPY_BYTES
        self._socket = connect_dealer(context, plan.endpoint)

    def await_peer(self) -> None:
        """Exchange one message, so that it is connected before the run."""
        self._socket.setsockopt(zmq.RCVTIMEO, 5_000)
        self._socket.send(b"hello")
        self._socket.recv()

    def send_one(self, i: int, slack_ns: int) -> bool:  # noqa: ARG002  the echo ignores deadlines
        """Send query `i` as one message; a large payload is a separate frame, which is not copied."""
        head = _INDEX.pack(i)
        try:
            if self._is_large:
                self._socket.send_multipart([head, self._padding], zmq.NOBLOCK, copy=False)
            else:
                self._socket.send(head + self._padding, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def take(self) -> None:
        """Receive what has come back."""
        receive, answered_ns = self._socket.recv, self._answered_ns
        with contextlib.suppress(zmq.Again):
            for _ in range(self.at_once):
                frame = receive(zmq.NOBLOCK)
                answered_ns[_INDEX.unpack_from(frame)[0]] = time.monotonic_ns()
                self.records.n_answered += 1
                if self._is_large:
                    receive(zmq.NOBLOCK, copy=False)

    def wait_for_answers(self, duration_ns: int) -> None:
        """Wait for something to come back."""
        wait((self._socket,), duration_ns)

    def answered_ns(self) -> list[int]:
        """Return when each message came back."""
        return self._answered_ns

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(0)


class ClientTarget(SingleTarget):
    """One `submit` of a client for each query; the replies, with their instants, are read after the run."""

    def __init__(self, plan: SenderPlan, records: Records, client: Client | AsyncClient) -> None:
        super().__init__(plan, records)
        self._futures: dict[int, QueryFuture | AsyncQueryFuture] = {}
        self._client = client
        self._payload = bytes(plan.payload_bytes)

    def send_one(self, i: int, slack_ns: int) -> bool:
        """Submit query `i`; False if the client holds too many without an answer."""
        try:
            # A query that is already too late is submitted too: its load was due.
            self._futures[i] = self._client.submit(self._payload, slo_ms=max(slack_ns, 1_000) / MS)
        except OverloadedError:
            return False
        return True

    def take(self) -> None:
        """Count only: the client itself receives the answers."""
        self.records.n_answered = len(self._futures) - self._client.outstanding

    def answered_ns(self) -> list[int]:
        """Return when each query was answered; -1 if no output came."""
        answered_ns = [-1] * len(self.records.sent_ns)
        for i, future in self._futures.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                answered_ns[i] = future.submitted_ns + round(future.result().latency_ms * MS)
        return answered_ns


def run_single(plan: SenderPlan) -> None:
    """Connect, wait for the coordinator's start, send the schedule, write the columns."""
    due_ns = np.load(plan.path("due"))
    records = Records(len(due_ns))
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(new_context())
        if plan.target == "async-client":
            asyncio.run(_play(plan, records, context))
            return
        target: SingleTarget
        if plan.target == "client":
            client = stack.enter_context(Client(plan.endpoint, max_outstanding=_MAX_OUTSTANDING))
            target = ClientTarget(plan, records, client)
        else:
            target = echo = EchoTarget(plan, records, context)
            stack.callback(echo.close)
            echo.await_peer()
        # To the end before the client closes: closing ends queries without an answer.
        for duration_ns in Sender(target, due_ns).play(context):
            target.wait(duration_ns)


async def _play(plan: SenderPlan, records: Records, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Run an AsyncClient from one coroutine, in the same loop as the client's own tasks."""
    async with AsyncClient(plan.endpoint, max_outstanding=_MAX_OUTSTANDING) as client:
        target = ClientTarget(plan, records, client)
        for duration_ns in Sender(target, np.load(plan.path("due"))).play(context):
            await asyncio.sleep(duration_ns / 1e9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], run_single))
