"""One HTTP connection: order, bodies, limits, and what can be read in two ways."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.exchange import CONTINUE, MAX_HEAD_BYTES, Exchange, HttpAnswer, HttpLimits, failure

if TYPE_CHECKING:
    from gateway.http.exchange import AnswerPlace, HttpRequest

POST = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n%s"
GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"


class Peer:
    """The other side of an exchange: what was asked, and what was written back."""

    def __init__(self, *, body_bytes: int = 1_000, at_once: bool = True) -> None:
        self.asked: list[tuple[HttpRequest, AnswerPlace]] = []
        self.out = b""
        self.now_ns = 1
        self.at_once = at_once
        self.exchange = Exchange(HttpLimits(body_bytes), self._take, self._write, lambda: self.now_ns)

    def _take(self, request: HttpRequest, place: AnswerPlace) -> None:
        self.asked.append((request, place))
        if self.at_once:
            self.exchange.answer(place, HttpAnswer(200, b"ok"))

    def _write(self, parts: list[bytes | memoryview]) -> None:
        self.out += b"".join(parts)

    def send(self, raw: bytes, piece: int = 1 << 20) -> None:
        """Send bytes as a socket would receive them: into the body's own room, where there is some."""
        while raw and not self.exchange.is_closing:
            room = self.exchange.body_room()
            if room is None:
                self.exchange.feed(memoryview(raw[:piece]))
                raw = raw[piece:]
            else:
                n = min(len(room), piece, len(raw))
                room[:n] = raw[:n]
                raw = raw[n:]
                self.exchange.body_received(n)

    @property
    def statuses(self) -> list[int]:
        """The statuses of the answers, in order."""
        return [int(one) for one in re.findall(rb"HTTP/1.1 (\d+) ", self.out)]


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.integers(1, 400))
def test_bodies_arrive_whole_whatever_the_pieces(bodies: list[bytes], piece: int) -> None:
    """Pipelined requests, cut anywhere, give the same bodies in the same order."""
    peer = Peer()
    peer.send(b"".join(POST % (len(body), b"", body) for body in bodies), piece)

    assert [bytes(request.body) for request, _ in peer.asked] == bodies
    assert peer.statuses == [200] * len(bodies)


@given(st.lists(st.binary(min_size=1, max_size=90), max_size=4), st.integers(1, 60))
def test_chunked_bodies(chunks: list[bytes], piece: int) -> None:
    """A body of unknown length, and the request after it."""
    peer = Peer()
    coded = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    peer.send(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + coded + GET, piece)

    assert [bytes(request.body) for request, _ in peer.asked] == [b"".join(chunks), b""]


def test_answers_leave_in_the_order_of_the_requests() -> None:
    """A later request that ends first waits for the earlier one."""
    peer = Peer(at_once=False)
    peer.send(GET * 3)
    places = [place for _, place in peer.asked]
    peer.exchange.answer(places[2], HttpAnswer(204, b""))
    peer.exchange.answer(places[1], failure(404, "no"))
    assert peer.out == b""

    peer.exchange.answer(places[0], HttpAnswer(200, b""))
    assert peer.statuses == [200, 404, 204]


def test_a_large_body_is_received_into_the_requests_own_buffer() -> None:
    """What follows the first piece is not copied."""
    peer = Peer()
    peer.exchange.feed(POST % (500, b"", b"x" * 100))
    room = peer.exchange.body_room()
    assert room is not None
    assert len(room) == 400
    room[:] = b"y" * 400
    peer.exchange.body_received(400)

    assert peer.asked[0][0].body == b"x" * 100 + b"y" * 400
    peer.send(GET)
    assert peer.statuses == [200, 200]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length : 5\r\n\r\nhello", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Encoding: gzip\r\n\r\nhello", 415),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: magic\r\n\r\nhello", 417),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"a" * (MAX_HEAD_BYTES + 1) + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * (MAX_HEAD_BYTES + 1) + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\na: b\r\n c\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_what_cannot_be_served_ends_the_connection(raw: bytes, status: int, piece: int) -> None:
    """One answer with the reason, `Connection: close`, and nothing that follows is read."""
    peer = Peer()
    peer.send(raw + GET, piece)

    assert peer.statuses[-1] == status
    assert 200 not in peer.statuses, "what follows a malformed request is no request"
    assert b"connection: close" in peer.out
    assert peer.exchange.is_done


