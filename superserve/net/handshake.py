"""Reports failed handshakes and retries them. ZeroMQ exposes failures only through a socket monitor.

If a router refuses a key, ZeroMQ ends the session and does not retry, not even once the key is listed. So a
refused socket is disconnected and connected again about every second.
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
"""Time between two tries of a refused socket; each try costs the router a line in its log."""


def monitor_of(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], events: int
) -> zmq.Socket[bytes]:
    """Return a socket that receives another socket's events; it queues any number of unread ones."""
    address = f"inproc://monitor-{secrets.token_hex(8)}"
    socket.monitor(address, events)
    monitor = context.socket(zmq.PAIR)
    monitor.set(zmq.RCVHWM, 0)  # no limit: with one, a slow reader would block ZeroMQ's I/O thread
    monitor.set(zmq.LINGER, 0)
    monitor.connect(address)
    return monitor


class Handshake:
    """Connects a DEALER, and watches whether the handshake with the router succeeds. For the socket's thread.

    Args:
        context: The socket's.
        endpoint: Where it connects.
        keys: The keys that it presents to the router.

    Attributes:
        socket: The DEALER; watched from before it connects. The caller closes it.
        failure: The likely cause of the last failed handshake; None if none has failed.
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
        """Read the monitor's events, retry if it is time, and return whether `failure` has changed."""
        if self._monitor is None:
            return False
        before = self.failure
        while is_readable(self._monitor):
            event = int(recv_monitor_message(self._monitor)["event"])
            self.failure = self._why(event)
            # Without detail means that the peer closed the connection: ZeroMQ retries that by itself.
            if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._retry_ns is None:
                # Jitter: peers that one change of keys has refused must not return in step.
                self._retry_ns = now_ns + int(RETRY_NS * random.uniform(0.75, 1.25))
        if self._retry_ns is not None and now_ns >= self._retry_ns:
            self._retry_ns = None
            with contextlib.suppress(zmq.ZMQError):  # ZeroMQ may have dropped the endpoint already
                self.socket.disconnect(self._endpoint)
            self.socket.connect(self._endpoint)
        return self.failure != before

    def succeeded(self) -> None:
        """Clear `failure`. Without keys, stop watching: such a router admits every peer, or none."""
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
        """Stop watching; call it before the socket is closed."""
        if self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            try:
                self.socket.disable_monitor()
            finally:
                monitor.close(0)
