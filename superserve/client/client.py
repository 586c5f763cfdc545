"""Client: submit a query, await its reply. Thread-safe; one I/O thread behind it.

    with Client("tcp://127.0.0.1:5555") as client:
        reply = client.infer(image, slo_ms=36)              # blocks; raises a QueryError
        future = client.submit(image, slo_ms=36)            # a concurrent.futures.Future
        print(future.result().output, future.result().subnet)

What has gathered since the last send goes out as one message, so a busy process pays for
few messages and an idle one waits for nobody. Every future ends: with a Reply (on time, or
marked late), with the router's refusal, or with an UnansweredError.

`superserve.client.session` decides, `superserve.client.link` sends and receives; here are the thread and the
waiting.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any

import zmq

from superserve.client.futures import BLOCKING, FORKED, QueryFuture, is_on_a_loop, settle
from superserve.client.link import SessionLink
from superserve.client.options import (
    checked_accuracy,
    checked_bound,
    checked_priority,
    checked_slo,
    checked_wait,
)
from superserve.client.session import CLOSED, CLOSED_EARLY, Session
from superserve.errors import (
    CancelledQueryError,
    DrainingError,
    QueryError,
    SuperServeError,
    UnansweredError,
    UsageError,
)
from superserve.net.connection import Connection, no_router
from superserve.net.keys import peer_keys

if TYPE_CHECKING:
    from types import TracebackType

    from superserve.client.reply import Answers, Reply

_FD_SETSIZE = 1024


class Client:
    """A connection to a router that any number of threads may share.

    Args:
        endpoint: The router's client endpoint, such as tcp://10.0.0.1:5555.
        max_outstanding: Queries without an answer, at most; `submit` then raises OverloadedError.
        max_bytes: Payload bytes without an answer, at most; likewise.
        connect_timeout_s: How long `connect` waits for a router.
        keys: A key file, or a folder with `client.key`, for a router with keys; "" for none. None takes
            it from the environment, SUPERSERVE_KEYS.

    Raises:
        ConfigError: The key file is missing, malformed, or others may read it.
        UsageError: A bound or the timeout is no number.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        max_outstanding: int = 20_000,
        max_bytes: int = 1 << 30,
        connect_timeout_s: float = 5.0,
        keys: str | os.PathLike[str] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.connect_timeout_s = checked_wait("connect_timeout_s", connect_timeout_s)
        self._keys = peer_keys(keys)
        self.guard: contextlib.AbstractContextManager[Any] = threading.RLock()
        self.pid = os.getpid()
        self._session: Session[QueryFuture] = Session(
            self.guard,
            no_router(endpoint),
            max_outstanding=checked_bound("max_outstanding", max_outstanding),
            max_bytes=checked_bound("max_bytes", max_bytes),
        )
        self._starting = threading.RLock()
        self._cancelling = threading.RLock()
        self.thread: threading.Thread | None = None
        self._wake_fd = -1
        self._is_closing = False
        self._welcomed = threading.Event()
        self._failure: BaseException | None = None

    # --- for applications ---------------------------------------------------------------

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Start the I/O thread and wait until a router has said WELCOME.

        Raises:
            UnansweredError: No router answered within `connect_timeout_s`.
            ConfigError: The endpoint is malformed.
            UsageError: An event loop runs in this thread, or the client is from before a fork.
        """
        if is_on_a_loop():
            raise UsageError(BLOCKING.format(what="Client.connect()"))
        self._start()
        if self.thread is None:
            raise DrainingError(CLOSED)
        if not self._welcomed.wait(self.connect_timeout_s):
            self.close()
            raise UnansweredError(self._session.no_router)
        if self._failure is not None:
            raise SuperServeError(f"client: {self._failure}") from self._failure

    def infer(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0
    ) -> Reply:
        """Submit one query and wait for its reply. See `submit`.

        Raises:
            QueryError: It got no output; the class and the message say why.
            UsageError: An event loop runs in this thread.
        """
        if is_on_a_loop():
            raise UsageError(BLOCKING.format(what="Client.infer()"))
        future = self.submit(payload, slo_ms=slo_ms, min_accuracy=min_accuracy, priority=priority)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # interrupted: nobody wants the answer any more
            raise

    def submit(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0
    ) -> QueryFuture:
        """Submit one query.

        Args:
            payload: An array of the model's input dtype and shape, or its bytes in C order. It is not
                copied before it is sent, and may be sent again: do not write to it until the query
                has ended.
            slo_ms: From now until the answer is worthless, milliseconds.
            min_accuracy: Least profiled accuracy, percent, that the serving subnet must have.
            priority: Class 0 to 255, for policies that see classes.

        Returns:
            A future; its result is a Reply, its exception a QueryError.

        Raises:
            InvalidQueryError: The payload or an option is not what the model takes.
            OverloadedError: `max_outstanding` or `max_bytes` is reached.
            DrainingError: The client is closed.
            UsageError: The client is from before a fork.
        """
        buffer, n_bytes = self._session.checked(payload)
        slo_ns = checked_slo(slo_ms)
        floor = 0.0 if min_accuracy is None else checked_accuracy(min_accuracy)
        if type(priority) is not int or priority:
            priority = checked_priority(priority)
        if self.thread is None or os.getpid() != self.pid:
            self._start()
        future = QueryFuture(self, buffer, n_bytes, time.monotonic_ns(), slo_ns, floor, priority)
        if self._session.submit(future):
            self._wake()
        return future

    def close(self) -> None:
        """Stop the I/O thread; queries without an answer end as CancelledQueryError."""
        if os.getpid() != self.pid:
            return  # the parent's: its locks may have been held at the fork
        with self._starting:
            thread, was_closing, self._is_closing = self.thread, self._is_closing, True
        if thread is None:
            self._fail(self._session.close(CancelledQueryError(CLOSED_EARLY)))
            return
        if not was_closing:
            self._wake()
        if threading.current_thread() is thread:
            return  # called by a future's callback: the thread ends by itself
        thread.join()
        atexit.unregister(self.close)

    @property
    def outstanding(self) -> int:
        """Queries without an answer."""
        return self._session.outstanding

    @property
    def held_bytes(self) -> int:
        """Payload bytes of queries without an answer."""
        return self._session.held_bytes

    # --- inside -------------------------------------------------------------------------

    def cancel_query(self, future: QueryFuture) -> bool:
        """End a query for QueryFuture.cancel; False if it has ended already."""
        if os.getpid() != self.pid:
            raise UsageError(FORKED.format(what="Client"))
        with self._cancelling:  # of two who cancel at once, the second is told True as well
            is_ended, must_wake = self._session.cancel(future)
            if is_ended:
                future._is_cancelled = True
        if must_wake:
            self._wake()
        return is_ended

    def _start(self) -> None:
        if os.getpid() != self.pid:
            raise UsageError(FORKED.format(what="Client"))
        with self._starting:
            if self.thread is not None or self._is_closing:
                return
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
            connection = Connection(self.endpoint, context, self._keys)
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.thread = threading.Thread(
                target=self._run, args=(connection,), name=f"superserve {self.endpoint}", daemon=True
            )
            self.thread.start()
            atexit.register(self.close)

    def _wake(self) -> None:
        with self._starting:  # a number that was closed may be another's by now
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    # --- the I/O thread -----------------------------------------------------------------

    def _run(self, connection: Connection) -> None:
        """Serve until closed. Whatever ends it, no future is left waiting."""
        link: SessionLink[QueryFuture] = SessionLink(connection, self._session, self._settle, self._fail)
        error: QueryError = CancelledQueryError(CLOSED_EARLY)
        try:
            sleeper = _Sleeper(connection.socket.fileno(), self._wake_fd)
            while not self._is_closing:
                self._pass(link, sleeper)
        except BaseException as failure:
            self._failure = failure
            error = UnansweredError(f"the client's I/O thread failed: {failure!r}")
            raise
        finally:
            self._is_closing = True
            link.close(error)
            self._welcomed.set()
            with self._starting:
                fd, self._wake_fd = self._wake_fd, -1
            os.close(fd)

    def _pass(self, link: SessionLink[QueryFuture], sleeper: _Sleeper) -> None:
        """Take in, look, send; then sleep until there is more to do."""
        link.receive()
        now_ns = time.monotonic_ns()
        link.look(now_ns)
        if link.is_welcome and not self._welcomed.is_set():
            self._welcomed.set()
        link.send(now_ns)
        if link.connection.is_readable():
            return
        sleeper.clear()
        if self._is_closing:  # whoever closes sets this before he writes: it may just have been read
            return
        session = self._session
        wake_ns, send_at_ns = link.wake_ns(), link.send_at_ns
        if now_ns < send_at_ns:
            wake_ns = min(wake_ns, send_at_ns)
            must_sleep = session.pause()
        else:
            must_sleep = session.rest()
        if must_sleep:
            sleeper.sleep(wake_ns)
            sleeper.is_told |= session.resume()

    def _settle(self, answers: Answers, futures: list[QueryFuture | None]) -> None:
        settle(self.guard, futures, answers)

    def _fail(self, ended: list[tuple[QueryFuture, QueryError]]) -> None:
        for future, error in ended:
            future._outcome = error
        settle(self.guard, [future for future, _ in ended])


class _Sleeper:
    """Sleeps until one of two file descriptors can be read, or an instant has come.

    select() counts in microseconds but takes no descriptor above 1023, and an application may have
    many; poll() takes any, and counts in milliseconds.

    Attributes:
        is_told: Somebody has written to the second descriptor, or is about to.
    """

    def __init__(self, socket_fd: int, wake_fd: int) -> None:
        self.is_told = False
        self._fds = [socket_fd, wake_fd]
        self._wake_fd = wake_fd
        self._poll: select.poll | None = None
        if max(self._fds) >= _FD_SETSIZE:
            self._poll = select.poll()
            for fd in self._fds:
                self._poll.register(fd, select.POLLIN)

    def clear(self) -> None:
        """Read what was written, before anybody can be told to write anew: that must not be swallowed."""
        if self.is_told:
            with contextlib.suppress(BlockingIOError):  # not written yet
                os.eventfd_read(self._wake_fd)
                self.is_told = False

    def sleep(self, until_ns: int) -> None:
        """Sleep; return at once if the instant has passed."""
        left_ns = max(0, until_ns - time.monotonic_ns())
        if self._poll is not None:
            self._poll.poll(left_ns / 1e6)
        else:
            select.select(self._fds, (), (), left_ns / 1e9)
