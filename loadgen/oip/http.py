"""HTTP as a run's target: connections that a query has to itself, on one thread that waits for the sockets.

A query takes a connection that is free, or a new one up to a limit; if all are busy it counts as unsent:
an open loop does not wait.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import httptools
import orjson

from loadgen.live.records import Payloads
from loadgen.live.sender import SenderTarget
from loadgen.oip.answers import OF_HTTP, AnswerBook, read_http
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Status

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from loadgen.live.records import Records, SenderPlan
    from loadgen.oip.model import RequestMaker, TargetUrl

MAX_CONNECTIONS = 1_024
"""Of one sender."""
_WARM = 16
_RECEIVE_BYTES = 262_144
_CONNECT_S = 5.0


class Caller:
    """One connection, and the query that it carries."""

    __slots__ = ("_body", "_book", "_headers", "_is_complete", "_out", "_parser", "query", "sock")

    def __init__(self, sock: socket.socket, book: AnswerBook) -> None:
        self.sock = sock
        self.query = -1
        self._book = book
        self._out = b""
        self._parser: Any = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._is_complete = False

    def send(self, query: int, request: bytes) -> bool:
        """Send a query; return whether a part of it is left to send."""
        self.query, self._is_complete = query, False
        self._out = request
        return self.flush()

    def flush(self) -> bool:
        """Send what is left; return whether something still is."""
        try:
            n = self.sock.send(self._out)
        except BlockingIOError:
            n = 0
        self._out = self._out[n:]
        return bool(self._out)

    def receive(self) -> bool:
        """Take in what has come; return whether the answer is complete.

        Raises:
            ConnectionError: The server has closed, or does not speak HTTP.
        """
        data = self.sock.recv(_RECEIVE_BYTES)
        if not data:
            raise ConnectionError("the server closed the connection")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ConnectionError(f"malformed HTTP: {error}") from error
        return self._is_complete

    @property
    def is_kept(self) -> bool:
        """Whether the server keeps the connection."""
        return bool(self._parser.should_keep_alive())

    def on_message_begin(self) -> None:
        """An answer begins."""
        self._headers, self._body = {}, []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The answer is complete: enter it."""
        now_ns = time.monotonic_ns()
        self._is_complete = True
        status = self._parser.get_status_code()
        try:
            parameters, output, error = read_http(status, self._headers, b"".join(self._body))
            if not error:
                self._book.answered(self.query, parameters, output, now_ns)
                return
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, ValueError) as defect:
            error, status = f"the answer is none of the protocol: {defect!r}", 500
        self._book.failed(self.query, OF_HTTP.get(status, Status.FAILED), error, now_ns)


class HttpTarget(SenderTarget):
    """A server of the protocol over HTTP/1.1.

    Args:
        plan: The sender's.
        records: The sender's.
        url: The server.
        maker: Makes the requests.
    """

    at_once = 64
    idle_ns = MS

    def __init__(self, plan: SenderPlan, records: Records, url: TargetUrl, maker: RequestMaker) -> None:
        super().__init__(plan, records)
        self.payloads = Payloads(plan)
        self._maker = maker
        self._where = (url.host, url.port)
        self._book = AnswerBook(records, maker.model.subnets, keep_outputs=plan.keep_outputs)
        self.subnets = self._book.subnets
        self._epoll = select.epoll()
        self._callers: dict[int, Caller] = {}
        self._free: deque[Caller] = deque()
        for _ in range(_WARM):
            self._free.append(self._connected(_CONNECT_S))

    def _connected(self, timeout_s: float) -> Caller:
        """Return a new connection.

        Raises:
            ConfigError: Nothing listens there.
        """
        try:
            sock = socket.create_connection(self._where, timeout_s)
        except OSError as error:
            raise ConfigError(f"--target: {self._where[0]}:{self._where[1]}: {error}") from error
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        caller = Caller(sock, self._book)
        self._callers[sock.fileno()] = caller
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return caller

    def send(self, lo: int, slacks_ns: npt.NDArray[np.int64], now_ns: int) -> int:
        """Send each query on a connection of its own; return how many were taken."""
        n_taken = 0
        for i, slack_ns in enumerate(slacks_ns.tolist(), lo):
            caller = self._free_caller()
            if caller is None:
                self.records.reasons.setdefault("UNSENT", f"{MAX_CONNECTIONS} connections were busy")
                continue
            self.records.sent_ns[i] = now_ns
            n_taken += 1
            try:
                if caller.send(i, self._maker.http(self.payloads.packed(i, i + 1), slack_ns)):
                    self._epoll.modify(caller.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
            except OSError as error:
                self._drop(caller, repr(error))
        return n_taken

    def _free_caller(self) -> Caller | None:
        if self._free:
            return self._free.pop()
        if len(self._callers) >= MAX_CONNECTIONS:
            return None
        try:
            return self._connected(0.05)
        except ConfigError:
            return None

    def take(self) -> None:
        """Receive what has come."""
        self._handle(self._epoll.poll(0))

    def _handle(self, events: list[tuple[int, int]]) -> None:
        for fd, event in events:
            caller = self._callers[fd]
            try:
                if event & select.EPOLLOUT and not caller.flush():
                    self._epoll.modify(fd, select.EPOLLIN)
                if event & ~select.EPOLLOUT and caller.receive():
                    caller.query = -1
                    if caller.is_kept:
                        self._free.append(caller)
                    else:
                        self._drop(caller, "")
            except BlockingIOError:
                continue
            except OSError as error:
                self._drop(caller, repr(error))

    def _drop(self, caller: Caller, reason: str) -> None:
        """Close a connection; its query stays without an answer."""
        if caller.query >= 0:
            self._book.lost(caller.query, reason)
        if self._callers.pop(caller.sock.fileno(), None) is not None:
            self._epoll.unregister(caller.sock.fileno())
            if caller in self._free:
                self._free.remove(caller)
        caller.sock.close()

    def settle(self) -> None:
        """Nothing: answers are entered as they come."""

    def wait(self, duration_ns: int) -> None:
        """Wait this long, or for an answer."""
        self._handle(self._epoll.poll(duration_ns / 1e9))

    def close(self) -> None:
        """Close every connection."""
        for caller in self._callers.values():
            caller.sock.close()
        self._epoll.close()
