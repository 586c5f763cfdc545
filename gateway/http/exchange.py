"""One HTTP/1.1 connection, without I/O: bytes in, requests out, answers back in the requests' order.

httptools parses heads and chunked bodies. A body whose length is known is not parsed: what follows its head
is received straight into the buffer that the request keeps, so a tensor is copied once, by the kernel.

What may be read in two ways ends the connection: both lengths, lengths that differ, an unknown coding.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

import httptools
import orjson

from gateway.v2.verdicts import INVALID, LONG_HEAD, TOO_LARGE, WRONG_ENCODING, WRONG_EXPECTATION, GatewayError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_HEAD_BYTES = 32_768
MAX_HEADERS = 100
MAX_PIPELINED = 64
"""Requests of one connection that are answered at a time; above it the connection is not read."""
LONG = f"expected a head of at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = "application/json"

_COPIED_BYTES = 16_384  # parts smaller than this are joined: each part of its own costs a system call's entry
# Names as clients write them, so that most need not be decoded.
_NAMES = {
    form(name).encode(): name
    for name in (
        "accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "host",
        "inference-header-content-length", "superserve-slo-ms", "traceparent", "user-agent",
    )
    for form in (str, str.title)
}  # fmt: skip
_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}


class HttpAnswer(NamedTuple):
    """An answer to a request; `more` follows `body`, and headers are as HTTP has them."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    more: bytes | memoryview = b""


class HttpRequest:
    """A request, complete with its body.

    Attributes:
        method: In upper case.
        target: Path and query, as sent.
        headers: By name, in lower case; of several of a name, the values joined by commas.
        body: Its bytes; a bytearray that is nobody else's, or bytes.
        arrived_ns: When its head was complete.
        keep_alive: Whether the connection is kept after the answer.
    """

    __slots__ = ("arrived_ns", "body", "headers", "keep_alive", "method", "target")

    def __init__(self, arrived_ns: int) -> None:
        self.method = ""
        self.target = b""
        self.headers: dict[str, str] = {}
        self.body: bytes | bytearray = b""
        self.arrived_ns = arrived_ns
        self.keep_alive = True


