"""Link: a session on its connections, one to each router. The work of both clients between two waits.

One thread owns it; it has no thread and no loop. `receive`, `look` and `send` in this order make one turn.
The next turn is due at `wake_ns`, or when a connection's socket becomes readable.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from superserve.client.outgoing import Query
from superserve.client.session import SPACING_NS
from superserve.errors import ConfigError
from superserve.net.endpoints import MOST_ROUTERS
from superserve.wire import Queries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from superserve.client.reply import Answers
    from superserve.client.session import Session
    from superserve.errors import QueryError
    from superserve.net.connection import Connection

log = logging.getLogger("superserve")

_AT_ONCE = 64
"""Messages received in one turn: a flood of answers must not delay queries."""

Q = TypeVar("Q", bound=Query)


class SessionLink(Generic[Q]):
    """Moves messages between a session and its connections.

    Args:
        connections: One to each router; closed with the link.
        session: The session whose queries it carries.
        settle: Settles a group's queries with their answers; None is a query that has ended already.
        fail: Ends queries with a local error.
        connect: Connects to a further router that a WELCOME lists; None to stay with those given.

    Attributes:
        connections: In the order in which the session numbers the routers.
        is_welcome: Whether a router has ever sent WELCOME.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        session: Session[Q],
        settle: Callable[[Answers, list[Q | None]], None],
        fail: Callable[[list[tuple[Q, QueryError]]], None],
        connect: Callable[[str], Connection] | None = None,
    ) -> None:
        self.connections: list[Connection] = []
        self.session = session
        self._next_send_ns = 0
        self.is_welcome = False
        self._settle = settle
        self._fail = fail
        self._connect = connect
        self._n_welcomes: list[int] = []
        self._models: list[object] = []
        self._listed: list[tuple[str, ...]] = []
        for connection in connections:
            self._add(connection)

    def _add(self, connection: Connection) -> None:
        if self.connections:
            self.session.add_router()
        self.connections.append(connection)
        self._n_welcomes.append(0)
        self._models.append(self)
        self._listed.append(())

    @property
    def served(self) -> Connection | None:
        """The first connection whose router has a worker, and so knows the model; None if none has."""
        return next((one for one in self.connections if one.model is not None), None)

    def receive(self) -> None:
        """Take in what has arrived, up to a limit: a connection may still be readable afterwards."""
        for i in range(len(self.connections)):
            self._receive(i)

    def _receive(self, i: int) -> None:
        session = self.session
        for n, results in enumerate(self.connections[i].receive(), start=1):
            self._observe(i)
            for answers, queries in session.answered(results, time.monotonic_ns(), i):
                self._settle(answers, queries)
            if n >= _AT_ONCE:
                return

    def look(self, now_ns: int) -> None:
        """Keep the connections alive, notice routers that came or went, end overdue queries."""
        session = self.session
        heard_ns = 0
        for i, connection in enumerate(self.connections):
            connection.look()
            connection.tick(now_ns)
            self._observe(i)
            heard_ns = max(heard_ns, connection.heard_ns)
        if session.spread.is_many:
            self._beat(now_ns)
        if session.epoch is None:
            session.no_router = self._absence()
        if ended := session.expired(now_ns, heard_ns):
            self._fail(ended)
        if session.wants_ping:
            session.wants_ping = False
            for connection in self.connections:
                if connection.epoch is not None:
                    connection.ping(now_ns)

    def _absence(self) -> str:
        """Return why no router answers: the reasons of up to three, each once."""
        reasons = list(dict.fromkeys([connection.absence for connection in self.connections]))
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        return "; ".join(reasons[:3]) + more

    def _beat(self, now_ns: int) -> None:
        """Ask the routers that are silent, and give up those that are dead."""
        session, connections = self.session, self.connections
        for i, connection in enumerate(connections):
            session.spread.routes[i].hear(connection.heard_ns)
        asked, dead = session.beat(now_ns)
        for i in asked:
            connections[i].ping(now_ns)
        for i in dead:
            log.warning("router %s is silent: its queries go to others", connections[i].endpoint)
            connections[i].lose()
            session.lost(i)

    def _observe(self, i: int) -> None:
        """Pass a new router, a lost one or a new model on to the session."""
        connection, session = self.connections[i], self.session
        route = session.spread.routes[i]
        if connection.epoch is None:
            if route.epoch is not None:
                session.lost(i)
            return
        model = connection.model
        if model is not self._models[i]:  # before `welcomed`: what is sent next is checked by it
            self._models[i] = model
            # Of several routers one may have no worker yet, and does not know what the others' take.
            if model is not None or not session.spread.is_many:
                takes, gives = (None, None) if model is None else (model.input, model.output)
                session.learn(takes, gives, connection.subnets)
        if connection.n_welcomes != self._n_welcomes[i]:
            if self._is_known(i):
                return
            self._n_welcomes[i] = connection.n_welcomes
            if route.epoch is not None:
                session.lost(i)
            session.welcomed(connection.epoch, i)
            self.is_welcome = True
        route.gpus = connection.gpus
        if connection.is_draining:
            route.is_draining = True
        if connection.routers is not self._listed[i]:
            self._listed[i] = connection.routers
            self._open(connection.routers)

    def _is_known(self, i: int) -> bool:
        """Return whether another connection leads to the same router, under another name."""
        epoch = self.connections[i].epoch
        routes = self.session.spread.routes
        return any(route.epoch == epoch for j, route in enumerate(routes) if j != i)

    def _open(self, endpoints: Sequence[str]) -> None:
        """Connect to routers that are new."""
        known = {connection.endpoint for connection in self.connections}
        for endpoint in endpoints:
            if self._connect is None or endpoint in known or len(known) >= MOST_ROUTERS:
                continue
            known.add(endpoint)
            try:
                self._add(self._connect(endpoint))
            except ConfigError as error:  # the routers that are there go on serving
                log.warning("router %s: %s", endpoint, error)

    @property
    def send_at_ns(self) -> int:
        """The earliest instant to send; 0 if no answer is outstanding."""
        return 0 if self.session.is_idle else self._next_send_ns

    def send(self, now_ns: int) -> None:
        """Send what has gathered, once it is due."""
        if not self.session.has_outbound or now_ns < self.send_at_ns:
            return
        lost = -1
        for i, message in self.session.outbound_to(now_ns):
            self._next_send_ns = now_ns + SPACING_NS
            if i == lost:
                continue
            connection = self.connections[i]
            if isinstance(message, Queries):
                is_sent = connection.send_queries(message)
            else:
                is_sent = connection.send_cancel(message.n, bytes(message.ids))
            if not is_sent:
                # Gone, or stuck: greet again. Queries with slack left are sent after the next WELCOME, or at
                # once to another router.
                lost = i
                connection.lose()
                self.session.lost(i)

    def wake_ns(self) -> int:
        """Return when `look` is due next, unless something arrives before."""
        session = self.session
        wake_ns = min([connection.next_tick_ns() for connection in self.connections])
        for at_ns in (session.next_wake_ns(), session.spread.next_beat_ns()):
            if at_ns is not None and at_ns < wake_ns:
                wake_ns = at_ns
        return wake_ns

    def filenos(self) -> list[int]:
        """Return the descriptors that wake its thread or loop."""
        return [connection.socket.fileno() for connection in self.connections]

    def is_readable(self) -> bool:
        """Return whether something has arrived that no descriptor will wake for."""
        # Each must be asked: that is what makes its descriptor wake again.
        return any([connection.is_readable() for connection in self.connections])  # noqa: C419  see above

    def close(self, error: QueryError) -> None:
        """Send BYE, close the sockets, and end every query that is left."""
        try:
            for connection in self.connections:
                connection.close()
        finally:  # queries end even if a socket fails
            self._fail(self.session.close(error))
