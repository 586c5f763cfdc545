"""The flight record: what a router did in its last minutes, in a form that costs little to keep and to send.

A sequence of entries, each self-contained, in the order in which things happened. The router writes them
(`router.report.flight`); `explain`, traces and the live page read them. Four kinds:

    batch    sent to a GPU, with its queries: who sent them, when they arrived, when they are due
    report   of a worker: how long a batch waited there and ran
    miss     queries that did not end OK, and why
    traced   a query that came with a `traceparent`: which trace it is a part of

So every query is in the record, either in a batch or in a miss; one that missed after it ran is in both. All
instants are the router's monotonic clock, nanoseconds.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from superserve.errors import WireError
from superserve.wire.traceparent import TraceContext, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterator

    Column = bytes | memoryview

_BATCH, _REPORT, _MISS, _TRACED = 1, 2, 3, 4
_BATCH_HEAD = struct.Struct("<BHHHqqqq")  # kind, gpu, subnet, stretches; id, dispatched, begin, profiled
_REPORT_HEAD = struct.Struct("<Bqqqqqq")  # kind; id, at, to start, waited, executing, returning
_MISS_HEAD = struct.Struct(
    "<BBHqqqq"
)  # kind, status, bytes of the reason; at, batch, way to client, quickest
_TRACED_HEAD = struct.Struct("<BIQ28s")  # kind; client, query, context as on the wire
_STRETCH = struct.Struct("<IIBqq")  # client, queries, columns; arrived, sent
_ALONE = struct.Struct("<IIBqq8sq")  # a stretch of one query: its id and its deadline too
_KIND = struct.Struct("<B")
pack_alone, pack_batch, pack_report = _ALONE.pack, _BATCH_HEAD.pack, _REPORT_HEAD.pack
"""For the router's loop, which notes every batch: calling a function for each would cost as much again."""
BATCH, REPORT = _BATCH, _REPORT
_HAS_FLOORS, _HAS_CLASSES = 1, 2
_MAX_REASON = 300


class Waiting(NamedTuple):
    """Queries of one message that were handled together.

    Attributes:
        client: The client's number on this router.
        arrived_ns: When the router read them.
        sent_ns: When their client sent them, by the router's estimate of the way.
        ids: As the client numbers them.
        deadlines_ns: The router's clock.
        floors: The least profile row of each; None without floors.
        classes: The priority class of each; None without classes.
    """

    client: int
    arrived_ns: int
    sent_ns: int
    ids: tuple[int, ...]
    deadlines_ns: tuple[int, ...]
    floors: tuple[int, ...] | None = None
    classes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SentBatch:
    """A batch that was sent to a GPU.

    Attributes:
        batch_id: Its number on this router.
        gpu: Index into the record's GPUs.
        subnet: Row of the profile.
        dispatched_ns: When it was sent.
        begin_ns: When the router expected it to start.
        profiled_ns: What it takes by the profile.
        queries: Its queries.
    """

    batch_id: int
    gpu: int
    subnet: int
    dispatched_ns: int
    begin_ns: int
    profiled_ns: int
    queries: tuple[Waiting, ...]

    @property
    def n(self) -> int:
        """How many queries it has."""
        return sum(len(one.ids) for one in self.queries)


@dataclass(frozen=True, slots=True)
class RanBatch:
    """A worker's report of a batch.

    Attributes:
        batch_id: Which one.
        at_ns: When the router read the report.
        to_start_ns: From dispatch until it started, the wait at the worker included.
        waited_ns: Of that, the wait at the worker, behind the batch before it.
        executing_ns: How long it ran.
        returning_ns: How long the report was under way.
    """

    batch_id: int
    at_ns: int
    to_start_ns: int
    waited_ns: int
    executing_ns: int
    returning_ns: int


@dataclass(frozen=True, slots=True)
class Missed:
    """Queries that did not end OK, for one reason.

    Attributes:
        status: A `superserve.wire.Status`.
        at_ns: When that was decided.
        batch_id: The batch that they ran in; 0 if they did not.
        to_client_ns: What the way back to the client usually takes.
        quickest_ns: The quickest answer of any GPU, then.
        reason: In words; "" for LATE.
        queries: Which ones.
    """

    status: int
    at_ns: int
    batch_id: int
    to_client_ns: int
    quickest_ns: int
    reason: str
    queries: Waiting


@dataclass(frozen=True, slots=True)
class Traced:
    """A query that its caller traces; this comes before its batch or miss.

    Attributes:
        client: The client's number on this router.
        query_id: As the client numbers it.
        context: The caller's.
    """

    client: int
    query_id: int
    context: TraceContext


Entry = SentBatch | RanBatch | Missed | Traced


# --- writing: plain values in, for the router's loop ------------------------------------------


