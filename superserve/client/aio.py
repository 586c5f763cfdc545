"""AsyncClient: the client for asyncio. One event loop; no thread, no task.

    async with AsyncClient("tcp://127.0.0.1:5555") as client:
        reply = await client.infer(image, slo_ms=36)        # raises a QueryError
        future = client.submit(image, slo_ms=36)            # an asyncio.Future
        reply = await future

Queries that tasks submit in one round of the loop leave as one message. A task that is cancelled while
it waits cancels its query at the router too. `superserve.client.session` decides, `superserve.client.link`
sends and receives, as for `superserve.client`; this module has the loop's reader and timers.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import random
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from superserve.client.futures import FORKED
from superserve.client.iothread import opened
from superserve.client.link import SessionLink
from superserve.client.options import (
    checked_accuracy,
    checked_bound,
    checked_priority,
    checked_slo,
    checked_wait,
    packed_trace,
)
from superserve.client.reply import Reply
from superserve.client.session import CLOSED, CLOSED_EARLY, Session
from superserve.errors import CancelledQueryError, DrainingError, QueryError, UnansweredError, UsageError
from superserve.net.connection import Connection, no_router
from superserve.net.context import client_context
from superserve.net.endpoints import endpoints_of, resolved
from superserve.net.keys import peer_keys
from superserve.shared.offers import is_allowed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from superserve.client.reply import Answers
    from superserve.hello import ModelSpec

_unclosed: weakref.WeakSet[AsyncClient] = weakref.WeakSet()
"""Clients with an open socket; closed at exit, so that the interpreter can end."""

NO_LOOP = (
    "no event loop runs in this thread: use AsyncClient in a coroutine, on the loop that made it, "
    "or use Client from threads"
)
OTHER_LOOP = (
    "this AsyncClient belongs to another event loop: make one AsyncClient per event loop, "
    "or use Client from threads"
)


class AsyncQueryFuture(asyncio.Future[Reply]):
    """The future of one query. If you cancel it, or the task that awaits it, the router drops the query too.

    Attributes:
        query_id: As in error messages and in the router's event log.
        deadline_ns: After this instant the answer is worthless, on the loop's clock, ns.
        submitted_ns: When it was submitted, on the same clock.
    """

    __slots__ = (
        "_owner", "deadline_ns", "min_accuracy", "n_bytes", "n_sends", "payload", "priority", "query_id",
        "submitted_ns", "trace",
    )  # fmt: skip

    def __init__(  # the hot path: plain numbers by position
        self, owner: AsyncClient, loop: asyncio.AbstractEventLoop, payload: Any, n_bytes: int, slo_ns: int,
        min_accuracy: float, priority: int,
    ) -> None:  # fmt: skip
        super().__init__(loop=loop)
        self._owner = owner
        self.payload = payload
        self.n_bytes = n_bytes
        self.submitted_ns = now_ns = time.monotonic_ns()
        self.deadline_ns = now_ns + slo_ns
        self.min_accuracy = min_accuracy
        self.priority = priority
        self.trace = b""
        self.query_id = self.n_sends = 0

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the query wherever it is; False if it has ended already."""
        is_cancelled = super().cancel(msg)
        if is_cancelled:
            self._owner._cancel(self)
        return is_cancelled


@atexit.register
def _close_all() -> None:
    """Close the sockets of the clients that the application left open."""
    for client in list(_unclosed):
        client._abandon()


