"""The gate of a router with keys: which peers may connect, and whose messages still count.

Its own thread answers ZeroMQ's key requests (ZAP), watches failed handshakes, and checks the folder of keys
four times a second. The router's sockets check every message that arrives: ZeroMQ attaches the key that the
connection was made with. So a key that is no longer listed is worth nothing from the next message on, for
any routing id of the connection, and whichever peer had that id before.
"""

from __future__ import annotations

import logging
import os
import socket as os_socket
import threading
import time
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from superserve.errors import ConfigError
from superserve.net.handshake import FAILED, monitor_of
from superserve.net.keys import read_ring, router_keys, signature
from superserve.net.sockets import is_local, is_readable
from superserve.status import ListedKeys

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from superserve.net.keys import Ring

log = logging.getLogger("router")

CLIENT_DOMAIN = "superserve.client"
WORKER_DOMAIN = "superserve.worker"

LOOK_EVERY_MS = 250
"""How often the folder is checked: at most this long after it leaves its list, a key is cut off."""

QUIET_NS = 10_000_000_000
"""A peer that fails again within this time is counted, not logged."""

_GONE = "an address that was gone too soon"
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_MAX_REMEMBERED = 1_024  # peers whose last warning is remembered: a bound on what strangers can make us keep
_REFUSED_AUTH = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_WATCHED = FAILED | int(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
_WORDS = {
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): "it has another key for this router than the router's own",
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): "it came without keys",
}


def check_reach(name: str, endpoint: str) -> None:
    """Refuse to bind a socket without keys if other machines can reach it.

    Raises:
            ConfigError: Other machines can reach the endpoint.
    """
    if "://" in endpoint and not is_local(endpoint):  # without a scheme, bind fails and reports that
        raise ConfigError(
            f"{name} {endpoint}: other machines can reach it, and anyone there could send queries or serve "
            f"them: give --keys FOLDER (from `cluster keys make`), or --security none"
        )


class Door:
    """Checks each message of one of the router's sockets; for the thread that receives.

    Attributes:
        listed: The names of the admitted public keys.
        user: The public key of the last admitted message.
        n_unauthenticated: Messages without a key.
        n_revoked: Messages with a key that is not listed any more.
    """

    __slots__ = ("listed", "n_revoked", "n_unauthenticated", "user")

    def __init__(self) -> None:
        self.listed: Mapping[str, str] = {}
        self.user = ""
        self.n_unauthenticated = 0
        self.n_revoked = 0

    def admits(self, frame: zmq.Frame) -> bool:
        """Return whether the message that begins with `frame` may be read; takes 0.5 us."""
        try:
            user = str(frame.get("User-Id"))
        except zmq.ZMQError:
            self.n_unauthenticated += 1
            return False
        if user not in self.listed:
            self.n_revoked += 1
            return False
        self.user = user
        return True


