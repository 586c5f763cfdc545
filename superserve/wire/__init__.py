"""Wire protocol, version 1: the only place where bytes become messages.

Every message is a list of ZeroMQ frames. Frame 0 begins with the prelude

    magic "SS" | version u8 | kind u8 | flags u32            (all integers little-endian)

followed by the kind's fixed header and its columns. Payloads and outputs ride in
frames of their own after it, so that nobody on the way has to copy or parse them.
Nothing is pickled. Times are integer nanoseconds; durations cross hosts, instants
do not: where a sender stamps its own clock (`sent_ns`), the receiver only compares
such stamps of one peer with each other.

    kind       no.  sender -> receiver        frame 0 after the prelude          further frames
    HELLO        1  client|worker -> router   -                                  JSON
    WELCOME      2  router -> client|worker   -                                  JSON
    QUERIES      3  client -> router          header, ids, slacks, options       payloads
    RESULTS      4  router -> client          header, groups, ids, lengths       one a group
    CANCEL       5  client -> router          header, ids                        -
    PULL         6  worker -> router          header, rows                       -
    DIRECTIVE    7  router -> worker          header, segments, ids, slacks      payloads
    DONE         8  worker -> router          header, rows, statuses, lengths    one a batch
    PING         9  any -> any                stamp                              -
    PONG        10  any -> any                the PING's stamp, own stamp        -
    DRAIN       11  operator|worker -> router, router -> peers   -               JSON
    BYE         12  any -> any                -                                  JSON
    STATUS      13  any -> router -> back     -                                  JSON (empty asks)
    REFUSED     14  router -> any             -                                  JSON

A retired kind's number is never reused. A receiver that meets another version
answers REFUSED, in version 1's form, naming both versions.

QUERIES: `epoch` (of the WELCOME it was sent under) u64, `sent_ns` i64, `n` u32,
`payload_bytes` u32 (of each query; VARIED if they differ). Columns, each of n:
`ids` u64, unique within the client's session and the same when a query is sent
again; `slacks` i64 ns, time left at the moment of sending; then, as flags say,
`min_accuracy` f32 percent (MIN_ACCURACY), `priority` u8 (PRIORITY), `lengths` u32
(LENGTHS, exactly when VARIED). Payloads: packed end to end in one frame, or with
the flag FRAMES one frame a query. RESUBMITTED: these ids may be known already.

RESULTS: `epoch` u64, `n` u32, `n_groups` u32. A group is a stretch of queries that
share an end: count u32, status u8, (3 pad), subnet u16, batch_size u16, accuracy f32,
queued, to_start, executing, returning i64 ns, output_bytes u32 (VARIED: the column
`lengths`, present with flag LENGTHS for all n). Then ids u64, one after the other, and
with flag QUEUED `queued` u32 us of each query, which may differ within a batch. A
buffer a group: its outputs end to end; for a status without output, one UTF-8 text that
says why, shared by the group, output_bytes long.

PULL: `epoch` u64, `n_rows` u32. A row: slot u16, credit u16 (batches it can take),
held u16, running u16, last_batch u64 (the last directive it had seen: the router
deducts what it sent after that), running_batch u64 (0: none of this epoch runs),
running_for_ns i64 (how long it has been running; when it ends is for the router to reckon),
memory_bytes u64, utilisation f32, temperature_c f32 (NaN where unknown).

DIRECTIVE: `epoch` u64, `batch_id` u64 (ascending), slot u16, subnet u16, `n` u32,
`n_segments` u32. A segment is a stretch of one QUERIES message: count u32,
payload_bytes u32, packed u32 (1: one frame; 0: a frame a query), (4 pad), elapsed_ns
i64. Columns: ids u64; slacks i64 as the client sent them: slack - elapsed is left;
lengths u32 (LENGTHS, where any segment is VARIED).

DONE: `epoch` u64, `n_rows` u32. A row: batch_id u64, slot u16, credit u16, held u16,
flags u16 (1: mixed statuses), n u32, output_bytes u32 (VARIED as above), waited_ns
i64 (received to started), executing_ns i64, last_batch u64, running_batch u64,
running_for_ns i64 (both as in PULL). Columns: for each row with mixed statuses,
status u8 of n; for each VARIED row, lengths u32 of n. A buffer a row: outputs, or
UTF-8 reasons, end to end.

The buffers of QUERIES, RESULTS, DIRECTIVE and DONE are frames of their own, or, where
together they are small (GATHER_BYTES), follow the columns in frame 0, end to end, with
flag GATHERED: ZeroMQ copies small frames anyway, and each costs as much as kilobytes.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import orjson

from superserve.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

VERSION = 1
MAGIC = b"SS"
VARIED = 0xFFFFFFFF
"""In a *_bytes field: lengths differ and stand in the column `lengths`."""

MAX_QUERIES = 65_536
"""Queries in one message, at most: a bound on what one decode may allocate."""
MAX_FRAMES = MAX_QUERIES + 1
MAX_SLACK_NS = 86_400 * 10**9
"""No slack is longer than a day; a longer one is a unit mistaken."""
MAX_JSON_BYTES = 16 << 20

GATHER_BYTES = 16_384
"""Buffers that together stay below this share a frame: joining them costs less than their frames."""

Buffer = bytes | memoryview

_PRELUDE = struct.Struct("<2sBBI")
_QUERIES = struct.Struct("<QqII")
_QUERY = struct.Struct("<2sBBIQqIIQq")  # prelude, header, and the columns of a single query
_QUERIES_AT = _PRELUDE.size + _QUERIES.size
_RESULTS = struct.Struct("<QII")
_RESULT = struct.Struct("<2sBBIQIIIB3xHHfqqqqI")  # prelude, header, and the row of a single group
_GROUP = struct.Struct("<IB3xHHfqqqqI")
_COUNTED = struct.Struct("<QI")
_PULL_ROW = struct.Struct("<HHHHQQqQff")
_DIRECTIVE = struct.Struct("<QQHHII")
_SEGMENT = struct.Struct("<III4xq")
_DONE_ROW = struct.Struct("<QHHHHIIqqQQq")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_STAMP = _I64
_STAMPS = struct.Struct("<qq")

_FLAG_MIN_ACCURACY = 1
_FLAG_PRIORITY = 2
_FLAG_LENGTHS = 4
_FLAG_FRAMES = 8
_FLAG_RESUBMITTED = 16
_FLAG_GATHERED = 32
_FLAG_QUEUED = 64
_ROW_MIXED = 1


class Kind(enum.IntEnum):
    """What a message is; a retired kind's number is never reused."""

    HELLO = 1
    WELCOME = 2
    QUERIES = 3
    RESULTS = 4
    CANCEL = 5
    PULL = 6
    DIRECTIVE = 7
    DONE = 8
    PING = 9
    PONG = 10
    DRAIN = 11
    BYE = 12
    STATUS = 13
    REFUSED = 14


