"""HTTP on asyncio: sockets and timers around `Exchange`, and a drain that fails no request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from gateway.http.exchange import MAX_PIPELINED, Exchange, HttpLimits, failure
from gateway.v2.verdicts import BROKEN, TOO_SLOW, UNAVAILABLE, GatewayError

if TYPE_CHECKING:
    import socket
    import ssl

    from gateway.calls.backend import CallUnderWay
    from gateway.calls.board import Board
    from gateway.http.exchange import AnswerPlace, HttpAnswer, HttpRequest
    from gateway.http.routes import Routes

log = logging.getLogger(__name__)

MAX_HELD_BYTES = 1 << 30
"""Most bytes of bodies that are coming, in one process; a body that would be the only one is always taken."""
_S = 1_000_000_000
_SWEEP_S = 0.5
_BUFFER_BYTES = 65_536
_LINGER_NS = 2 * _S
_MOST_DISCARDED = 64 << 20
_BACKLOG = 4_096


class HttpConnection(asyncio.BufferedProtocol):
    """One caller's connection.

    Bytes go into a buffer that all connections share: the loop fills it and hands it over at once. A body of
    known length goes straight into the request's own.
    """

    __slots__ = (
        "_calls", "_direct", "_discarded", "_exchange", "_held_bytes", "_is_paused", "_name", "_server",
        "_transport", "_write_stuck_ns", "idle_since_ns", "lingering_since_ns",
    )  # fmt: skip

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._exchange = Exchange(
            server.limits, self._on_request, self._write, time.monotonic_ns, self._admit
        )
        self._held_bytes = 0
        self._calls: set[CallUnderWay] = set()
        self._direct = False
        self._discarded = 0
        self._is_paused = False
        self._name: str | None = None
        self._write_stuck_ns = 0
        self.idle_since_ns = time.monotonic_ns()
        self.lingering_since_ns = 0

    # --- what asyncio calls --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands, and TLS too if it is used."""
        self._transport = transport  # type: ignore[assignment]  # of a stream, as `create_server` makes them
        self._name = _common_name(transport.get_extra_info("peercert"))
        self._server.opened(self)
        if self._server.is_draining:
            self._exchange.drain()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's interface
        """The caller is gone: what it asked for is cancelled."""
        self._server.closed(self)
        calls, self._calls = self._calls, set()
        self._release()
        self._server.board.add("in_flight", -len(calls))
        for call in calls:
            self._server.board.count_status(499)
            call.cancel()
        self._transport = None

    def eof_received(self) -> bool:
        """The caller sends nothing more: a client that closed looks the same as one that still reads."""
        return False

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  asyncio's interface
        """Return where the next bytes go."""
        room = self._exchange.body_room()
        self._direct = room is not None
        return self._server.buffer if room is None else room

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        exchange = self._exchange
        self._server.board.add("bytes_in", nbytes)
        if exchange.is_closing:
            self._discarded += nbytes
            if self._discarded > _MOST_DISCARDED and self._transport is not None:
                self._transport.abort()
            return
        if self._direct:
            exchange.body_received(nbytes)
        else:
            exchange.feed(self._server.buffer[:nbytes])
        if exchange.refused is not None:
            self._server.board.count_status(exchange.refused.verdict.http)
        self._after()

    def pause_writing(self) -> None:
        """The caller does not read: read no more from it."""
        self._write_stuck_ns = time.monotonic_ns()
        self._pace()

    def resume_writing(self) -> None:
        """It reads again."""
        self._write_stuck_ns = 0
        self._pace()

    # --- what the exchange calls ---------------------------------------------------------

    def _admit(self, request: HttpRequest, n_bytes: int | None) -> None:
        """Refuse a body before it comes: of a caller who is not known, or one too many at a time.

        Raises:
            GatewayError: It is not wanted.
        """
        self._server.routes.check_caller(request, self._name)
        self._held_bytes = self._server.limits.body_bytes if n_bytes is None else n_bytes
        self._server.hold(self._held_bytes)

    def _release(self) -> None:
        """Give back the room of a body that has come, or that will not."""
        held, self._held_bytes = self._held_bytes, 0
        self._server.held_bytes -= held

    def _on_request(self, request: HttpRequest, place: AnswerPlace) -> None:
        self._release()
        box: list[CallUnderWay] = []

        def answered(answer: HttpAnswer) -> None:
            if box:
                self._calls.discard(box[0])
                self._server.board.add("in_flight", -1)
            if self._transport is not None:
                self._exchange.answer(place, answer)
                self._after()

        try:
            call = self._server.routes.handle(request, self._name, answered)
        except Exception:  # a defect must cost this request an answer, not the process its connections
            log.exception("%s %r failed", request.method, request.target[:200])
            self._server.board.count_status(BROKEN.http)
            answered(failure(BROKEN.http, "internal error: see the gateway's log"))
            return
        if call is not None:
            box.append(call)
            self._calls.add(call)
            self._server.board.add("in_flight")

    def _write(self, parts: list[bytes | memoryview]) -> None:
        if self._transport is None:
            return
        self._server.board.add("bytes_out", sum([len(part) for part in parts]))
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    # --- pace and end --------------------------------------------------------------------

    def _after(self) -> None:
        """Close a connection that is done, or hold it back."""
        exchange, transport = self._exchange, self._transport
        if transport is None:
            return
        if exchange.is_done:
            self._end(transport)
            return
        if exchange.is_idle:
            self.idle_since_ns = time.monotonic_ns()
        if exchange.n_pending >= MAX_PIPELINED or self._is_paused:
            self._pace()

    def _end(self, transport: asyncio.Transport) -> None:
        """Close: at once, or, while a refused caller may still send, once it has seen the answer."""
        if self._exchange.refused is None:
            transport.close()
        elif not self.lingering_since_ns:
            # Closed with bytes unread, TCP would reset the connection, and the answer could be lost.
            self.lingering_since_ns = time.monotonic_ns()
            if transport.can_write_eof():
                transport.write_eof()

    def _pace(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        wants = bool(self._write_stuck_ns) or self._exchange.n_pending >= MAX_PIPELINED
        if wants != self._is_paused:
            self._is_paused = wants
            (transport.pause_reading if wants else transport.resume_reading)()

    def drain(self) -> None:
        """Answer what still comes with `Connection: close`."""
        self._exchange.drain()

    def close_if_idle(self) -> None:
        """Close a connection on which nothing is under way."""
        if self._exchange.is_idle and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def look(self, now_ns: int) -> None:
        """Close what takes too long."""
        exchange, limits = self._exchange, self._server.limits
        if self._write_stuck_ns and now_ns - self._write_stuck_ns > limits.write_s * _S:
            self.abort()
        elif self.lingering_since_ns:
            if now_ns - self.lingering_since_ns > _LINGER_NS:
                self.abort()
        elif exchange.head_since_ns and now_ns - exchange.head_since_ns > limits.head_s * _S:
            self._refuse(f"expected a complete head within {limits.head_s:g} s")
        elif exchange.body_since_ns and now_ns - exchange.body_since_ns > limits.body_s * _S:
            self._refuse(f"expected a complete body within {limits.body_s:g} s")
        elif exchange.is_idle and now_ns - self.idle_since_ns > limits.idle_s * _S:
            self.close_if_idle()

    def _refuse(self, message: str) -> None:
        self._server.board.count_status(TOO_SLOW.http)
        self._exchange.refuse(GatewayError(TOO_SLOW, message))
        self._after()


def _common_name(certificate: Any) -> str | None:
    """Return the common name of a verified certificate's subject; None without one."""
    for relative in (certificate or {}).get("subject", ()):
        for key, value in relative:
            if key == "commonName":
                return str(value)
    return None


class HttpServer:
    """Every connection of a process.

    Args:
        routes: What requests mean.
        board: Where this process counts.
        limits: What a request may cost.
        max_connections: Most connections; one more is closed at once.
    """

    def __init__(
        self, routes: Routes, board: Board, limits: HttpLimits, max_connections: int = 16_384
    ) -> None:
        self.routes = routes
        self.board = board
        self.limits = limits
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.is_draining = False
        self.held_bytes = 0
        self._max_connections = max_connections
        self._connections: set[HttpConnection] = set()
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    def opened(self, connection: HttpConnection) -> None:
        """Count a connection; close it if there are too many."""
        self._connections.add(connection)
        self.board.add("connections_total")
        self.board.put("connections", len(self._connections))
        if len(self._connections) > self._max_connections:
            connection.abort()

    def closed(self, connection: HttpConnection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        self.board.put("connections", len(self._connections))

    def hold(self, n_bytes: int) -> None:
        """Count a body that is about to come.

        Raises:
            GatewayError: Bodies that come at this time would take more than `MAX_HELD_BYTES` together.
        """
        self.held_bytes += n_bytes
        if self.held_bytes > MAX_HELD_BYTES and self.held_bytes > n_bytes:
            raise GatewayError(UNAVAILABLE, "bodies of other requests take all the room: try again")

    async def listen(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Accept connections at a bound socket."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: HttpConnection(self),
            sock=sock,
            ssl=tls,
            backlog=_BACKLOG,
            ssl_handshake_timeout=None if tls is None else self.limits.head_s,
        )
        self._sweep()

    def _sweep(self) -> None:
        """Look at every connection now and then: a timer each would cost more than ten thousand looks."""
        now_ns = time.monotonic_ns()
        for connection in list(self._connections):
            connection.look(now_ns)
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    async def drain(self, notice_s: float, most_s: float) -> int:
        """Stop without failing a request; return how many connections were cut after `most_s` seconds.

        Args:
            notice_s: How long new connections and requests are still taken: load balancers look at readiness
                now and then, and callers reuse a connection until an answer says that it closes.
            most_s: How long answers may take after that.
        """
        self.is_draining = True
        for connection in list(self._connections):
            connection.drain()
        await asyncio.sleep(notice_s)
        if self._listener is not None:
            for _ in range(3):  # what has connected already is accepted
                await asyncio.sleep(0)
            self._listener.close()
        for connection in list(self._connections):
            connection.close_if_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while self._connections:
                    await asyncio.sleep(0.02)
        left = list(self._connections)
        for connection in left:
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        return len(left)
