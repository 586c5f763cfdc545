"""Link: a session on a connection. The work of both clients between two waits; no thread, no loop.

One thread owns it. `receive`, `look` and `send` in this order make one turn. The next turn is due at
`wake_ns`, or when the connection's socket becomes readable.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, TypeVar

from superserve.client.session import SPACING_NS, Query
from superserve.wire import Queries

if TYPE_CHECKING:
    from collections.abc import Callable

    from superserve.client.reply import Answers
    from superserve.client.session import Session
    from superserve.errors import QueryError
    from superserve.net.connection import Connection

_AT_ONCE = 64
"""Messages received in one turn: a flood of answers must not delay queries."""

Q = TypeVar("Q", bound=Query)


class SessionLink(Generic[Q]):
    """Moves messages between a session and a connection.

    Args:
        connection: To the router; closed with the link.
        session: The session whose queries it carries.
        settle: Settles a group's queries with their answers; None is a query that has ended already.
        fail: Ends queries with a local error.

    Attributes:
        is_welcome: Whether a router has ever sent WELCOME.
    """

    def __init__(
        self,
        connection: Connection,
        session: Session[Q],
        settle: Callable[[Answers, list[Q | None]], None],
        fail: Callable[[list[tuple[Q, QueryError]]], None],
    ) -> None:
        self.connection = connection
        self.session = session
        self._next_send_ns = 0
        self.is_welcome = False
        self._settle = settle
        self._fail = fail
        self._n_welcomes = 0
        self._model: object = self

    def receive(self) -> None:
        """Take in what has arrived, up to a limit: the connection may still be readable afterwards."""
        session = self.session
        for n, results in enumerate(self.connection.receive(), start=1):
            self._observe()
            for answers, queries in session.answered(results, time.monotonic_ns()):
                self._settle(answers, queries)
            if n >= _AT_ONCE:
                return

    def look(self, now_ns: int) -> None:
        """Keep the connection alive, notice a router that came or went, end overdue queries."""
        connection, session = self.connection, self.session
        connection.look()
        connection.tick(now_ns)
        self._observe()
        if connection.epoch is None:
            session.no_router = connection.absence
        if ended := session.expired(now_ns, connection.heard_ns):
            self._fail(ended)
        if session.wants_ping:
            session.wants_ping = False
            connection.ping(now_ns)

    def _observe(self) -> None:
        """Pass a new router, a lost one or a new model on to the session."""
        connection, session = self.connection, self.session
        if connection.epoch is None:
            if session.epoch is not None:
                session.lost()
            return
        if connection.model is not self._model:  # before `welcomed`: what is sent next is checked by it
            self._model = connection.model
            model = connection.model
            takes, gives = (None, None) if model is None else (model.input, model.output)
            session.learn(takes, gives, connection.subnets)
        if connection.n_welcomes != self._n_welcomes:
            self._n_welcomes = connection.n_welcomes
            if session.epoch is not None:
                session.lost()
            session.welcomed(connection.epoch)
            self.is_welcome = True

    @property
    def send_at_ns(self) -> int:
        """The earliest instant to send; 0 if no answer is outstanding."""
        return 0 if self.session.is_idle else self._next_send_ns

    def send(self, now_ns: int) -> None:
        """Send what has gathered, once it is due."""
        if not self.session.has_outbound or now_ns < self.send_at_ns:
            return
        connection = self.connection
        for message in self.session.outbound(now_ns):
            self._next_send_ns = now_ns + SPACING_NS
            if isinstance(message, Queries):
                is_sent = connection.send_queries(message)
            else:
                is_sent = connection.send_cancel(message.n, bytes(message.ids))
            if not is_sent:
                # Gone, or stuck: greet again. Queries with slack left are sent after the next WELCOME.
                connection.lose()
                self.session.lost()
                return

    def wake_ns(self) -> int:
        """Return when `look` is due next, unless something arrives before."""
        wake_ns = self.session.next_wake_ns()
        tick_ns = self.connection.next_tick_ns()
        return tick_ns if wake_ns is None else min(tick_ns, wake_ns)

    def close(self, error: QueryError) -> None:
        """Send BYE, close the socket, and end every query that is left."""
        try:
            self.connection.close()
        finally:  # queries end even if the socket fails
            self._fail(self.session.close(error))
