"""Session: the client's core. It decides what is sent next and how each query ends. No I/O.

It receives `now_ns` and messages, and returns messages and ended queries. `Client` and `AsyncClient`
are two shells around it: they own the socket, the clock and the waiting, and settle the futures.

    submit(query), cancel(query)       any thread
    outbound(now_ns)                   the messages to send now
    answered(results, now_ns)          the queries that a RESULTS message answers
    expired(now_ns, heard_ns)          the queries that have waited long enough, each with its error
    welcomed(...), lost(...)           a router is there; it is gone
    beat(now_ns)                       the routers to PING, and those that are dead

With several routers each message goes to one of them, and `superserve.client.spread` says to which. What a
lost router had is sent to another; what a suspect one has may be with two, and the first answer wins.

A query ends when it leaves `_pending`, under the guard, and nowhere else: once. The guard is held
only briefly, never while a message is built or a callback runs, and nothing here relies on the
interpreter's own lock. It is reentrant because the garbage collector may run an application's
finalizer at any line, and that may submit or cancel.
"""

from __future__ import annotations

from array import array
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, Generic

from superserve.client.checks import PayloadCheck
from superserve.client.outgoing import Q, messages_of
from superserve.client.reply import Answers
from superserve.client.spread import Spread
from superserve.clock import MS
from superserve.errors import DrainingError, OverloadedError, UnansweredError
from superserve.wire import Cancel, Queries, Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from superserve.errors import QueryError
    from superserve.subnet import TensorSpec
    from superserve.wire import Results


SPACING_NS = MS
"""Least time between two messages while answers are outstanding. Each message costs the router and the
client some 60 us whatever it holds, so a busy process may spend a tenth of a core on them, not a whole
one. A client without outstanding answers sends at once: sequential calls never wait here."""

GRACE_NS = 2_000 * MS
"""How long after its deadline a query waits for a LATE answer while the router answers heartbeats: longer
than a router keeps a batch that overran (one second), so that the answer reports how the query ended."""

QUIET_NS = 12 * MS
"""How long after a query's deadline silence is normal: refusals of expired queries arrive within 5 ms."""

PROBE_NS = 100 * MS
"""How long a router that is silent beyond QUIET_NS has to answer a PING."""

HOPELESS_NS = 2 * MS
"""Without a router, a query ends when less slack than this is left: HELLO, WELCOME, QUERIES and RESULTS
are four trips. So its error is raised before its deadline, not after."""

MAX_SENDS = 5
"""Most routers that one query is sent to: a query that crashes its router must not crash every successor."""

_COARSE_NS = 4 * MS
"""Queries past their deadline are checked together, this often."""

_SPARE_TIMED = 4_096
"""Ids of answered queries that may stay in the timer heap until their deadline, beyond twice the pending:
large enough that an idle client never pays to clean up."""

CLOSED = "the client is closed: make a new one"
CLOSED_EARLY = "the client was closed before the answer came"

LOST_LATE = "its router is gone, and no slack is left to send it to another"
"""Why a query ends whose router was lost just before its deadline."""

_DRAINING = Status.DRAINING