class Status(enum.IntEnum):
    """How a query ended. OK and LATE carry the output, the others a reason."""

    OK = 0
    LATE = 1
    EXPIRED = 2
    INFEASIBLE = 3
    OVERLOADED = 4
    FAILED = 5
    WORKER_LOST = 6
    INVALID = 7
    CANCELLED = 8
    DRAINING = 9


STATUSES = tuple(Status)
HAS_OUTPUT = (Status.OK, Status.LATE)


@dataclass(slots=True)
class Queries:
    """Client to router: queries, as columns of equal length n.

    Attributes:
        epoch: The epoch of the WELCOME this connection was given.
        sent_ns: The sender's own clock at the moment of sending.
        ids: n u64, little-endian, as bytes: the router never looks inside.
        slacks: n i64 ns as bytes.
        payload_bytes: Bytes of each payload, or VARIED.
        payloads: One buffer holding all payloads, or n buffers if `framed`.
        lengths: n u32 as bytes when VARIED, else None.
        min_accuracy: n f32 percent as bytes, or None.
        priority: n u8 as bytes, or None.
    """

    kind: ClassVar[Kind] = Kind.QUERIES

    epoch: int
    sent_ns: int
    n: int
    ids: Buffer
    slacks: Buffer
    payload_bytes: int
    payloads: Sequence[Buffer]
    framed: bool = False
    lengths: Buffer | None = None
    min_accuracy: Buffer | None = None
    priority: Buffer | None = None
    resubmitted: bool = False

    def slack_ns(self) -> list[int]:
        """Return the slacks, ns. A list: most messages are too short for an array to pay."""
        return list(_I64.unpack(self.slacks)) if self.n == 1 else _int64s(self.slacks)

    def n_bytes(self) -> int:
        """Return the bytes of all payloads together."""
        return len(self.payloads[0]) if len(self.payloads) == 1 else sum(map(len, self.payloads))


@dataclass(slots=True)
class Group:
    """A stretch of RESULTS that share an end. Durations in ns; accuracy in percent.

    Attributes:
        ids: count u64 as bytes.
        output_bytes: Bytes of each output, or VARIED.
        output: Outputs end to end (OK, LATE), or one UTF-8 reason.
        lengths: count u32 as bytes when VARIED, else None.
        queued_us: count u32 us as bytes where the queries did not wait equally long, else
            None; `queued_ns` is then the first one's.
    """

    count: int
    status: int
    subnet: int
    batch_size: int
    accuracy: float
    queued_ns: int
    to_start_ns: int
    executing_ns: int
    returning_ns: int
    ids: Buffer
    output_bytes: int
    output: Buffer
    lengths: Buffer | None = None
    queued_us: Buffer | None = None


@dataclass(slots=True)
class Results:
    """Router to client: terminal answers, in groups."""

    kind: ClassVar[Kind] = Kind.RESULTS

    epoch: int
    groups: list[Group]


