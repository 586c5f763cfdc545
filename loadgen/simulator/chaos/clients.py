"""Simulated applications: the same `Session` that clients embed, on a virtual clock.

It is another host of that core, besides the thread of `Client` and the loop of `AsyncClient`: queries
are submitted when they are due, messages are sent at most every millisecond, connections break and are
made again, and each end of a query is recorded.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from loadgen.simulator.links import FAR_NS
from router.core.events import CancelAsked, ClientJoined, QueriesArrived
from router.serve.directives import results_of
from superserve.client.session import SPACING_NS, Session
from superserve.wire import Cancel, Queries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadgen.simulator.links import SimLink
    from loadgen.simulator.world import Simulation
    from router.core.events import Answer, Event

_LOOK_EVERY_NS = SPACING_NS
_WELCOME = "welcome"
_PONG = "pong"
_HELLO = "hello"
_PING = "ping"


@dataclass(slots=True, eq=False)
class SimQuery:
    """A query in the form that a session keeps.

    Attributes:
        slo_ns: From submission to deadline.
        cancelled_after_ns: When its owner cancels it, from submission; None never.
        ends: How it ended: statuses and errors, by name. In the end it has one entry.
    """

    due_ns: int
    slo_ns: int
    min_accuracy: float = 0.0
    cancelled_after_ns: int | None = None
    priority: int = 0
    query_id: int = 0
    payload: Any = b"payload."
    n_bytes: int = 8
    deadline_ns: int = 0
    submitted_ns: int = 0
    trace: bytes = b""
    n_sends: int = 0
    ends: list[str] = field(default_factory=list)


class SessionClient:
    """One application and its connection; implements `loadgen.simulator.Client`.

    Args:
        simulation: Its world.
        number: Which client of the world it is.
        queries: What it submits.
        breaks_ns: When its connection breaks; it notices at once, and sends HELLO again.
    """

    def __init__(
        self, simulation: Simulation, number: int, queries: Sequence[SimQuery], breaks_ns: Sequence[int]
    ) -> None:
        self.key = self.number = number
        self.queries = queries
        self._simulation = simulation
        self._session = Session[SimQuery](
            contextlib.nullcontext(), "no router", max_outstanding=1 << 20, max_bytes=1 << 40
        )
        self._session.welcomed(1)
        self._session.outbound(simulation.now_ns)
        self._link: SimLink
        self._way: deque[tuple[int, Any]] = deque()
        self._heard_ns = simulation.now_ns
        self._next_send_ns = 0
        self._looks_ns = FAR_NS
        for query in queries:
            simulation.later(query.due_ns, partial(self._submit, query))
        for at_ns in breaks_ns:
            simulation.later(at_ns, self._break)

    # --- what the router reads --------------------------------------------------------------

    @property
    def next_ns(self) -> int:
        """When its next message arrives at the router."""
        return self._way[0][0] if self._way else FAR_NS

    @property
    def has_unread(self) -> bool:
        """Whether a message waits to be read: never, because such a client never delays a pass."""
        return False

    def may_wait(self, now_ns: int, _deadline_ns: int, _room: int) -> bool:
        """Return whether nothing has arrived by now."""
        return self.next_ns > now_ns

    def connected(self, way_in: SimLink) -> None:
        """Take a new connection's way to the router; what was under way on the old one is lost."""
        self._link = way_in
        self._way.clear()

    def arrived(self, now_ns: int) -> list[tuple[int, Event]]:
        """Return what has arrived by now."""
        events: list[Event] = []
        while self._way and self._way[0][0] <= now_ns:
            _, message = self._way.popleft()
            if isinstance(message, Queries):
                events.append(QueriesArrived(self.key, message, now_ns - message.sent_ns))
            elif isinstance(message, Cancel):
                events.append(CancelAsked(self.key, message))
            elif message is _HELLO:
                events.append(ClientJoined(self.key, self.number + 1))
                self._reply(_WELCOME, now_ns)
            else:
                self._reply(_PONG, now_ns)
        if self.key not in self._simulation.core.clients and not any(
            isinstance(event, ClientJoined) for event in events
        ):
            return []  # the router has forgotten it: it answers "say HELLO", and ignores the rest
        return [(now_ns, event) for event in events]

    def _reply(self, word: str, now_ns: int) -> None:
        key = self.key
        for at_ns in self._simulation.ways_back[key].arrivals(now_ns):
            self._simulation.later(at_ns, lambda at_ns: self._told(word, key, at_ns))

    # --- what it receives -------------------------------------------------------------------

    def _told(self, word: str, key: int, now_ns: int) -> None:
        if key != self.key:
            return
        self._heard_ns = now_ns
        if word is _WELCOME:
            self._session.welcomed(1)
        self._send(now_ns)

    def answered(self, answer: Answer, arrives_ns: int) -> None:
        """Take an answer that arrives at `arrives_ns`, unless the connection breaks before."""
        key = self.key
        self._simulation.later(arrives_ns, lambda now_ns: self._take(answer, key, now_ns))

    def _take(self, answer: Answer, key: int, now_ns: int) -> None:
        if key != self.key:
            return
        self._heard_ns = now_ns
        for results in results_of(1, [answer]):
            for _, queries in self._session.answered(results, now_ns):
                for query in queries:
                    if query is not None:
                        query.ends.append(answer.status.name)

    # --- what it does -----------------------------------------------------------------------

    def _submit(self, query: SimQuery, now_ns: int) -> None:
        query.submitted_ns = now_ns
        query.deadline_ns = now_ns + query.slo_ns
        self._session.submit(query)
        if query.cancelled_after_ns is not None:
            self._simulation.later(now_ns + query.cancelled_after_ns, lambda at: self._cancel(query, at))
        self._send(now_ns)

    def _cancel(self, query: SimQuery, now_ns: int) -> None:
        if self._session.cancel(query)[0]:
            query.ends.append("CANCELLED")
            self._send(now_ns)

    def _break(self, now_ns: int) -> None:
        """Lose the connection, and make another: the router learns of it from the HELLO."""
        self._session.lost()
        self._simulation.reconnect(self)
        for at_ns in self._link.arrivals(now_ns):
            self._way.append((at_ns, _HELLO))
        self._look(now_ns)

    def _send(self, now_ns: int) -> None:
        """Send what has gathered, at least a millisecond after the last time."""
        if now_ns >= self._next_send_ns:
            if self._session.has_outbound:
                self._next_send_ns = now_ns + SPACING_NS
            for message in self._session.outbound(now_ns):
                self._put(message, now_ns)
            if self._session.wants_ping:
                self._session.wants_ping = False
                self._put(_PING, now_ns)
        self._look(now_ns)

    def _put(self, message: Any, now_ns: int) -> None:
        instants = self._link.arrivals(now_ns)
        # A QUERIES that arrives twice was sent twice, and is marked as such.
        for i, at_ns in enumerate(instants):
            if i and isinstance(message, Queries):
                message = _again(message)
            self._way.append((at_ns, message))

    def _look(self, now_ns: int) -> None:
        """End overdue queries, and check again when there is something to see."""
        for query, _error in self._session.expired(now_ns, self._heard_ns):
            query.ends.append("UNANSWERED")
        session = self._session
        wake_ns = session.next_wake_ns()
        at_ns = FAR_NS if wake_ns is None else max(wake_ns, now_ns + _LOOK_EVERY_NS)
        if session.has_outbound and session.epoch is not None:
            at_ns = min(at_ns, max(self._next_send_ns, now_ns + 1))
        if at_ns < self._looks_ns or self._looks_ns <= now_ns:
            self._looks_ns = at_ns
            if at_ns < FAR_NS:
                self._simulation.later(at_ns, self._woken)

    def _woken(self, now_ns: int) -> None:
        if now_ns == self._looks_ns:
            self._looks_ns = FAR_NS
            self._send(now_ns)

    @property
    def is_done(self) -> bool:
        """Whether each of its queries was submitted and has ended."""
        return all(query.ends for query in self.queries)


def _again(message: Queries) -> Queries:
    return Queries(
        message.epoch, message.sent_ns, message.n, message.ids, message.slacks, message.payload_bytes,
        message.payloads, message.framed, message.lengths, message.min_accuracy, message.priority, True,
    )  # fmt: skip
