"""A sender with one query in each call: to the bare echo, or through `superserve.Client`.

Like `loadgen.live.sender` it is open loop: a schedule computed before the run, never moved, and
latency counted from the instant a query was due. Where `loadgen.live.sender` submits in bulk,
this one does what an application does: one message to the echo, or one `submit`, a query.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import orjson
import zmq

from loadgen.bench.senders.clients import ManyTarget
from superserve.client.aio import AsyncClient
from superserve.client.client import Client
from superserve.clock import MS
from superserve.errors import OverloadedError
from superserve.net.sockets import ZERO_COPY_BYTES, connect_dealer, wait
from superserve.roles.processes import announce_ready, die_with_parent

if TYPE_CHECKING:
    import numpy.typing as npt

    from superserve.client.aio import AsyncQueryFuture
    from superserve.client.futures import QueryFuture

_AT_ONCE = 128
"""Queries sent, and answers taken, in a row before the other's turn."""
_START_POLL_S = 0.005
_MAX_OUTSTANDING = 200_000
"""Far beyond what an SLO of tens of milliseconds leaves without an answer at any rate tried."""
_INDEX = struct.Struct("<Q")
COLUMNS = ("sent_ns", "answered_ns")
"""What a sender writes of each query: instants, -1 where it did not happen."""


@dataclass(frozen=True, slots=True)
class SinglePlan:
    """What one sender is to do; travels as JSON beside the arrays.

    Attributes:
        target: "echo", "client" or "async-client", or with `n_clients` sockets "many-echo"
            or "many".
        endpoint: Where to.
        name: This sender's name.
        folder: Holds `<name>-due_ns.npy` (int64 offsets, ascending); once all senders are ready
            also `start`, the instant to begin at. The columns are written there.
        slo_ns: From due to deadline.
        payload_bytes: Of each query; 8 at least.
        grace_ns: How long after the last deadline answers are awaited.
        least_sleep_ns: Never sleep less; 0 sleeps exactly to the next query. At high rates a
            sender that wakes for each query takes the processor from what is measured.
    """

    target: str
    endpoint: str
    name: str
    folder: str
    slo_ns: int
    payload_bytes: int = 64
    grace_ns: int = 500 * MS
    least_sleep_ns: int = 0
    n_clients: int = 1

    def path(self, what: str) -> Path:
        """Return the path of one of this sender's arrays."""
        return Path(self.folder) / f"{self.name}-{what}.npy"

    @property
    def start_path(self) -> Path:
        """The path of the instant to begin at."""
        return Path(self.folder) / "start"


class SenderTarget(Protocol):
    """Where queries go."""

    @property
    def n_ended(self) -> int:
        """Queries that will hear nothing more."""
        ...

    def send(self, i: int, slack_ns: int) -> bool:
        """Send query `i`; False if it was refused, which ends it."""
        ...

    def take(self) -> None:
        """Enter answers that have arrived, if this thread must."""
        ...

    def sleep(self, duration_ns: int, *, least_ns: int) -> None:
        """Sleep, or wait for answers, until there may be something to do."""
        ...

    def answered_ns(self, n: int) -> list[int]:
        """Return when the answer to each of the `n` queries came; -1 where none did."""
        ...