@dataclass(slots=True)
class Cancel:
    """Client to router: forget these queries; `ids` is n u64 as bytes."""

    kind: ClassVar[Kind] = Kind.CANCEL

    epoch: int
    n: int
    ids: Buffer


@dataclass(slots=True)
class PullRow:
    """One GPU's queue state. See the module's docstring; `credit` is deducted by the router."""

    slot: int
    credit: int
    held: int
    running: int
    last_batch: int
    running_batch: int
    running_for_ns: int
    memory_bytes: int = 0
    utilisation: float = float("nan")
    temperature_c: float = float("nan")


@dataclass(slots=True)
class Pull:
    """Worker to router: what its GPUs hold and can take."""

    kind: ClassVar[Kind] = Kind.PULL

    epoch: int
    rows: list[PullRow]


@dataclass(slots=True)
class Segment:
    """A stretch of one client's message inside a directive.

    Attributes:
        payload_bytes: Bytes of each payload, or VARIED.
        payloads: One buffer if `packed`, else `count` buffers.
        elapsed_ns: Slack used up since the client sent it.
        ids: count u64 as bytes.
        slacks: count i64 ns as bytes, as the client sent them.
        lengths: count u32 as bytes when VARIED, else None.
    """

    count: int
    payload_bytes: int
    packed: bool
    elapsed_ns: int
    ids: Buffer
    slacks: Buffer
    payloads: Sequence[Buffer]
    lengths: Buffer | None = None


@dataclass(slots=True)
class Directive:
    """Router to worker: actuate `subnet`, then run these queries as one batch."""

    kind: ClassVar[Kind] = Kind.DIRECTIVE

    epoch: int
    batch_id: int
    slot: int
    subnet: int
    n: int
    segments: list[Segment]

    def slack_left_ns(self) -> npt.NDArray[np.int64]:
        """Return what was left of each query's slack at sending, shape (n,), ns."""
        parts = [np.frombuffer(s.slacks, "<i8") - s.elapsed_ns for s in self.segments]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def least_slack_left_ns(self) -> int:
        """Return the least of `slack_left_ns`, without making an array of a handful of numbers."""
        return min([min(memoryview(s.slacks).cast("q")) - s.elapsed_ns for s in self.segments])

    def payload_list(self) -> list[Buffer]:
        """Return the n payloads, each a buffer of its own; nothing is copied."""
        payloads: list[Buffer] = []
        for segment in self.segments:
            if not segment.packed:
                payloads.extend(segment.payloads)
                continue
            view, at = memoryview(segment.payloads[0]), 0
            for length in _lengths(segment.count, segment.payload_bytes, segment.lengths):
                payloads.append(view[at : at + length])
                at += length
        return payloads


@dataclass(slots=True)
class DoneRow:
    """One finished batch. `statuses` is n u8 when they are not all OK."""

    batch_id: int
    slot: int
    credit: int
    held: int
    n: int
    waited_ns: int
    executing_ns: int
    last_batch: int
    running_batch: int
    running_for_ns: int
    output_bytes: int
    output: Buffer
    statuses: Buffer | None = None
    lengths: Buffer | None = None


@dataclass(slots=True)
class Done:
    """Worker to router: finished batches, and the queue state they leave behind."""

    kind: ClassVar[Kind] = Kind.DONE

    epoch: int
    rows: list[DoneRow]


@dataclass(slots=True)
class Ping:
    """Are you there? `stamp_ns` is the sender's own clock and comes back in the PONG."""

    kind: ClassVar[Kind] = Kind.PING

    stamp_ns: int


@dataclass(slots=True)
class Pong:
    """The PING's stamp, and the clock of whoever answers it."""

    kind: ClassVar[Kind] = Kind.PONG

    stamp_ns: int
    own_ns: int


@dataclass(slots=True)
class Control:
    """HELLO, WELCOME, DRAIN, BYE, STATUS and REFUSED: a JSON object."""

    kind: Kind
    body: dict[str, Any] = field(default_factory=dict)


Message = Queries | Results | Cancel | Pull | Directive | Done | Ping | Pong | Control


# By kind and flags: packing one costs as much as looking up ten.
_PRELUDES_OF = {
    kind: tuple(_PRELUDE.pack(MAGIC, VERSION, kind, flags) for flags in range(2 * _FLAG_QUEUED))
    for kind in Kind
}
_PRELUDES = {kind: preludes[0] for kind, preludes in _PRELUDES_OF.items()}
_PLAIN_QUERIES = _PRELUDES_OF[Kind.QUERIES][_FLAG_GATHERED]
_CONTROL_KINDS = frozenset({Kind.HELLO, Kind.WELCOME, Kind.DRAIN, Kind.BYE, Kind.STATUS, Kind.REFUSED})


def _int64s(column: Buffer) -> list[int]:
    """Return a column of i64. The protocol is little-endian, and so is every machine with CUDA."""
    values: list[int] = memoryview(column).cast("q").tolist()
    return values


def uint64s(column: Buffer) -> list[int]:
    """Return a column of u64, such as `ids`."""
    values: list[int] = memoryview(column).cast("Q").tolist()
    return values


