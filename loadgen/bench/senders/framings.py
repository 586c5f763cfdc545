"""What a crowd of small callers says to each kind of server, as bytes that are ready before the run.

A framing knows how a message looks on a plain TCP connection: this system's wire over ZeroMQ, the same to
an echo, or HTTP/1.1. ZeroMQ is spoken without its library, so that neither a second thread nor an object for
each frame costs the generator anything. Answers are cut from what arrives; ids stand at a fixed place, and
are read after the run.
"""

from __future__ import annotations

import abc
import struct
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from superserve import wire
from superserve.errors import WireError
from superserve.hello import ClientHello
from superserve.net import zmtp
from superserve.wire import OURS, Control, Kind, Queries, Status

if TYPE_CHECKING:
    import socket

    import numpy.typing as npt

_RESULTS_COUNTS = struct.Struct("<IIH")  # n, n_groups, row_bytes
_PRELUDE_BYTES = 8
_IDS_AT = _PRELUDE_BYTES + 24  # of a QUERIES message: its header has 24 bytes
_SENT_AT = _PRELUDE_BYTES + 8
_COUNTS_AT = _PRELUDE_BYTES + 8  # of a RESULTS message: after the epoch
_STATUS_AT = 4  # of a group
_OK = (int(Status.OK), int(Status.LATE))
_HTTP_END = b"\r\n\r\n"
_HTTP_OK = b"HTTP/1.1 200"
_HTTP_LENGTH = b"content-length:"


class Framing(abc.ABC):
    """One connection's way to speak.

    Args:
        payload_bytes: Bytes of each query's payload, 8 at least.
        n: Queries in each message.

    Attributes:
        pipelines: Whether a connection may have several messages under way.
        stamp_at: Where in a message the instant of its sending stands, i64 ns; None if nowhere.
    """

    pipelines: ClassVar[bool] = True

    def __init__(self, payload_bytes: int, n: int = 1) -> None:
        self.payload_bytes = payload_bytes
        self.n = n
        self.stamp_at: int | None = None

    def greet(self, link: socket.socket, session: int) -> bytes:  # noqa: ARG002
        """Exchange greetings on a new connection, waiting; return what has been received beyond them.

        Raises:
            WireError: The peer closed the connection, or says something else.
            OSError: It fails, or is silent for too long.
        """
        return b""

    @abc.abstractmethod
    def messages(self, ids: npt.NDArray[np.uint64], slack_ns: int) -> npt.NDArray[np.uint8]:
        """Return the messages of these queries, shape (len(ids) // n, bytes of a message)."""

    @abc.abstractmethod
    def cut(self, data: bytes) -> tuple[list[bytes], bytes, bytes]:
        """Return the whole answers in `data`, what is left of it, and what is to be sent back at once."""

    def count(self, answer: bytes) -> int:  # noqa: ARG002
        """Return how many queries an answer ends, outputs or not."""
        return self.n

    @abc.abstractmethod
    def answered(self, answer: bytes) -> list[int]:
        """Return the ids in an answer that have an output."""


