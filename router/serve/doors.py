"""Doors: the listening sockets of a router, shut while it has no file descriptors left.

At the limit accept() fails, the connection stays in the kernel's queue, and ZeroMQ's thread retries at once:
that takes a whole processor for as long as the limit lasts. `unbind` would end the spinning, but also every
connection that the listener has ever made. So some descriptors are kept in reserve. Once all others are in
use, the kernel drops attempts to connect, and the reserve serves the connections that are already in its
queue. Established connections are not affected.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from superserve.clock import MS
from superserve.net.context import has_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = logging.getLogger("router")

_LOOK_NS = 20 * MS  # between two checks: each makes and closes a descriptor
_SHUT_NS = 1_000 * MS
"""Doors stay shut for at least this long, so that they do not flap."""
_BACKLOG = 100
"""Connections that may wait to be accepted: ZeroMQ's own default."""
_SAY_NS = 60_000 * MS
"""Least time between two log lines about it."""

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = struct.pack("HBBI", 6, 0, 0, 0)  # BPF: return 0, keep no byte of the packet


class Doors:
    """Keeps descriptors in reserve, and refuses further TCP connections while all others are in use.

    Args:
        endpoints: Where the router listens, as bound; only tcp:// is affected.
    """

    def __init__(self, endpoints: Iterable[str]) -> None:
        self._listeners = [found for endpoint in endpoints for found in _listeners(endpoint)]
        self._reserve: list[int] = []
        self._is_shut = False
        self._look_ns = 0
        self._said_ns: int | None = None
        self._fill()

    def look(self, now_ns: int) -> None:
        """Shut the doors or open them again, if the next check is due."""
        if now_ns < self._look_ns:
            return
        self._look_ns = now_ns + _LOOK_NS
        if not self._is_shut and not has_descriptors(1):
            self._shut(now_ns)
        elif self._is_shut and has_descriptors(reserve() * 3 // 2):
            self._is_shut = False
            self._fill()
            for listener in self._listeners:
                listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def close(self) -> None:
        """Close the reserve and the listeners' copies."""
        self._give_up()
        for listener in self._listeners:
            listener.close()

    def _shut(self, now_ns: int) -> None:
        self._is_shut = True
        self._look_ns = now_ns + _SHUT_NS
        code = ctypes.create_string_buffer(_DROP_ALL)
        program = struct.pack("HL", 1, ctypes.addressof(code))
        for listener in self._listeners:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        self._give_up()
        if self._said_ns is None or now_ns - self._said_ns >= _SAY_NS:
            self._said_ns = now_ns
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            log.warning(
                "all file descriptors are in use: this process may open %d (RLIMIT_NOFILE, at most %d)."
                " No new connection is taken until some are free: raise the limit with `ulimit -n`",
                soft,
                hard,
            )

    def _fill(self) -> None:
        """Reserve what the present limit allows, and let no more connections wait than it can take."""
        size = reserve()
        for listener in self._listeners:
            listener.listen(min(_BACKLOG, size // 2 - 2))
        try:
            for _ in range(size):
                self._reserve.append(os.eventfd(0, os.EFD_CLOEXEC))
        except OSError:
            return  # at the limit from the start: the next check shuts the doors

    def _give_up(self) -> None:
        for fd in self._reserve:
            os.close(fd)
        self._reserve = []


def reserve() -> int:
    """Return how many descriptors to reserve: enough for two listeners' queues, or a quarter of the limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(256, soft // 4))


def raise_limit() -> None:
    """Raise this process's limit of open files to its hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listeners(endpoint: str) -> Iterator[socket.socket]:
    """Yield this process's listening sockets of a bound endpoint; ZeroMQ does not reveal them."""
    if not endpoint.startswith("tcp://"):
        return
    port = int(endpoint.rpartition(":")[2])
    seen: set[int] = set()
    for entry in list(Path("/proc/self/fd").iterdir()):
        found = _socket(int(entry.name))
        if found is None:
            continue
        inode = os.fstat(found.fileno()).st_ino
        if inode not in seen and _listens(found, port):
            seen.add(inode)
            yield found
        else:
            found.close()


def _socket(fd: int) -> socket.socket | None:
    """Return a second descriptor of a socket; None if `fd` is no socket, or closed by now."""
    try:
        second = os.dup(fd)
    except OSError:
        return None
    try:
        return socket.socket(fileno=second)
    except OSError:
        os.close(second)
        return None


def _listens(found: socket.socket, port: int) -> bool:
    try:
        is_listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return bool(is_listening) and found.family != socket.AF_UNIX and found.getsockname()[1] == port
    except OSError:
        return False