def _lengths(count: int, uniform: int, column: Buffer | None) -> list[int]:
    if uniform != VARIED:
        return [uniform] * count
    assert column is not None, "VARIED without a column of lengths"
    lengths: list[int] = np.frombuffer(column, "<u4").tolist()
    return lengths


# --- encoding -------------------------------------------------------------------------------


def _frames(kind: Kind, flags: int, parts: Sequence[Buffer], buffers: Sequence[Buffer]) -> list[Buffer]:
    """Return frame 0 of header and columns, and the buffers: in it if they are small, else behind it."""
    n_bytes = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
    if n_bytes < GATHER_BYTES:
        return [b"".join((_PRELUDES_OF[kind][flags | _FLAG_GATHERED], *parts, *buffers))]
    return [b"".join((_PRELUDES_OF[kind][flags], *parts)), *buffers]


def encode_queries(message: Queries) -> list[Buffer]:
    """Return the frames of a QUERIES message."""
    flags = _FLAG_FRAMES if message.framed else 0
    columns: list[Buffer] = [message.ids, message.slacks]
    if message.min_accuracy is not None:
        flags |= _FLAG_MIN_ACCURACY
        columns.append(message.min_accuracy)
    if message.priority is not None:
        flags |= _FLAG_PRIORITY
        columns.append(message.priority)
    if message.lengths is not None:
        flags |= _FLAG_LENGTHS
        columns.append(message.lengths)
    if message.resubmitted:
        flags |= _FLAG_RESUBMITTED
    header = _QUERIES.pack(message.epoch, message.sent_ns, message.n, message.payload_bytes)
    return _frames(Kind.QUERIES, flags, (header, *columns), message.payloads)


def kind_of(frame: bytes) -> int:
    """Return the kind that a sound first frame names, without decoding the message."""
    return frame[3]


def encode_query(epoch: int, sent_ns: int, query_id: int, slack_ns: int, payload: Buffer) -> Buffer:
    """Return the one frame of a QUERIES message of one query with a payload below GATHER_BYTES."""
    n_bytes = len(payload)
    assert n_bytes < GATHER_BYTES, "a larger payload has a frame of its own"
    head = _QUERY.pack(
        MAGIC, VERSION, Kind.QUERIES, _FLAG_GATHERED, epoch, sent_ns, 1, n_bytes, query_id, slack_ns
    )
    return head + payload


def _group_row(g: Group) -> bytes:
    n_bytes = g.output_bytes if g.status <= Status.LATE or g.lengths is not None else len(g.output)
    return _GROUP.pack(
        g.count, g.status, g.subnet, g.batch_size, g.accuracy,
        g.queued_ns, g.to_start_ns, g.executing_ns, g.returning_ns, n_bytes,
    )  # fmt: skip


def encode_results(message: Results) -> list[Buffer]:
    """Return the frames of a RESULTS message."""
    groups = message.groups
    if len(groups) == 1:
        return encode_group(message.epoch, groups[0])
    flags = 0
    rows = [_group_row(g) for g in groups]
    columns: list[Buffer] = [g.ids for g in groups]
    if any(g.queued_us is not None for g in groups):
        flags |= _FLAG_QUEUED
        columns.extend(queued_us_of(g) for g in groups)
    if any(g.lengths is not None for g in groups):
        flags |= _FLAG_LENGTHS
        columns.extend(bytes(4 * g.count) if g.lengths is None else g.lengths for g in groups)
    header = _RESULTS.pack(message.epoch, sum([g.count for g in groups]), len(groups))
    return _frames(Kind.RESULTS, flags, (header, *rows, *columns), [g.output for g in groups])


def encode_group(epoch: int, g: Group) -> list[Buffer]:
    """Return the frames of a RESULTS message of one group: what most clients are sent."""
    output, flags = g.output, 0
    n_bytes = g.output_bytes if g.status <= Status.LATE or g.lengths is not None else len(output)
    parts = [g.ids]
    if g.queued_us is not None:
        flags |= _FLAG_QUEUED
        parts.append(g.queued_us)
    if g.lengths is not None:
        flags |= _FLAG_LENGTHS
        parts.append(g.lengths)
    is_small = len(output) < GATHER_BYTES
    if is_small:
        flags |= _FLAG_GATHERED
        parts.append(output)
    head = _RESULT.pack(
        MAGIC, VERSION, Kind.RESULTS, flags, epoch, g.count, 1, g.count, g.status, g.subnet, g.batch_size,
        g.accuracy, g.queued_ns, g.to_start_ns, g.executing_ns, g.returning_ns, n_bytes,
    )  # fmt: skip
    frame = b"".join((head, *parts))
    return [frame] if is_small else [frame, output]


def queued_us_of(group: Group) -> Buffer:
    """Return the column `queued` of a group: its own, or the one wait that its queries share."""
    if group.queued_us is not None:
        return group.queued_us
    return pack_queued_us(group.queued_ns) * group.count