class AnswerPlace:
    """A request's place in the order of its connection's answers."""

    __slots__ = ("is_last", "parts", "request")

    def __init__(self, request: HttpRequest | None) -> None:
        self.request = request
        self.parts: list[bytes | memoryview] | None = None
        self.is_last = False


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one request may cost.

    Attributes:
        body_bytes: Most bytes of a body.
        head_s: How long a head may take, from its first byte.
        body_s: How long a body may take, from its head.
        idle_s: How long a connection without a request is kept.
        write_s: How long a caller may take to read what it was sent.
    """

    body_bytes: int = 64 << 20
    head_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 300.0
    write_s: float = 30.0


class Exchange:
    """One connection.

    Args:
        limits: What a request may cost.
        on_request: Takes each complete request with its place; answers by `answer`, at once or later.
        write: Takes bytes to send, in order.
        clock: The current instant, ns.
        admit: Raises a GatewayError for a head whose body is not wanted; given the body's length, None if
            that is unknown.

    Attributes:
        is_closing: No further request is read; once `is_done`, the connection may be closed.
        refused: What could not be read, once the connection has ended because of it.
        head_since_ns: When the head under way began; 0 if none is.
        body_since_ns: When the body under way began; 0 if none is.
    """

    def __init__(
        self, limits: HttpLimits, on_request: Callable[[HttpRequest, AnswerPlace], None],
        write: Callable[[list[bytes | memoryview]], None], clock: Callable[[], int],
        admit: Callable[[HttpRequest, int | None], None] | None = None,
    ) -> None:  # fmt: skip
        self._limits = limits
        self._on_request = on_request
        self._write = write
        self._clock = clock
        self._admit = admit
        self._parser: Any = httptools.HttpRequestParser(self)
        self._places: deque[AnswerPlace] = deque()
        self._request = HttpRequest(0)
        self._chunks: list[bytes] = []
        self._n_body = 0
        self._n_head = 0
        self._n_unfinished = 0
        self._has_begun = False
        self._n_headers = 0
        self._length: int | None = None
        self._whole: bytearray | None = None
        self._filled = 0
        self._refusal: GatewayError | None = None
        self.is_closing = False
        self.is_draining = False
        self.refused: GatewayError | None = None
        self.head_since_ns = 0
        self.body_since_ns = 0

    @property
    def n_pending(self) -> int:
        """Requests without an answer that was sent."""
        return len(self._places)

    @property
    def is_done(self) -> bool:
        """Whether the connection may be closed: nothing is read any more, and every answer was sent."""
        return self.is_closing and not self._places

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way in either direction."""
        return not self._places and not self.head_since_ns and not self.body_since_ns

    # --- bytes in ------------------------------------------------------------------------

    def body_room(self) -> memoryview | None:
        """Return where the rest of a body goes, to receive into it; None if bytes go through `feed`."""
        return None if self._whole is None else memoryview(self._whole)[self._filled :]

    def body_received(self, n_bytes: int) -> None:
        """Take in bytes that were received into `body_room`."""
        assert self._whole is not None, "there was room"
        self._filled += n_bytes
        if self._filled == len(self._whole):
            self._request.body, self._whole = self._whole, None
            # The parser still waits for the body: another one reads the next head.
            self._parser = httptools.HttpRequestParser(self)
            self._complete()

    def feed(self, data: bytes | memoryview) -> None:
        """Take in bytes of heads and of bodies of unknown length."""
        if self.is_closing:
            return
        if not self.body_since_ns and not self.head_since_ns:
            self.head_since_ns = self._clock()
        self._has_begun = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request stands, the upgrade is not taken; what follows may be of another protocol.
            self._close_after_last()
        except httptools.HttpParserError as error:
            cause = error.__context__
            if self._refusal is None:
                reason = str(cause) if isinstance(cause, GatewayError) else str(error)
                self._refusal = GatewayError(INVALID, f"malformed HTTP: {reason}")
        if self._refusal is not None:
            self.refuse(self._refusal)
        elif self.head_since_ns:
            # Where in these bytes a head began is not known: those before it may be other requests.
            self._n_unfinished = 0 if self._has_begun else self._n_unfinished + len(data)
            if self._n_unfinished > MAX_HEAD_BYTES:
                self.refuse(GatewayError(LONG_HEAD, LONG))
        elif self.body_since_ns and self._length:
            self._receive_directly()

    def refuse(self, error: GatewayError) -> None:
        """Answer what cannot be read with an error, after what was asked before; then close."""
        if self.is_closing:
            return
        self.is_closing = True
        self.refused = error
        self.head_since_ns = self.body_since_ns = 0
        self._whole, self._chunks = None, []
        place = AnswerPlace(None)
        self._places.append(place)
        self.answer(place, error_answer(error))

    def _receive_directly(self) -> None:
        """Have the rest of a body of known length received into the request's own buffer."""
        assert self._length is not None, "the length is known"
        self._whole = bytearray(self._length)
        for chunk in self._chunks:
            self._whole[self._filled : self._filled + len(chunk)] = chunk
            self._filled += len(chunk)
        self._chunks = []

    # --- what httptools calls ------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        self._request = HttpRequest(0)
        self._chunks, self._n_body, self._n_head, self._n_headers = [], 0, 0, 0
        self._has_begun = True
        self._length, self._filled = None, 0
        if not self.head_since_ns:  # a pipelined one
            self.head_since_ns = self._clock()

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._request.target += url
        self._n_head += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._n_headers += 1
        self._n_head += len(name) + len(value)
        headers, text = self._request.headers, value.decode("latin-1")
        key = _NAMES.get(name) or name.decode("latin-1").lower()
        if key in headers:
            if key in ("host", "content-length", "inference-header-content-length", "authorization"):
                self._refuse(GatewayError(INVALID, f"{key}: expected once"))
            text = f"{headers[key]}, {text}"
        headers[key] = text

    def on_headers_complete(self) -> None:
        """The head is complete: decide whether the body is wanted."""
        request, parser = self._request, self._parser
        self.head_since_ns, request.arrived_ns = 0, self._clock()
        self.body_since_ns = request.arrived_ns
        # One that came in a single piece was never seen unfinished.
        if self._n_head > MAX_HEAD_BYTES or self._n_headers > MAX_HEADERS:
            self._refuse(GatewayError(LONG_HEAD, LONG))
        request.method = parser.get_method().decode("latin-1")
        request.keep_alive = parser.should_keep_alive()
        headers = request.headers
        if "host" not in headers and parser.get_http_version() == "1.1":
            self._refuse(GatewayError(INVALID, "host: expected in HTTP/1.1"))
        if (length := headers.get("content-length")) is not None:
            if "transfer-encoding" in headers:
                self._refuse(GatewayError(INVALID, "expected content-length or transfer-encoding, got both"))
            self._length = int(length) if length.isascii() and length.isdigit() else None
            if self._length is None or self._length > self._limits.body_bytes:
                self._refuse(_too_large(self._limits.body_bytes))
        if (coding := headers.get("content-encoding", "identity")) != "identity":
            self._refuse(GatewayError(WRONG_ENCODING, f"content-encoding: expected none, got {coding!r:.40}"))
        if (
            self._admit is not None
            and self._refusal is None
            and (self._length or "transfer-encoding" in headers)
        ):
            try:
                self._admit(request, self._length)
            except GatewayError as error:
                self._refuse(error)
        if (expected := headers.get("expect")) is not None:
            if expected.lower() != "100-continue":
                self._refuse(
                    GatewayError(WRONG_EXPECTATION, f"expect: expected 100-continue, got {expected!r:.40}")
                )
            # With an answer under way it would come in between; the caller then sends after its own wait.
            if (
                self._refusal is None
                and not self._places
                and (self._length or "transfer-encoding" in headers)
            ):
                self._write([CONTINUE])

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._n_body += len(body)
        if self._refusal is not None:
            return
        if self._n_body > self._limits.body_bytes:
            self._refuse(_too_large(self._limits.body_bytes))
            return
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        if self._refusal is not None:
            return
        self._request.body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._complete()

    def _refuse(self, error: GatewayError) -> None:
        if self._refusal is None:
            self._refusal = error

    def _complete(self) -> None:
        self.body_since_ns = 0
        self._chunks, self._length = [], None
        if self.is_closing:
            return  # the head before it said close: what follows is not a request
        request = self._request
        place = AnswerPlace(request)
        place.is_last = self.is_closing = not request.keep_alive
        self._places.append(place)
        self._on_request(request, place)

    def _close_after_last(self) -> None:
        self.is_closing = True
        self.head_since_ns = self.body_since_ns = 0
        if self._places:
            self._places[-1].is_last = True

    # --- answers out ---------------------------------------------------------------------

    def drain(self) -> None:
        """Answer what is asked from now on with `Connection: close`."""
        self.is_draining = True

    def answer(self, place: AnswerPlace, answer: HttpAnswer) -> None:
        """Answer a request; what was asked before it on this connection is answered first."""
        request = place.request
        if self.is_draining and request is not None and place is self._places[-1]:
            place.is_last = self.is_closing = True
        is_last = place.is_last or request is None
        place.parts = _parts(answer, is_last=is_last, has_body=request is None or request.method != "HEAD")
        places = self._places
        if places[0] is place and len(places) == 1:  # nearly always
            places.popleft()
            self._write(place.parts)
            return
        ready: list[bytes | memoryview] = []
        while places and (parts := places[0].parts) is not None:
            ready.extend(parts)
            places.popleft()
        if ready:
            self._write(ready)


