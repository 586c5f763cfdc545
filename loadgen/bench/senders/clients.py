"""A thousand small clients in one process: every query is one message, over its client's socket.

The generator, sockets and schedule are the same for the router and for the bare echo, so that their
rates can be compared. Arriving frames are stored with their instants and decoded after the run, so
that during it neither costs the generator more than the other.
"""

from __future__ import annotations

import abc
import select
import struct
import time
from typing import TYPE_CHECKING, Any

import zmq

from loadgen.live.sender import SenderTarget
from superserve import wire
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.net.connection import Connection, no_router
from superserve.net.sockets import connect_dealer
from superserve.wire import HAS_OUTPUT, Kind, Queries, Results

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from loadgen.live.sender import Records, SenderPlan

_WELCOME_NS = 20_000_000_000  # a thousand clients join one after another
_POLLIN = int(zmq.POLLIN)
_U64, _I64 = struct.Struct("<Q").pack, struct.Struct("<q").pack
_AT_ONCE = 256
"""Sockets drained in a row before the senders' turn."""


class SingleTarget(SenderTarget):
    """What the targets share that send each query by its own call."""

    at_once = 128
    idle_ns = MS

    @abc.abstractmethod
    def send_one(self, i: int, slack_ns: int) -> bool:
        """Send query `i`; False if it was refused."""

    @abc.abstractmethod
    def answered_ns(self) -> list[int]:
        """Return when each query's answer came; -1 where none did."""

    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send the queries one by one; return how many were taken."""
        taken = [i for i, slack_ns in enumerate(slacks_ns.tolist(), lo) if self.send_one(i, slack_ns)]
        self.records.sent_ns[taken] = now_ns
        return len(taken)

    def settle(self) -> None:
        """Enter the instants of the answers: these rows use nothing else of them."""
        self.records.answered_ns[:] = self.answered_ns()

    def wait(self, duration_ns: int) -> None:
        """Sleep; a sender that wakes for each query also wakes for answers."""
        if self.plan.least_sleep_ns:
            time.sleep(duration_ns / 1e9)
        else:
            self.wait_for_answers(duration_ns)

    def wait_for_answers(self, duration_ns: int) -> None:
        """Wait until an answer has come; sleep if another thread receives them."""
        time.sleep(duration_ns / 1e9)


class ManyTarget(SingleTarget):
    """Query i goes out over socket i modulo `plan.n_clients`.

    Args:
        plan: `target` is "many-echo" or "many".
        records: Where the outcome is entered.
        context: Of all the sockets.
    """

    def __init__(self, plan: SenderPlan, records: Records, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__(plan, records)
        context.set(zmq.MAX_SOCKETS, max(1023, 4 * plan.n_clients + 16))
        self._is_echo = plan.target == "many-echo"
        self._payload = bytes(plan.payload_bytes)
        self._endpoint = plan.endpoint
        self._arrived: list[tuple[int, bytes]] = []
        self._epoch = 0
        self._connections: list[Connection] = []
        if self._is_echo:
            self._sockets = [connect_dealer(context, plan.endpoint) for _ in range(plan.n_clients)]
        else:
            self._connections = [Connection(plan.endpoint, context) for _ in range(plan.n_clients)]
            self._sockets = [connection.socket for connection in self._connections]
        self._poller = select.epoll()
        self._of_fd = {socket.fileno(): socket for socket in self._sockets}
        for fd in self._of_fd:
            self._poller.register(fd, select.EPOLLIN | select.EPOLLET)
        self._ready: list[zmq.Socket[bytes]] = []

    def await_peer(self) -> None:
        """Exchange one message over every socket, so that all are connected before the run.

        Raises:
            ConfigError: One gets no answer.
        """
        if self._is_echo:
            for socket in self._sockets:
                socket.setsockopt(zmq.RCVTIMEO, 5_000)
                socket.send(b"hello")
            for socket in self._sockets:
                socket.recv()
            return
        give_up_ns = time.monotonic_ns() + _WELCOME_NS
        waiting = list(self._connections)
        while waiting:
            now_ns = time.monotonic_ns()
            if now_ns > give_up_ns:
                raise ConfigError(no_router(self._endpoint))
            for connection in waiting:
                connection.tick(now_ns)
                for _ in connection.receive():
                    pass
            waiting = [one for one in waiting if one.epoch is None or one.model is None]
            time.sleep(0.005)
        self._epoch = self._connections[0].epoch or 0

    def send_one(self, i: int, slack_ns: int) -> bool:
        """Send query `i` as one message."""
        socket = self._sockets[i % len(self._sockets)]
        message = Queries(
            self._epoch, time.monotonic_ns(), 1, _U64(i), _I64(slack_ns), len(self._payload), (self._payload,)
        )
        (frame,) = wire.encode_queries(message)  # one frame: a small payload shares it
        try:
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        if int(socket.getsockopt(zmq.EVENTS)) & _POLLIN:  # sending may swallow the descriptor's edge
            self._ready.append(socket)
        return True

    def take(self) -> None:
        """Receive what has come back."""
        of_fd = self._of_fd
        ready, self._ready = self._ready, []
        ready.extend([of_fd[fd] for fd, _ in self._poller.poll(0, _AT_ONCE)])
        for socket in ready:
            receive: Any = socket.recv
            try:
                while True:
                    frame = receive(zmq.NOBLOCK)
                    self._arrived.append((time.monotonic_ns(), frame))
                    self.records.n_answered += (
                        1 if self._is_echo or wire.kind_of(frame) == Kind.RESULTS else 0
                    )
            except zmq.Again:
                pass

    def wait_for_answers(self, duration_ns: int) -> None:
        """Wait until something has come back."""
        if not self._ready:
            self._ready.extend([self._of_fd[fd] for fd, _ in self._poller.poll(duration_ns / 1e9, _AT_ONCE)])

    def answered_ns(self) -> list[int]:
        """Return when each query's answer came; -1 if none with an output did."""
        answered_ns = [-1] * len(self.records.sent_ns)
        for now_ns, frame in self._arrived:
            if wire.kind_of(frame) not in (Kind.QUERIES, Kind.RESULTS):
                continue  # heartbeats
            message = wire.decode([frame])
            if isinstance(message, Queries):  # the echo sends back what it got
                answered_ns[wire.uint64s(message.ids)[0]] = now_ns
                continue
            assert isinstance(message, Results), "the kind says so"
            for group in message.groups:
                if group.status in HAS_OUTPUT:
                    for i in wire.uint64s(group.ids):
                        answered_ns[i] = now_ns
        return answered_ns

    def close(self) -> None:
        """Close every socket."""
        self._poller.close()
        for connection in self._connections:
            connection.close()
        for socket in self._sockets:
            socket.close(0)