class Gate:
    """The doors of a router. Call `open()` before its sockets are bound, `close()` after they are closed.

    Args:
        context: The router's.
        folder: Its folder of keys; see `superserve.net.keys`.
        secret: The file with its secret; None for `router.key` in the folder.

    Attributes:
        keys: The router's own keys.
        clients: The door of the client socket.
        workers: The door of the worker socket.
        operators: The clients that may drain.
        version: Changes whenever the lists do.
        n_failed: Failed handshakes.

    Raises:
        ConfigError: The folder is not a router's, or lists a malformed key.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, secret: Path | None = None
    ) -> None:
        self.keys = router_keys(folder, secret)
        self.clients, self.workers = Door(), Door()
        self.operators: Mapping[str, str] = {}
        self.version = 0
        self.n_failed = 0
        self._context = context
        self._folder = folder
        try:
            self._signature = signature(folder)
            ring, problems = read_ring(folder)
        except OSError as error:
            raise ConfigError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
        if problems:
            raise ConfigError("; ".join(problems))
        self._take(ring)
        self._wake_fd = -1
        self._monitors: list[_Monitor] = []
        self._voice = _Voice()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Bind the ZAP handler: sockets that are bound after this use it."""
        self._zap = self._context.socket(zmq.REP)
        self._zap.set(zmq.LINGER, 0)
        self._zap.bind(_ZAP_ENDPOINT)

    def start(self, sockets: Mapping[str, zmq.Socket[bytes]]) -> None:
        """Watch sockets, given by what their peers are called, and answer from a thread from now on."""
        self._monitors = [
            _Monitor(what, monitor_of(self._context, socket, _WATCHED), self._voice)
            for what, socket in sockets.items()
        ]
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and close the gate's sockets; the context can then be terminated."""
        if self._thread is not None:
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join()
            os.close(self._wake_fd)
        for monitor in self._monitors:
            monitor.socket.close(0)
        self._zap.close(0)

    def counts(self) -> dict[str, int]:
        """Return how much was refused, for STATUS."""
        doors = (self.clients, self.workers)
        return {
            "unauthenticated_frames": sum(door.n_unauthenticated for door in doors),
            "revoked_frames": sum(door.n_revoked for door in doors),
            "handshake_failures": self.n_failed,
        }

    def listed(self) -> ListedKeys:
        """Return the listed names, for STATUS."""
        operators = sorted(self.operators.values())
        return ListedKeys(
            clients=tuple(sorted(set(self.clients.listed.values()) - set(operators))),
            workers=tuple(sorted(self.workers.listed.values())),
            operators=tuple(operators),
        )

    # --- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)
        for monitor in self._monitors:
            poller.register(monitor.socket, zmq.POLLIN)
        look_ns = 0
        while True:
            ready = dict(poller.poll(LOOK_EVERY_MS))
            if self._wake_fd in ready:
                return
            if self._zap in ready:
                self._answer()
            for monitor in self._monitors:
                if monitor.socket in ready:
                    self.n_failed += monitor.take()
            if (now_ns := time.monotonic_ns()) >= look_ns:
                look_ns = now_ns + LOOK_EVERY_MS * 1_000_000
                self._look()

    def _answer(self) -> None:
        """Answer one ZAP request: admit only CURVE keys on that socket's list."""
        request = self._zap.recv_multipart()
        version, number, domain, address, _, mechanism, *credentials = request
        doors = {CLIENT_DOMAIN.encode(): self.clients, WORKER_DOMAIN.encode(): self.workers}
        door = doors.get(domain)
        public = ""
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            public = z85.encode(credentials[0]).decode("ascii")
        if door is not None and public in door.listed:
            answer = [b"200", b"listed", public.encode("ascii")]
        else:
            answer = [b"400", b"not listed", b""]
            what = "worker" if door is self.workers else "client"
            peer = address.decode("ascii", "replace") or "this machine"
            self._voice.warn(
                f"{what} {peer}", f"{what} at {peer} refused: the key {public or 'it lacks'} is not listed"
            )
        self._zap.send_multipart([version, number, *answer, b""])

    def _look(self) -> None:
        """Load the folder's lists if they changed. If they cannot be read, the last ones stay in force."""
        try:
            found = signature(self._folder)
            if found == self._signature:
                return
            ring, problems = read_ring(self._folder)
        except OSError as error:
            self._voice.warn("", f"{self._folder}: cannot be read, the last lists stay in force: {error}")
            return
        self._signature = found
        for problem in problems:
            log.warning("left out: %s", problem)
        self._take(ring)
        self.version += 1
        log.info(
            "keys: %d clients, %d workers and %d operators are listed",
            len(ring.clients), len(ring.workers), len(ring.operators),
        )  # fmt: skip

    def _take(self, ring: Ring) -> None:
        self.operators = ring.operators
        self.clients.listed = {**ring.clients, **ring.operators}
        self.workers.listed = ring.workers


class _Voice:
    """Warns about each peer and fault once in a while: twenty retries a second must not fill the disk."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[int, int]] = {}

    def warn(self, peer: str, text: str) -> None:
        """Log `text`, or count it if `peer` was warned about recently."""
        now_ns = time.monotonic_ns()
        said_ns, n_unsaid = self._said.get(peer, (now_ns - QUIET_NS, 0))
        if now_ns - said_ns < QUIET_NS:
            self._said[peer] = (said_ns, n_unsaid + 1)
            return
        if peer not in self._said and len(self._said) >= _MAX_REMEMBERED:
            self._said.clear()
        self._said[peer] = (now_ns, 0)
        log.warning("%s%s", text, f" ({n_unsaid} more since)" if n_unsaid else "")


class _Monitor:
    """Counts one socket's failed handshakes, and finds out whose they were.

    ZeroMQ does not name the peer of a failure or a disconnection. But it reports the file descriptor of each
    connection that it accepts, and one whose handshake fails ends right after. A connection that ends before
    this thread has looked, as can happen on the same machine, has no name.
    """

    def __init__(self, what: str, socket: zmq.Socket[bytes], voice: _Voice) -> None:
        self.socket = socket
        self._what = what
        self._voice = voice
        self._peers: dict[int, str] = {}
        self._why: str | None = None

    def take(self) -> int:
        """Handle the events so far; return how many handshakes have failed."""
        n_failed = 0
        while is_readable(self.socket):
            told = recv_monitor_message(self.socket)
            event, value = int(told["event"]), int(told["value"])
            if event == zmq.EVENT_ACCEPTED:
                self._peers[value] = _peer_of(value)
            elif event == zmq.EVENT_DISCONNECTED:
                peer, why, self._why = self._peers.pop(value, _GONE), self._why, None
                if why is not None:
                    who = f"{self._what} handshake {_host_of(peer)}"
                    self._voice.warn(who, f"{self._what} at {peer}: handshake failed: {why}")
            elif event & FAILED:
                n_failed += 1
                if event != _REFUSED_AUTH:  # `_answer` has already logged it
                    self._why = _WORDS.get(value, f"it broke off or does not speak our protocol ({value})")
        return n_failed


def _peer_of(fd: int) -> str:
    """Return the address at the other end, if the connection still exists."""
    try:
        own = os.dup(fd)  # ZeroMQ may close its descriptor at any moment
    except OSError:
        return _GONE
    try:
        with os_socket.socket(fileno=own) as copy:
            own = -1  # closed with the socket; if the number now belongs to a file, getpeername fails
            address = copy.getpeername()
    except (OSError, ValueError):
        return _GONE
    finally:
        if own >= 0:
            os.close(own)
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "this machine"


def _host_of(peer: str) -> str:
    return peer.rpartition(":")[0] or peer