class EchoTarget:
    """One DEALER; each query is a message that begins with the query's index."""

    def __init__(self, plan: SinglePlan, context: zmq.Context[zmq.Socket[bytes]], n: int) -> None:
        self.n_ended = 0
        self._answered_ns = [-1] * n
        self._padding = bytes(plan.payload_bytes - _INDEX.size)
        self._is_large = plan.payload_bytes >= ZERO_COPY_BYTES
        self._socket = connect_dealer(context, plan.endpoint)

    def await_peer(self) -> None:
        """Exchange one message, so that the connection stands before the run."""
        self._socket.setsockopt(zmq.RCVTIMEO, 5_000)
        self._socket.send(b"hello")
        self._socket.recv()

    def send(self, i: int, slack_ns: int) -> bool:  # noqa: ARG002  the echo knows no deadlines
        """Send query `i` as one message; a large payload in a frame of its own, which is not copied."""
        head = _INDEX.pack(i)
        try:
            if self._is_large:
                self._socket.send_multipart([head, self._padding], zmq.NOBLOCK, copy=False)
            else:
                self._socket.send(head + self._padding, zmq.NOBLOCK)
        except zmq.Again:
            self.n_ended += 1
            return False
        return True

    def take(self) -> None:
        """Receive what has come back."""
        receive, answered_ns = self._socket.recv, self._answered_ns
        with contextlib.suppress(zmq.Again):
            for _ in range(_AT_ONCE):
                frame = receive(zmq.NOBLOCK)
                answered_ns[_INDEX.unpack_from(frame)[0]] = time.monotonic_ns()
                self.n_ended += 1
                if self._is_large:
                    receive(zmq.NOBLOCK, copy=False)

    def sleep(self, duration_ns: int, *, least_ns: int) -> None:
        """Wait for answers, or sleep the least time."""
        if least_ns:
            time.sleep(max(duration_ns, least_ns) / 1e9)
        else:
            wait((self._socket,), duration_ns)

    def answered_ns(self, n: int) -> list[int]:
        """Return when each message came back."""
        assert n == len(self._answered_ns), "one entry a query"
        return self._answered_ns

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(0)


class ClientTarget:
    """`Client.submit`, once a query; the replies, which say when they came, are read after the run."""

    def __init__(self, plan: SinglePlan, client: Client) -> None:
        self._n_refused = 0
        self._futures: dict[int, QueryFuture] = {}
        self._client = client
        self._payload = bytes(plan.payload_bytes)

    @property
    def n_ended(self) -> int:
        """Queries that will hear nothing more."""
        return self._n_refused + len(self._futures) - self._client.outstanding

    def send(self, i: int, slack_ns: int) -> bool:
        """Submit query `i`; False if the client holds too many without an answer."""
        try:
            # One that is already too late is submitted all the same: its load was due.
            self._futures[i] = self._client.submit(self._payload, slo_ms=max(slack_ns, 1_000) / MS)
        except OverloadedError:
            self._n_refused += 1
            return False
        return True

    def take(self) -> None:
        """Do nothing: the client's thread does it."""

    def sleep(self, duration_ns: int, *, least_ns: int) -> None:
        """Sleep."""
        time.sleep(max(duration_ns, least_ns) / 1e9)

    def answered_ns(self, n: int) -> list[int]:
        """Return when each query was answered, -1 where no output came."""
        answered_ns = [-1] * n
        for i, future in self._futures.items():
            answered_ns[i] = _answered_ns(future)
        return answered_ns


def _answered_ns(future: QueryFuture | AsyncQueryFuture) -> int:
    if not future.done() or future.cancelled() or future.exception() is not None:
        return -1
    return future.submitted_ns + round(future.result().latency_ms * MS)


async def submit_all(
    plan: SinglePlan, client: AsyncClient, due_ns: npt.NDArray[np.int64], start_ns: int
) -> tuple[list[int], list[int]]:
    """Submit every query at `start_ns` plus its offset, from one coroutine; as `send_all`.

    Returns:
        When each was submitted, and when answered: -1 where that did not happen.
    """
    due, n, i = (due_ns + start_ns).tolist(), len(due_ns), 0
    sent_ns = [-1] * n
    futures: dict[int, AsyncQueryFuture] = {}
    payload = bytes(plan.payload_bytes)
    give_up_ns = (due[-1] if n else start_ns) + plan.slo_ns + plan.grace_ns
    while i < n or (client.outstanding and time.monotonic_ns() < give_up_ns):
        now_ns = time.monotonic_ns()
        while i < n and due[i] <= now_ns:
            slack_ns = max(due[i] + plan.slo_ns - now_ns, 1_000)
            with contextlib.suppress(OverloadedError):
                futures[i] = client.submit(payload, slo_ms=slack_ns / MS)
                sent_ns[i] = now_ns
            i += 1
        sleep_ns = (due[i] if i < n else now_ns + MS) - time.monotonic_ns()
        await asyncio.sleep(max(sleep_ns, plan.least_sleep_ns) / 1e9)
    answered_ns = [-1] * n
    for i, future in futures.items():
        answered_ns[i] = _answered_ns(future)
    return sent_ns, answered_ns


