"""Client: submit a query, await its reply. Thread-safe; one I/O thread behind it.

    with Client("tcp://127.0.0.1:5555") as client:
        reply = client.infer(image, slo_ms=36)              # blocks; raises a QueryError
        future = client.submit(image, slo_ms=36)            # a concurrent.futures.Future
        print(future.result().output, future.result().subnet)

Queries that gather between two sends leave as one message, so a busy process sends few messages, and an
idle one sends at once. Every future ends: with a Reply (on time, or marked late), with the router's
refusal, or with an UnansweredError.

`superserve.client.session` decides, `superserve.client.link` sends and receives, on the thread of
`superserve.client.iothread`; this module is the API for applications.
"""

from __future__ import annotations

import atexit
import os
import random
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from superserve.client.futures import BLOCKING, FORKED, QueryFuture, is_on_a_loop
from superserve.client.iothread import IoThread
from superserve.client.options import (
    checked_accuracy,
    checked_bound,
    checked_priority,
    checked_slo,
    checked_wait,
    packed_trace,
)
from superserve.client.session import CLOSED, Session
from superserve.errors import DrainingError, SuperServeError, UnansweredError, UsageError
from superserve.net.connection import no_router
from superserve.net.endpoints import endpoints_of, resolved
from superserve.net.keys import peer_keys
from superserve.shared.offers import is_allowed

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Sequence
    from types import TracebackType

    from superserve.client.reply import Reply

_unclosed: weakref.WeakSet[Client] = weakref.WeakSet()
"""Clients with a running thread; closed at exit, so that the interpreter can end."""


@atexit.register
def _close_all() -> None:
    """Close the clients that the application left open, while threads can still be joined."""
    for client in list(_unclosed):
        client.close()