def waiting_bytes(
    client: int, arrived_ns: int, sent_ns: int, ids: Column, deadlines_ns: list[int],
    floors: list[int] | None = None, classes: bytes | None = None,
) -> bytes:  # fmt: skip
    """Return a stretch of queries as bytes; `ids` are u64, little-endian."""
    n = len(deadlines_ns)
    if floors is None and classes is None:
        if n == 1:
            return pack_alone(client, 1, 0, arrived_ns, sent_ns, bytes(ids), deadlines_ns[0])
        head = _STRETCH.pack(client, n, 0, arrived_ns, sent_ns)
        return head + ids + array("q", deadlines_ns).tobytes()
    columns = (_HAS_FLOORS if floors is not None else 0) | (_HAS_CLASSES if classes is not None else 0)
    head = _STRETCH.pack(client, n, columns, arrived_ns, sent_ns)
    more = b"" if floors is None else array("H", floors).tobytes()
    return head + ids + array("q", deadlines_ns).tobytes() + more + (classes or b"")


def batch_bytes(
    batch_id: int, gpu: int, subnet: int, dispatched_ns: int, begin_ns: int, profiled_ns: int,
    stretches: list[bytes],
) -> bytes:  # fmt: skip
    """Return a batch's entry; `stretches` are of `waiting_bytes`."""
    head = _BATCH_HEAD.pack(
        _BATCH, gpu, subnet, len(stretches), batch_id, dispatched_ns, begin_ns, profiled_ns
    )
    return head + b"".join(stretches)


def report_bytes(
    batch_id: int, at_ns: int, to_start_ns: int, waited_ns: int, executing_ns: int, returning_ns: int
) -> bytes:
    """Return the entry of a worker's report."""
    return _REPORT_HEAD.pack(_REPORT, batch_id, at_ns, to_start_ns, waited_ns, executing_ns, returning_ns)


def miss_bytes(
    status: int, at_ns: int, batch_id: int, to_client_ns: int, quickest_ns: int, reason: str, stretch: bytes
) -> bytes:
    """Return the entry of queries that missed; `stretch` is of `waiting_bytes`."""
    said = reason.encode()[:_MAX_REASON]
    head = _MISS_HEAD.pack(_MISS, status, len(said), at_ns, batch_id, to_client_ns, quickest_ns)
    return head + said + stretch


def traced_bytes(client: int, query_id: int, context: bytes) -> bytes:
    """Return the entry of a query's trace; `context` is of `superserve.wire.traceparent.packed`."""
    return _TRACED_HEAD.pack(_TRACED, client, query_id, context)


# --- reading ----------------------------------------------------------------------------------


def entries_of(data: bytes) -> Iterator[Entry]:
    """Yield the entries of a record, in order.

    Raises:
        WireError: It is cut short, or no record.
    """
    at, end = 0, len(data)
    try:
        while at < end:
            (kind,) = _KIND.unpack_from(data, at)
            if kind == _BATCH:
                entry, at = _batch(data, at)
            elif kind == _REPORT:
                entry, at = RanBatch(*_REPORT_HEAD.unpack_from(data, at)[1:]), at + _REPORT_HEAD.size
            elif kind == _MISS:
                entry, at = _miss(data, at)
            elif kind == _TRACED:
                _, client, query_id, context = _TRACED_HEAD.unpack_from(data, at)
                entry, at = Traced(client, query_id, unpacked(context)), at + _TRACED_HEAD.size
            else:
                raise WireError(f"flight record: byte {at}: expected an entry of kind 1 to 4, got {kind}")
            yield entry
    except (struct.error, ValueError) as error:
        raise WireError(f"flight record: it is cut short near byte {at} of {end}") from error


def _batch(data: bytes, at: int) -> tuple[Entry, int]:
    _, gpu, subnet, n, batch_id, dispatched_ns, begin_ns, profiled_ns = _BATCH_HEAD.unpack_from(data, at)
    at += _BATCH_HEAD.size
    queries = []
    for _ in range(n):
        one, at = _waiting(data, at)
        queries.append(one)
    return SentBatch(batch_id, gpu, subnet, dispatched_ns, begin_ns, profiled_ns, tuple(queries)), at


def _miss(data: bytes, at: int) -> tuple[Entry, int]:
    _, status, n_said, at_ns, batch_id, to_client_ns, quickest_ns = _MISS_HEAD.unpack_from(data, at)
    at += _MISS_HEAD.size
    reason = data[at : at + n_said].decode(errors="replace")
    queries, at = _waiting(data, at + n_said)
    return Missed(status, at_ns, batch_id, to_client_ns, quickest_ns, reason, queries), at


def _waiting(data: bytes, at: int) -> tuple[Waiting, int]:
    client, n, columns, arrived_ns, sent_ns = _STRETCH.unpack_from(data, at)
    at += _STRETCH.size
    ids, at = _column(data, at, n, "Q", 8)
    deadlines_ns, at = _column(data, at, n, "q", 8)
    floors = classes = None
    if columns & _HAS_FLOORS:
        floors, at = _column(data, at, n, "H", 2)
    if columns & _HAS_CLASSES:
        classes, at = _column(data, at, n, "B", 1)
    return Waiting(client, arrived_ns, sent_ns, ids, deadlines_ns, floors, classes), at


def _column(data: bytes, at: int, n: int, code: str, width: int) -> tuple[tuple[int, ...], int]:
    end = at + n * width
    if end > len(data):
        raise ValueError("a column reaches beyond the end")
    values: array[Any] = array(code, data[at:end])
    return tuple(values), end