def send_all(
    plan: SinglePlan, target: SenderTarget, due_ns: npt.NDArray[np.int64], start_ns: int
) -> list[int]:
    """Send every query at `start_ns` plus its offset; return when each was sent, once all have ended."""
    due, n, i = (due_ns + start_ns).tolist(), len(due_ns), 0
    sent_ns = [-1] * n
    give_up_ns = (due[-1] if n else start_ns) + plan.slo_ns + plan.grace_ns
    while True:
        now_ns = time.monotonic_ns()
        last = min(n, i + _AT_ONCE)
        while i < last and due[i] <= now_ns:
            if target.send(i, due[i] + plan.slo_ns - now_ns):
                sent_ns[i] = now_ns
            i += 1
        target.take()
        if i >= n and (target.n_ended >= n or now_ns >= give_up_ns):
            return sent_ns
        sleep_ns = (due[i] if i < n else now_ns + MS) - time.monotonic_ns()
        if sleep_ns > 0:
            target.sleep(sleep_ns, least_ns=plan.least_sleep_ns)


def run_single(plan: SinglePlan) -> None:
    """Connect, wait for the start, send the schedule, write the columns."""
    due_ns = np.load(plan.path("due_ns"))
    if plan.target == "async-client":
        sent_ns, answered_ns = asyncio.run(_run_async(plan, due_ns))
    else:
        sent_ns, answered_ns = _run_target(plan, due_ns)
    np.save(plan.path("answered_ns"), np.array(answered_ns, np.int64))
    np.save(plan.path("sent_ns"), np.array(sent_ns, np.int64))


def _run_target(plan: SinglePlan, due_ns: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    n = len(due_ns)
    with contextlib.ExitStack() as stack:
        target: SenderTarget
        if plan.target == "client":
            client = stack.enter_context(Client(plan.endpoint, max_outstanding=_MAX_OUTSTANDING))
            target = ClientTarget(plan, client)
        else:
            context = stack.enter_context(zmq.Context())
            echo = EchoTarget(plan, context, n) if plan.target == "echo" else ManyTarget(plan, context)
            stack.callback(echo.close)
            echo.await_peer()
            target = echo
        _get_ready(plan)
        sent_ns = send_all(plan, target, due_ns, _await_start(plan))
        # Now: closing the client ends what is left, which is no answer.
        return sent_ns, target.answered_ns(n)


async def _run_async(plan: SinglePlan, due_ns: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    async with AsyncClient(plan.endpoint, max_outstanding=_MAX_OUTSTANDING) as client:
        _get_ready(plan)
        start_ns = None
        while start_ns is None:
            await asyncio.sleep(_START_POLL_S)
            start_ns = _start_ns(plan)
        return await submit_all(plan, client, due_ns, start_ns)


def _get_ready(plan: SinglePlan) -> None:
    gc.collect()
    gc.freeze()
    gc.disable()  # what is kept until the end of the run would be walked again and again
    announce_ready({"name": plan.name})


def _start_ns(plan: SinglePlan) -> int | None:
    return int(plan.start_path.read_text()) if plan.start_path.exists() else None


def _await_start(plan: SinglePlan) -> int:
    """Return the instant to begin at, once it has been written; ends with the parent if it never is."""
    while (start_ns := _start_ns(plan)) is None:
        time.sleep(_START_POLL_S)
    return start_ns


def main(argv: list[str]) -> int:
    """Run the sender whose plan is the JSON file named on the command line."""
    die_with_parent()
    run_single(SinglePlan(**orjson.loads(Path(argv[0]).read_bytes())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
