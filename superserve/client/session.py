"""Session: the client's core. It decides what is sent next and how each query ends. No I/O.

It receives `now_ns` and messages, and returns messages and ended queries. `Client` and `AsyncClient`
are two shells around it: they own the socket, the clock and the waiting, and settle the futures.

    submit(query), cancel(query)       any thread
    outbound(now_ns)                   the messages to send now
    answered(results, now_ns)          the queries that a RESULTS message answers
    expired(now_ns, heard_ns)          the queries that have waited long enough, each with its error
    welcomed(...), lost()              a router is there; it is gone

A query ends when it leaves `_pending`, under the guard, and nowhere else: once. The guard is held
only briefly, never while a message is built or a callback runs, and nothing here relies on the
interpreter's own lock. It is reentrant because the garbage collector may run an application's
finalizer at any line, and that may submit or cancel.
"""

from __future__ import annotations

from array import array
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from superserve.client.reply import Answers
from superserve.clock import MS
from superserve.errors import DrainingError, InvalidQueryError, OverloadedError, UnansweredError
from superserve.subnet import TensorSpec
from superserve.wire import MAX_QUERIES, VARIED, Cancel, Queries

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from superserve.errors import QueryError
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

FRAMED_BYTES = 65_536
"""Payloads from this size on get their own frame, uncopied (`superserve.net.sockets.ZERO_COPY_BYTES`)."""

PACKED_BYTES = 8 << 20
"""Smaller payloads are joined into one frame of at most this: far below what ends a connection."""

MAX_PAYLOAD_BYTES = 256 << 20
"""A longer frame would end the connection (`superserve.net.sockets.MAX_MESSAGE_BYTES`)."""

_COARSE_NS = 4 * MS
"""Queries past their deadline are checked together, this often."""

_SPARE_TIMED = 4_096
"""Ids of answered queries that may stay in the timer heap until their deadline, beyond twice the pending:
large enough that an idle client never pays to clean up."""

CLOSED = "the client is closed: make a new one"
CLOSED_EARLY = "the client was closed before the answer came"

_PLAIN_KINDS = "biufc"
"""Kinds of dtype whose arrays expose their buffer directly."""


class _Input(NamedTuple):
    """What the model takes; replaced as a whole, so that no thread sees parts of two models."""

    spec: TensorSpec
    dtype: np.dtype[Any]
    n_bytes: int


class Query(Protocol):
    """What a session needs of a query; the shells' futures have it.

    Attributes:
        query_id: Assigned by `submit`; ascending.
        payload: A buffer in C order; b"" once the query has ended.
        n_bytes: Bytes of the payload.
        n_sends: How often it was sent again.
    """

    query_id: int
    payload: Any
    n_bytes: int
    deadline_ns: int
    submitted_ns: int
    min_accuracy: float
    priority: int
    n_sends: int


Q = TypeVar("Q", bound=Query)


