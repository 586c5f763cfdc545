"""Handshakes that fail: why, and another try. ZeroMQ tells only who watches, and gives some up for good.

A router that refuses a key ends the session of whoever came with it: ZeroMQ does not try again, not even
once the key is listed. So a refused socket is connected anew, every second or so.
"""

from __future__ import annotations

import contextlib
import random
import secrets
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from superserve.errors import ConfigError
from superserve.net.sockets import connect_dealer, is_readable

if TYPE_CHECKING:
    from typing import Self

    from superserve.net.keys import PeerKeys

FAILED = int(
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
RETRY_NS = 1_000_000_000
"""Time between two tries of a socket that was refused; each costs the router a line in its log."""


def monitor_of(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], events: int
) -> zmq.Socket[bytes]:
    """Return a socket that tells a socket's events; it takes in any number of them unread."""
    address = f"inproc://monitor-{secrets.token_hex(8)}"
    socket.monitor(address, events)
    monitor = context.socket(zmq.PAIR)
    monitor.set(zmq.RCVHWM, 0)  # ZeroMQ's I/O thread would wait for a slow reader
    monitor.set(zmq.LINGER, 0)
    monitor.connect(address)
    return monitor


class Handshake:
    """Connects a DEALER, and watches whether it gets to talk to its router. For the socket's thread.

    Args:
        context: The socket's.
        endpoint: Where it connects.
        keys: What it shows the router.

    Attributes:
        socket: The DEALER; watched from before it connects, and closed by whoever uses it.
        failure: What is likely to be wrong, as of the last handshake that failed; None if none has.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: PeerKeys | None = None
    ) -> None:
        self.failure: str | None = None
        self._endpoint = endpoint
        self._keys = keys
        self._retry_ns: int | None = None
        monitors: list[zmq.Socket[bytes]] = []
        try:
            self.socket = connect_dealer(
                context, endpoint, keys, lambda socket: monitors.append(monitor_of(context, socket, FAILED))
            )
        except ConfigError:
            for monitor in monitors:
                monitor.close(0)
            raise
        self._monitor: zmq.Socket[bytes] | None = monitors[0]

    def look(self, now_ns: int) -> bool:
        """Take in what has failed, and try again if it is time; tell whether `failure` has changed."""
        if self._monitor is None:
            return False
        before = self.failure
        while is_readable(self._monitor):
            event = int(recv_monitor_message(self._monitor)["event"])
            self.failure = self._why(event)
            if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._retry_ns is None:
                self._retry_ns = now_ns + int(RETRY_NS * random.uniform(0.75, 1.25))
        if self._retry_ns is not None and now_ns >= self._retry_ns:
            self._retry_ns = None
            with contextlib.suppress(zmq.ZMQError):  # it may have let go of the endpoint itself
                self.socket.disconnect(self._endpoint)
            self.socket.connect(self._endpoint)
        return self.failure != before

    def succeeded(self) -> None:
        """Forget what failed. Without keys nothing more is watched: a router takes anybody, or nobody."""
        self.failure = None
        if self._keys is None:
            self.close()

    def _why(self, event: int) -> str:
        keys = self._keys
        if keys is None:
            return (
                f"{self._endpoint} broke off the handshake: it asks for keys, or is no router; give a key "
                f"file with keys=, --keys or SUPERSERVE_KEYS"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return (
                f"{self._endpoint} does not admit the key of {keys.path}: list its .pub file in the router's "
                f"folder of keys; this one is {keys.public}"
            )
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return (
                f"{self._endpoint} does not speak with keys, or is no router; start it with --keys, "
                f"or connect without ({keys.path})"
            )
        return (
            f"{self._endpoint} broke off the handshake: its key is probably not the one in {keys.path}, "
            f"router = {keys.router}; or it does not speak with keys"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; before the socket is closed."""
        if self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            try:
                self.socket.disable_monitor()
            finally:
                monitor.close(0)
