"""QueryFuture: a concurrent.futures.Future that costs little until you block on it.

Most futures are never waited for: when `result` is called, the answer is already there. So the
condition that `concurrent.futures` keeps in every future is made only when a caller first needs it,
and the Reply when a caller first reads it.

Why no waiter is missed. A future's state changes under the client's guard, and its condition is made
under the guard. So the thread that settles a future either sees the condition, and then changes the state
under that condition and notifies, as the standard library does; or it changes the state before the
condition exists, and the thread that makes the condition sees the new state before it waits. Callbacks are
added under the guard too. The lock order is: conditions, then the guard.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import sys
import threading
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from typing import TYPE_CHECKING, Any, Protocol

from superserve.client.options import checked_wait
from superserve.client.reply import Reply
from superserve.errors import QueryError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from superserve.client.reply import Answers

log = logging.getLogger("superserve")

FORKED = (
    "this {what} was made before a fork: its connection did not come along. "
    "Make one in each process, after the fork"
)
BLOCKING = (
    "{what} would block the event loop that runs in this thread: use AsyncClient there, "
    "or `await asyncio.wrap_future(client.submit(...))`"
)

IN_CALLBACK = (
    "{what} would wait for itself: callbacks run on the client's own thread, so start the waiting in another"
)


class Owner(Protocol):
    """What a future needs of its client; `thread` is the thread that settles futures."""

    guard: AbstractContextManager[Any]
    pid: int

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that settles futures; None if there is none."""
        ...

    def cancel_query(self, future: QueryFuture) -> bool:
        """End a query; False if it has ended already."""
        ...


def is_on_a_loop() -> bool:
    """Return whether an event loop runs in this thread, unless it is a notebook's.

    A notebook's cells run on its kernel's loop, and may block it: the kernel has nothing else to do.
    """
    return asyncio._get_running_loop() is not None and "ipykernel" not in sys.modules