class Session(Generic[Q]):
    """The queries of one client.

    Args:
        guard: A reentrant lock; protects what several threads change.
        no_router: The error text for a query that found no router; may be replaced.
        max_outstanding: Most queries without an answer.
        max_bytes: Most payload bytes without an answer.

    Attributes:
        epoch: The router's, or None while there is none.
        held_bytes: Payload bytes without an answer.
        wants_ping: A query's deadline has passed and the router has been silent since.
    """

    def __init__(
        self, guard: AbstractContextManager[Any], no_router: str, *, max_outstanding: int, max_bytes: int
    ) -> None:
        self.max_outstanding = max_outstanding
        self.max_bytes = max_bytes
        self.epoch: int | None = None
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
        self._is_greeted = False
        self._taken_through = 0
        self._sent_through = 0
        self._timed: list[tuple[int, int, list[int]]] = []
        self._n_timed = 0
        self._serial = 0
        self._asked_ns: int | None = None
        self._subnets: Sequence[tuple[str, float]] = ()
        self._output: TensorSpec | None = None
        self._input: _Input | None = None

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
            if query.min_accuracy or query.priority:
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
        return bool(self._gathered or self._cancelled or (self._is_greeted and self.epoch is not None))

    def outbound(self, now_ns: int) -> list[Queries | Cancel]:
        """Return the messages to send now, in order; they count as sent. If a send fails, call `lost`."""
        with self._guard:
            # Ids ascend, so one number separates the queries that were taken from those that were not.
            self._taken_through = self._last_id
            batch, self._gathered = self._gathered, []
            cancelled, self._cancelled = self._cancelled, []
            if self._has_holes:
                batch = [query for query in batch if query.query_id in self._pending]
            has_options, self._has_options = self._has_options, False
            self._has_holes = False
            everything = list(self._pending.values()) if self._is_greeted else []
        if batch:
            self._time([query.query_id for query in batch], min([query.deadline_ns for query in batch]))
        for query in cancelled:
            query.payload = b""  # not in `cancel`: another thread may be sending it
        if self.epoch is None:
            return []
        messages: list[Queries | Cancel] = []
        if self._is_greeted:
            self._is_greeted = False
            messages.extend(self._again(everything, now_ns))
        elif batch:
            messages.extend(self._queries(batch, now_ns, has_options=has_options, resubmitted=False))
        # The router has never seen the others.
        if sent := [query.query_id for query in cancelled if query.query_id <= self._sent_through]:
            messages.append(Cancel(self.epoch, len(sent), array("Q", sent).tobytes()))
        self._sent_through = self._taken_through
        return messages

    def _again(self, everything: list[Q], now_ns: int) -> Iterator[Queries]:
        """Yield what a new router needs: all queries with slack left, marked if an older router had them."""
        alive = [query for query in everything if query.deadline_ns - now_ns > HOPELESS_NS]
        fresh = [query for query in alive if query.query_id > self._sent_through]
        again = [query for query in alive if query.query_id <= self._sent_through]
        again = [query for query in again if query.n_sends < MAX_SENDS - 1]
        for query in again:
            query.n_sends += 1
        if again:
            yield from self._queries(again, now_ns, has_options=True, resubmitted=True)
        if fresh:
            yield from self._queries(fresh, now_ns, has_options=True, resubmitted=False)

    def _queries(
        self, batch: list[Q], now_ns: int, *, has_options: bool, resubmitted: bool
    ) -> Iterator[Queries]:
        """Yield messages for a batch: small payloads packed, large ones in their own frames."""
        assert self.epoch is not None, "queries are sent only to a router that is there"
        sizes = [query.n_bytes for query in batch]
        parts = [(batch, False)]
        if max(sizes) >= FRAMED_BYTES:
            large = [query for query in batch if query.n_bytes >= FRAMED_BYTES]
            parts = [([query for query in batch if query.n_bytes < FRAMED_BYTES], False), (large, True)]
        is_one = len(parts) == 1 and len(batch) <= MAX_QUERIES and sum(sizes) <= PACKED_BYTES
        for part, is_framed in parts:
            for chunk in [part] if is_one else _chunks(part, is_framed=is_framed):
                yield _message(
                    chunk, self.epoch, now_ns, is_framed=is_framed, has_options=has_options,
                    resubmitted=resubmitted,
                )  # fmt: skip

    def answered(self, results: Results, now_ns: int) -> Iterator[tuple[Answers, list[Q | None]]]:
        """Yield the answers of each group with its queries; None for a query that had ended already."""
        for group in results.groups:
            ids = memoryview(group.ids).cast("Q").tolist()
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

    def welcomed(self, epoch: int) -> None:
        """A router is there, or another one: queries with slack left are sent to it next."""
        self.epoch = epoch
        # Only noted here: the next `outbound` sends them, with whatever was submitted meanwhile.
        self._is_greeted = True
        self._asked_ns = None

    def lost(self) -> None:
        """The router is gone: overdue queries end at the next check, others just before their deadline."""
        self.epoch = None
        self._is_greeted = False
        with self._guard:
            # Only those that `outbound` took: it will time the others itself.
            ids = [query_id for query_id in self._pending if query_id <= self._taken_through]
        self._timed, self._n_timed = [], 0
        if ids:
            self._time(ids, 0)

    def learn(
        self, takes: TensorSpec | None, gives: TensorSpec | None, subnets: Sequence[tuple[str, float]]
    ) -> None:
        """Store what the model takes and gives, and the subnets' names."""
        self._subnets, self._output = subnets, gives
        self._input = None if takes is None else _Input(takes, np.dtype(takes.dtype), takes.n_bytes)

    def close(self, error: QueryError) -> list[tuple[Q, QueryError]]:
        """Refuse new queries; return every query that is left, with `error`."""
        with self._guard:
            self._is_closed = True
            queries = list(self._pending.values())
            self._pending.clear()
            self.held_bytes = 0
            gone, self._cancelled = self._cancelled, []
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

    # --- checks -------------------------------------------------------------------------

    def checked(self, payload: Any) -> tuple[Any, int]:
        """Return the payload as a buffer in C order, and its bytes; numeric arrays stay as they are.

        Raises:
            InvalidQueryError: It is not what the model takes.
        """
        if type(payload) is bytes:
            buffer: Any = payload
        elif isinstance(payload, np.ndarray):
            return self._checked_array(payload)
        else:
            buffer = _as_bytes(payload)
        n_bytes = len(buffer)
        expected = self._input
        if expected is not None and n_bytes != expected.n_bytes:
            spec = expected.spec
            raise InvalidQueryError(
                f"input: expected {spec.n_bytes} bytes ({spec.dtype} {spec.shape}), got {n_bytes}"
            )
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise _too_long(n_bytes)
        return buffer, n_bytes

    def _checked_array(self, payload: np.ndarray[Any, Any]) -> tuple[Any, int]:
        dtype = payload.dtype
        expected = self._input
        # Comparing here first: `check` makes two dtypes, and this runs for every query.
        if expected is not None and (dtype != expected.dtype or payload.shape != expected.spec.shape):
            expected.spec.check(payload)
        n_bytes = payload.nbytes
        if n_bytes > MAX_PAYLOAD_BYTES:
            raise _too_long(n_bytes)
        if dtype.kind in _PLAIN_KINDS and payload.flags.c_contiguous:
            return payload, n_bytes
        if dtype.hasobject:
            raise InvalidQueryError("input: expected an array of numbers, got objects")
        return np.ascontiguousarray(payload).reshape(-1).view(np.uint8), n_bytes


