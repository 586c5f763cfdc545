"""One serving process of a gateway: its event loop, its client of the router, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.calls.access import Access, read_callers
from gateway.calls.backend import Backend
from gateway.calls.board import Board
from gateway.http.exchange import HttpLimits
from gateway.http.routes import Routes
from gateway.http.server import HttpServer
from gateway.text.tokens import Tokens
from gateway.v2.terms import MS
from superserve.client import AsyncClient
from superserve.errors import ConfigError, UnansweredError
from superserve.roles.processes import announce_ready
from superserve.roles.version import version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.calls.settings import GatewaySettings

log = logging.getLogger(__name__)

HTTP, GRPC = "http", "grpc"
_KEPT_FILES = 64


def run_process(settings: GatewaySettings, protocol: str, row: int) -> None:
    """Serve one protocol until SIGTERM."""
    _raise_limit()
    runner = asyncio.Runner(loop_factory=_loop_factory(protocol))
    with runner:
        runner.run(_Process(settings, protocol, row).run())


def _loop_factory(protocol: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's, with which a request costs half; gRPC has its own loop beside asyncio's."""
    if protocol == GRPC:
        return None
    try:
        import uvloop  # noqa: PLC0415  optional
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _raise_limit() -> None:
    """Raise the limit of open files as far as this user may: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections_of(settings: GatewaySettings) -> int:
    """Return how many connections the limit of open files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(min(settings.max_connections, soft - _KEPT_FILES), 1)


def reusable_socket(address: str, port: int) -> socket.socket:
    """Return a socket that is bound, and does not listen: several may be bound to its port.

    Raises:
        ConfigError: The address is not one of this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"{address}:{port}: cannot listen: {error.strerror or error}") from error
    return sock


def tls_context(settings: GatewaySettings) -> ssl.SSLContext | None:
    """Return what TLS needs; None without TLS.

    Raises:
        ConfigError: A file is missing or is not what it should be.
    """
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.client_ca is not None:
            context.load_verify_locations(settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--tls-cert {settings.tls_cert}, --tls-key, --client-ca: expected PEM files: {error}"
        ) from error
    return context


class _Process:
    """A serving process.

    Args:
        settings: The gateway's; ports are those that the watcher chose.
        protocol: HTTP or GRPC.
        row: Its row of the board.
    """

    def __init__(self, settings: GatewaySettings, protocol: str, row: int) -> None:
        self._settings = settings
        self._protocol = protocol
        self._board = Board(Path(settings.board), row)
        slo_ms = settings.default_slo_ms
        self._backend = Backend(
            self._client(), self._board, name=settings.model,
            default_slo_ns=None if slo_ms is None else int(slo_ms * MS),
        )  # fmt: skip
        callers = {} if settings.callers is None else read_callers(Path(settings.callers))
        self._access = Access(callers, settings.n_http + settings.n_grpc)

    def _client(self) -> AsyncClient:
        return AsyncClient(
            self._settings.connect, keys=self._settings.keys, max_outstanding=self._settings.max_outstanding
        )

    async def run(self) -> None:
        """Serve until SIGTERM, then drain."""
        ending = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ending.set)
        connecting = asyncio.create_task(self._connect())
        drain = await (self._open_http() if self._protocol == HTTP else self._open_grpc())
        gc.collect()
        gc.freeze()
        announce_ready({"protocol": self._protocol})
        await ending.wait()
        self._backend.is_draining = True
        await drain()
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await connecting
        await self._backend.client.close()

    async def _connect(self) -> None:
        """Find the router, however long it takes: until then requests are answered with 503."""
        while True:
            client = self._client()
            try:
                await client.connect()
            except UnansweredError as error:
                log.warning("%s", error)
                continue
            self._backend.client = client
            self._board.put("is_connected", 1)
            return

    async def _open_http(self) -> Callable[[], Awaitable[object]]:
        settings = self._settings
        limits = HttpLimits(
            settings.max_body_bytes, head_s=settings.head_s, body_s=settings.body_s, idle_s=settings.idle_s
        )
        tokens = None if settings.tokenizer is None else Tokens(Path(settings.tokenizer))
        routes = Routes(self._backend, self._access, version(), tokens)
        server = HttpServer(routes, self._board, limits, max_connections_of(settings))
        assert settings.http_port is not None, "this process serves HTTP"
        sock = reusable_socket(settings.address, settings.http_port)
        await server.listen(sock, tls_context(settings))

        async def drain() -> None:
            await server.drain(settings.notice_s, settings.drain_s)
            if tokens is not None:
                tokens.close()

        return drain

    async def _open_grpc(self) -> Callable[[], Awaitable[object]]:
        from gateway.rpc.server import open_grpc  # noqa: PLC0415  grpcio takes 100 ms that HTTP need not pay

        return await open_grpc(self._settings, self._backend, self._access, version())