def test_a_chunked_body_over_the_limit_is_refused_as_it_grows() -> None:
    """Its length is not known before."""
    peer = Peer(body_bytes=100)
    peer.send(
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"40\r\n" + b"a" * 64 + b"\r\n"
    )
    assert peer.statuses == []
    peer.send(b"40\r\n" + b"a" * 64 + b"\r\n")

    assert peer.statuses == [413]


def test_what_was_asked_before_a_malformed_request_is_answered_first() -> None:
    """The refusal is in its place in the order."""
    peer = Peer(at_once=False)
    peer.send(GET + b"garbage\r\n\r\n")
    assert peer.out == b""
    peer.exchange.answer(peer.asked[0][1], HttpAnswer(200, b""))

    assert peer.statuses == [200, 400]


def test_expect_100_continue() -> None:
    """The caller is asked for the body once its head is fine, and not if it is refused."""
    peer = Peer()
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    peer.send(head)
    assert peer.out == CONTINUE
    peer.send(b"hello")
    assert peer.statuses == [100, 200]

    refused = Peer(body_bytes=4)
    refused.send(head)
    assert refused.statuses == [413]


def test_connection_close_and_http_1_0() -> None:
    """The connection ends after the answer, and what follows is not read."""
    for raw in (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"):
        peer = Peer()
        peer.send(raw + GET)
        assert peer.statuses == [200]
        assert peer.exchange.is_done


def test_an_upgrade_is_not_taken() -> None:
    """The request is answered over HTTP/1.1, and the connection ends."""
    peer = Peer()
    peer.send(b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")

    assert peer.statuses == [200]
    assert peer.exchange.is_done


def test_draining_answers_the_last_request_with_close() -> None:
    """No request that has arrived is left without an answer."""
    peer = Peer(at_once=False)
    peer.send(GET * 2)
    peer.exchange.drain()
    for _, place in peer.asked:
        peer.exchange.answer(place, HttpAnswer(200, b""))

    assert peer.statuses == [200, 200]
    assert peer.out.count(b"connection: close") == 1
    assert peer.exchange.is_done


def test_times_begin_with_the_first_byte() -> None:
    """A slow head and a slow body can be seen; an idle connection has neither."""
    peer = Peer()
    assert peer.exchange.is_idle
    peer.now_ns = 5
    peer.send(b"POST / HT")
    assert peer.exchange.head_since_ns == 5
    peer.now_ns = 9
    peer.send(b"TP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhe")
    assert (peer.exchange.head_since_ns, peer.exchange.body_since_ns) == (0, 9)
    peer.send(b"llo")
    assert peer.exchange.is_idle
    assert peer.asked[0][0].arrived_ns == 9


@given(st.binary(max_size=400), st.integers(1, 100))
def test_any_bytes_are_answered_or_awaited(raw: bytes, piece: int) -> None:
    """Nothing is raised, and no more than one refusal is written."""
    peer = Peer()
    peer.send(raw, piece)

    assert len([one for one in peer.statuses if one >= 400]) <= 1


@given(st.data())
def test_a_mangled_request_is_answered_or_awaited(data: st.DataObject) -> None:
    """Bytes changed, removed or doubled in a valid stream never raise."""
    raw = bytearray((POST % (5, b"Expect: 100-continue\r\n", b"hello")) + GET)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.integers(0, 2))
        if how == 0:
            raw[at] = data.draw(st.integers(0, 255))
        elif how == 1 and len(raw) > 1:
            del raw[at]
        else:
            raw[at:at] = raw[at : at + 9]
    peer = Peer()
    peer.send(bytes(raw), data.draw(st.integers(1, 200)))
    assert len(peer.statuses) <= 8
