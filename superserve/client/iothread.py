"""The thread behind a `Client`: only it uses the socket, and it holds no reference to the client.

A pending query's future does. So a client lives as long as the application holds it or waits for an answer.
A client that is dropped disappears, with its thread and descriptors.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from superserve.client.futures import QueryFuture, settle
from superserve.client.link import SessionLink
from superserve.client.session import CLOSED_EARLY
from superserve.errors import CancelledQueryError, ConfigError, QueryError, UnansweredError
from superserve.net.connection import Connection
from superserve.net.context import client_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from superserve.client.reply import Answers
    from superserve.client.session import Session
    from superserve.net.keys import PeerKeys

_FD_SETSIZE = 1024  # select() is undefined from this descriptor on


class IoThread:
    """Sends a session's queries, receives their answers, and settles the futures.

    Args:
        session: The session to serve.
        guard: The session's guard.

    Attributes:
        thread: None until it is started.
        welcomed: Set once a router has sent WELCOME, or the thread has ended.
        failure: The exception that ended the thread, if it did not end by `stop`.
        is_closing: The thread ends, or has ended: nothing more is sent.
    """

    def __init__(self, session: Session[QueryFuture], guard: contextlib.AbstractContextManager[Any]) -> None:
        self.thread: threading.Thread | None = None
        self.welcomed = threading.Event()
        self.failure: BaseException | None = None
        self.is_closing = False
        self._session = session
        self._guard = guard
        self._lock = threading.RLock()
        self._wake_fd = -1

    # --- any thread ---------------------------------------------------------------------

    def start(
        self, endpoints: Sequence[str], keys: PeerKeys | None, *, shared_memory: bool | None = None
    ) -> None:
        """Start the thread, unless it was already started or stopped.

        Raises:
            ConfigError: An endpoint is malformed, or too few descriptors are left.
        """
        with self._lock:
            if self.thread is not None or self.is_closing:
                return
            connect = partial(Connection, context=client_context(), keys=keys, shared_memory=shared_memory)
            connections = opened(endpoints, connect)
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.thread = threading.Thread(
                target=self._run, args=(connections, connect), name=f"superserve {endpoints[0]}", daemon=True
            )
            self.thread.start()

    def wake(self) -> None:
        """Wake the thread: there is something to send, or it has to end."""
        with self._lock:  # a closed descriptor's number may already belong to another file
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> threading.Thread | None:
        """Ask the thread to end, and return it; it ends the queries that are left."""
        with self._lock:
            thread, was_closing, self.is_closing = self.thread, self.is_closing, True
        if thread is None:
            self._fail(self._session.close(CancelledQueryError(CLOSED_EARLY)))
        elif not was_closing:
            self.wake()
        return thread

    # --- the thread ---------------------------------------------------------------------

    def _run(self, connections: list[Connection], connect: Callable[[str], Connection]) -> None:
        """Serve until stopped. However the loop ends, every future is settled."""
        link: SessionLink[QueryFuture] = SessionLink(
            connections, self._session, self._settle, self._fail, connect
        )
        error: QueryError = CancelledQueryError(CLOSED_EARLY)
        try:
            sleeper = Sleeper(link.filenos(), self._wake_fd)
            while not self.is_closing:
                self._pass(link, sleeper)
        except BaseException as failure:
            self.failure = failure
            error = UnansweredError(f"the client's I/O thread failed: {failure!r}")
            raise
        finally:
            self.is_closing = True
            try:
                link.close(error)
            finally:
                self.welcomed.set()
                with self._lock:
                    fd, self._wake_fd = self._wake_fd, -1
                os.close(fd)

    def _pass(self, link: SessionLink[QueryFuture], sleeper: Sleeper) -> None:
        """Receive, check, send; then sleep until there is more to do."""
        link.receive()
        now_ns = time.monotonic_ns()
        link.look(now_ns)
        if link.is_welcome and not self.welcomed.is_set():
            self.welcomed.set()
        link.send(now_ns)
        sleeper.watch(link.filenos())
        if link.is_readable():  # the descriptor would not wake us for it: it is edge-triggered
            return
        sleeper.clear()
        if self.is_closing:  # `stop` sets it before it writes, and `clear` may just have read that byte
            return
        session = self._session
        wake_ns, send_at_ns = link.wake_ns(), link.send_at_ns
        if now_ns < send_at_ns:
            wake_ns = min(wake_ns, send_at_ns)
            must_sleep = session.pause()  # until the message may leave; only an urgent submit wakes us
        else:
            must_sleep = session.rest()
        if must_sleep:
            sleeper.sleep(wake_ns)
            sleeper.is_told |= session.resume()

    def _settle(self, answers: Answers, futures: list[QueryFuture | None]) -> None:
        settle(self._guard, futures, answers)

    def _fail(self, ended: list[tuple[QueryFuture, QueryError]]) -> None:
        for future, error in ended:
            future._outcome = error
        settle(self._guard, [future for future, _ in ended])


def opened(endpoints: Sequence[str], connect: Callable[[str], Connection]) -> list[Connection]:
    """Connect to each endpoint; if one is malformed, none stays open."""
    found: list[Connection] = []
    try:
        for endpoint in endpoints:
            found.append(connect(endpoint))  # noqa: PERF401  those before one that fails have to be closed
    except ConfigError:
        for connection in found:
            connection.close()
        raise
    return found


class Sleeper:
    """Sleeps until a file descriptor is readable, or until an instant.

    select() has microseconds but accepts no descriptor above 1023, and an application may have more
    open; poll() accepts any, and has milliseconds.

    Attributes:
        is_told: A thread has written to `wake_fd`, or is about to.
    """

    def __init__(self, socket_fds: Sequence[int], wake_fd: int) -> None:
        self.is_told = False
        self._fds: list[int] = []
        self._wake_fd = wake_fd
        self._poll: select.poll | None = None
        self.watch(socket_fds)

    def watch(self, socket_fds: Sequence[int]) -> None:
        """Sleep on these sockets from now on; they only ever become more."""
        if len(socket_fds) + 1 == len(self._fds):
            return
        self._fds = [*socket_fds, self._wake_fd]
        if max(self._fds) >= _FD_SETSIZE:
            self._poll = select.poll()
            for fd in self._fds:
                self._poll.register(fd, select.POLLIN)

    def clear(self) -> None:
        """Read the wake-up before another thread may write one: reading later would lose the new one."""
        if self.is_told:
            with contextlib.suppress(BlockingIOError):  # the writer has not come to it yet
                os.eventfd_read(self._wake_fd)
                self.is_told = False

    def sleep(self, until_ns: int) -> None:
        """Sleep; return at once if the instant has passed."""
        left_ns = max(0, until_ns - time.monotonic_ns())
        if self._poll is not None:
            self._poll.poll(left_ns / 1e6)
        else:
            select.select(self._fds, (), (), left_ns / 1e9)
