"""The process that people start: it keeps the serving processes, asks for STATUS, and shows the metrics."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.calls.access import read_callers
from gateway.calls.board import Board
from gateway.serve.metrics import page, pages
from gateway.serve.process import GRPC, HTTP, reusable_socket, tls_context
from superserve.errors import SuperServeError
from superserve.net.connection import ask_status
from superserve.roles.pages import serve_pages
from superserve.roles.processes import ProcessGroup, announce_ready, wait_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.calls.settings import GatewaySettings
    from superserve.roles.processes import RoleProcess

log = logging.getLogger(__name__)

READY_S = 30.0
_LOOK_S = 0.1
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 10.0
_GOOD_S = 30.0
_ASK_EVERY_S = 1.0
_ASK_SOON_S = 0.2  # while nothing is ready: the first worker is seen at once
_SPARE_S = 3.0
_ROUTER_S = 5.0


class _Kept:
    """One serving process, restarted when it ends."""

    def __init__(self, protocol: str, row: int, start: Callable[[], RoleProcess]) -> None:
        self.name = f"gateway-{protocol}-{row}"
        self.protocol = protocol
        self.row = row
        self._start = start
        self._wait_s = _FIRST_WAIT_S
        self._again_at = 0.0
        self._began = time.monotonic()
        self.process = start()

    def look(self) -> bool:
        """Start it again if it has ended and its wait is over; return whether it was started."""
        now = time.monotonic()
        if (code := self.process.poll()) is None:
            return False
        if not self._again_at:
            if now - self._began > _GOOD_S:
                self._wait_s = _FIRST_WAIT_S
            self._again_at = now + self._wait_s
            log.error(
                "%s ended (%s); again in %.1f s: %s", self.name, code, self._wait_s, self.process.tail(5)
            )
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        if now < self._again_at:
            return False
        self._again_at, self._began = 0.0, now
        self.process = self._start()
        return True


class Watcher:
    """Runs a gateway.

    Args:
        settings: Checked ones.
        metrics: Where the metrics are served, as address and port; None for nowhere.
    """

    def __init__(self, settings: GatewaySettings, metrics: tuple[str, int] | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._ending = threading.Event()
        self._restarts = 0

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            ConfigError: A port is taken, or a file is not what it should be.
            ProcessError: A serving process did not start.
        """
        settings = self._settings
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._ending.set())
        if settings.callers is not None:
            read_callers(Path(settings.callers))
        tls_context(settings)
        with contextlib.ExitStack() as stack:
            settings = self._reserved(stack)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="superserve-gateway-")))
            n_rows = settings.n_http + settings.n_grpc
            Board.make(folder / "board", n_rows)
            settings = replace(settings, board=str(folder / "board"))
            board = Board(folder / "board")
            rows = {HTTP: range(settings.n_http), GRPC: range(settings.n_http, n_rows)}
            where = ""
            if self._metrics is not None:
                give = pages(lambda: page(board, rows, self._restarts))
                where = stack.enter_context(
                    serve_pages(give, address=self._metrics[0], port=self._metrics[1])
                )
            stack.callback(self._ask(board).join)
            stack.callback(self._ending.set)
            self._keep(settings, board, where)

    def _reserved(self, stack: contextlib.ExitStack) -> GatewaySettings:
        """Return the settings with ports, which sockets of this process hold as long as it lives."""
        settings = self._settings
        for name in ("http_port", "grpc_port"):
            port = getattr(settings, name)
            if port is None:
                settings = _with(settings, "n_" + name.partition("_")[0], 0)
                continue
            sock = stack.enter_context(reusable_socket(settings.address, port))
            settings = _with(settings, name, sock.getsockname()[1])
        return settings

    def _keep(self, settings: GatewaySettings, board: Board, metrics: str) -> None:
        with ProcessGroup() as group:
            kept = [_Kept(*one) for one in self._wanted(settings, group)]
            for one in kept:
                wait_ready(one.process, READY_S)
            self._wait_for_router(board)
            self._announce(settings, metrics)
            while not self._ending.wait(_LOOK_S):
                for one in kept:
                    self._restarts += one.look()
            for one in kept:
                one.process.terminate()
            most_s = settings.notice_s + settings.drain_s + _SPARE_S
            deadline = time.monotonic() + most_s
            for one in kept:
                one.process.stop(max(deadline - time.monotonic(), 0.1))

    def _wanted(
        self, settings: GatewaySettings, group: ProcessGroup
    ) -> Iterator[tuple[str, int, Callable[[], RoleProcess]]]:
        text = settings.to_json()
        protocols = [HTTP] * settings.n_http + [GRPC] * settings.n_grpc
        for row, protocol in enumerate(protocols):
            argv = ["-m", "gateway", "process", protocol, str(row), text]
            name = f"gateway-{protocol}-{row}"
            yield protocol, row, lambda name=name, argv=argv: group.start(name, argv)  # type: ignore[misc]

    def _wait_for_router(self, board: Board) -> None:
        """Wait a little for every process to find the router: a gateway starts without one, too."""
        deadline = time.monotonic() + _ROUTER_S
        while board.sum("is_connected") < board.n_rows and time.monotonic() < deadline:
            if self._ending.wait(0.02):
                return
        if board.sum("is_connected") < board.n_rows:
            log.warning("no router answers at %s yet: requests get 503", self._settings.connect)

    def _announce(self, settings: GatewaySettings, metrics: str) -> None:
        scheme = "http" if settings.tls_cert is None else "https"
        host = f"[{settings.address}]" if ":" in settings.address else settings.address
        ends = {}
        if settings.http_port is not None:
            ends["http"] = f"{scheme}://{host}:{settings.http_port}"
        if settings.grpc_port is not None:
            ends["grpc"] = f"{host}:{settings.grpc_port}"
        if metrics:
            ends["metrics"] = metrics
        announce_ready(ends)
        log.info("%s", "  ".join(f"{name}: {end}" for name, end in ends.items()))

    def _ask(self, board: Board) -> threading.Thread:
        """Start the thread that asks the router how many GPUs are ready; it ends with this gateway."""

        def ask() -> None:
            while not self._ending.is_set():
                try:
                    n_ready = ask_status(
                        self._settings.connect, _ASK_EVERY_S, self._settings.keys
                    ).workers_ready
                except SuperServeError as error:
                    log.debug("the router did not say how it is: %s", error)
                    board.set_workers(None)
                else:
                    board.set_workers(n_ready)
                self._ending.wait(_ASK_EVERY_S if board.workers_ready else _ASK_SOON_S)

        thread = threading.Thread(target=ask, name="router status")
        thread.start()
        return thread


def _with(settings: GatewaySettings, name: str, value: int) -> GatewaySettings:
    changed: dict[str, Any] = {name: value}
    return replace(settings, **changed)