class _Zmtp(Framing):
    """ZeroMQ over TCP: a DEALER without security."""

    epoch = 0

    def greet(self, link: socket.socket, session: int) -> bytes:  # noqa: ARG002
        """Exchange greetings and READY: libzmq hangs up on a peer that says more before its own READY."""
        link.sendall(zmtp.GREETING + zmtp.ready(b"DEALER"))
        data = b""
        while len(data) < zmtp.GREETING_BYTES:
            data += _received(link)
        zmtp.check_greeting(data)
        return _next_frame(link, data[zmtp.GREETING_BYTES :])[2]

    def messages(self, ids: npt.NDArray[np.uint64], slack_ns: int) -> npt.NDArray[np.uint8]:
        """Return one frame for each message: all alike but for their ids."""
        n, each = self.n, self.payload_bytes
        slacks = np.full(n, slack_ns, "<i8").tobytes()
        plain = Queries(self.epoch, 0, n, bytes(8 * n), slacks, each, (bytes(n * each),))
        (body,) = wire.encode_queries(plain)
        frame = zmtp.frame_of(bytes(body))
        prefix = len(frame) - len(body)
        self.stamp_at = prefix + _SENT_AT
        rows = np.tile(np.frombuffer(frame, np.uint8), (len(ids) // n, 1))
        at = prefix + _IDS_AT
        rows[:, at : at + 8 * n] = ids.astype("<u8").view(np.uint8).reshape(len(rows), 8 * n)
        return rows

    def cut(self, data: bytes) -> tuple[list[bytes], bytes, bytes]:
        """Return the bodies of the frames that answer."""
        if len(data) > 2 and not data[0] and len(data) == 2 + data[1] and self.is_answer(data[2:6]):
            return [data[2:]], b"", b""  # nearly always: one short frame
        answers, back, done = [], b"", 0
        for flags, start, end, _ in zmtp.frames_in(data):
            if end > len(data):
                break
            body, done = data[start:end], end
            if flags & zmtp.COMMAND:
                back += zmtp.pong_to(body)
            elif self.is_answer(body[:4]):
                answers.append(body)
            else:
                back += self.reply(body)
        return answers, data[done:], back

    def is_answer(self, head: bytes) -> bool:
        """Return whether a frame that begins so is an answer."""
        raise NotImplementedError

    def reply(self, body: bytes) -> bytes:  # noqa: ARG002
        """Return what is to be sent back at once."""
        return b""


def _received(link: socket.socket) -> bytes:
    data = link.recv(65_536)
    if not data:
        raise WireError("the server closed the connection")
    return data


def _next_frame(link: socket.socket, data: bytes) -> tuple[int, bytes, bytes]:
    """Return the first frame of what has been received and follows, and what comes after it."""
    while True:
        for flags, start, end, _ in zmtp.frames_in(data):
            if end <= len(data):
                return flags, data[start:end], data[end:]
        data += _received(link)


class SuperServe(_Zmtp):
    """This system's wire: HELLO, WELCOME, then QUERIES and RESULTS; PINGs are answered."""

    def greet(self, link: socket.socket, session: int) -> bytes:
        """Say HELLO, and take the epoch of WELCOME."""
        rest = super().greet(link, session)
        hello = Control(Kind.HELLO, ClientHello(session=session, wire=OURS).body(), OURS[0])
        prelude, body = wire.encode_control(hello)
        link.sendall(zmtp.frame_of(bytes(prelude), more=True) + zmtp.frame_of(bytes(body)))
        frames: list[bytes] = []
        flags = zmtp.MORE
        while flags & zmtp.MORE:
            flags, frame, rest = _next_frame(link, rest)
            frames.append(frame)
        message = wire.decode(frames)
        if not isinstance(message, Control) or message.kind is not Kind.WELCOME:
            raise WireError(f"expected WELCOME, got {message}")
        self.epoch = int(message.body["epoch"])
        return rest

    def is_answer(self, head: bytes) -> bool:
        """Return whether it is RESULTS."""
        return head[3] == Kind.RESULTS

    def reply(self, body: bytes) -> bytes:
        """Answer a PING."""
        if wire.kind_of(body) != Kind.PING:
            return b""
        ping = wire.decode([body])
        assert isinstance(ping, wire.Ping), "the kind says so"
        (pong,) = wire.encode_pong(wire.Pong(ping.stamp_ns, ping.stamp_ns))
        return zmtp.frame_of(bytes(pong))

    def count(self, answer: bytes) -> int:
        """Return how many queries it ends: the router may split and merge messages."""
        n: int = _RESULTS_COUNTS.unpack_from(answer, _COUNTS_AT)[0]
        return n

    def answered(self, answer: bytes) -> list[int]:
        """Return the ids of the groups with an output."""
        n, n_groups, row_bytes = _RESULTS_COUNTS.unpack_from(answer, _COUNTS_AT)
        rows_at = _PRELUDE_BYTES + int.from_bytes(answer[6:8], "little")
        ids = np.frombuffer(answer, "<u8", n, rows_at + n_groups * row_bytes).tolist()
        found: list[int] = []
        at = 0
        for row in range(rows_at, rows_at + n_groups * row_bytes, row_bytes):
            count = int.from_bytes(answer[row : row + 4], "little")
            if answer[row + _STATUS_AT] in _OK:
                found += ids[at : at + count]
            at += count
        return found


class Echo(_Zmtp):
    """The same messages to a ROUTER that sends back what it gets."""

    def is_answer(self, head: bytes) -> bool:  # noqa: ARG002
        """Return True: it sends nothing else."""
        return True

    def answered(self, answer: bytes) -> list[int]:
        """Return the ids of the message that came back."""
        ids: list[int] = np.frombuffer(answer, "<u8", self.n, _IDS_AT).tolist()
        return ids


class Http(Framing):
    """HTTP/1.1 with connections that are kept: a POST a query, one at a time on each.

    The payload begins with the query's id; the server's model gives it back.
    """

    pipelines = False

    def messages(self, ids: npt.NDArray[np.uint64], slack_ns: int) -> npt.NDArray[np.uint8]:  # noqa: ARG002
        """Return a request for each query."""
        head = (
            "POST /inference HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {self.payload_bytes}\r\n\r\n"
        ).encode()
        plain = np.frombuffer(head + bytes(self.payload_bytes), np.uint8)
        rows = np.tile(plain, (len(ids), 1))
        rows[:, len(head) : len(head) + 8] = ids.astype("<u8").view(np.uint8).reshape(len(rows), 8)
        return rows

    def cut(self, data: bytes) -> tuple[list[bytes], bytes, bytes]:
        """Return the response, if it is complete."""
        head_end = data.find(_HTTP_END)
        if head_end < 0:
            return [], data, b""
        at = data.find(_HTTP_LENGTH, 0, head_end)
        if at < 0:  # another server's capitals
            at = data[:head_end].lower().find(_HTTP_LENGTH)
        line = data[at + len(_HTTP_LENGTH) : data.find(b"\r", at)]
        end = head_end + len(_HTTP_END) + int(line)
        return ([data[:end]], data[end:], b"") if len(data) >= end else ([], data, b"")

    def answered(self, answer: bytes) -> list[int]:
        """Return the id at the beginning of the body."""
        if not answer.startswith(_HTTP_OK):
            return []
        body = answer[answer.find(_HTTP_END) + len(_HTTP_END) :]
        return [int.from_bytes(body[:8], "little")]


class Protocol(Http):
    """The Open Inference Protocol: each query an element of BYTES after the JSON, whose `id` comes back."""

    _id_bytes = 16  # in hexadecimal

    def messages(self, ids: npt.NDArray[np.uint64], slack_ns: int) -> npt.NDArray[np.uint8]:
        """Return a request for each query."""
        n_binary = 4 + self.payload_bytes
        text = (
            '{"id":"' + "0" * self._id_bytes + '","inputs":[{"name":"input","datatype":"BYTES","shape":[1],'
            '"parameters":{"binary_data_size":'
            + str(n_binary)
            + '}}],"parameters":{"binary_data_output":true}}'
        )
        head = (
            "POST /v2/models/m/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Content-Type: application/octet-stream\r\n"
            f"Inference-Header-Content-Length: {len(text)}\r\nsuperserve-slo-ms: {slack_ns / 1e6:.3f}\r\n"
            f"Content-Length: {len(text) + n_binary}\r\n\r\n"
        )
        body = text.encode() + self.payload_bytes.to_bytes(4, "little") + bytes(self.payload_bytes)
        plain = np.frombuffer(head.encode() + body, np.uint8)
        rows = np.tile(plain, (len(ids), 1))
        at = len(head) + len('{"id":"')
        words = np.array([f"{one:016x}".encode() for one in ids.tolist()], f"S{self._id_bytes}")
        rows[:, at : at + self._id_bytes] = words.view(np.uint8).reshape(len(rows), self._id_bytes)
        return rows

    def answered(self, answer: bytes) -> list[int]:
        """Return the id that has come back."""
        if not answer.startswith(_HTTP_OK):
            return []
        at = answer.find(b'"id":"') + len(b'"id":"')
        return [int(answer[at : at + self._id_bytes], 16)]


FRAMINGS: dict[str, type[Framing]] = {
    "superserve": SuperServe,
    "echo": Echo,
    "http": Http,
    "protocol": Protocol,
}
"""The framings by name."""