class Client:
    """A connection to a router that any number of threads may share.

    A client that is dropped without `close` closes itself, with a ResourceWarning, once none of its queries
    is pending.

    Args:
        endpoint: The router's client endpoint, such as tcp://10.0.0.1:5555. Of several routers: a list of
            theirs, one string with commas between them, or a name that has several addresses. One is enough
            if the routers know each other.
        max_outstanding: Most queries without an answer; above it `submit` raises OverloadedError.
        max_bytes: Most payload bytes without an answer; above it `submit` raises OverloadedError.
        connect_timeout_s: How long `connect` waits for a router.
        keys: A key file, or a folder with `client.key`, for a router with keys; "" for none. None reads
            the path from the environment variable SUPERSERVE_KEYS.
        shared_memory: Whether payloads of 32 KiB and more go through memory shared with a router on this
            host. None does so unless the environment variable SUPERSERVE_SHARED_MEMORY is 0.

    Attributes:
        ignored_traceparents: How many a caller gave that were malformed.

    Raises:
        ConfigError: The key file is missing, malformed, or others may read it; or the environment variable
            is neither 0 nor 1.
        UsageError: A bound or the timeout is not a number, or no endpoint is given.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        *,
        max_outstanding: int = 20_000,
        max_bytes: int = 1 << 30,
        connect_timeout_s: float = 5.0,
        keys: str | os.PathLike[str] | None = None,
        shared_memory: bool | None = None,
    ) -> None:
        self._endpoints = endpoints_of(endpoint)
        self.endpoint = ",".join(self._endpoints)
        self.connect_timeout_s = checked_wait("connect_timeout_s", connect_timeout_s)
        self._keys = peer_keys(keys)
        self._shared_memory = is_allowed(shared_memory)
        self.guard: contextlib.AbstractContextManager[Any] = threading.RLock()
        self.pid = os.getpid()
        self._session: Session[QueryFuture] = Session(
            self.guard,
            no_router(self.endpoint),
            max_outstanding=checked_bound("max_outstanding", max_outstanding),
            max_bytes=checked_bound("max_bytes", max_bytes),
            start=random.random(),
        )
        # Not the guard: while it is held, `_is_cancelled` and the session's state change together.
        self._cancelling = threading.RLock()
        self._io = IoThread(self._session, self.guard)
        self.ignored_traceparents = 0

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that settles futures; None before the first query or `connect`."""
        return self._io.thread

    def __del__(self) -> None:
        io: IoThread | None = self.__dict__.get("_io")  # absent if the constructor raised
        if io is None or io.thread is None or io.is_closing or os.getpid() != self.pid:
            return
        io.stop()  # not joined: this may be the thread itself
        warnings.warn(f"Client({self.endpoint!r}) was not closed", ResourceWarning, source=self, stacklevel=2)

    # --- for applications ---------------------------------------------------------------

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Start the I/O thread and wait for a router's WELCOME.

        Raises:
            UnansweredError: No router answered within `connect_timeout_s`.
            ConfigError: The endpoint is malformed, or too few file descriptors are left.
            UsageError: An event loop runs in this thread, or the client was made before a fork.
        """
        if is_on_a_loop():
            raise UsageError(BLOCKING.format(what="Client.connect()"))
        self._start()
        io = self._io
        if io.thread is None:
            raise DrainingError(CLOSED)
        if not io.welcomed.wait(self.connect_timeout_s):
            self.close()
            raise UnansweredError(self._session.no_router)
        if io.failure is not None:
            raise SuperServeError(f"client: {io.failure}") from io.failure

    def infer(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0,
        traceparent: str | None = None,
    ) -> Reply:  # fmt: skip
        """Submit one query and wait for its reply. See `submit`.

        Raises:
            QueryError: It got no output; the class and the message give the reason.
            UsageError: An event loop runs in this thread.
        """
        if is_on_a_loop():
            raise UsageError(BLOCKING.format(what="Client.infer()"))
        future = self.submit(
            payload, slo_ms=slo_ms, min_accuracy=min_accuracy, priority=priority, traceparent=traceparent
        )
        try:
            return future.result()
        except BaseException:
            future.cancel()  # interrupted: the answer is not needed any more
            raise

    def submit(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0,
        traceparent: str | None = None,
    ) -> QueryFuture:  # fmt: skip
        """Submit one query.

        Args:
            payload: An array of the model's input dtype and shape, or its bytes in C order. It is not
                copied before it is sent, and may be sent again: do not write to it until the query
                has ended.
            slo_ms: How long from now the answer is useful, milliseconds.
            min_accuracy: Least profiled accuracy, percent, that the serving subnet must have.
            priority: Class 0 to 255, for policies that see classes.
            traceparent: The caller's W3C trace context: the spans of the query continue it. A malformed one
                is ignored, and counted in `ignored_traceparents`.

        Returns:
            A future; its result is a Reply, its exception a QueryError.

        Raises:
            InvalidQueryError: The payload or an option is not what the model takes.
            OverloadedError: `max_outstanding` or `max_bytes` is reached.
            DrainingError: The client is closed.
            ConfigError: On the first call, as `connect`.
            UsageError: The client was made before a fork.
        """
        buffer, n_bytes = self._session.checked(payload)
        slo_ns = checked_slo(slo_ms)
        floor = 0.0 if min_accuracy is None else checked_accuracy(min_accuracy)
        if type(priority) is not int or priority:
            priority = checked_priority(priority)
        if self._io.thread is None or os.getpid() != self.pid:
            self._start()
        future = QueryFuture(self, buffer, n_bytes, time.monotonic_ns(), slo_ns, floor, priority)
        if traceparent is not None:
            future.trace = packed_trace(traceparent)
            self.ignored_traceparents += not future.trace
        if self._session.submit(future):
            self._io.wake()
        return future

    def close(self) -> None:
        """Stop the I/O thread; queries without an answer end as CancelledQueryError."""
        if os.getpid() != self.pid:
            return  # the parent's client: its locks may have been held at the fork
        thread = self._io.stop()
        if thread is None or threading.current_thread() is thread:
            return  # called by a future's callback: the thread ends once it returns
        thread.join()
        _unclosed.discard(self)

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
        """End a query, for QueryFuture.cancel; False if it has ended already."""
        if os.getpid() != self.pid:
            raise UsageError(FORKED.format(what="Client"))
        with self._cancelling:  # so that of two concurrent cancels the second returns True as well
            is_ended, must_wake = self._session.cancel(future)
            if is_ended:
                future._is_cancelled = True
        if must_wake:
            self._io.wake()
        return is_ended

    def _start(self) -> None:
        if os.getpid() != self.pid:
            raise UsageError(FORKED.format(what="Client"))
        self._io.start(resolved(self._endpoints), self._keys, shared_memory=self._shared_memory)
        _unclosed.add(self)