def pack_queued_us(queued_ns: int) -> bytes:
    """Return one entry of the column `queued`: microseconds, at most what a u32 holds."""
    return _U32.pack(min(max(0, queued_ns) // 1000, 0xFFFFFFFF))


def encode_cancel(message: Cancel) -> list[Buffer]:
    """Return the frames of a CANCEL message."""
    return [b"".join((_PRELUDES[Kind.CANCEL], _COUNTED.pack(message.epoch, message.n), message.ids))]


def encode_pull(message: Pull) -> list[Buffer]:
    """Return the frames of a PULL message."""
    parts = [_PRELUDES[Kind.PULL], _COUNTED.pack(message.epoch, len(message.rows))]
    parts.extend(
        _PULL_ROW.pack(
            r.slot,
            r.credit,
            r.held,
            r.running,
            r.last_batch,
            r.running_batch,
            r.running_for_ns,
            r.memory_bytes,
            r.utilisation,
            r.temperature_c,
        )
        for r in message.rows
    )
    return [b"".join(parts)]


def encode_directive(message: Directive) -> list[Buffer]:
    """Return the frames of a DIRECTIVE message."""
    segments = message.segments
    flags = 0
    pack = _SEGMENT.pack
    parts: list[Buffer] = [
        _DIRECTIVE.pack(
            message.epoch, message.batch_id, message.slot, message.subnet, message.n, len(segments)
        )
    ]
    parts += [pack(s.count, s.payload_bytes, s.packed, s.elapsed_ns) for s in segments]
    parts += [s.ids for s in segments]
    parts += [s.slacks for s in segments]
    lengths = [s.lengths for s in segments]
    if lengths.count(None) < len(lengths):
        flags |= _FLAG_LENGTHS
        parts += [bytes(4 * s.count) if s.lengths is None else s.lengths for s in segments]
    payloads = [payload for s in segments for payload in s.payloads]
    return _frames(Kind.DIRECTIVE, flags, parts, payloads)


def encode_done(message: Done) -> list[Buffer]:
    """Return the frames of a DONE message."""
    rows = message.rows
    parts: list[Buffer] = [_COUNTED.pack(message.epoch, len(rows))]
    parts.extend(
        [
            _DONE_ROW.pack(
                r.batch_id,
                r.slot,
                r.credit,
                r.held,
                _ROW_MIXED if r.statuses is not None else 0,
                r.n,
                r.output_bytes,
                r.waited_ns,
                r.executing_ns,
                r.last_batch,
                r.running_batch,
                r.running_for_ns,
            )
            for r in rows
        ]
    )
    for r in rows:
        if r.statuses is not None:
            parts.append(r.statuses)
        if r.lengths is not None:
            parts.append(r.lengths)
    return _frames(Kind.DONE, 0, parts, [r.output for r in rows])


def encode_ping(message: Ping) -> list[Buffer]:
    """Return the frames of a PING."""
    return [_PRELUDES[Kind.PING] + _STAMP.pack(message.stamp_ns)]


def encode_pong(message: Pong) -> list[Buffer]:
    """Return the frames of a PONG."""
    return [_PRELUDES[Kind.PONG] + _STAMPS.pack(message.stamp_ns, message.own_ns)]


def encode_control(message: Control) -> list[Buffer]:
    """Return the frames of a HELLO, WELCOME, DRAIN, BYE, STATUS or REFUSED."""
    if message.kind not in _CONTROL_KINDS:
        raise WireError(f"kind: expected a control kind, got {message.kind.name}")
    return [_PRELUDES[message.kind], orjson.dumps(message.body, option=orjson.OPT_SERIALIZE_NUMPY)]


def encode(message: Message) -> list[Buffer]:
    """Return the frames of any message."""
    match message:
        case Queries():
            return encode_queries(message)
        case Results():
            return encode_results(message)
        case Cancel():
            return encode_cancel(message)
        case Pull():
            return encode_pull(message)
        case Directive():
            return encode_directive(message)
        case Done():
            return encode_done(message)
        case Ping():
            return encode_ping(message)
        case Pong():
            return encode_pong(message)
        case Control():
            return encode_control(message)


# --- decoding -------------------------------------------------------------------------------
#
# Every length is checked before anything is read, so a mangled message is a WireError
# and never an exception from struct or NumPy, whatever its bytes.


class _Reader:
    """Takes fixed numbers of bytes from frame 0, in order, and objects when they are not there."""

    __slots__ = ("_at", "_frame", "_kind")

    def __init__(self, frame: Buffer, kind: Kind) -> None:
        self._frame = frame
        self._kind = kind
        self._at = _PRELUDE.size

    def unpack(self, fixed: struct.Struct, what: str) -> tuple[Any, ...]:
        at = self._at
        if len(self._frame) < at + fixed.size:
            raise self.short(what, fixed.size)
        self._at = at + fixed.size
        return fixed.unpack_from(self._frame, at)

    def rows(self, fixed: struct.Struct, n: int, what: str) -> list[tuple[Any, ...]]:
        return list(fixed.iter_unpack(self.take(n * fixed.size, what)))

    def take(self, n_bytes: int, what: str) -> Buffer:
        at = self._at
        if len(self._frame) < at + n_bytes:
            raise self.short(what, n_bytes)
        self._at = at + n_bytes
        return self._frame[at : at + n_bytes]

    def rest(self) -> memoryview:
        """Take everything that is left."""
        rest = memoryview(self._frame)[self._at :]
        self._at = len(self._frame)
        return rest

    def short(self, what: str, n_bytes: int) -> WireError:
        left = len(self._frame) - self._at
        return WireError(f"{self._kind.name.lower()}: {what}: expected {n_bytes} bytes, got {left}")

    def finish(self) -> None:
        if self._at != len(self._frame):
            left = len(self._frame) - self._at
            raise WireError(f"{self._kind.name.lower()}: {left} bytes follow the last column")


def _count(kind: Kind, what: str, n: int, at_least: int = 1) -> None:
    if not at_least <= n <= MAX_QUERIES:
        raise WireError(f"{kind.name.lower()}: {what}: expected {at_least} to {MAX_QUERIES}, got {n}")


def _check_n_frames(kind: Kind, frames: Sequence[Buffer], expected: int) -> None:
    if len(frames) != expected:
        raise WireError(f"{kind.name.lower()}: expected {expected} frames, got {len(frames)}")


def _decode_queries(frames: Sequence[Buffer], flags: int) -> Queries:
    """Decode QUERIES; the usual ones, small, uniform and without options, in a few steps."""
    frame = frames[0]
    if flags == _FLAG_GATHERED and len(frames) == 1 and len(frame) > _QUERIES_AT:
        epoch, sent_ns, n, payload_bytes = _QUERIES.unpack_from(frame, _PRELUDE.size)
        middle, end = _QUERIES_AT + 8 * n, _QUERIES_AT + 16 * n
        if 0 < n <= MAX_QUERIES and len(frame) == end + n * payload_bytes:
            slacks = frame[middle:end]
            _check_slacks(n, slacks)
            payloads = [memoryview(frame)[end:]]
            return Queries(epoch, sent_ns, n, frame[_QUERIES_AT:middle], slacks, payload_bytes, payloads)
    return _decode_any_queries(frames, flags)


def _check_slacks(n: int, slacks: Buffer) -> None:
    if n == 1:
        (least,) = (most,) = _I64.unpack(slacks)
    else:
        slack_ns = _int64s(slacks)
        least, most = min(slack_ns), max(slack_ns)
    if most > MAX_SLACK_NS or least < -MAX_SLACK_NS:
        raise WireError("queries: slacks: expected at most a day, in nanoseconds")


def _decode_any_queries(frames: Sequence[Buffer], flags: int) -> Queries:
    kind = Kind.QUERIES
    reader = _Reader(frames[0], kind)
    epoch, sent_ns, n, payload_bytes = reader.unpack(_QUERIES, "header")
    _count(kind, "n", n)
    ids = reader.take(8 * n, "ids")
    slacks = reader.take(8 * n, "slacks")
    min_accuracy = reader.take(4 * n, "min_accuracy") if flags & _FLAG_MIN_ACCURACY else None
    priority = reader.take(n, "priority") if flags & _FLAG_PRIORITY else None
    lengths = reader.take(4 * n, "lengths") if flags & _FLAG_LENGTHS else None
    if (payload_bytes == VARIED) != (lengths is not None):
        raise WireError("queries: payload_bytes: VARIED and the column of lengths go together")
    _check_slacks(n, slacks)
    framed = bool(flags & _FLAG_FRAMES)
    sizes = _lengths(n, payload_bytes, lengths) if framed else [_size(n, payload_bytes, lengths)]
    payloads = _split(kind, frames, flags, sizes, reader)
    resubmitted = bool(flags & _FLAG_RESUBMITTED)
    return Queries(
        epoch,
        sent_ns,
        n,
        ids,
        slacks,
        payload_bytes,
        payloads,
        framed,
        lengths,
        min_accuracy,
        priority,
        resubmitted,
    )


def _size(count: int, each: int, lengths: Buffer | None) -> int:
    """Return the bytes of `count` payloads or outputs end to end."""
    return count * each if lengths is None else sum(memoryview(lengths).cast("I"))


def _split(
    kind: Kind, frames: Sequence[Buffer], flags: int, sizes: list[int], reader: _Reader
) -> Sequence[Buffer]:
    """Return the buffers behind the columns, each of its size, from frames of their own or frame 0."""
    if not flags & _FLAG_GATHERED:
        reader.finish()
        _check_n_frames(kind, frames, 1 + len(sizes))
        for i, size in enumerate(sizes, start=1):
            if len(frames[i]) != size:
                raise _wrong_size(kind, i, size, len(frames[i]))
        return frames[1:]
    _check_n_frames(kind, frames, 1)
    view = reader.rest()
    if len(view) != sum(sizes):
        raise _wrong_size(kind, 0, sum(sizes), len(view))
    if len(sizes) == 1:
        return [view]
    buffers = []
    at = 0
    for size in sizes:
        buffers.append(view[at : at + size])
        at += size
    return buffers


def _wrong_size(kind: Kind, frame: int, expected: int, got: int) -> WireError:
    return WireError(f"{kind.name.lower()}: frame {frame}: expected {expected} bytes, got {got}")


def _decode_results(frames: Sequence[Buffer], flags: int) -> Results:
    kind = Kind.RESULTS
    reader = _Reader(frames[0], kind)
    epoch, n, n_groups = reader.unpack(_RESULTS, "header")
    _count(kind, "n", n)
    _count(kind, "n_groups", n_groups)
    rows = reader.rows(_GROUP, n_groups, "groups")
    if sum([row[0] for row in rows]) != n:
        raise WireError(f"results: groups: their counts do not sum to n = {n}")
    columns = [reader.take(8 * row[0], "ids") for row in rows]
    queued_of = _optional(reader, rows, flags & _FLAG_QUEUED, "queued")
    lengths_of = _optional(reader, rows, flags & _FLAG_LENGTHS, "lengths")
    sizes = []
    for i, row in enumerate(rows):
        count, status, each = row[0], row[1], row[-1]
        if count == 0 or status >= len(STATUSES):
            raise WireError(f"results: group: count {count}, status {status}")
        if each != VARIED:
            lengths_of[i] = None
        elif lengths_of[i] is None:
            raise WireError("results: output_bytes: VARIED without the column of lengths")
        is_shared = status > Status.LATE and each != VARIED
        sizes.append(each if is_shared else _size(count, each, lengths_of[i]))
    outputs = _split(kind, frames, flags, sizes, reader)
    groups = []
    for row, ids, output, lengths, queued in zip(rows, columns, outputs, lengths_of, queued_of, strict=True):
        count, status, subnet, batch_size, accuracy, *durations, each = row
        queued_ns, to_start_ns, executing_ns, returning_ns = durations
        groups.append(
            Group(
                count, status, subnet, batch_size, accuracy, queued_ns, to_start_ns, executing_ns,
                returning_ns, ids, each, output, lengths, queued,
            )
        )  # fmt: skip
    return Results(epoch, groups)


def _optional(reader: _Reader, rows: list[tuple[Any, ...]], is_there: int, what: str) -> list[Buffer | None]:
    """Return a column of u32 split by the rows' counts, or as many Nones."""
    if not is_there:
        return [None] * len(rows)
    return [reader.take(4 * row[0], what) for row in rows]


def _decode_cancel(frames: Sequence[Buffer], _flags: int) -> Cancel:
    reader = _Reader(frames[0], Kind.CANCEL)
    epoch, n = reader.unpack(_COUNTED, "header")
    _count(Kind.CANCEL, "n", n)
    ids = reader.take(8 * n, "ids")
    reader.finish()
    _check_n_frames(Kind.CANCEL, frames, 1)
    return Cancel(epoch, n, ids)


def _decode_pull(frames: Sequence[Buffer], _flags: int) -> Pull:
    reader = _Reader(frames[0], Kind.PULL)
    epoch, n = reader.unpack(_COUNTED, "header")
    _count(Kind.PULL, "n_rows", n)
    rows = [PullRow(*row) for row in reader.rows(_PULL_ROW, n, "rows")]
    reader.finish()
    _check_n_frames(Kind.PULL, frames, 1)
    return Pull(epoch, rows)


def _decode_directive(frames: Sequence[Buffer], flags: int) -> Directive:
    kind = Kind.DIRECTIVE
    reader = _Reader(frames[0], kind)
    epoch, batch_id, slot, subnet, n, n_segments = reader.unpack(_DIRECTIVE, "header")
    _count(kind, "n", n)
    _count(kind, "n_segments", n_segments)
    rows = reader.rows(_SEGMENT, n_segments, "segments")
    if sum([row[0] for row in rows]) != n:
        raise WireError(f"directive: segments: their counts do not sum to n = {n}")
    ids = [reader.take(8 * row[0], "ids") for row in rows]
    slacks = [reader.take(8 * row[0], "slacks") for row in rows]
    lengths = _optional(reader, rows, flags & _FLAG_LENGTHS, "lengths")
    sizes: list[int] = []
    for i, (count, each, packed, _) in enumerate(rows):
        if count == 0 or packed > 1:
            raise WireError(f"directive: segment {i}: count {count}, packed {packed}")
        if each != VARIED:
            lengths[i] = None
        elif lengths[i] is None:
            raise WireError(f"directive: segment {i}: VARIED without the column of lengths")
        if packed:
            sizes.append(_size(count, each, lengths[i]))
        else:
            sizes.extend(_lengths(count, each, lengths[i]))
    payloads = _split(kind, frames, flags, sizes, reader)
    segments = []
    at = 0
    for i, (count, each, packed, elapsed_ns) in enumerate(rows):
        end = at + (1 if packed else count)
        segments.append(
            Segment(count, each, bool(packed), elapsed_ns, ids[i], slacks[i], payloads[at:end], lengths[i])
        )
        at = end
    return Directive(epoch, batch_id, slot, subnet, n, segments)


def _decode_done(frames: Sequence[Buffer], flags: int) -> Done:
    kind = Kind.DONE
    reader = _Reader(frames[0], kind)
    epoch, n_rows = reader.unpack(_COUNTED, "header")
    _count(kind, "n_rows", n_rows)
    fixed = reader.rows(_DONE_ROW, n_rows, "rows")
    rows, sizes = [], []
    for row in fixed:
        batch_id, slot, credit, held, row_flags, n, each, waited, executing, last_batch, *running = row
        _count(kind, "row: n", n)
        if waited < 0 or executing < 0:
            raise WireError(f"done: batch {batch_id}: a duration below 0: {waited} or {executing} ns")
        statuses = reader.take(n, "statuses") if row_flags & _ROW_MIXED else None
        if statuses is not None and max(statuses) >= len(STATUSES):
            raise WireError(f"done: batch {batch_id}: statuses: unknown status {max(statuses)}")
        lengths = reader.take(4 * n, "lengths") if each == VARIED else None
        sizes.append(_size(n, each, lengths))
        rows.append(
            DoneRow(
                batch_id, slot, credit, held, n, waited, executing, last_batch, running[0], running[1], each,
                b"", statuses, lengths,
            )
        )  # fmt: skip
    for done_row, output in zip(rows, _split(kind, frames, flags, sizes, reader), strict=True):
        done_row.output = output
    return Done(epoch, rows)


def _decode_ping(frames: Sequence[Buffer], _flags: int) -> Ping:
    reader = _Reader(frames[0], Kind.PING)
    (stamp_ns,) = reader.unpack(_STAMP, "stamp")
    reader.finish()
    _check_n_frames(Kind.PING, frames, 1)
    return Ping(stamp_ns)


def _decode_pong(frames: Sequence[Buffer], _flags: int) -> Pong:
    reader = _Reader(frames[0], Kind.PONG)
    stamp_ns, own_ns = reader.unpack(_STAMPS, "stamps")
    reader.finish()
    _check_n_frames(Kind.PONG, frames, 1)
    return Pong(stamp_ns, own_ns)


def _decode_control(kind: Kind, frames: Sequence[Buffer]) -> Control:
    if len(frames[0]) != _PRELUDE.size:
        raise WireError(f"{kind.name.lower()}: bytes follow the prelude")
    _check_n_frames(kind, frames, 2)
    if len(frames[1]) > MAX_JSON_BYTES:
        raise WireError(f"{kind.name.lower()}: expected at most {MAX_JSON_BYTES} bytes of JSON")
    try:
        body = orjson.loads(memoryview(frames[1]))  # which may be ZeroMQ's own object
    except orjson.JSONDecodeError as error:
        raise WireError(f"{kind.name.lower()}: expected JSON: {error}") from error
    if not isinstance(body, dict):
        raise WireError(f"{kind.name.lower()}: expected a JSON object, got {type(body).__name__}")
    return Control(kind, body)


_DECODERS: dict[int, Callable[[Sequence[Buffer], int], Message]] = {
    Kind.QUERIES: _decode_queries,
    Kind.RESULTS: _decode_results,
    Kind.CANCEL: _decode_cancel,
    Kind.PULL: _decode_pull,
    Kind.DIRECTIVE: _decode_directive,
    Kind.DONE: _decode_done,
    Kind.PING: _decode_ping,
    Kind.PONG: _decode_pong,
}


def decode(frames: Sequence[Buffer]) -> Message:
    """Return the message in `frames`; columns are slices of frame 0, payloads the frames themselves.

    Raises:
        WireError: The frames do not follow the protocol. Nothing else is ever raised.
    """
    if not frames or len(frames[0]) < _PRELUDE.size:
        raise WireError("prelude: the message is too short")
    if len(frames) == 1 and bytes(frames[0][: _PRELUDE.size]) == _PLAIN_QUERIES:
        return _decode_queries(frames, _FLAG_GATHERED)
    magic, version, number, flags = _PRELUDE.unpack_from(frames[0])
    if magic != MAGIC:
        raise WireError(f"magic: expected {MAGIC!r}, got {bytes(magic)!r}")
    if version != VERSION:
        raise WireError(f"version: expected {VERSION}, got {version}")
    if len(frames) > MAX_FRAMES:
        raise WireError(f"expected at most {MAX_FRAMES} frames, got {len(frames)}")
    decoder = _DECODERS.get(number)
    if decoder is not None:
        return decoder(frames, flags)
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError(f"kind: unknown kind {number}") from None
    return _decode_control(kind, frames)
