"""HTTP on a real loop and real sockets: callers that leave, are slow, or send too much."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from gateway.calls.access import Access, KnownCaller
from gateway.http.exchange import HttpLimits
from gateway.http.routes import Routes
from gateway.http.server import HttpServer
from gateway.serve.process import reusable_socket
from tests.gateway.fakes import FakeClient, backend
from tests.gateway.test_routes import infer_body

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from gateway.calls.board import Board

GET = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"


def infer_request(n_rows: int = 1) -> bytes:
    """Return an inference as HTTP has it."""
    body = infer_body(n_rows)
    head = f"POST /v2/models/digits/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"superserve-slo-ms: 5000\r\n\r\n" + body


@dataclass
class Site:
    """A server, its router's stand-in, and the way to it."""

    server: HttpServer
    client: FakeClient
    board: Board
    port: int
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect a caller."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(10):
            while not is_so():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def site(
    folder: Path, limits: HttpLimits | None = None, callers: dict[str, KnownCaller] | None = None, **more: Any
) -> AsyncIterator[Site]:
    """Serve on loopback."""
    client = FakeClient()
    way = backend(client, folder)
    server = HttpServer(Routes(way, Access(callers), "1"), way.board, limits or HttpLimits(), **more)
    sock = reusable_socket("127.0.0.1", 0)
    port = sock.getsockname()[1]
    await server.listen(sock, None)
    here = Site(server, client, way.board, port)
    try:
        yield here
    finally:
        await server.drain(0, 0)
        for writer in here.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on a loop of its own."""
    asyncio.run(test)


async def status_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return int(head.split()[1]), head + await reader.readexactly(length)


def test_a_caller_that_disconnects_has_its_queries_cancelled(tmp_path: Path) -> None:
    """All of a connection's queries, pipelined ones too, and each request is counted."""

    async def scene() -> None:
        async with site(tmp_path) as here:
            _, writer = await here.connect()
            writer.write(infer_request(2) + infer_request())
            await here.until(lambda: len(here.client.submitted) == 3)
            writer.close()
            await here.until(lambda: here.board.totals().cancelled.count == 2)
            assert all(one.future.cancelled() for one in here.client.submitted)
            assert here.board.sum("status_499") == 2
            assert here.board.sum("in_flight") == 0
            assert here.board.sum("connections") == 0

    run(scene())


def test_a_connection_is_kept_and_pipelined(tmp_path: Path) -> None:
    """Two inferences in one piece, answered in order; then another on the same connection."""

    async def scene() -> None:
        async with site(tmp_path) as here:
            reader, writer = await here.connect()
            writer.write(infer_request() + GET)
            await here.until(lambda: len(here.client.submitted) == 1)
            here.client.answer()
            assert (await status_of(reader))[0] == 200
            assert b"content-length: 0" in (await status_of(reader))[1]
            writer.write(GET)
            assert (await status_of(reader))[0] == 200
            assert here.board.sum("connections_total") == 1

    run(scene())


