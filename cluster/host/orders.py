"""Orders to a keeper: a socket in the cluster's folder, for its user alone.

    command -> keeper    {"order": "stop" | "start", "role": NAME}, a line
    keeper -> command    {"error": ""}, a line; or why the order was not followed

An order is followed or refused at once: that a role has ended or is ready is seen in the state
file. The socket is 0600 in a folder of 0700, and the kernel says whose process is at the other
end. The keeper never waits for that end: it has a loop to run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING

import orjson

from superserve.errors import ProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SOCKET = "orders"
"""The socket's name in the cluster's folder."""

_MAX_BYTES = 4_096
_MAX_WAITING = 16  # connections that have not said their line yet; an older one makes room
_ANSWER_S = 5.0


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """Give a path of the socket that fits into the 107 bytes of a socket's address, however deep it lies."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


class OrderDesk:
    """The keeper's end.

    Args:
        folder: The cluster's, held by the caller: a socket that is there is a dead keeper's.
        follow: Follows an order for a role, or raises ProcessError.
    """

    def __init__(self, folder: Path, follow: Callable[[str, str], None]) -> None:
        self._folder = folder
        self._follow = follow
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._waiting: dict[int, tuple[socket.socket, bytes]] = {}

    def open(self) -> None:
        """Listen; OSError if that is impossible."""
        (self._folder / SOCKET).unlink(missing_ok=True)
        with _short(self._folder) as path:
            old = os.umask(0o177)
            try:
                self._listener.bind(path)
            finally:
                os.umask(old)
        self._listener.listen(_MAX_WAITING)

    def close(self) -> None:
        """Stop listening, and remove the socket."""
        for number in list(self._waiting):
            self._let_go(number)
        self._listener.close()
        (self._folder / SOCKET).unlink(missing_ok=True)

    def descriptors(self) -> list[int]:
        """Return what to wait for: each is readable when `look` has something to do."""
        return [self._listener.fileno(), *self._waiting]

    def look(self) -> None:
        """Take what has come, and follow each order that is complete; never waits."""
        self._accept()
        for number in list(self._waiting):
            self._read(number)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                other, _ = self._listener.accept()
                other.setblocking(False)
                if _uid(other) not in (os.geteuid(), 0):
                    other.close()
                    continue
                if len(self._waiting) >= _MAX_WAITING:
                    self._let_go(next(iter(self._waiting)))
                self._waiting[other.fileno()] = (other, b"")

    def _read(self, number: int) -> None:
        other, text = self._waiting[number]
        try:
            chunk = other.recv(_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        text += chunk
        if chunk and not text.endswith(b"\n") and len(text) < _MAX_BYTES:
            self._waiting[number] = (other, text)
            return
        if text.endswith(b"\n"):
            with contextlib.suppress(OSError):  # it is gone, or does not listen
                other.send(orjson.dumps({"error": self._answer(text)}) + b"\n")
        self._let_go(number)

    def _answer(self, text: bytes) -> str:
        """Follow an order; return "", or why it was not followed."""
        try:
            body = orjson.loads(text)
            order, role = str(body["order"]), str(body["role"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return "an order: expected a JSON object with order and role"
        try:
            self._follow(order, role)
        except ProcessError as error:
            return str(error)
        return ""

    def _let_go(self, number: int) -> None:
        self._waiting.pop(number)[0].close()


def _uid(other: socket.socket) -> int:
    """Return whose process is at the other end, by the kernel's word."""
    credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def give_order(folder: Path, order: str, role: str) -> None:
    """Have the keeper of the cluster in `folder` follow an order; return once it has begun to.

    Raises:
        ProcessError: It refuses, does not answer, or is of a version that takes no orders.
    """
    try:
        with _short(folder) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as keeper:
            # With a timeout of Python's, connect would not wait for a place in the keeper's queue.
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_ANSWER_S), 0))
            keeper.connect(path)
            keeper.settimeout(_ANSWER_S)
            keeper.sendall(orjson.dumps({"order": order, "role": role}) + b"\n")
            text = keeper.recv(1 << 16)
    except OSError as error:
        raise ProcessError(f"{folder / SOCKET}: expected a keeper that takes orders: {error}") from error
    if not text:
        raise ProcessError(f"{folder / SOCKET}: the keeper ended without an answer")
    if why := str(orjson.loads(text)["error"]):
        raise ProcessError(why)
