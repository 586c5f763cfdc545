"""The way to the router: a request's rows become queries of one AsyncClient, and their replies one answer."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from gateway.v2.answer import answer_of
from gateway.v2.served import served_model
from gateway.v2.terms import MS, NO_SLO
from gateway.v2.verdicts import CALLER_GONE, TOO_LATE, UNAVAILABLE, GatewayError, invalid, verdict_of
from superserve.errors import SuperServeError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import Protocol

    from gateway.calls.board import Board
    from gateway.v2.answer import InferAnswer
    from gateway.v2.request import InferRequest
    from gateway.v2.served import ServedModel
    from gateway.v2.terms import Terms
    from gateway.v2.verdicts import RefusalKind
    from superserve.client import AsyncClient, Reply

    Done = Callable[[InferAnswer | SuperServeError], None]

    class CallUnderWay(Protocol):
        """A request that has no answer yet."""

        def cancel(self) -> None:
            """The caller is gone."""


log = logging.getLogger(__name__)


class InferCall:
    """A request under way: one future for each of its rows.

    Args:
        done: Called once, with the answer or the error; not after `cancel`.
    """

    __slots__ = ("_arrived_ns", "_backend", "_done", "_futures", "_n_left", "_request", "_terms", "is_ended")

    def __init__(
        self, backend: Backend, request: InferRequest, terms: Terms, arrived_ns: int, done: Done
    ) -> None:
        self._backend = backend
        self._request = request
        self._terms = terms
        self._arrived_ns = arrived_ns
        self._done = done
        self._futures: list[asyncio.Future[Reply]] = []
        self._n_left = 0
        self.is_ended = False

    def start(self, slo_ms: float) -> None:
        """Submit every row; all have the same deadline.

        Raises:
            QueryError: One was refused at once; none is left at the router.
        """
        submit, terms = self._backend.client.submit, self._terms
        rows = self._request.rows
        if len(rows) == 1:  # nearly always
            try:
                only = submit(
                    rows[0], slo_ms=slo_ms, min_accuracy=terms.min_accuracy, priority=terms.priority,
                    traceparent=terms.traceparent,
                )  # fmt: skip
            except SuperServeError:
                self.is_ended = True
                raise
            self._futures.append(only)
            self._n_left = 1
            only.add_done_callback(self._row_ended)
            return
        try:
            for row in rows:
                self._futures.append(
                    submit(
                        row, slo_ms=slo_ms, min_accuracy=terms.min_accuracy, priority=terms.priority,
                        traceparent=terms.traceparent,
                    )
                )  # fmt: skip
        except SuperServeError:
            self.is_ended = True
            for future in self._futures:
                future.cancel()
            raise
        self._n_left = len(self._futures)
        for future in self._futures:
            future.add_done_callback(self._row_ended)

    def cancel(self) -> None:
        """The caller is gone: its queries end at the router too, and count as cancelled."""
        if self.is_ended:
            return
        self.is_ended = True
        for future in self._futures:
            future.cancel()
        self._backend.ended(CALLER_GONE, self._arrived_ns)

    def _row_ended(self, future: asyncio.Future[Reply]) -> None:
        self._n_left -= 1
        if self.is_ended:
            if not future.cancelled():
                future.exception()  # mark it as retrieved
            return
        if self._n_left and (future.cancelled() or future.exception() is None):
            return
        self.is_ended = True
        try:
            outcome = self._outcome()
        except SuperServeError as error:
            for other in self._futures:  # one failed row fails the request: the others would be for nothing
                other.cancel()
            self._backend.ended(verdict_of(error), self._arrived_ns)
            self._done(error)
            return
        self._done(outcome)

    def _outcome(self) -> InferAnswer:
        for i, future in enumerate(self._futures):
            if not future.done() or future.cancelled():
                continue
            error = future.exception()
            if isinstance(error, SuperServeError):
                n = len(self._futures)
                raise error if n == 1 else type(error)(f"row {i} of {n}: {error}")
        replies = [future.result() for future in self._futures]
        answer = answer_of(self._request, replies, self._terms)
        self._backend.succeeded(replies, self._arrived_ns)
        return answer


class Backend:
    """One process's connection to the router, and what it serves.

    Args:
        client: Belongs to the running event loop.
        board: Where this process counts.
        name: The model's name in requests; None for its supernet's.
        default_slo_ns: For requests without a time; None refuses them.
    """

    def __init__(
        self, client: AsyncClient, board: Board, *, name: str | None = None, default_slo_ns: int | None = None
    ) -> None:
        self.client = client
        self.board = board
        self.default_slo_ns = default_slo_ns
        self.is_draining = False
        self._name = name
        self._seen: object = None
        self._model: ServedModel | None = None

    @property
    def model(self) -> ServedModel | None:
        """What the workers serve now; None before one has joined."""
        spec = self.client.model
        if spec is not self._seen:
            self._seen = spec
            self._model = None
            if spec is not None:
                self._model = served_model(
                    self._name, spec.supernet, spec.input, spec.output, self.client.subnets
                )
        return self._model

    @property
    def is_ready(self) -> bool:
        """Whether a request would reach a GPU: a router answers, and a worker is ready as far as known."""
        is_served = self.client.is_connected and self.model is not None
        return is_served and not self.is_draining and self.board.workers_ready != 0

    def infer(self, request: InferRequest, terms: Terms, arrived_ns: int, done: Done) -> InferCall:
        """Submit a request's rows; `done` gets the answer, or the error of the first row without one.

        Args:
            request: What is asked.
            terms: On which terms.
            arrived_ns: When the request arrived: its time counts from then.
            done: Called once, unless the call is cancelled.

        Raises:
            SuperServeError: It was refused at once; it has been counted.
        """
        if terms.is_trace_ignored:
            self.board.add("ignored_traceparents")
        call = InferCall(self, request, terms, arrived_ns, done)
        try:
            call.start(self._slo_ms(terms, arrived_ns))
        except SuperServeError as error:
            self.ended(verdict_of(error), arrived_ns)
            raise
        return call

    def _slo_ms(self, terms: Terms, arrived_ns: int) -> float:
        """Return the time that is left to a request."""
        if terms.slo_ns is None:
            raise invalid(NO_SLO)
        if not self.client.is_connected:
            raise GatewayError(UNAVAILABLE, "no router answers the gateway")
        left_ns = terms.slo_ns - (time.monotonic_ns() - arrived_ns)
        if left_ns <= 0:
            raise GatewayError(TOO_LATE, "the deadline passed before the request was complete")
        return left_ns / MS

    def succeeded(self, replies: list[Reply], arrived_ns: int) -> None:
        """Count an answered request."""
        self.board.count_success(replies, time.monotonic_ns() - arrived_ns, int(time.time() * 1e3))

    def ended(self, verdict: RefusalKind, arrived_ns: int) -> None:
        """Count a request that got no answer with an output."""
        self.board.count_failure(verdict, time.monotonic_ns() - arrived_ns)
