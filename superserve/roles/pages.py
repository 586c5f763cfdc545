"""A small HTTP server for pages that operators and probes request: GET and HEAD, one request a connection.

One thread holds all connections, so that a silent one costs a descriptor and no thread: an orchestrator's
probe is answered at once beside a thousand of them. Pages are made in other threads, a bounded number at a
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from superserve.errors import ConfigError, SuperServeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_PAGES_AT_ONCE = 8
"""Most pages made at a time; further requests wait for their turn."""
MAX_CONNECTIONS = 4_096
"""Most connections held; for one more, the connection that has been silent for longest is closed."""

_REQUEST_TIMEOUT_S = 5.0  # a peer that sends no request, or does not read the answer, is dropped after this
_MAX_REQUEST_BYTES = 8_192  # the request's head; probes and scrapers send hundreds
_MAX_DISCARDED_BYTES = 1 << 20  # of a longer one; then the connection is closed all the same
_TEXT = "text/plain; charset=utf-8"


class Page(NamedTuple):
    """An answer to a GET."""

    status: int
    body: bytes
    content_type: str = _TEXT


class UnavailableError(SuperServeError):
    """A page cannot be made now: answered as 503 with this message."""


def _response(page: Page, headers: str = "", *, has_body: bool = True) -> bytes:
    """Return a page as HTTP has it."""
    head = (
        f"HTTP/1.0 {page.status} {HTTPStatus(page.status).phrase}\r\n"
        f"Content-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\n{headers}"
        "Connection: close\r\n\r\n"
    ).encode("latin-1")
    return head + page.body if has_body else head


_TOO_LONG = _response(Page(431, f"expected a request of {_MAX_REQUEST_BYTES} bytes at most\n".encode()))


async def _head(reader: asyncio.StreamReader) -> bytes | None:
    """Read a request up to its empty line; return None if it is too long."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return None


async def _discard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read what the peer still sends: closed before, the connection would be reset, and the answer lost."""
    writer.write_eof()
    for _ in range(_MAX_DISCARDED_BYTES // _MAX_REQUEST_BYTES):
        if not await reader.read(_MAX_REQUEST_BYTES):
            return


class _PageServer:
    """Answers requests on one event loop.

    Args:
        pages: By path.
        pool: Threads that make the pages.
    """

    def __init__(self, pages: Mapping[str, Callable[[], Page]], pool: ThreadPoolExecutor) -> None:
        self._pages = pages
        self._pool = pool
        self._silent: dict[asyncio.StreamWriter, None] = {}  # in order of arrival: the first is the oldest

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the request of one connection."""
        if len(self._silent) >= MAX_CONNECTIONS:
            next(iter(self._silent)).transport.abort()
        self._silent[writer] = None
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                request = await _head(reader)
            self._silent.pop(writer, None)
            answer = _TOO_LONG if request is None else await self._answer(request)
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                writer.write(answer)
                await writer.drain()
                if request is None:
                    await _discard(reader, writer)
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.debug("a request was not answered: %r", error)
        finally:
            self._silent.pop(writer, None)
            writer.transport.abort()

    async def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        allowed = ""
        if method not in ("GET", "HEAD"):
            page = Page(405, f"expected GET or HEAD, got {method[:20]!r}\n".encode())
            allowed = "Allow: GET, HEAD\r\n"
        else:
            page = await self._page(rest.partition(" ")[0].partition("?")[0])
        return _response(page, allowed, has_body=method != "HEAD")

    async def _page(self, path: str) -> Page:
        give = self._pages.get(path)
        if give is None:
            return Page(404, f"expected one of {', '.join(self._pages)}\n".encode())
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, give)
        except UnavailableError as error:
            return Page(503, f"{error}\n".encode())
        except Exception:  # a failing page must end neither the server nor the process
            log.exception("%s could not be made", path)
            return Page(500, b"the page could not be made: see the log\n")


class _PageThread(threading.Thread):
    """The thread with the event loop; once `listening` is set, `address` is known or `failure` is set."""

    def __init__(self, pages: Mapping[str, Callable[[], Page]], address: str, port: int) -> None:
        super().__init__(name="metrics", daemon=True)
        self.address: tuple[str, int] = (address, port)
        self.failure: OSError | None = None
        self.listening = threading.Event()
        self._pages = pages
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None

    def run(self) -> None:
        """Serve until `stop`."""
        pool = ThreadPoolExecutor(MAX_PAGES_AT_ONCE, "metrics page")
        try:
            asyncio.run(self._serve(_PageServer(self._pages, pool)))
        except OSError as error:
            self.failure = error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.listening.set()

    def stop(self) -> None:
        """Close the port and every connection."""
        if self._loop is not None and self._ending is not None:
            with contextlib.suppress(RuntimeError):  # the loop has already ended
                self._loop.call_soon_threadsafe(self._ending.set)
        self.join()

    async def _serve(self, server: _PageServer) -> None:
        host, port = self.address
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        listener = await asyncio.start_server(
            server.serve, host, port, limit=_MAX_REQUEST_BYTES, backlog=1_024
        )
        self.address = listener.sockets[0].getsockname()[:2]
        self.listening.set()
        await self._ending.wait()
        listener.close()


@contextlib.contextmanager
def serve_pages(
    pages: Mapping[str, Callable[[], Page]], *, address: str = LOOPBACK, port: int = 0
) -> Iterator[str]:
    """Serve pages from other threads while the block runs; give HOST:PORT, as bound.

    Args:
        pages: By path; each is made in a thread and may raise `UnavailableError`.
        address: Where to listen.
        port: 0 lets the system pick.

    Raises:
        ConfigError: The address is not one of this machine's, or the port is taken.
    """
    thread = _PageThread(pages, address, port)
    thread.start()
    thread.listening.wait()
    if thread.failure is not None:
        error = thread.failure
        raise ConfigError(f"metrics at {address}:{port}: {error.strerror or error}") from error
    host, bound = thread.address
    log.info("metrics at http://%s:%d/metrics", host, bound)
    try:
        yield f"{host}:{bound}"
    finally:  # requests still being answered end with the process
        thread.stop()