@pytest.mark.parametrize(
    "sent", [b"GET /v2 HTTP/1.1\r\nhost:", b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc"]
)
def test_what_comes_too_slowly_times_out(tmp_path: Path, sent: bytes) -> None:
    """A slow loris gets 408 and is closed, in the head and in the body; an idle connection stays."""

    async def scene() -> None:
        async with site(tmp_path, HttpLimits(head_s=0.2, body_s=0.2)) as here:
            idle_reader, idle_writer = await here.connect()
            reader, writer = await here.connect()
            writer.write(sent)
            status, answer = await status_of(reader)
            assert status == 408
            assert b"connection: close" in answer
            assert await reader.read() == b""
            idle_writer.write(GET)
            assert (await status_of(idle_reader))[0] == 200

    run(scene())


def test_idle_connections_are_closed_in_the_end(tmp_path: Path) -> None:
    """After idle_s; one that waits for an answer is not idle."""

    async def scene() -> None:
        async with site(tmp_path, HttpLimits(idle_s=0.1)) as here:
            idle, _ = await here.connect()
            busy, writer = await here.connect()
            writer.write(infer_request())
            assert await idle.read() == b""
            await here.until(lambda: len(here.client.submitted) == 1)
            here.client.answer()
            assert (await status_of(busy))[0] == 200

    run(scene())


def test_a_refused_caller_that_still_sends_sees_the_answer(tmp_path: Path) -> None:
    """A connection closed with bytes unread would be reset, and the 413 lost."""

    async def scene() -> None:
        async with site(tmp_path, HttpLimits(body_bytes=1_000)) as here:
            reader, writer = await here.connect()
            n = 3_000_000
            writer.write(b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % n)
            writer.write(b"x" * n)
            await writer.drain()
            assert (await status_of(reader))[0] == 413
            assert await reader.read() == b""

    run(scene())


def test_a_drain_fails_no_request(tmp_path: Path) -> None:
    """What is under way is answered, what comes during the notice too, and idle connections end."""

    async def scene() -> None:
        async with site(tmp_path) as here:
            reader, writer = await here.connect()
            writer.write(infer_request())
            await here.until(lambda: len(here.client.submitted) == 1)
            early, early_writer = await here.connect()
            await here.until(lambda: here.board.sum("connections") == 2)
            draining = asyncio.create_task(here.server.drain(0.3, 5))
            await asyncio.sleep(0.01)
            early_writer.write(GET)
            late, late_writer = await here.connect()
            late_writer.write(GET)
            for one in (early, late):
                status, answer = await status_of(one)
                assert status == 200
                assert b"connection: close" in answer
            here.client.answer()
            assert (await status_of(reader))[0] == 200
            assert await draining == 0
            with pytest.raises(ConnectionError):
                await here.connect()

    run(scene())


def test_a_drain_ends_even_with_a_stuck_request(tmp_path: Path) -> None:
    """After its time the connection is cut, and counted."""

    async def scene() -> None:
        async with site(tmp_path) as here:
            _, writer = await here.connect()
            writer.write(infer_request())
            await here.until(lambda: len(here.client.submitted) == 1)
            assert await here.server.drain(0, 0.1) == 1

    run(scene())


def test_a_defect_costs_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 for it, and the connection goes on."""

    async def scene() -> None:
        async with site(tmp_path) as here:
            handle = here.server.routes.handle

            def broken(request: Any, *more: Any) -> Any:
                if request.target == b"/broken":
                    raise ZeroDivisionError
                return handle(request, *more)

            monkeypatch.setattr(here.server.routes, "handle", broken)
            reader, writer = await here.connect()
            writer.write(GET.replace(b"/v2/health/live", b"/broken") + GET)
            assert [(await status_of(reader))[0] for _ in range(2)] == [500, 200]

    run(scene())


def test_one_connection_too_many_is_closed(tmp_path: Path) -> None:
    """The others stay."""

    async def scene() -> None:
        async with site(tmp_path, max_connections=2) as here:
            readers = [(await here.connect()) for _ in range(2)]
            await here.until(lambda: here.board.sum("connections") == 2)
            extra, _ = await here.connect()
            with contextlib.suppress(ConnectionError):
                assert await extra.read() == b""
            readers[0][1].write(GET)
            assert (await status_of(readers[0][0]))[0] == 200

    run(scene())


def test_a_caller_that_pipelines_without_end_is_held_back(tmp_path: Path) -> None:
    """At most a buffer's worth of its requests wait; all are answered once the router answers."""

    async def scene() -> None:
        async with site(tmp_path) as here:
            reader, writer = await here.connect()
            n = 600
            writer.write(infer_request() * n)
            await here.until(lambda: len(here.client.submitted) >= 64)
            await asyncio.sleep(0.05)
            assert len(here.client.submitted) < n
            answered = 0
            while answered < n:
                here.client.answer()
                assert (await status_of(reader))[0] == 200
                answered += 1
            assert len(here.client.submitted) == n

    run(scene())


def test_a_body_of_an_unknown_caller_is_not_read(tmp_path: Path) -> None:
    """401 comes on the head; a 100 Continue does not."""

    async def scene() -> None:
        async with site(tmp_path, callers={"cert:known": KnownCaller("known")}) as here:
            reader, writer = await here.connect()
            head = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
            writer.write(head + b"expect: 100-continue\r\n\r\n")
            status, answer = await status_of(reader)
            assert status == 401
            assert b"connection: close" in answer
            assert here.server.held_bytes == 0 or here.board.sum("connections") == 1

    run(scene())


def test_bodies_share_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many at a time is a 503; room comes back when a body is complete, or its caller leaves."""
    monkeypatch.setattr("gateway.http.server.MAX_HELD_BYTES", 1_000)

    async def scene() -> None:
        async with site(tmp_path) as here:
            head = b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: 600\r\n\r\n"
            first, first_writer = await here.connect()
            first_writer.write(head + b"x")
            await here.until(lambda: here.server.held_bytes == 600)
            second, second_writer = await here.connect()
            second_writer.write(head)
            assert (await status_of(second))[0] == 503
            await here.until(lambda: here.server.held_bytes in (600, 1_200))
            second_writer.close()
            await here.until(lambda: here.server.held_bytes == 600)
            first_writer.write(b"x" * 599)
            assert (await status_of(first))[0] == 405
            assert here.server.held_bytes == 0

    run(scene())