class Session(Generic[Q]):
    """The queries of one client.

    Args:
        guard: A reentrant lock; protects what several threads change.
        no_router: The error text for a query that found no router; may be replaced.
        max_outstanding: Most queries without an answer.
        max_bytes: Most payload bytes without an answer.
        start: As `Spread` takes it; clients should differ.

    Attributes:
        spread: The routers, one to begin with, and which of them has what.
        held_bytes: Payload bytes without an answer.
        wants_ping: A query's deadline has passed and the router has been silent since.
    """

    def __init__(
        self, guard: AbstractContextManager[Any], no_router: str, *, max_outstanding: int, max_bytes: int,
        start: float = 0.0,
    ) -> None:  # fmt: skip
        self.max_outstanding = max_outstanding
        self.max_bytes = max_bytes
        self.spread = Spread(start)
        self.held_bytes = 0
        self.wants_ping = False
        self._guard = guard
        self.no_router = no_router
        self._last_id = 0
        self._pending: dict[int, Q] = {}
        self._gathered: list[Q] = []
        self._cancelled: list[Q] = []
        self._has_options = False
        self._has_holes = False
        self._is_resting = True
        self._is_pausing = False
        self._is_closed = False
        self._is_to_home = False
        self._returned: list[int] = []
        self._copied: set[int] = set()
        self._answered_copies: list[tuple[int, int]] = []
        self._forsaken: set[int] = set()
        self._taken_through = 0
        self._sent_through = 0
        self._timed: list[tuple[int, int, list[int]]] = []
        self._n_timed = 0
        self._serial = 0
        self._asked_ns: int | None = None
        self._subnets: Sequence[tuple[str, float]] = ()
        self._output: TensorSpec | None = None
        self._check = PayloadCheck()
        self.checked = self._check.checked

    @property
    def epoch(self) -> int | None:
        """That of a router that is there; None while there is none."""
        for route in self.spread.routes:
            if route.epoch is not None:
                return route.epoch
        return None

    @property
    def outstanding(self) -> int:
        """Number of queries without an answer."""
        return len(self._pending)

    @property
    def is_closed(self) -> bool:
        """Whether the session refuses new queries."""
        return self._is_closed

    @property
    def is_idle(self) -> bool:
        """Whether every query that was sent has its answer."""
        return len(self._pending) <= len(self._gathered)

    # --- any thread ---------------------------------------------------------------------

    def submit(self, query: Q) -> bool:
        """Take a query and assign its id.

        Returns:
            Whether the caller must wake the sender thread; see `rest` and `pause`. Of many submits, one must.

        Raises:
            OverloadedError: `max_outstanding` or `max_bytes` is reached.
            DrainingError: The session is closed.
        """
        n_bytes = query.n_bytes
        with self._guard:
            pending = self._pending
            if (
                self._is_closed
                or len(pending) >= self.max_outstanding
                or self.held_bytes + n_bytes > self.max_bytes
            ):
                raise self._refusal(n_bytes)
            self.held_bytes += n_bytes
            self._last_id = query_id = query.query_id = self._last_id + 1
            pending[query_id] = query
            self._gathered.append(query)
            if query.min_accuracy or query.priority or query.trace:
                self._has_options = True
            # Resting: nothing wakes the sender but this. Pausing, it wakes by itself when SPACING_NS is over,
            # except for the first query after an idle moment, which must not wait for that.
            must_tell = self._is_resting or (self._is_pausing and len(pending) == 1)
            if must_tell:
                self._is_resting = self._is_pausing = False
        return must_tell

    def _refusal(self, n_bytes: int) -> QueryError:
        if self._is_closed:
            return DrainingError(CLOSED)
        if len(self._pending) >= self.max_outstanding:
            return OverloadedError(
                f"max_outstanding: {len(self._pending)} queries have no answer yet, of at most "
                f"{self.max_outstanding}: await some, or raise the bound"
            )
        return OverloadedError(
            f"max_bytes: {self.held_bytes} payload bytes have no answer yet, of at most {self.max_bytes}, "
            f"and this query has {n_bytes}: await some, or raise the bound"
        )

    def cancel(self, query: Q) -> tuple[bool, bool]:
        """End a query on behalf of its owner; the router learns it with the next messages.

        Returns:
            Whether this call ended the query, and whether the sender thread must be woken.
        """
        with self._guard:
            if self._pending.pop(query.query_id, None) is None:
                return False, False
            self.held_bytes -= query.n_bytes
            self._cancelled.append(query)
            if query.query_id > self._taken_through:  # not sent yet: `outbound` has to skip it
                self._has_holes = True
            must_tell = self._is_resting
            self._is_resting = False
        return True, must_tell

    # --- the sender thread --------------------------------------------------------------

    def rest(self) -> bool:
        """Make the next submit or cancel wake the sender; return False if one has come meanwhile."""
        with self._guard:
            self._is_resting = not self.has_outbound
            return self._is_resting

    def pause(self) -> bool:
        """Make the next urgent submit wake the sender; return False if there is one already."""
        with self._guard:
            self._is_pausing = not self.is_idle
            return self._is_pausing

    def resume(self) -> bool:
        """Stop wake-up requests: the sender thread is awake. Return whether one was made meanwhile."""
        with self._guard:
            was_told = not (self._is_resting or self._is_pausing)
            self._is_resting = self._is_pausing = False
        return was_told

    @property
    def has_outbound(self) -> bool:
        """Whether `outbound` has something to do."""
        return bool(
            self._gathered or self._cancelled or self._answered_copies
            or ((self._is_to_home or self._returned) and self.epoch is not None)
        )  # fmt: skip

    def outbound(self, now_ns: int) -> list[Queries | Cancel]:
        """Return the messages to send now, in order, of a session with one router; see `outbound_to`."""
        return [message for _, message in self.outbound_to(now_ns)]

    def outbound_to(self, now_ns: int) -> list[tuple[int, Queries | Cancel]]:
        """Return the messages to send now, in order, each with its router; they count as sent.

        If a send fails, call `lost` for that router.
        """
        with self._guard:
            # Ids ascend, so one number separates the queries that were taken from those that were not.
            self._taken_through = self._last_id
            batch, self._gathered = self._gathered, []
            cancelled, self._cancelled = self._cancelled, []
            if self._has_holes:
                batch = [query for query in batch if query.query_id in self._pending]
            has_options, self._has_options = self._has_options, False
            self._has_holes = False
            is_to_home = self._is_to_home
            everything = list(self._pending.values()) if is_to_home else []
        if batch:
            self._time([query.query_id for query in batch], min([query.deadline_ns for query in batch]))
        for query in cancelled:
            query.payload = b""  # not in `cancel`: another thread may be sending it
        answered, self._answered_copies = self._answered_copies, []
        if self.epoch is None:
            # A router that comes gets all that is pending; those handed back by another are among them.
            self._is_to_home = self._is_to_home or bool(batch or self._returned)
            self._returned = []
            return []
        messages: list[tuple[int, Queries | Cancel]] = []
        if self._returned:
            self._send_again(messages, self._taken_back(), now_ns)
        if is_to_home:
            self._is_to_home = False
            self._home(messages, everything, now_ns)
        elif batch:
            self._place(messages, batch, now_ns, has_options=has_options, resubmitted=False)
        # The routers have never seen the others.
        if sent := [query.query_id for query in cancelled if query.query_id <= self._sent_through]:
            self._cancel_at(messages, self.spread.live(), sent)
        if answered:  # the other router that has a copy must not run it
            for i in self.spread.live():
                self._cancel_at(messages, [i], [query_id for by, query_id in answered if by != i])
        self._sent_through = self._taken_through
        return messages

    def _cancel_at(
        self, messages: list[tuple[int, Queries | Cancel]], routers: list[int], ids: list[int]
    ) -> None:
        for i in routers:
            epoch = self.spread.routes[i].epoch
            if ids and epoch is not None:
                messages.append((i, Cancel(epoch, len(ids), array("Q", ids).tobytes())))

    def _taken_back(self) -> list[Q]:
        """Return the queries that a router handed back, or may have lost, and that have no answer yet."""
        returned, self._returned = self._returned, []
        found = [self._pending.get(query_id) for query_id in returned]
        return [query for query in found if query is not None]

    def _home(self, messages: list[tuple[int, Queries | Cancel]], everything: list[Q], now_ns: int) -> None:
        """Send what no router has: what is new, and what a lost one had."""
        if self.spread.is_many:
            there = self.spread.on_live()
            everything = [query for query in everything if query.query_id not in there]
        fresh = [query for query in everything if query.query_id > self._sent_through]
        again = [query for query in everything if query.query_id <= self._sent_through]
        self._send_again(messages, again, now_ns)
        fresh = [query for query in fresh if query.deadline_ns - now_ns > HOPELESS_NS]
        if fresh:
            self._place(messages, fresh, now_ns, has_options=True, resubmitted=False)

    def _send_again(
        self, messages: list[tuple[int, Queries | Cancel]], queries: list[Q], now_ns: int
    ) -> None:
        """Send what a router had before, marked as such, as far as slack is left."""
        again = [
            query
            for query in queries
            if query.deadline_ns - now_ns > HOPELESS_NS and query.n_sends < MAX_SENDS - 1
        ]
        for query in again:
            query.n_sends += 1
        if self.spread.is_many and len(again) < len(queries):
            taken = {query.query_id for query in again}
            lost = [query.query_id for query in queries if query.query_id not in taken]
            there = self.spread.on_live()
            if gone := [query_id for query_id in lost if query_id not in there]:
                self._forsaken.update(gone)  # no answer can come: they need not wait for one
                self._time(gone, now_ns)
        if again:
            self._place(messages, again, now_ns, has_options=True, resubmitted=True)

    def _place(
        self, messages: list[tuple[int, Queries | Cancel]], batch: list[Q], now_ns: int, *,
        has_options: bool, resubmitted: bool,
    ) -> None:  # fmt: skip
        """Add the messages for a batch, to the router that will serve it soonest."""
        spread = self.spread
        i = spread.choose(len(batch))
        assert i is not None, "queries are sent only to a router that is there"
        epoch = spread.routes[i].epoch
        assert epoch is not None, "such a router has one"
        if spread.is_many:
            spread.sent(i, [query.query_id for query in batch], now_ns)
            if spread.is_bloated(i):
                spread.prune(i, self._pending)
        found = messages_of(batch, epoch, now_ns, has_options=has_options, resubmitted=resubmitted)
        messages.extend([(i, message) for message in found])

    def answered(
        self, results: Results, now_ns: int, router: int = 0
    ) -> Iterator[tuple[Answers, list[Q | None]]]:
        """Yield the answers of each group with its queries; None for a query that had ended already.

        What a router that drains hands back goes to another one, if there is one, and has not ended.
        """
        is_many = self.spread.is_many
        for group in results.groups:
            ids = memoryview(group.ids).cast("Q").tolist()
            if is_many:
                self.spread.answered(router, len(ids))
                if group.status == _DRAINING and self._take_back(ids, router):
                    continue
                if self._copied:
                    self._note_copies(ids, router)
            with self._guard:  # one acquisition for a group, not one for each query
                pop = self._pending.pop
                queries = [pop(query_id, None) for query_id in ids]
                freed = sum([query.n_bytes for query in queries if query is not None])
                self.held_bytes -= freed
            for query in queries:
                if query is not None:
                    query.payload = b""  # the future may live long, and must not hold the input
            row = group.subnet
            name = self._subnets[row][0] if row < len(self._subnets) else str(row)
            yield Answers(group, name, self._output, now_ns), queries

    def _take_back(self, ids: list[int], router: int) -> bool:
        """Mark a router as draining; return whether another one gets what it refused."""
        spread = self.spread
        spread.routes[router].is_draining = True
        if not [i for i in spread.live() if not spread.routes[i].is_draining]:
            return False
        self._returned += ids
        return True

    def _note_copies(self, ids: list[int], router: int) -> None:
        """Note which of the answered queries are with another router too."""
        for query_id in ids:
            if query_id in self._copied:
                self._copied.discard(query_id)
                if query_id in self._pending:
                    self._answered_copies.append((router, query_id))

    # --- routers ------------------------------------------------------------------------

    def add_router(self) -> int:
        """Know of one more router, which is not there yet; return its number."""
        spread = self.spread
        if not spread.is_many:  # nothing was noted so far
            with self._guard:
                ids = [query_id for query_id in self._pending if query_id <= self._sent_through]
            if ids and spread.routes[0].epoch is not None:
                spread.sent(0, ids, 0)
        spread.add()
        return len(spread.routes) - 1

    def welcomed(self, epoch: int, router: int = 0) -> None:
        """A router is there, or another one: queries that no router has are sent to it next."""
        route = self.spread.routes[router]
        route.forget()
        route.epoch = epoch
        # Only noted here: the next `outbound` sends them, with whatever was submitted meanwhile.
        self._is_to_home = True
        self._asked_ns = None

    def lost(self, router: int = 0) -> None:
        """A router is gone: another gets what it had.

        Without another, overdue queries end at the next check, and others just before their deadline.
        """
        route = self.spread.routes[router]
        route.epoch = None
        route.forget()
        self._is_to_home = True
        if self.epoch is not None:
            return
        with self._guard:
            # Only those that `outbound` took: it will time the others itself.
            ids = [query_id for query_id in self._pending if query_id <= self._taken_through]
        self._timed, self._n_timed = [], 0
        if ids:
            self._time(ids, 0)

    def beat(self, now_ns: int) -> tuple[list[int], list[int]]:
        """Judge the routers that owe answers; mark what suspect ones have, to be sent to another as well.

        Returns:
            The routers to send a PING, and those that are dead: call `lost` for them.
        """
        spread, pending, least_ns = self.spread, self._pending, now_ns + HOPELESS_NS

        def is_wanted(query_id: int) -> bool:
            query = pending.get(query_id)
            return query is not None and query.deadline_ns > least_ns

        asked, dead = spread.beat(now_ns, pending)
        for i in spread.suspects():
            if i not in dead:
                copies = spread.copies(i, is_wanted, now_ns)
                self._copied.update(copies)
                self._returned += copies
        return asked, dead

    def learn(
        self, takes: TensorSpec | None, gives: TensorSpec | None, subnets: Sequence[tuple[str, float]]
    ) -> None:
        """Store what the model takes and gives, and the subnets' names."""
        self._subnets, self._output = subnets, gives
        self._check.learn(takes)

    def close(self, error: QueryError) -> list[tuple[Q, QueryError]]:
        """Refuse new queries; return every query that is left, with `error`."""
        with self._guard:
            self._is_closed = True
            queries = list(self._pending.values())
            self._pending.clear()
            self.held_bytes = 0
            gone, self._cancelled = self._cancelled, []
            self._returned, self._answered_copies = [], []
            self._gathered, self._timed, self._n_timed = [], [], 0
        for query in (*queries, *gone):
            query.payload = b""
        return [(query, error) for query in queries]

    # --- time ---------------------------------------------------------------------------
    #
    # A message's ids are one heap entry, at the earliest deadline among them, so that a query costs no
    # heap operation. The entry holds ids, not queries, so that it keeps no answered query or output alive.

    def next_wake_ns(self) -> int | None:
        """Return when `expired` has something to check; None if no query waits."""
        if not self._timed:
            return None
        return self._timed[0][0] - (HOPELESS_NS if self.epoch is None else 0)

    def _time(self, ids: list[int], look_ns: int) -> None:
        self._serial += 1
        heappush(self._timed, (look_ns, self._serial, ids))
        self._n_timed += len(ids)
        if self._n_timed > 2 * len(self._pending) + _SPARE_TIMED:
            self._drop_answered()

    def _drop_answered(self) -> None:
        """Drop ids that have their answer. At least half of them go, so it costs one step an id overall."""
        pending = self._pending
        kept = [(at, serial, [i for i in ids if i in pending]) for at, serial, ids in self._timed]
        self._timed = [entry for entry in kept if entry[2]]
        heapify(self._timed)
        self._n_timed = sum(len(ids) for _, _, ids in self._timed)

    def expired(self, now_ns: int, heard_ns: int) -> list[tuple[Q, QueryError]]:
        """End the queries that have waited long enough; `heard_ns` is when the router last sent anything.

        Without a router a query ends just before its deadline. With one, it waits GRACE_NS longer for a
        LATE answer. But a router that is silent gets a PING (`wants_ping`), and if it does not answer
        within PROBE_NS, its queries end.
        """
        if self._asked_ns is not None and heard_ns >= self._asked_ns:
            self._asked_ns = None
        ended: list[tuple[Q, QueryError]] = []
        later: dict[int, list[int]] = {}
        while self._timed and (wake_ns := self.next_wake_ns()) is not None and wake_ns <= now_ns:
            _, _, ids = heappop(self._timed)
            self._n_timed -= len(ids)
            for query_id in ids:
                query = self._pending.get(query_id)
                if query is None:
                    self._forsaken.discard(query_id)
                    continue
                look_ns = self._look_again_ns(query, now_ns, heard_ns)
                if look_ns is not None:
                    later.setdefault(look_ns, []).append(query_id)
                elif self._forget(query):
                    ended.append((query, UnansweredError(self._why(query, now_ns))))
        for look_ns, ids in later.items():
            self._time(ids, look_ns)
        return ended

    def _look_again_ns(self, query: Q, now_ns: int, heard_ns: int) -> int | None:
        """Return when to check a query again; None if it ends now."""
        deadline_ns = query.deadline_ns
        if self._forsaken and query.query_id in self._forsaken:
            return None
        if self.epoch is None:  # a WELCOME may still come in time to send it
            return deadline_ns if deadline_ns - HOPELESS_NS > now_ns else None
        if now_ns < deadline_ns:
            return deadline_ns
        if now_ns >= deadline_ns + GRACE_NS:
            return None
        if heard_ns >= deadline_ns:  # the router works: a LATE answer may come
            return _coarse(deadline_ns + GRACE_NS)
        if now_ns < deadline_ns + QUIET_NS:
            return _coarse(deadline_ns + QUIET_NS)
        if self._asked_ns is None:
            self._asked_ns = now_ns
            self.wants_ping = True
        silent_ns = self._asked_ns + PROBE_NS
        return _coarse(silent_ns) if now_ns < silent_ns else None

    def _why(self, query: Q, now_ns: int) -> str:
        if query.query_id in self._forsaken:
            self._forsaken.discard(query.query_id)
            return f"query {query.query_id}: {LOST_LATE}"
        if self.epoch is None:
            return f"query {query.query_id}: {self.no_router}"
        if now_ns >= query.deadline_ns + GRACE_NS:
            why = f"the router gave no answer within {GRACE_NS // MS} ms of its deadline"
        else:
            why = f"its deadline has passed, and the router has not answered a PING for {PROBE_NS // MS} ms"
        return f"query {query.query_id}: {why}"

    def _forget(self, query: Q) -> bool:
        with self._guard:
            if self._pending.pop(query.query_id, None) is None:
                return False  # just cancelled: that ended it
            self.held_bytes -= query.n_bytes
        query.payload = b""
        return True


def _coarse(at_ns: int) -> int:
    """Return the next instant at which overdue queries are checked: many share one check."""
    return -(-at_ns // _COARSE_NS) * _COARSE_NS
