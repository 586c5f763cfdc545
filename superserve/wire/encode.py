"""Messages to frames: one encoder for each kind."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import orjson

from superserve.errors import WireError
from superserve.wire import layout
from superserve.wire.layout import (
    CONTROL_KINDS,
    DIRECTIVE,
    DONE,
    DONE_ROW,
    EXTENDED,
    FRAMES,
    GATHER_BYTES,
    GATHERED,
    GROUP,
    HIGHEST,
    LENGTHS,
    MAGIC,
    MIN_ACCURACY,
    PRELUDE,
    PRIORITY,
    PULL,
    PULL_ROW,
    QUERIES,
    QUEUED,
    RESUBMITTED,
    ROW_MIXED,
    SEGMENT,
    Kind,
    Status,
)
from superserve.wire.messages import (
    Cancel,
    Control,
    Directive,
    Done,
    DoneRow,
    Ping,
    Pong,
    Pull,
    PullRow,
    Queries,
    Results,
    queued_us_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from superserve.wire.layout import Buffer
    from superserve.wire.messages import Group, Message, SharedPayloads


def _preludes(kind: Kind) -> tuple[bytes, ...]:
    """Return the preludes of a kind, by flags: packing one costs as much as ten look-ups."""
    n_bytes = layout.HEADERS[kind].size
    return tuple(PRELUDE.pack(MAGIC, HIGHEST, kind, flags, n_bytes) for flags in range(2 * EXTENDED))


_QUERIES = _preludes(Kind.QUERIES)
_RESULTS = _preludes(Kind.RESULTS)
_CANCEL = _preludes(Kind.CANCEL)[0]
_PULL = _preludes(Kind.PULL)[0]
_DIRECTIVE = _preludes(Kind.DIRECTIVE)
_DONE = _preludes(Kind.DONE)
_PING = _preludes(Kind.PING)[0]
_PONG = _preludes(Kind.PONG)[0]
_PRICED_PONG = PRELUDE.pack(MAGIC, HIGHEST, Kind.PONG, 0, layout.PRICED_PONG.size)
_RESULTS_OF_ONE = layout.RESULTS_OF_ONE.pack
_RESULTS_GATHERED = _RESULTS[GATHERED]
_RESULTS_HEADER = layout.RESULTS.pack
_GROUP = GROUP.pack
_GROUP_BYTES = GROUP.size
# The fields that a row's fixed part holds, in its order, which is the dataclass's own.
_PULL_FIELDS = attrgetter(*[field.name for field in fields(PullRow)])
_DONE_NAMES = [field.name for field in fields(DoneRow)]
_DONE_FIELDS = attrgetter(*_DONE_NAMES[: _DONE_NAMES.index("output")])
_LATE = int(Status.LATE)  # an IntEnum compares at half the speed


def _frames(
    preludes: Sequence[bytes], flags: int, parts: Sequence[Buffer], buffers: Sequence[Buffer]
) -> list[Buffer]:
    """Return frame 0 of header and columns, then the buffers: inside it if they are small, else after it."""
    n_bytes = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
    if n_bytes < GATHER_BYTES:
        return [b"".join((preludes[flags | GATHERED], *parts, *buffers))]
    return [b"".join((preludes[flags], *parts)), *buffers]


def _extensions(columns: Sequence[tuple[int, Buffer]]) -> bytes:
    """Return extension columns, each with its tag."""
    parts: list[Buffer] = []
    for tag, column in columns:
        parts += [layout.EXTENSION.pack(tag, len(column)), column]
    return b"".join((layout.U32.pack(sum(map(len, parts))), *parts))


def _shared_column(shared: Sequence[tuple[int, SharedPayloads]]) -> bytes:
    """Return the column with the places of payloads, by segment; QUERIES are one segment."""
    parts: list[Buffer] = []
    for i, one in shared:
        parts += [layout.SHARED_OF.pack(i, one.memory), one.places]
    return b"".join(parts)


def encode_queries(message: Queries) -> list[Buffer]:
    """Return the frames of a QUERIES message."""
    flags = FRAMES if message.framed else 0
    parts: list[Buffer] = [
        QUERIES.pack(message.epoch, message.sent_ns, message.n, message.payload_bytes),
        message.ids,
        message.slacks,
    ]
    if message.min_accuracy is not None:
        flags |= MIN_ACCURACY
        parts.append(message.min_accuracy)
    if message.priority is not None:
        flags |= PRIORITY
        parts.append(message.priority)
    if message.lengths is not None:
        flags |= LENGTHS
        parts.append(message.lengths)
    if message.resubmitted:
        flags |= RESUBMITTED
    if message.shared is not None or message.traced is not None:
        flags |= EXTENDED
        columns: list[tuple[int, Buffer]] = []
        if message.shared is not None:
            columns.append((layout.TAG_SHARED, _shared_column(((0, message.shared),))))
        if message.traced is not None:
            columns.append((layout.TAG_TRACED, message.traced))
        parts.append(_extensions(columns))
    return _frames(_QUERIES, flags, parts, message.payloads)


def encode_results(message: Results) -> list[Buffer]:
    """Return the frames of a RESULTS message.

    A router sends one for nearly every batch, mostly with one group. That case builds no list of one
    element, which would cost a third more.
    """
    groups = message.groups
    flags = n = n_bytes = 0
    parts: list[Buffer] = [b"", b""]
    for g in groups:
        n += g.count
        output = g.output
        n_bytes += len(output)
        if g.queued_us is not None:
            flags |= QUEUED
        if g.lengths is not None:
            flags |= LENGTHS
        # Queries without output share one reason, so its length is the whole text's.
        is_each = g.status <= _LATE or g.lengths is not None
        parts.append(
            _GROUP(
                g.count, g.status, g.subnet, g.batch_size, g.accuracy,
                g.queued_ns, g.to_start_ns, g.executing_ns, g.returning_ns,
                g.output_bytes if is_each else len(output),
            )
        )  # fmt: skip
    parts[1] = _RESULTS_HEADER(message.epoch, n, len(groups), _GROUP_BYTES)
    is_one = len(groups) == 1
    if is_one:
        parts.append(g.ids)
    else:
        parts += [g.ids for g in groups]
    if flags:
        parts += _group_columns(groups, flags)
    if n_bytes >= GATHER_BYTES:
        parts[0] = _RESULTS[flags]
        return [b"".join(parts), *[g.output for g in groups]]
    parts[0] = _RESULTS[flags | GATHERED]
    if is_one:
        parts.append(output)
    else:
        parts += [g.output for g in groups]
    return [b"".join(parts)]


def encode_outputs(
    epoch: int, count: int, status: int, subnet: int, batch_size: int, accuracy: float, queued_ns: int,
    to_start_ns: int, executing_ns: int, returning_ns: int, ids: Buffer, each: int, output: Buffer,
) -> list[Buffer]:  # fmt: skip
    """Return the frames of a RESULTS message with one group of small outputs, all of `each` bytes.

    Most callers have one query at a time, and get this: it costs half of `encode_results`, whose group and
    message need not be made first. `output` is shorter than `GATHER_BYTES`.
    """
    packed = _RESULTS_OF_ONE(
        epoch, count, 1, _GROUP_BYTES, count, status, subnet, batch_size, accuracy,
        queued_ns, to_start_ns, executing_ns, returning_ns, each,
    )  # fmt: skip
    return [b"".join((_RESULTS_GATHERED, packed, ids, output))]


def _group_columns(groups: Sequence[Group], flags: int) -> list[Buffer]:
    """Return the columns that at least one group has, for all groups."""
    columns: list[Buffer] = []
    if flags & QUEUED:
        columns += [queued_us_of(g) for g in groups]
    if flags & LENGTHS:
        columns += [bytes(4 * g.count) if g.lengths is None else g.lengths for g in groups]
    return columns


def encode_cancel(message: Cancel) -> list[Buffer]:
    """Return the frames of a CANCEL message."""
    return [b"".join((_CANCEL, layout.CANCEL.pack(message.epoch, message.n), message.ids))]


def encode_pull(message: Pull) -> list[Buffer]:
    """Return the frames of a PULL message."""
    parts = [_PULL, PULL.pack(message.epoch, len(message.rows), PULL_ROW.size)]
    parts += [PULL_ROW.pack(*_PULL_FIELDS(row)) for row in message.rows]
    return [b"".join(parts)]


def encode_directive(message: Directive) -> list[Buffer]:
    """Return the frames of a DIRECTIVE message."""
    segments = message.segments
    flags = 0
    pack = SEGMENT.pack
    parts: list[Buffer] = [
        DIRECTIVE.pack(
            message.epoch, message.batch_id, message.slot, message.subnet, message.n, len(segments),
            SEGMENT.size,
        )
    ]  # fmt: skip
    parts += [pack(s.count, s.payload_bytes, s.packed, s.elapsed_ns) for s in segments]
    parts += [s.ids for s in segments]
    parts += [s.slacks for s in segments]
    lengths = [s.lengths for s in segments]
    if lengths.count(None) < len(lengths):
        flags |= LENGTHS
        parts += [bytes(4 * s.count) if s.lengths is None else s.lengths for s in segments]
    payloads = [payload for s in segments for payload in s.payloads]
    for s in segments:  # faster than a list of them, when there is nothing to find
        if s.shared is not None:
            flags |= EXTENDED
            column = _shared_column([(i, s.shared) for i, s in enumerate(segments) if s.shared])
            parts.append(_extensions(((layout.TAG_SHARED, column),)))
            break
    return _frames(_DIRECTIVE, flags, parts, payloads)


def encode_done(message: Done) -> list[Buffer]:
    """Return the frames of a DONE message."""
    rows = message.rows
    parts: list[Buffer] = [DONE.pack(message.epoch, len(rows), DONE_ROW.size)]
    parts += [DONE_ROW.pack(*_DONE_FIELDS(r), 0 if r.statuses is None else ROW_MIXED) for r in rows]
    for r in rows:
        if r.statuses is not None:
            parts.append(r.statuses)
        if r.lengths is not None:
            parts.append(r.lengths)
    return _frames(_DONE, 0, parts, [r.output for r in rows])


def encode_ping(message: Ping) -> list[Buffer]:
    """Return the frames of a PING."""
    return [_PING + layout.PING.pack(message.stamp_ns)]


def encode_pong(message: Pong) -> list[Buffer]:
    """Return the frames of a PONG."""
    if message.price is not None:
        return [_PRICED_PONG + layout.PRICED_PONG.pack(message.stamp_ns, message.own_ns, message.price)]
    return [_PONG + layout.PONG.pack(message.stamp_ns, message.own_ns)]


def encode_control(message: Control) -> list[Buffer]:
    """Return the frames of a HELLO, WELCOME, DRAIN, BYE, STATUS, REFUSED or SHARE.

    Raises:
        WireError: It is of another kind.
    """
    if message.kind not in CONTROL_KINDS:
        raise WireError(f"kind: expected a control kind, got {message.kind.name}")
    prelude = PRELUDE.pack(MAGIC, message.version, message.kind, 0, 0)
    return [prelude, orjson.dumps(message.body, option=orjson.OPT_SERIALIZE_NUMPY)]


_ENCODERS: dict[type, Callable[[Any], list[Buffer]]] = {
    Queries: encode_queries, Results: encode_results, Cancel: encode_cancel, Pull: encode_pull,
    Directive: encode_directive, Done: encode_done, Ping: encode_ping, Pong: encode_pong,
    Control: encode_control,
}  # fmt: skip


def encode(message: Message) -> list[Buffer]:
    """Return the frames of any message except a load generator's."""
    return _ENCODERS[type(message)](message)
