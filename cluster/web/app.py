"""The routes of the live page, and who may ask.

Without a token it answers this machine alone: it listens on loopback, and refuses a Host that is not
loopback, so that no other site can have a browser here read it. With a token anyone who has it may look, once
with `?token=` in the address and then with a cookie.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from cluster.web.recording import FILES, file_of, live_page, recorded_page

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from cluster.web.hub import FrameHub

COOKIE = "superserve_token"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
)  # fmt: skip


def page_app(
    hub: FrameHub, loop: Callable[[], asyncio.AbstractEventLoop], logs: Callable[[str], str], token: str = ""
) -> Starlette:
    """Return the application.

    Args:
        hub: Gives the frames; it is started and stopped with the application.
        loop: Returns the running event loop.
        logs: Returns the end of a worker's log, or says where it is.
        token: Who has it may look from anywhere; "" for this machine alone.
    """

    async def page(_: Request) -> Response:
        return HTMLResponse(live_page())

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in FILES:
            return PlainTextResponse(f"{name}: no such file", 404)
        return Response(file_of(name), media_type=FILES[name][1])

    async def stream(_: Request) -> Response:
        async def events() -> AsyncIterator[bytes]:
            async for frame in hub.follow():
                yield b"data: " + frame + b"\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def recording(_: Request) -> Response:
        return HTMLResponse(
            recorded_page(list(hub.frames)),
            headers={"content-disposition": 'attachment; filename="superserve-recording.html"'},
        )

    async def log(request: Request) -> Response:
        return PlainTextResponse(logs(request.path_params["worker"]))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        hub.start(loop())
        yield
        hub.stop()

    routes = [
        Route("/", page), Route("/stream", stream), Route("/recording", recording),
        Route("/log/{worker}", log), Route("/{name}", file),
    ]  # fmt: skip
    return Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(PageGuard, token=token)])


class PageGuard:
    """Refuses who may not look, and adds the headers that every answer has.

    Args:
        app: What it guards.
        token: As for `page_app`.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                assert isinstance(headers, list), "ASGI has them as a list"
                headers.extend(_HEADERS)
            await send(message)

        answer = self._refusal(scope)
        if answer is None:
            await self._app(scope, receive, guarded)  # type: ignore[arg-type]
        else:
            await answer(scope, receive, guarded)  # type: ignore[arg-type]

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that does not pass; None if it does."""
        request = Request(scope)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("this page only shows: expected GET", 405)
        if not self._token:
            if request.url.hostname in _LOOPBACK:
                return None
            return PlainTextResponse("expected a loopback address, or a page started with --token-file", 403)
        given = request.query_params.get("token")
        if given is not None and _same(given, self._token):
            moved = RedirectResponse(request.url.path, 303)
            moved.set_cookie(COOKIE, given, httponly=True, samesite="strict")
            return moved
        if _same(request.cookies.get(COOKIE, ""), self._token):
            return None
        return PlainTextResponse("expected ?token=TOKEN, as in the address that `cluster web` printed", 401)


def _same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())
