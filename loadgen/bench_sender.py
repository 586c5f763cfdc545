"""A sender with one query in each call: to the bare echo, or through `superserve.Client`.

Like `loadgen.sender` it is open loop: a schedule computed before the run, never moved, and
latency counted from the instant a query was due. Where `loadgen.sender` submits in bulk,
this one does what an application does: one message to the echo, or one `submit`, a query.
"""

from __future__ import annotations

import contextlib
import gc
import struct
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson
import zmq

from loadgen.bench_clients import ManyTarget
from superserve.client import Client
from superserve.clock import MS
from superserve.errors import OverloadedError
from superserve.processes import announce_ready, die_with_parent
from superserve.sockets import ZERO_COPY_BYTES, connect_dealer, wait

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy.typing as npt

_AT_ONCE = 128
"""Queries sent, and answers taken, in a row before the other's turn."""
_START_POLL_S = 0.005
_INDEX = struct.Struct("<Q")
COLUMNS = ("sent_ns", "answered_ns")
"""What a sender writes of each query: instants, -1 where it did not happen."""


@dataclass(frozen=True, slots=True)
class SinglePlan:
    """What one sender is to do; travels as JSON beside the arrays.

    Attributes:
        target: "echo", "client", or with a socket for each of `n_clients` "many-echo" or "many".
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


class Target(Protocol):
    """Where queries go; `answered_ns` has -1 where no answer came."""

    @property
    def answered_ns(self) -> list[int]:
        """When each query's answer came."""
        ...

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


class EchoTarget:
    """One DEALER; each query is a message that begins with the query's index."""

    def __init__(self, plan: SinglePlan, context: zmq.Context[zmq.Socket[bytes]], n: int) -> None:
        self.n_ended = 0
        self.answered_ns = [-1] * n
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
        receive, answered_ns = self._socket.recv, self.answered_ns
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

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(0)


class ClientTarget:
    """`Client.submit`, once a query; answers are counted by callbacks on the client's thread."""

    def __init__(self, plan: SinglePlan, client: Client, n: int) -> None:
        self.n_refused = 0
        self.n_called = 0
        self.answered_ns = [-1] * n
        self._client = client
        self._payload = bytes(plan.payload_bytes)

    @property
    def n_ended(self) -> int:
        """Queries that will hear nothing more; each of the two counts has one thread that writes it."""
        return self.n_refused + self.n_called

    def send(self, i: int, slack_ns: int) -> bool:
        """Submit query `i`; False if the client holds too many without an answer."""
        try:
            # One that is already too late is submitted all the same: its load was due.
            future = self._client.submit(self._payload, slo_ms=max(slack_ns, 1_000) / MS)
        except OverloadedError:
            self.n_refused += 1
            return False
        future.add_done_callback(partial(self._on_done, i))
        return True

    def _on_done(self, i: int, future: Future[Any]) -> None:
        if future.exception() is None:
            self.answered_ns[i] = time.monotonic_ns()
        self.n_called += 1

    def take(self) -> None:
        """Do nothing: the callbacks do it."""

    def sleep(self, duration_ns: int, *, least_ns: int) -> None:
        """Sleep."""
        time.sleep(max(duration_ns, least_ns) / 1e9)


def send_all(plan: SinglePlan, target: Target, due_ns: npt.NDArray[np.int64], start_ns: int) -> list[int]:
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
    with contextlib.ExitStack() as stack:
        target: Target
        if plan.target == "echo":
            echo = EchoTarget(plan, stack.enter_context(zmq.Context()), len(due_ns))
            stack.callback(echo.close)
            echo.await_peer()
            target = echo
        elif plan.target in ("many-echo", "many"):
            many = ManyTarget(plan, stack.enter_context(zmq.Context()), len(due_ns))
            stack.callback(many.close)
            many.await_peer()
            target = many
        else:
            target = ClientTarget(plan, stack.enter_context(Client(plan.endpoint)), len(due_ns))
        gc.collect()
        gc.freeze()
        announce_ready({"name": plan.name})
        sent_ns = send_all(plan, target, due_ns, _await_start(plan))
        # Copied now: closing the client ends what is left, which is no answer.
        answered_ns = np.array(target.answered_ns, np.int64)
    np.save(plan.path("answered_ns"), answered_ns)
    np.save(plan.path("sent_ns"), np.array(sent_ns, np.int64))


def _await_start(plan: SinglePlan) -> int:
    """Return the instant to begin at, once it has been written; ends with the parent if it never is."""
    while not plan.start_path.exists():
        time.sleep(_START_POLL_S)
    return int(plan.start_path.read_text())


def main(argv: list[str]) -> int:
    """Run the sender whose plan is the JSON file named on the command line."""
    die_with_parent()
    run_single(SinglePlan(**orjson.loads(Path(argv[0]).read_bytes())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
