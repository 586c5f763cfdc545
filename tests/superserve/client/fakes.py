"""A router that sends what a test orders, in the test's own thread; and waiting without guessing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import zmq

from superserve.clock import SECOND
from superserve.net import sockets
from superserve.wire import (
    Control,
    Group,
    Kind,
    Message,
    Ping,
    Pong,
    Queries,
    Results,
    Status,
    decode,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from superserve.wire import Buffer

WAIT_S = 60.0  # reached only when something is broken
SUBNETS = [["small", 70.0], ["large", 80.0]]
M = TypeVar("M", bound=Message)


class FakeRouter:
    """A ROUTER that answers PINGs and HELLOs by itself, and everything else as the test orders.

    Attributes:
        model: What WELCOME says of the model.
        shared: Whether WELCOME asks for shared memory; None as a router of an older release.
        is_known: Whether clients have said HELLO to this one; until then they are refused.
        peer: Whoever spoke last.
    """

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*", *, epoch: int = 1) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket, self.endpoint = sockets.bind_router(self.context, endpoint)
        self.epoch = epoch
        self.model: dict[str, Any] | None = {"input": None, "output": None, "supernet": "fake"}
        self.shared: bool | None = None
        self.peers: set[bytes] = set()
        self.peer: Buffer = b""
        self.hellos: list[dict[str, Any]] = []

    def close(self) -> None:
        """Vanish without a word, as a killed router does."""
        self.socket.close(0)
        self.context.term()

    def send(self, message: Message) -> None:
        """Send to whoever spoke last."""
        assert sockets.send(self.socket, [self.peer, *encode(message)])

    def welcome(self) -> None:
        """Say WELCOME to whoever spoke last."""
        body = {"epoch": self.epoch, "model": self.model, "subnets": SUBNETS, "policy": "fake"}
        if self.shared is not None:
            body["shared"] = self.shared
        self.send(Control(Kind.WELCOME, body))

    def serve(self, until: Callable[[], bool]) -> None:
        """Greet and answer PINGs until `until`; other messages are dropped."""
        give_up_s = time.monotonic() + WAIT_S
        while not until():
            assert time.monotonic() < give_up_s, f"not within {WAIT_S} s"
            self._next(SECOND // 100)

    def expect(self, kind: type[M], where: Callable[[M], bool] = lambda _message: True) -> M:
        """Return the next message of `kind` that is as wanted; what comes before it is dropped."""
        give_up_s = time.monotonic() + WAIT_S
        while time.monotonic() < give_up_s:
            message = self._next(SECOND // 10)
            if isinstance(message, kind) and where(message):
                return message
        raise AssertionError(f"no {kind.__name__} within {WAIT_S} s")

    def answer(self, queries: Queries, status: Status = Status.OK, output: bytes = b"out!") -> None:
        """Answer every query of a message alike; `output` is each one's, or the reason."""
        self.send(Results(self.epoch, [group(queries.ids, status, output)]))

    def send_results(self, *groups: Group) -> None:
        """Answer with groups of the test's making."""
        self.send(Results(self.epoch, list(groups)))

    def _next(self, wait_ns: int) -> Message | None:
        sockets.wait([self.socket], wait_ns)
        frames = sockets.receive(self.socket)
        if frames is None:
            return None
        self.peer = frames[0]
        message = decode(frames[1:])
        key = bytes(self.peer)
        if isinstance(message, Control) and message.kind is Kind.HELLO:
            self.hellos.append(message.body)
            self.peers.add(key)
            self.welcome()
        elif key not in self.peers and not isinstance(message, Control):
            self.send(Control(Kind.REFUSED, {"code": "say-hello", "reason": "say HELLO"}))
            return None
        elif isinstance(message, Ping):
            self.send(Pong(message.stamp_ns, 0))
        return message


def group(ids: Buffer, status: Status, output: bytes) -> Group:
    """Return answers that share an end: `output` is each one's, or the reason of all."""
    n = len(ids) // 8
    has_output = status in (Status.OK, Status.LATE)
    return Group(
        n, status, 1, 4, 80.0, 1_000_000, 2_000_000, 3_000_000, 4_000_000, ids, len(output),
        output * n if has_output else output,
    )  # fmt: skip


def ids_of(queries: Queries) -> list[int]:
    """Return the ids in a QUERIES message."""
    ids: list[int] = np.frombuffer(queries.ids, "<u8").tolist()
    return ids


def next_message(socket: zmq.Socket[bytes]) -> list[Buffer]:
    """Return the frames of a socket's next message."""
    give_up_s = time.monotonic() + WAIT_S
    while (frames := sockets.receive(socket)) is None:
        assert time.monotonic() < give_up_s, f"no message within {WAIT_S} s"
        sockets.wait([socket], SECOND // 10)
    return frames


def poll(what: Callable[[], bool], wait_s: float = WAIT_S) -> None:
    """Wait until `what` holds, looking now and then; fail if it does not come to hold."""
    give_up_s = time.monotonic() + wait_s
    while not what():
        assert time.monotonic() < give_up_s, f"not within {wait_s} s"
        time.sleep(0.005)