class AsyncClient:
    """A connection to a router for the tasks of one event loop.

    A client that is dropped without `close` closes itself, with a ResourceWarning, once none of its queries
    is pending.

    Args:
        endpoint: As for `Client`: of one router, or of several.
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
        UsageError: A bound or the timeout is not a number.
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
        self._pid = os.getpid()
        self._session: Session[AsyncQueryFuture] = Session(
            threading.RLock(),
            no_router(self.endpoint),
            max_outstanding=checked_bound("max_outstanding", max_outstanding),
            max_bytes=checked_bound("max_bytes", max_bytes),
            start=random.random(),
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: SessionLink[AsyncQueryFuture] | None = None
        self._welcomed: asyncio.Future[None] | None = None
        self._timer: asyncio.Handle | None = None
        self._timer_ns = 0
        self._is_kept = False
        self._watched: list[int] = []
        self._is_closed = False
        self.ignored_traceparents = 0

    def __del__(self) -> None:
        link, loop = self.__dict__.get("_link"), self.__dict__.get("_loop")
        if link is None or loop is None or os.getpid() != self._pid:
            return
        self._link, self._is_closed = None, True
        if loop.is_closed() or asyncio._get_running_loop() is loop:
            _drop(loop, link)
        else:  # the garbage collector runs in any thread, but only the loop's may use the socket
            loop.call_soon_threadsafe(_drop, loop, link)
        warnings.warn(
            f"AsyncClient({self.endpoint!r}) was not closed", ResourceWarning, source=self, stacklevel=2
        )

    # --- for applications ---------------------------------------------------------------

    async def __aenter__(self) -> AsyncClient:
        try:
            await self.connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect, and wait for a router's WELCOME.

        Raises:
            UnansweredError: No router answered within `connect_timeout_s`.
            ConfigError: The endpoint is malformed.
            UsageError: It is called on another event loop, or in another process.
        """
        self._check_place()
        if self._is_closed or self._welcomed is None:
            raise DrainingError(CLOSED)
        try:
            await asyncio.wait_for(asyncio.shield(self._welcomed), self.connect_timeout_s)
        except TimeoutError:
            await self.close()
            raise UnansweredError(self._session.no_router) from None

    async def infer(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0,
        traceparent: str | None = None,
    ) -> Reply:  # fmt: skip
        """Submit one query and wait for its reply. See `submit`.

        Raises:
            QueryError: It got no output; the class and the message give the reason.
        """
        return await self.submit(
            payload, slo_ms=slo_ms, min_accuracy=min_accuracy, priority=priority, traceparent=traceparent
        )

    def submit(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0,
        traceparent: str | None = None,
    ) -> AsyncQueryFuture:  # fmt: skip
        """Submit one query; it is sent once the tasks that are ready have run.

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
            An asyncio.Future; its result is a Reply, its exception a QueryError.

        Raises:
            InvalidQueryError: The payload or an option is not what the model takes.
            OverloadedError: `max_outstanding` or `max_bytes` is reached.
            DrainingError: The client is closed.
            UsageError: It is called on another event loop, or in another process.
        """
        loop = asyncio._get_running_loop()
        if loop is None or loop is not self._loop or os.getpid() != self._pid:
            loop = self._check_place()
        session = self._session
        buffer, n_bytes = session.checked(payload)
        slo_ns = checked_slo(slo_ms)
        floor = 0.0 if min_accuracy is None else checked_accuracy(min_accuracy)
        if type(priority) is not int or priority:
            priority = checked_priority(priority)
        future = AsyncQueryFuture(self, loop, buffer, n_bytes, slo_ns, floor, priority)
        if traceparent is not None:
            future.trace = packed_trace(traceparent)
            self.ignored_traceparents += not future.trace
        if session.submit(future) and self._link is not None:
            self._plan(self._link.send_at_ns)
        return future

    async def close(self) -> None:
        """Send BYE and detach from the loop; queries without an answer end as CancelledQueryError."""
        if self._loop is not None and not self._loop.is_closed():
            self._check_place()
        self._is_closed = True
        self._let_go()
        link, self._link = self._link, None
        if link is None:
            self._session.close(CancelledQueryError(CLOSED_EARLY))
        else:
            link.close(CancelledQueryError(CLOSED_EARLY))

    @property
    def outstanding(self) -> int:
        """Queries without an answer."""
        return self._session.outstanding

    @property
    def held_bytes(self) -> int:
        """Payload bytes of queries without an answer."""
        return self._session.held_bytes

    @property
    def is_connected(self) -> bool:
        """Whether a router is there, as far as known: it has sent WELCOME, and answers heartbeats since."""
        return self._session.epoch is not None

    @property
    def model(self) -> ModelSpec | None:
        """What the workers serve, as the latest WELCOME has it; None before a worker has joined.

        The same object for as long as the model stays the same.
        """
        served = None if self._link is None else self._link.served
        return None if served is None else served.model

    @property
    def subnets(self) -> tuple[tuple[str, float], ...]:
        """Name and profiled accuracy, percent, of each subnet; empty before a worker has joined."""
        served = None if self._link is None else self._link.served
        return () if served is None else tuple(served.subnets)

    # --- where it may be used -----------------------------------------------------------

    def _check_place(self) -> asyncio.AbstractEventLoop:
        """Return the running loop, which becomes this client's on the first call."""
        if os.getpid() != self._pid:
            raise UsageError(FORKED.format(what="AsyncClient"))
        loop = asyncio._get_running_loop()
        if loop is None:
            raise UsageError(NO_LOOP)
        if self._loop is None:
            if not self._is_closed:
                self._open(loop)
        elif loop is not self._loop:
            raise UsageError(OTHER_LOOP)
        return loop

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        connect = functools.partial(
            Connection, context=client_context(), keys=self._keys, shared_memory=self._shared_memory
        )
        connections = opened(resolved(self._endpoints), connect)
        self._loop = loop
        self._welcomed = loop.create_future()
        fail = functools.partial(_fail, self._session)
        self._link = SessionLink(connections, self._session, _settle, fail, connect)
        self._watch(self._link)
        _unclosed.add(self)
        self._plan(0)

    def _watch(self, link: SessionLink[AsyncQueryFuture]) -> None:
        """Have the loop wake for every connection: a router may list others."""
        assert self._loop is not None, "an open client has a loop"
        if len(link.connections) != len(self._watched):
            for fileno in link.filenos():
                if fileno not in self._watched:
                    self._watched.append(fileno)
                    self._loop.add_reader(fileno, _weakly(self._turn))

    def _let_go(self) -> None:
        """Remove this client's reader and timer from the loop."""
        _unclosed.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        watched, self._watched = self._watched, []
        if self._loop is not None and not self._loop.is_closed():
            for fileno in watched:
                self._loop.remove_reader(fileno)
        if self._welcomed is not None and not self._welcomed.done():
            self._welcomed.cancel()

    def _abandon(self) -> None:
        """Close the socket of a client that was left open, so that the interpreter can end."""
        link, self._link = self._link, None
        if link is not None and os.getpid() == self._pid:
            for connection in link.connections:
                connection.close()

    # --- in the loop --------------------------------------------------------------------

    def _turn(self) -> None:
        """Do what is due: the socket is readable, a timer has fired, or a query was submitted."""
        link = self._link
        if link is None:
            return  # closed after this turn was planned
        try:
            self._work(link)
        except BaseException as failure:
            self._let_go()
            self._link, self._is_closed = None, True
            link.close(UnansweredError(f"the client failed: {failure!r}"))
            raise

    def _work(self, link: SessionLink[AsyncQueryFuture]) -> None:
        """Receive, check, send; then plan the next turn."""
        link.receive()
        now_ns = time.monotonic_ns()
        link.look(now_ns)
        if link.is_welcome and self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(None)
        link.send(now_ns)
        self._watch(link)
        wake_ns = link.wake_ns()
        if not self._session.rest():
            wake_ns = min(wake_ns, link.send_at_ns)
        # The descriptor is edge-triggered, and each call on the socket may have consumed an edge.
        self._plan(0 if link.is_readable() else wake_ns)

    def _plan(self, at_ns: int) -> None:
        """Run a turn at this instant or earlier; 0 means in the next round of the loop."""
        loop, timer = self._loop, self._timer
        assert loop is not None, "an open client has a loop"
        is_kept = self._session.outstanding > 0
        if timer is not None:
            if self._timer_ns <= at_ns and self._is_kept == is_kept:
                return
            timer.cancel()
            at_ns = min(at_ns, self._timer_ns)
        self._timer_ns, self._is_kept = at_ns, is_kept
        # While a query waits, this timer keeps the client alive, even if the application has dropped it.
        on_timer = self._on_timer if is_kept else _weakly(self._on_timer)
        delay_ns = at_ns - time.monotonic_ns()
        self._timer = loop.call_soon(on_timer) if delay_ns <= 0 else loop.call_later(delay_ns / 1e9, on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._turn()

    def _cancel(self, future: AsyncQueryFuture) -> None:
        """Tell the router, unless the query has ended there; for AsyncQueryFuture.cancel."""
        is_ended, must_tell = self._session.cancel(future)
        if is_ended and must_tell and self._link is not None:
            self._plan(self._link.send_at_ns)


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Return a callable for a method that does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    return call


def _drop(loop: asyncio.AbstractEventLoop, link: SessionLink[AsyncQueryFuture]) -> None:
    """Close the link of a client that was dropped without `close`."""
    if not loop.is_closed():
        for fileno in link.filenos():
            loop.remove_reader(fileno)
    link.close(CancelledQueryError(CLOSED_EARLY))


def _settle(answers: Answers, futures: list[AsyncQueryFuture | None]) -> None:
    for i, future in enumerate(futures):
        if future is None or future.done():
            continue
        outcome = answers.outcome(i, future.submitted_ns)
        if isinstance(outcome, QueryError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _fail(session: Session[AsyncQueryFuture], ended: list[tuple[AsyncQueryFuture, QueryError]]) -> None:
    for future, error in ended:
        if not future.done() and not future.get_loop().is_closed():
            future.set_exception(error)
            if session.is_closed:
                future.exception()  # mark it as retrieved: after `close` an unawaited future is no mistake
