"""Frames to messages: one decoder for each kind.

Each length is checked before anything is read, so a mangled message raises WireError, never an exception
from struct or NumPy. Additions of later releases are skipped: headers, rows, and columns after the known
ones carry their length.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import orjson

from superserve.errors import VersionError, WireError
from superserve.wire import layout
from superserve.wire.layout import (
    CONTROL_KINDS,
    DIRECTIVE,
    DONE_ROW,
    EXTENDED,
    EXTENSION,
    FRAMES,
    GATHERED,
    GREETINGS,
    GROUP,
    HEADERS,
    HIGHEST,
    LENGTHS,
    LOWEST,
    MAGIC,
    MAX_EXTENSIONS,
    MAX_FRAMES,
    MAX_JSON_BYTES,
    MAX_QUERIES,
    MAX_SLACK_NS,
    MIN_ACCURACY,
    PLACE,
    PRELUDE,
    PRELUDE_KEYED,
    PRIORITY,
    PULL_ROW,
    QUERIES,
    QUEUED,
    RESUBMITTED,
    ROW_MIXED,
    RUN_KINDS,
    SEGMENT,
    SHARED_OF,
    STATUSES,
    TAG_SHARED,
    TAG_TRACED,
    TRACED,
    U32,
    VARIED,
    Kind,
    Status,
    key_of,
)
from superserve.wire.messages import (
    Cancel,
    Control,
    Directive,
    Done,
    DoneRow,
    Group,
    Ping,
    Pong,
    Pull,
    PullRow,
    Queries,
    Results,
    Segment,
    SharedPayloads,
    int64s,
    lengths_of,
)
from superserve.wire.versions import agreed

if TYPE_CHECKING:
    import struct
    from collections.abc import Callable, Sequence

    from superserve.wire.layout import Buffer
    from superserve.wire.messages import Message

_PRELUDE_BYTES = PRELUDE.size
_LATE = int(Status.LATE)  # an IntEnum compares at half the speed


def _short(kind: Kind, what: str, n_bytes: int, left: int) -> WireError:
    return WireError(f"{kind.name.lower()}: {what}: expected {n_bytes} bytes, got {max(0, left)}")


def _take(kind: Kind, frame: Buffer, at: int, n_bytes: int, what: str) -> Buffer:
    """Return the next `n_bytes` of frame 0."""
    if len(frame) < at + n_bytes:
        raise _short(kind, what, n_bytes, len(frame) - at)
    return frame[at : at + n_bytes]


def _rows(
    kind: Kind, frame: Buffer, at: int, fixed: struct.Struct, n: int, row_bytes: int
) -> tuple[list[tuple[Any, ...]], int]:
    """Return the known fields of n rows, and where the rows end."""
    if row_bytes < fixed.size:
        raise WireError(f"{kind.name.lower()}: row_bytes: expected {fixed.size} or more, got {row_bytes}")
    end = at + n * row_bytes
    if len(frame) < end:
        raise _short(kind, "rows", n * row_bytes, len(frame) - at)
    unpack = fixed.unpack_from
    return [unpack(frame, row) for row in range(at, end, row_bytes)], end


def _check_count(kind: Kind, what: str, n: int) -> None:
    if not 1 <= n <= MAX_QUERIES:
        raise WireError(f"{kind.name.lower()}: {what}: expected 1 to {MAX_QUERIES}, got {n}")


def _check_n_frames(kind: Kind, frames: Sequence[Buffer], expected: int) -> None:
    if len(frames) != expected:
        raise WireError(f"{kind.name.lower()}: expected {expected} frames, got {len(frames)}")


def _wrong_size(kind: Kind, frame: int, expected: int, got: int) -> WireError:
    return WireError(f"{kind.name.lower()}: frame {frame}: expected {expected} bytes, got {got}")


def _size(count: int, each: int, lengths: Buffer | None) -> int:
    """Return the total bytes of `count` payloads or outputs."""
    return count * each if lengths is None else sum(memoryview(lengths).cast("I"))


def _end(kind: Kind, frames: Sequence[Buffer], flags: int, at: int, n_frames: int = 1) -> None:
    """Check that only extension columns are left in frame 0, and check the number of frames."""
    if flags & EXTENDED:
        at = _skip_extensions(kind, frames[0], at)
    if len(frames[0]) != at:
        raise WireError(f"{kind.name.lower()}: {len(frames[0]) - at} bytes follow the last column")
    _check_n_frames(kind, frames, n_frames)


def _buffers(
    kind: Kind, frames: Sequence[Buffer], flags: int, at: int, sizes: Sequence[int]
) -> Sequence[Buffer]:
    """Return the buffers after the columns, with these sizes: from their own frames, or from frame 0."""
    if not flags & GATHERED:
        _end(kind, frames, flags, at, 1 + len(sizes))
        for i, size in enumerate(sizes, start=1):
            if len(frames[i]) != size:
                raise _wrong_size(kind, i, size, len(frames[i]))
        return frames[1:]
    frame = frames[0]
    if flags & EXTENDED:
        at = _skip_extensions(kind, frame, at)
    if len(frames) != 1:
        _check_n_frames(kind, frames, 1)
    n_left = len(frame) - at
    if n_left != (sizes[0] if len(sizes) == 1 else sum(sizes)):
        raise _wrong_size(kind, 0, sum(sizes), n_left)
    if len(sizes) == 1:  # most messages: no loop
        return [memoryview(frame)[at:]]
    view = memoryview(frame)
    buffers = []
    for size in sizes:
        buffers.append(view[at : at + size])
        at += size
    return buffers


def _skip_extensions(kind: Kind, frame: Buffer, at: int) -> int:
    """Return where the extension columns at `at` end."""
    return _extensions(kind, frame, at)[0]


def _extensions(kind: Kind, frame: Buffer, at: int) -> tuple[int, dict[int, Buffer]]:
    """Return where the extension columns at `at` end, and the columns by tag."""
    columns: dict[int, Buffer] = {}
    (n_bytes,) = U32.unpack(_take(kind, frame, at, U32.size, "extensions"))
    at += U32.size
    end = at + n_bytes
    if len(frame) < end:
        raise _short(kind, "extensions", n_bytes, len(frame) - at)
    n_columns = 0
    while at < end:
        n_columns += 1
        if n_columns > MAX_EXTENSIONS:
            raise WireError(f"{kind.name.lower()}: expected at most {MAX_EXTENSIONS} extension columns")
        tag, n_bytes = EXTENSION.unpack(_take(kind, frame, at, EXTENSION.size, "extension"))
        at += EXTENSION.size + n_bytes
        columns[tag] = frame[at - n_bytes : at]
    if at > end:
        raise WireError(f"{kind.name.lower()}: extension: the last is {at - end} bytes too long")
    return at, columns


def _shared(kind: Kind, column: Buffer, counts: Sequence[int]) -> dict[int, SharedPayloads]:
    """Return where the payloads of segments lie that are not in frames, by segment; QUERIES are one."""
    found: dict[int, SharedPayloads] = {}
    start = 0
    while start < len(column):
        if len(column) < start + SHARED_OF.size:
            raise _short(kind, "shared", SHARED_OF.size, len(column) - start)
        segment, memory = SHARED_OF.unpack_from(column, start)
        start += SHARED_OF.size
        if segment >= len(counts) or segment in found:
            raise WireError(f"{kind.name.lower()}: shared: segment {segment}: expected each once")
        end = start + PLACE.size * counts[segment]
        if len(column) < end:
            raise _short(kind, "shared", end - start, len(column) - start)
        found[segment] = SharedPayloads(memory, column[start:end])
        start = end
    return found


def _traced(column: Buffer, n: int) -> Buffer:
    """Return the column with the trace contexts of some of n queries."""
    if len(column) % TRACED.size:
        raise WireError(f"queries: traced: expected rows of {TRACED.size} bytes, got {len(column)} bytes")
    last = -1
    for index, _ in TRACED.iter_unpack(column):
        if not last < index < n:
            raise WireError(f"queries: traced: expected ascending indices below {n}, got {index}")
        last = index
    return column


# --- one for each kind: `at` is where its header ends ----------------------------------------


def _decode_queries(frames: Sequence[Buffer], flags: int, at: int) -> Queries:
    frame = frames[0]
    epoch, sent_ns, n, payload_bytes = QUERIES.unpack_from(frame, _PRELUDE_BYTES)
    if not 1 <= n <= MAX_QUERIES:
        _check_count(Kind.QUERIES, "n", n)
    middle, end = at + 8 * n, at + 16 * n
    if len(frame) < end:
        raise _short(Kind.QUERIES, "ids and slacks", 16 * n, len(frame) - at)
    ids, slacks = frame[at:middle], frame[middle:end]
    _check_slacks(n, slacks)
    if flags == GATHERED and payload_bytes != VARIED:  # the usual message, without any option below
        size = n * payload_bytes
        if len(frames) == 1 and len(frame) == end + size:
            return Queries(epoch, sent_ns, n, ids, slacks, payload_bytes, [memoryview(frame)[end:]])
    return _optional_queries(frames, flags, end, Queries(epoch, sent_ns, n, ids, slacks, payload_bytes, ()))


def _check_slacks(n: int, slacks: Buffer) -> None:
    if n == 1:  # single queries are frequent, and unpacking one number beats making a list
        (least,) = (most,) = layout.I64.unpack(slacks)
    else:
        slack_ns = int64s(slacks)
        least, most = min(slack_ns), max(slack_ns)
    if most > MAX_SLACK_NS or least < -MAX_SLACK_NS:
        raise WireError("queries: slacks: expected at most a day, in nanoseconds")


def _optional_queries(frames: Sequence[Buffer], flags: int, at: int, message: Queries) -> Queries:
    """Return the message with its optional columns, from `at` on, and its payloads."""
    kind, frame, n = Kind.QUERIES, frames[0], message.n
    if flags & MIN_ACCURACY:
        message.min_accuracy = _take(kind, frame, at, 4 * n, "min_accuracy")
        at += 4 * n
    if flags & PRIORITY:
        message.priority = _take(kind, frame, at, n, "priority")
        at += n
    if flags & LENGTHS:
        message.lengths = _take(kind, frame, at, 4 * n, "lengths")
        at += 4 * n
    each, lengths = message.payload_bytes, message.lengths
    if (each == VARIED) != (lengths is not None):
        raise WireError("queries: payload_bytes: VARIED and the column of lengths go together")
    message.framed = bool(flags & FRAMES)
    message.resubmitted = bool(flags & RESUBMITTED)
    sizes: Sequence[int] = lengths_of(n, each, lengths) if message.framed else (_size(n, each, lengths),)
    if flags & EXTENDED:
        columns = _extensions(kind, frame, at)[1]
        if shared := _shared(kind, columns.get(TAG_SHARED, b""), (n,)):
            message.shared, message.framed, sizes = shared[0], True, ()
        if TAG_TRACED in columns:
            message.traced = _traced(columns[TAG_TRACED], n)
    message.payloads = _buffers(kind, frames, flags, at, sizes)
    return message


def _decode_results(frames: Sequence[Buffer], flags: int, at: int) -> Results:
    kind, frame = Kind.RESULTS, frames[0]
    epoch, n, n_groups, row_bytes = layout.RESULTS.unpack_from(frame, _PRELUDE_BYTES)
    _check_count(kind, "n", n)
    _check_count(kind, "n_groups", n_groups)
    rows, at = _rows(kind, frame, at, GROUP, n_groups, row_bytes)
    if sum([row[0] for row in rows]) != n:
        raise WireError(f"results: groups: their counts do not sum to n = {n}")
    ids, at = _column(kind, frame, at, rows, 8, "ids")
    queued_of, at = _column(kind, frame, at, rows, 4 if flags & QUEUED else 0, "queued")
    lengths_of_all, at = _column(kind, frame, at, rows, 4 if flags & LENGTHS else 0, "lengths")
    groups, sizes = [], []
    for i, row in enumerate(rows):
        count, status, each = row[0], row[1], row[-1]
        if count == 0 or status >= len(STATUSES):
            raise WireError(f"results: group: count {count}, status {status}")
        lengths = lengths_of_all[i] if each == VARIED else None
        if each == VARIED and lengths is None:
            raise WireError("results: output_bytes: VARIED without the column of lengths")
        is_shared = status > _LATE and lengths is None  # one reason for the whole group
        sizes.append(each if is_shared else _size(count, each, lengths))
        groups.append(Group(*(*row[:-1], ids[i], each, b"", lengths, queued_of[i])))
    for group, output in zip(groups, _buffers(kind, frames, flags, at, sizes), strict=True):
        group.output = output
    return Results(epoch, groups)


def _column(
    kind: Kind, frame: Buffer, at: int, rows: list[tuple[Any, ...]], n_bytes: int, what: str
) -> tuple[list[Any], int]:
    """Return a column of `n_bytes` an entry, split by the rows' counts, and where it ends.

    0 bytes means that the column is absent: each row gets None.
    """
    if not n_bytes:
        return [None] * len(rows), at
    parts = []
    start = at
    for row in rows:
        end = at + n_bytes * row[0]
        parts.append(frame[at:end])
        at = end
    if len(frame) < at:
        raise _short(kind, what, at - start, len(frame) - start)
    return parts, at


def _decode_cancel(frames: Sequence[Buffer], flags: int, at: int) -> Cancel:
    epoch, n = layout.CANCEL.unpack_from(frames[0], _PRELUDE_BYTES)
    _check_count(Kind.CANCEL, "n", n)
    ids = _take(Kind.CANCEL, frames[0], at, 8 * n, "ids")
    _end(Kind.CANCEL, frames, flags, at + 8 * n)
    return Cancel(epoch, n, ids)


def _decode_pull(frames: Sequence[Buffer], flags: int, at: int) -> Pull:
    epoch, n, row_bytes = layout.PULL.unpack_from(frames[0], _PRELUDE_BYTES)
    _check_count(Kind.PULL, "n_rows", n)
    rows, at = _rows(Kind.PULL, frames[0], at, PULL_ROW, n, row_bytes)
    _end(Kind.PULL, frames, flags, at)
    return Pull(epoch, [PullRow(*row) for row in rows])


def _decode_directive(frames: Sequence[Buffer], flags: int, at: int) -> Directive:
    kind, frame = Kind.DIRECTIVE, frames[0]
    epoch, batch_id, slot, subnet, n, n_segments, row_bytes = DIRECTIVE.unpack_from(frame, _PRELUDE_BYTES)
    _check_count(kind, "n", n)
    _check_count(kind, "n_segments", n_segments)
    rows, at = _rows(kind, frame, at, SEGMENT, n_segments, row_bytes)
    if sum([row[0] for row in rows]) != n:
        raise WireError(f"directive: segments: their counts do not sum to n = {n}")
    ids, at = _column(kind, frame, at, rows, 8, "ids")
    slacks, at = _column(kind, frame, at, rows, 8, "slacks")
    lengths_of_all, at = _column(kind, frame, at, rows, 4 if flags & LENGTHS else 0, "lengths")
    shared: dict[int, SharedPayloads] = {}
    if flags & EXTENDED:
        column = _extensions(kind, frame, at)[1].get(TAG_SHARED, b"")
        shared = _shared(kind, column, [row[0] for row in rows])
    segments: list[Segment] = []
    sizes: list[int] = []
    for i, (count, each, packed, elapsed_ns) in enumerate(rows):
        if count == 0 or packed > 1:
            raise WireError(f"directive: segment {i}: count {count}, packed {packed}")
        lengths = lengths_of_all[i] if each == VARIED else None
        if each == VARIED and lengths is None:
            raise WireError(f"directive: segment {i}: VARIED without the column of lengths")
        elsewhere = shared.get(i)
        if elsewhere is not None:
            packed = 0
        elif packed:
            sizes.append(_size(count, each, lengths))
        else:
            sizes += lengths_of(count, each, lengths)
        segments.append(
            Segment(count, each, packed == 1, elapsed_ns, ids[i], slacks[i], (), lengths, elsewhere)
        )
    payloads = _buffers(kind, frames, flags, at, sizes)
    first = 0
    for segment in segments:
        if segment.shared is not None:
            continue
        last = first + (1 if segment.packed else segment.count)
        segment.payloads = payloads[first:last]
        first = last
    return Directive(epoch, batch_id, slot, subnet, n, segments)


def _decode_done(frames: Sequence[Buffer], flags: int, at: int) -> Done:
    kind, frame = Kind.DONE, frames[0]
    epoch, n_rows, row_bytes = layout.DONE.unpack_from(frame, _PRELUDE_BYTES)
    _check_count(kind, "n_rows", n_rows)
    fixed, at = _rows(kind, frame, at, DONE_ROW, n_rows, row_bytes)
    rows, sizes = [], []
    for known in fixed:
        row = DoneRow(*(*known[:-1], b""))
        _check_count(kind, "row: n", row.n)
        if row.waited_ns < 0 or row.executing_ns < 0:
            raise WireError(
                f"done: batch {row.batch_id}: a duration below 0: {row.waited_ns} or {row.executing_ns} ns"
            )
        if known[-1] & ROW_MIXED:
            row.statuses = statuses = _take(kind, frame, at, row.n, "statuses")
            at += row.n
            if max(statuses) >= len(STATUSES):
                raise WireError(f"done: batch {row.batch_id}: statuses: unknown status {max(statuses)}")
        if row.output_bytes == VARIED:
            row.lengths = _take(kind, frame, at, 4 * row.n, "lengths")
            at += 4 * row.n
        sizes.append(_size(row.n, row.output_bytes, row.lengths))
        rows.append(row)
    for row, output in zip(rows, _buffers(kind, frames, flags, at, sizes), strict=True):
        row.output = output
    return Done(epoch, rows)


def _decode_ping(frames: Sequence[Buffer], flags: int, at: int) -> Ping:
    (stamp_ns,) = layout.PING.unpack_from(frames[0], _PRELUDE_BYTES)
    _end(Kind.PING, frames, flags, at)
    return Ping(stamp_ns)


def _decode_pong(frames: Sequence[Buffer], flags: int, at: int) -> Pong:
    stamp_ns, own_ns = layout.PONG.unpack_from(frames[0], _PRELUDE_BYTES)
    _end(Kind.PONG, frames, flags, at)
    if at < _PRELUDE_BYTES + layout.PRICED_PONG.size:
        return Pong(stamp_ns, own_ns)
    price = layout.PRICED_PONG.unpack_from(frames[0], _PRELUDE_BYTES)[2]
    return Pong(stamp_ns, own_ns, price if 0.0 <= price < inf else None)


def decode_json(kind: Kind, frames: Sequence[Buffer]) -> dict[str, Any]:
    """Return the JSON object in frame 1.

    Raises:
        WireError: There is none, or it is too long.
    """
    if len(frames) < 2:
        raise WireError(f"{kind.name.lower()}: expected 2 frames, got {len(frames)}")
    if len(frames[1]) > MAX_JSON_BYTES:
        raise WireError(f"{kind.name.lower()}: expected at most {MAX_JSON_BYTES} bytes of JSON")
    try:
        body = orjson.loads(memoryview(frames[1]))  # the frame may be ZeroMQ's own object
    except orjson.JSONDecodeError as error:
        raise WireError(f"{kind.name.lower()}: expected JSON: {error}") from error
    if not isinstance(body, dict):
        raise WireError(f"{kind.name.lower()}: expected a JSON object, got {type(body).__name__}")
    return body


def _decode_control(kind: Kind, frames: Sequence[Buffer], version: int, at: int) -> Control:
    if len(frames[0]) != at:
        raise WireError(f"{kind.name.lower()}: {len(frames[0]) - at} bytes follow the header")
    _check_n_frames(kind, frames, 2)
    return Control(kind, decode_json(kind, frames), version)


_DECODERS: dict[int, tuple[Callable[[Sequence[Buffer], int, int], Message], int]] = {
    key_of(kind, version): (decoder, HEADERS[kind].size)
    for version in range(LOWEST, HIGHEST + 1)
    for kind, decoder in (
        (Kind.QUERIES, _decode_queries),
        (Kind.RESULTS, _decode_results),
        (Kind.CANCEL, _decode_cancel),
        (Kind.PULL, _decode_pull),
        (Kind.DIRECTIVE, _decode_directive),
        (Kind.DONE, _decode_done),
        (Kind.PING, _decode_ping),
        (Kind.PONG, _decode_pong),
    )
}
"""By the first four bytes of a message: its decoder, and the bytes of its header that this release knows."""


def decode(frames: Sequence[Buffer]) -> Message:
    """Return the message in `frames`; columns are slices of frame 0, payloads are not copied.

    Raises:
        VersionError: Its sender speaks no wire version that this release speaks.
        WireError: The frames break the protocol, or are a load generator's. Nothing else is raised.
    """
    if not frames or len(frames[0]) < _PRELUDE_BYTES:
        raise WireError("prelude: the message is too short")
    # Magic, version and kind are read as one integer: one look-up replaces three checks.
    key, flags, header_bytes = PRELUDE_KEYED.unpack_from(frames[0])
    known = _DECODERS.get(key)
    if known is None or len(frames) > MAX_FRAMES:
        return _decode_rare(frames)
    decoder, known_bytes = known
    at = _PRELUDE_BYTES + header_bytes
    if header_bytes < known_bytes or len(frames[0]) < at:
        raise _wrong_header(frames[0], known_bytes)
    return decoder(frames, flags, at)


def _wrong_header(frame: Buffer, known_bytes: int) -> WireError:
    _, _, number, _, header_bytes = PRELUDE.unpack_from(frame)
    left = len(frame) - _PRELUDE_BYTES
    return WireError(
        f"{Kind(number).name.lower()}: header: expected {max(known_bytes, header_bytes)} bytes, got "
        f"{min(header_bytes, left)}"
    )


def kind_in(frames: Sequence[Buffer]) -> tuple[Kind, int, int]:
    """Return the kind of a message, its wire version, and where its header ends.

    Raises:
        VersionError: This release does not speak its wire version, and it is no greeting or refusal.
        WireError: Its first bytes break the protocol.
    """
    if not frames or len(frames[0]) < _PRELUDE_BYTES:
        raise WireError("prelude: the message is too short")
    magic, version, number, _, header_bytes = PRELUDE.unpack_from(frames[0])
    if magic != MAGIC:
        raise WireError(f"magic: expected {MAGIC!r}, got {bytes(magic)!r}")
    is_foreign = not LOWEST <= version <= HIGHEST
    if is_foreign and number not in GREETINGS and number != Kind.REFUSED:
        raise VersionError(layout.OURS, (version, version), version)
    if len(frames) > MAX_FRAMES:
        raise WireError(f"expected at most {MAX_FRAMES} frames, got {len(frames)}")
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError(f"kind: unknown kind {number}") from None
    return kind, version, _PRELUDE_BYTES + header_bytes


def _decode_rare(frames: Sequence[Buffer]) -> Control:
    """Decode a kind without columns, in any wire version that a peer may greet in."""
    kind, version, at = kind_in(frames)
    if kind in RUN_KINDS:
        raise WireError(f"kind: {kind.name} is between load generators")
    assert kind in CONTROL_KINDS, "kinds with columns were looked up, or raised VersionError"
    message = _decode_control(kind, frames, version, at)
    if kind in GREETINGS:
        agreed(message)
    return message


def kind_of(frame: Buffer) -> int:
    """Return the kind in a valid first frame, without decoding the message."""
    return frame[3]
