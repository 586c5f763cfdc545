"""A ROUTER on plain sockets: the same bytes as ZeroMQ's, in the thread that serves.

libzmq moves each message through a second thread: six system calls for a query and its answer, two wake-ups,
and an object for each frame. That is little for large messages, and most of the cost where a thousand callers
send one query each. Here a message costs one recv() and an answer one send(). Measured with an echo, 256
callers and one query a message: 14 us of processor time a message, through pyzmq 30.

For peers without keys, over TCP. Keys need libzmq, and `superserve.net.sockets` has it.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from superserve.clock import MS
from superserve.errors import ConfigError, WireError
from superserve.net import zmtp
from superserve.net.sockets import HIGH_WATER_MARK, KEEP_BYTES, MAX_MESSAGE_BYTES
from superserve.wire import MAX_FRAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from superserve.wire import Buffer

_READ_BYTES = 32_768
"""Read at once; what is missing of a longer frame is read to its place, without another copy."""
_AT_ONCE = 64
"""Connections read in a row, and connections accepted in a row."""
_BACKLOG = 100
_HANDSHAKE_NS = 30_000 * MS
_LOOK_NS = 1_000 * MS
_PING_NS, _DEAD_NS = 2_000 * MS, 12_000 * MS
"""Silence after which a peer is asked for a sign of life, and after which its connection is closed."""
_FIRST_KEY = 0x6B8B4567  # keys are five bytes like ZeroMQ's own

_GREETS, _READIES, _OPEN = 0, 1, 2


class _Peer:
    """One connection.

    Attributes:
        key: Names it to the caller, as ZeroMQ's routing id does.
        stage: What is expected of it: a greeting, READY, or messages.
        left: The beginning of a frame that has not arrived whole.
        frames: The whole frames of a message that has not.
        n_bytes: Their bytes.
        whole: Messages that wait for its next turn.
        large: Where the rest of a long frame is read to, `large_at` the next byte; None if none is under way.
        out: What the kernel has not taken yet.
        heard_ns: When something arrived last.
    """

    __slots__ = (
        "frames", "heard_ns", "key", "large", "large_at", "large_more", "left", "n_bytes", "out", "socket",
        "stage", "whole",
    )  # fmt: skip

    def __init__(self, key: bytes, link: socket.socket, now_ns: int) -> None:
        self.key = key
        self.socket = link
        self.stage = _GREETS
        self.left = b""
        self.frames: list[Buffer] = []
        self.n_bytes = 0
        self.large: memoryview | None = None
        self.large_at = 0
        self.large_more = False
        self.out: deque[Buffer] = deque()
        self.heard_ns = now_ns
        self.whole: deque[list[Buffer]] = deque()


class StreamRouter:
    """Accepts peers, and exchanges messages with them; one thread owns it.

    Args:
        endpoint: tcp://ADDRESS:PORT; port * or 0 lets the system pick, address * is every one of IPv4.

    Attributes:
        endpoint: Where peers connect.

    Raises:
        ConfigError: The endpoint is taken, or not of this machine.
    """

    def __init__(self, endpoint: str) -> None:
        host, port = _address(endpoint)
        try:
            self._listener = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
            )
        except OSError as error:
            raise ConfigError(f"bind {endpoint}: {error.strerror}") from error
        self._listener.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        self.endpoint = f"tcp://{shown}:{self._listener.getsockname()[1]}"
        self._poller = select.epoll()
        self._poller.register(self._listener.fileno(), select.EPOLLIN)
        self._listener_fd = self._listener.fileno()
        self._of_fd: dict[int, _Peer] = {}
        self._of_key: dict[bytes, _Peer] = {}
        self._n_keys = _FIRST_KEY
        self._look_ns = 0
        self._busy: deque[_Peer] = deque()

    def fileno(self) -> int:
        """Return a descriptor that is readable while anything is to be done."""
        return self._poller.fileno()

    # --- in -------------------------------------------------------------------------------

    def has_more(self) -> bool:
        """Whether messages have been read and wait here: `fileno` does not show these."""
        return bool(self._busy)

    def receive(self) -> list[tuple[bytes, list[Buffer]]] | None:
        """Return messages that have arrived, each with its peer's key; None if nothing has.

        At most one of each peer, from a few dozen peers: one that sends many gets no more turns than others.
        Call it until it returns None. The list is empty if no message is whole yet. A message of too many
        frames comes as an empty one.
        """
        found: list[tuple[bytes, list[Buffer]]] = []
        busy = self._busy
        events = self._poller.poll(0, _AT_ONCE)
        if not events and not busy:
            return None
        for _ in range(min(len(busy), _AT_ONCE)):
            peer = busy.popleft()
            if peer.whole:  # else it has been dropped
                found.append((peer.key, peer.whole.popleft()))
            if peer.whole:
                busy.append(peer)
        if events:
            self._serve(events, found)
        return found

    def _serve(self, events: list[tuple[int, int]], found: list[tuple[bytes, list[Buffer]]]) -> None:
        """Read from the connections that have something, and write to those that can take more."""
        now_ns = time.monotonic_ns()
        of_fd, can_read = self._of_fd, ~select.EPOLLOUT
        for fd, event in events:
            peer = of_fd.get(fd)
            if peer is None:
                if fd == self._listener_fd:
                    self._accept(now_ns)
                continue
            try:
                if event & can_read and not peer.whole:
                    self._read(peer, found, now_ns)
                if event & select.EPOLLOUT and fd in of_fd:
                    self._flush(peer)
            except (OSError, WireError):
                self._drop(peer)

    def _read(self, peer: _Peer, found: list[tuple[bytes, list[Buffer]]], now_ns: int) -> None:
        """Read what one connection has, once, and add its whole messages."""
        peer.heard_ns = now_ns
        if peer.large is not None:
            self._read_large(peer, peer.large, found)
            return
        data = peer.socket.recv(_READ_BYTES)
        n = len(data)
        # Nearly always: one short frame, which is a message.
        is_between = peer.stage == _OPEN and not (peer.left or peer.frames)
        if is_between and n > 2 and data[0] == 0 and n == data[1] + 2:
            found.append((peer.key, [data[2:]]))
            return
        if not n:
            self._drop(peer)
            return
        if peer.left:
            data = peer.left + data
            peer.left = b""
        if peer.stage == _GREETS:
            if len(data) < zmtp.GREETING_BYTES:
                peer.left = data
                return
            zmtp.check_greeting(data)
            peer.stage = _READIES
            data = data[zmtp.GREETING_BYTES :]
        self._cut(peer, data)
        self._share(peer, found)

    def _share(self, peer: _Peer, found: list[tuple[bytes, list[Buffer]]]) -> None:
        """Add the first of a peer's whole messages; the others wait for its next turns."""
        if peer.whole:
            found.append((peer.key, peer.whole.popleft()))
        if peer.whole:
            self._busy.append(peer)

    def _cut(self, peer: _Peer, data: bytes) -> None:
        """Take the frames in `data`, and keep what is left of it."""
        done = 0
        for flags, start, end, length in zmtp.frames_in(data):
            if length > MAX_MESSAGE_BYTES:
                raise WireError(f"a frame of {length} bytes")
            if end > len(data):
                if length >= _READ_BYTES and not flags & zmtp.COMMAND and peer.stage == _OPEN:
                    # Not a bytearray: its zeros would be written first, 10 us for an image.
                    large = np.empty(length, np.uint8).data
                    peer.large, peer.large_at = large, len(data) - start
                    large[: peer.large_at] = memoryview(data)[start:]
                    peer.large_more = bool(flags & zmtp.MORE)
                    return
                break
            done = end
            if flags & zmtp.COMMAND:
                self._command(peer, data[start:end])
            elif peer.stage != _OPEN:
                raise WireError("a message before READY")
            else:
                self._take_frame(peer, data[start:end], bool(flags & zmtp.MORE))
        peer.left = data[done:]

    def _read_large(self, peer: _Peer, large: memoryview, found: list[tuple[bytes, list[Buffer]]]) -> None:
        n = peer.socket.recv_into(large[peer.large_at :])
        if not n:
            self._drop(peer)
            return
        peer.large_at += n
        if peer.large_at == len(large):
            peer.large = None
            self._take_frame(peer, large, peer.large_more)
            self._share(peer, found)

    def _take_frame(self, peer: _Peer, frame: Buffer, more: bool) -> None:
        frames = peer.frames
        peer.n_bytes += len(frame)
        if peer.n_bytes > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        frames.append(frame)
        if more:
            if len(frames) > MAX_FRAMES + 1:
                frames.pop()  # the message is refused at its end
            return
        peer.frames, peer.n_bytes = [], 0
        peer.whole.append(frames if len(frames) <= MAX_FRAMES else [])

    def _command(self, peer: _Peer, command: bytes) -> None:
        if peer.stage != _READIES:
            if back := zmtp.pong_to(command):
                self._post(peer, back)
            return
        if zmtp.socket_type_of(command) not in zmtp.PEERS_OF_ROUTER:
            raise WireError("a socket that does not talk to a ROUTER")
        peer.stage = _OPEN

    # --- out ------------------------------------------------------------------------------

    def send(self, key: bytes, frames: Sequence[Buffer]) -> bool:
        """Send a message without waiting; False if the peer is gone, or leaves too many unread."""
        peer = self._of_key.get(key)
        if peer is None or len(peer.out) >= HIGH_WATER_MARK:
            return False
        frame = frames[0]
        n = len(frame)
        try:
            if n < 256 and len(frames) == 1:
                return self._post(peer, b"".join((zmtp.SHORT_HEADS[n], frame)))
            parts: list[Buffer] = []
            last = len(frames) - 1
            for i, frame in enumerate(frames):
                parts.append(zmtp.head_of(len(frame), more=i < last))
                parts.append(memoryview(frame))  # it may be ZeroMQ's own object
            if sum(map(len, parts)) < 2 * KEEP_BYTES:
                return self._post(peer, b"".join(parts))
            return self._post_parts(peer, parts)
        except OSError:
            self._drop(peer)
            return False

    def _post(self, peer: _Peer, data: bytes) -> bool:
        """Send bytes, or what the kernel takes of them, and keep the rest."""
        if peer.out:
            peer.out.append(data)
            return True
        try:
            n = peer.socket.send(data)
        except BlockingIOError:
            n = 0
        if n < len(data):
            peer.out.append(memoryview(data)[n:])
            self._poller.modify(peer.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return True

    def _post_parts(self, peer: _Peer, parts: list[Buffer]) -> bool:
        """Send buffers without putting them together; what the kernel does not take is kept, not copied."""
        was_idle = not peer.out
        peer.out.extend(parts)
        if was_idle:
            self._flush(peer)
            if peer.out:
                self._poller.modify(peer.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return True

    def _flush(self, peer: _Peer) -> None:
        """Send what has been kept for a peer."""
        out = peer.out
        while out:
            try:
                n = peer.socket.sendmsg([out[i] for i in range(min(len(out), _AT_ONCE))])
            except BlockingIOError:
                return
            while out and n >= len(out[0]):
                n -= len(out.popleft())
            if n:
                out[0] = memoryview(out[0])[n:]
        self._poller.modify(peer.socket.fileno(), select.EPOLLIN)

    # --- peers ----------------------------------------------------------------------------

    def _accept(self, now_ns: int) -> None:
        for _ in range(_AT_ONCE):
            try:
                link, _ = self._listener.accept()
            except OSError:
                return  # none is left, or no descriptor is: see `router.serve.doors`
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._n_keys = (self._n_keys + 1) & 0xFFFFFFFF
            peer = _Peer(b"\0" + self._n_keys.to_bytes(4, "big"), link, now_ns)
            self._of_fd[link.fileno()] = self._of_key[peer.key] = peer
            self._poller.register(link.fileno(), select.EPOLLIN)
            self._post(peer, zmtp.GREETING + zmtp.ready(b"ROUTER"))

    def look(self, now_ns: int) -> None:
        """Ask silent peers for a sign of life, and close the connections of dead ones, once a second."""
        if now_ns < self._look_ns:
            return
        self._look_ns = now_ns + _LOOK_NS
        for peer in list(self._of_fd.values()):
            silent_ns = now_ns - peer.heard_ns
            if silent_ns < _PING_NS:
                continue
            if silent_ns > (_DEAD_NS if peer.stage == _OPEN else _HANDSHAKE_NS):
                self._drop(peer)
            elif peer.stage == _OPEN and len(peer.out) < HIGH_WATER_MARK:
                try:
                    self._post(peer, zmtp.PING)
                except OSError:
                    self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        """Close a connection; a later send to its key fails, and so its owner finds out."""
        if self._of_key.pop(peer.key, None) is not None:
            del self._of_fd[peer.socket.fileno()]
            peer.socket.close()  # and so leaves the poller
            peer.out.clear()
            peer.whole.clear()

    def close(self, linger_ms: int = 0) -> None:
        """Close every connection; wait this long for what has been sent to leave this process."""
        end_s = time.monotonic() + linger_ms / 1e3
        self._listener.close()
        for peer in list(self._of_fd.values()):
            try:
                while peer.out and (left_s := end_s - time.monotonic()) > 0:
                    select.select((), (peer.socket,), (), left_s)
                    self._flush(peer)
            except OSError:
                pass  # it is gone
            self._drop(peer)
        self._poller.close()


def speaks(endpoint: str) -> bool:
    """Return whether a `StreamRouter` can bind here: TCP, with an address in numbers or *."""
    try:
        _address(endpoint)
    except ConfigError:
        return False
    return True


def _address(endpoint: str) -> tuple[str, int]:
    """Return address and port of an endpoint.

    Raises:
        ConfigError: It is of another form.
    """
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if host == "*":
        host = "0.0.0.0"  # noqa: S104  as asked for; `check_reach` has been passed
    is_ipv6 = host.startswith("[") and host.endswith("]")
    plain = host[1:-1] if is_ipv6 else host
    try:
        socket.inet_pton(socket.AF_INET6 if is_ipv6 else socket.AF_INET, plain)
        number = 0 if port == "*" else int(port)
    except (OSError, ValueError) as error:
        raise ConfigError(f"bind {endpoint}: expected tcp://ADDRESS:PORT") from error
    if scheme != "tcp" or not 0 <= number <= 65_535:
        raise ConfigError(f"bind {endpoint}: expected tcp://ADDRESS:PORT")
    return plain, number