def error_answer(error: GatewayError) -> HttpAnswer:
    """Return the answer for a failure: its message as the protocol has it."""
    return failure(error.verdict.http, str(error))


def failure(status: int, message: str, *headers: tuple[str, str]) -> HttpAnswer:
    """Return an answer with the protocol's error object."""
    text = message.encode(errors="replace").decode()
    return HttpAnswer(status, orjson.dumps({"error": text}), headers=headers)


def _too_large(limit: int) -> GatewayError:
    return GatewayError(TOO_LARGE, f"content-length: expected a body of at most {limit} bytes")


_LINES: dict[tuple[int, str], str] = {}
"""The beginnings of answers: some twenty statuses by two types."""


def _parts(answer: HttpAnswer, *, is_last: bool, has_body: bool) -> list[bytes | memoryview]:
    """Return an answer as HTTP has it."""
    status, body, content_type, headers, rest = answer
    line = _LINES.get((status, content_type))
    if line is None:
        line = _LINES[status, content_type] = (
            f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n"
            f"content-type: {content_type}\r\ncontent-length: "
        )
    more = "".join([f"\r\n{name}: {value}" for name, value in headers]) if headers else ""
    kept = "close" if is_last else "keep-alive"
    head = f"{line}{len(body) + len(rest)}{more}\r\nconnection: {kept}\r\n\r\n".encode("latin-1")
    if not has_body:
        return [head]
    if len(rest) < _COPIED_BYTES:
        return [b"".join((head, body, rest))]
    return [head + body, rest]