class QueryFuture(concurrent.futures.Future[Reply]):
    """The future of one query. `cancel()` also tells the router, which then drops the query unrun.

    Attributes:
        query_id: As in error messages and in the router's event log.
        deadline_ns: After this instant the answer is worthless, on this process's monotonic clock.
        submitted_ns: When it was submitted, on the same clock.
    """

    # The base class's constructor makes a condition and two lists, so it is not called.
    __slots__ = (
        "_answers", "_callbacks", "_index", "_is_cancelled", "_is_waited_for", "_outcome", "_owner", "_state",
        "deadline_ns", "min_accuracy", "n_bytes", "n_sends", "payload", "priority", "query_id",
        "submitted_ns", "trace",
    )  # fmt: skip

    def __init__(  # the hot path: plain numbers by position
        self, owner: Owner, payload: Any, n_bytes: int, submitted_ns: int, slo_ns: int, min_accuracy: float,
        priority: int,
    ) -> None:  # fmt: skip
        self._owner = owner
        self.payload = payload
        self.n_bytes = n_bytes
        self.submitted_ns = submitted_ns
        self.deadline_ns = submitted_ns + slo_ns
        self.min_accuracy = min_accuracy
        self.priority = priority
        self.trace = b""
        self.query_id = self.n_sends = 0
        self._state = PENDING
        self._is_waited_for = self._is_cancelled = False
        self._callbacks: list[Callable[[Any], object]] | None = None
        self._answers: Answers | None = None
        self._index = 0
        self._outcome: Reply | QueryError | None = None

    # --- for applications ---------------------------------------------------------------

    def cancel(self) -> bool:
        """Cancel the query wherever it is; False if it has its answer already."""
        if self._state == PENDING and self._owner.cancel_query(self):
            settle(self._owner.guard, [self], state=CANCELLED_AND_NOTIFIED)
        return self._is_cancelled

    def cancelled(self) -> bool:
        """Return whether the query was cancelled."""
        return self._state == CANCELLED_AND_NOTIFIED

    def running(self) -> bool:
        """Return False: a query can be cancelled until its answer is there."""
        return False

    def done(self) -> bool:
        """Return whether the query has ended, with or without an output."""
        return self._state != PENDING

    def result(self, timeout: float | None = None) -> Reply:
        """Wait for the reply.

        Raises:
            QueryError: The query got no output; the class and the message give the reason.
            TimeoutError: It has not ended within `timeout` seconds. It continues: see `cancel`.
            concurrent.futures.CancelledError: It was cancelled.
            UsageError: It has not ended, and an event loop runs in this thread.
        """
        outcome = self._wait("QueryFuture.result()", timeout)
        if isinstance(outcome, Reply):
            return outcome
        try:
            raise outcome
        finally:
            del self, outcome  # the error's traceback refers to this frame: avoid a reference cycle

    def exception(self, timeout: float | None = None) -> QueryError | None:
        """Wait for the end; return the error of a query without output, else None. See `result`."""
        outcome = self._wait("QueryFuture.exception()", timeout)
        return None if isinstance(outcome, Reply) else outcome

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call `fn` with this future once it has ended: now, or on the client's thread.

        On that thread `fn` must not block, because nothing is sent or received meanwhile. Exceptions of
        `fn` are logged.
        """
        with self._owner.guard:
            if self._state == PENDING:
                if self._callbacks is None:
                    self._callbacks = [fn]
                else:
                    self._callbacks.append(fn)
                return
        _call(fn, self)

    def __repr__(self) -> str:
        state = {PENDING: "pending", FINISHED: "finished"}.get(self._state, "cancelled")
        return f"<QueryFuture {self.query_id} {state}>"

    # --- what concurrent.futures.wait, as_completed and asyncio.wrap_future access ----------

    def _made_condition(self) -> threading.Condition:
        made = self.__dict__
        if "condition" not in made:
            with self._owner.guard:
                made.setdefault("condition", threading.Condition())
                made.setdefault("waiters", [])
                self._is_waited_for = True
        condition: threading.Condition = made["condition"]
        return condition

    def _made_waiters(self) -> list[Any]:
        waiters: list[Any] = self.__dict__["waiters"]  # made with the condition, which callers use first
        return waiters

    def _made_result(self) -> Reply | None:
        outcome = self._opened()
        return outcome if isinstance(outcome, Reply) else None

    def _made_exception(self) -> QueryError | None:
        outcome = self._opened()
        return None if isinstance(outcome, Reply) else outcome

    if not TYPE_CHECKING:  # to a type checker they are the attributes that the base class declares
        _condition = property(_made_condition)
        _waiters = property(_made_waiters)
        _result = property(_made_result)
        _exception = property(_made_exception)

    # --- inside -------------------------------------------------------------------------

    def _opened(self) -> Reply | QueryError | None:
        """Return the outcome; make it from the group of answers the first time."""
        answers = self._answers
        if answers is not None:
            if self._outcome is None:
                self._outcome = answers.outcome(self._index, self.submitted_ns)
            # Last: a thread that reads None here finds the outcome.
            self._answers = None
        return self._outcome

    def _wait(self, what: str, timeout: float | None) -> Reply | QueryError:
        if self._state == PENDING:
            self._block(what, None if timeout is None else checked_wait("timeout", timeout))
        if self._state == CANCELLED_AND_NOTIFIED:
            raise concurrent.futures.CancelledError
        outcome = self._opened()
        assert outcome is not None, "a finished query has an outcome"
        return outcome

    def _block(self, what: str, timeout: float | None) -> None:
        if timeout is None or timeout > 0:
            if os.getpid() != self._owner.pid:
                raise UsageError(FORKED.format(what="Client"))
            if is_on_a_loop():
                raise UsageError(BLOCKING.format(what=what))
            if threading.current_thread() is self._owner.thread:
                raise UsageError(IN_CALLBACK.format(what=what))
        with self._condition:
            if self._state == PENDING:
                self._condition.wait(timeout)
            if self._state == PENDING:
                raise concurrent.futures.TimeoutError

    def _announce(self, guard: AbstractContextManager[Any], state: str) -> None:
        """Change the state of a future that has a condition, and wake the threads that wait."""
        with self._condition:
            with guard:
                self._state = state
            for waiter in self._waiters:
                if state == FINISHED and isinstance(self._opened(), Reply):
                    waiter.add_result(self)
                elif state == FINISHED:
                    waiter.add_exception(self)
                else:
                    waiter.add_cancelled(self)
            self._condition.notify_all()


def settle(
    guard: AbstractContextManager[Any],
    futures: Sequence[QueryFuture | None],
    answers: Answers | None = None,
    *,
    state: str = FINISHED,
) -> None:
    """End futures whose queries have ended; the caller ended the queries, so no other thread settles them.

    Args:
        guard: Their client's.
        futures: Future `i` gets share `i` of `answers`; None is skipped.
        answers: None if each future has its `_outcome` already, or needs none.
        state: FINISHED, or CANCELLED_AND_NOTIFIED.
    """
    waited_for, called = [], []
    with guard:
        for i, future in enumerate(futures):
            if future is None:
                continue
            future._answers = answers
            future._index = i
            if future._is_waited_for:
                waited_for.append(future)  # its state changes under its condition
                continue
            future._state = state
            if future._callbacks is not None:
                called.append(future)
    for future in waited_for:
        future._announce(guard, state)
    # Outside the guard: a callback is the application's code, and may submit, cancel or take long.
    for future in (*waited_for, *called):
        callbacks, future._callbacks = future._callbacks, None
        for callback in callbacks or ():
            _call(callback, future)


def _call(callback: Callable[[Any], object], future: QueryFuture) -> None:
    try:
        callback(future)
    except Exception:  # the application's code: log it, and settle the other futures
        log.exception("a callback of %r failed", future)