def _coarse(at_ns: int) -> int:
    """Return the next instant at which overdue queries are checked: many share one check."""
    return -(-at_ns // _COARSE_NS) * _COARSE_NS


def _as_bytes(payload: Any) -> Any:
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise InvalidQueryError(f"input: expected a NumPy array or bytes, got {type(payload).__name__}")
    if isinstance(payload, memoryview) and not payload.c_contiguous:
        raise InvalidQueryError("input: expected bytes in C order, got a memoryview with gaps")
    return payload if isinstance(payload, bytes) else memoryview(payload).cast("B")


def _too_long(n_bytes: int) -> InvalidQueryError:
    return InvalidQueryError(f"input: expected at most {MAX_PAYLOAD_BYTES} bytes, got {n_bytes}")


def _chunks(batch: list[Q], *, is_framed: bool) -> Iterator[list[Q]]:
    """Yield the batch in parts that each fit in a message."""
    chunk: list[Q] = []
    n_bytes = 0
    for query in batch:
        is_full = not is_framed and n_bytes + query.n_bytes > PACKED_BYTES
        if chunk and (is_full or len(chunk) >= MAX_QUERIES):
            yield chunk
            chunk, n_bytes = [], 0
        chunk.append(query)
        n_bytes += query.n_bytes
    if chunk:
        yield chunk


def _message(
    batch: list[Q], epoch: int, now_ns: int, *, is_framed: bool, has_options: bool, resubmitted: bool
) -> Queries:
    """Return one message for `batch`, with slacks counted from now."""
    ids = array("Q", [query.query_id for query in batch]).tobytes()
    slacks = array("q", [query.deadline_ns - now_ns for query in batch]).tobytes()
    sizes = [query.n_bytes for query in batch]
    each, lengths = sizes[0], None
    if sizes.count(each) != len(sizes):
        each, lengths = VARIED, array("I", sizes).tobytes()
    payloads: list[Any] = [query.payload for query in batch]
    payloads = list(map(_frame, payloads)) if is_framed else [b"".join(payloads)]
    accuracies = priorities = None
    if has_options:
        floors = [query.min_accuracy for query in batch]
        accuracies = array("f", floors).tobytes() if any(floors) else None
        classes = bytes([query.priority for query in batch])
        priorities = classes if any(classes) else None
    return Queries(
        epoch, now_ns, len(batch), ids, slacks, each, payloads, is_framed, lengths, accuracies, priorities,
        resubmitted,
    )  # fmt: skip


def _frame(payload: Any) -> Any:
    """Return a payload as bytes without copying them."""
    return payload.reshape(-1).view(np.uint8).data if isinstance(payload, np.ndarray) else payload
