"""Strategies that draw a sound message of every kind, and what a later release would make of it."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from superserve import wire
from superserve.wire import VARIED, Kind, Pong, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from superserve.wire import Buffer

U8 = st.integers(0, 2**8 - 1)
U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
DURATION_NS = st.integers(0, 2**63 - 1)
SLACK_NS = st.integers(-wire.MAX_SLACK_NS, wire.MAX_SLACK_NS)
F32 = st.floats(width=32, allow_nan=False)
CONTROL_KINDS = (Kind.HELLO, Kind.WELCOME, Kind.DRAIN, Kind.BYE, Kind.STATUS, Kind.REFUSED, Kind.SHARE)


@st.composite
def columns(draw: st.DrawFn, fmt: str, elements: st.SearchStrategy[float], n: int) -> bytes:
    """Draw a column of n elements as bytes."""
    return struct.pack(f"<{n}{fmt}", *draw(st.lists(elements, min_size=n, max_size=n)))


@st.composite
def payloads(draw: st.DrawFn, n: int) -> tuple[int, list[bytes], bytes | None]:
    """Draw n payloads: bytes of each or VARIED, the payloads, and the column of lengths."""
    if draw(st.booleans()):
        each = draw(st.integers(0, 5))
        return each, [draw(st.binary(min_size=each, max_size=each)) for _ in range(n)], None
    parts = [draw(st.binary(max_size=5)) for _ in range(n)]
    return VARIED, parts, struct.pack(f"<{n}I", *map(len, parts))


def packed(parts: Sequence[bytes], *, framed: bool) -> list[Buffer]:
    """Return payloads as frames: one each, or one for all."""
    return list(parts) if framed else [b"".join(parts)]


@st.composite
def shared(draw: st.DrawFn, n: int) -> wire.SharedPayloads | None:
    """Draw the places of n payloads in a memory, or None for payloads in frames."""
    if draw(st.booleans()):
        return None
    return wire.SharedPayloads(draw(U64), draw(columns("Q", U64, 2 * n)))


@st.composite
def traced(draw: st.DrawFn, n: int) -> bytes | None:
    """Draw the trace contexts of some of n queries; None for none."""
    indices = draw(st.lists(st.integers(0, n - 1), unique=True).map(sorted))
    return b"".join([wire.TRACED.pack(i, draw(st.binary(min_size=28, max_size=28))) for i in indices]) or None


@st.composite
def queries(draw: st.DrawFn) -> wire.Queries:
    """Draw a QUERIES message."""
    n = draw(st.integers(1, 6))
    each, parts, lengths = draw(payloads(n))
    elsewhere = draw(shared(n))
    framed = elsewhere is not None or draw(st.booleans())
    return wire.Queries(
        epoch=draw(U64),
        sent_ns=draw(I64),
        n=n,
        ids=draw(columns("Q", U64, n)),
        slacks=draw(columns("q", SLACK_NS, n)),
        payload_bytes=each,
        payloads=packed(parts, framed=framed) if elsewhere is None else [],
        framed=framed,
        lengths=lengths,
        min_accuracy=draw(st.none() | columns("f", F32, n)),
        priority=draw(st.none() | columns("B", U8, n)),
        resubmitted=draw(st.booleans()),
        shared=elsewhere,
        traced=draw(traced(n)),
    )


@st.composite
def groups(draw: st.DrawFn, *, is_uneven: bool = False) -> wire.Group:
    """Draw a stretch of answers: with outputs, or with one reason."""
    count = draw(st.integers(1, 4))
    status = draw(st.sampled_from(Status))
    lengths, output = None, draw(st.binary(max_size=20))
    each = len(output)
    if status in wire.HAS_OUTPUT:
        each, parts, lengths = draw(payloads(count))
        output = b"".join(parts)
    queued_us = draw(columns("I", st.integers(0, 2**32 - 1), count)) if is_uneven else None
    return wire.Group(
        count=count,
        status=status,
        subnet=draw(U16),
        batch_size=draw(U16),
        accuracy=draw(F32),
        queued_ns=draw(I64),
        to_start_ns=draw(I64),
        executing_ns=draw(I64),
        returning_ns=draw(I64),
        ids=draw(columns("Q", U64, count)),
        output_bytes=each,
        output=output,
        lengths=lengths,
        queued_us=queued_us,
    )


@st.composite
def segments(draw: st.DrawFn) -> wire.Segment:
    """Draw a stretch of a client's message inside a directive."""
    count = draw(st.integers(1, 4))
    each, parts, lengths = draw(payloads(count))
    elsewhere = draw(shared(count))
    framed = elsewhere is not None or draw(st.booleans())
    return wire.Segment(
        count=count,
        payload_bytes=each,
        packed=not framed,
        elapsed_ns=draw(SLACK_NS),
        ids=draw(columns("Q", U64, count)),
        slacks=draw(columns("q", SLACK_NS, count)),
        payloads=packed(parts, framed=framed) if elsewhere is None else (),
        lengths=lengths,
        shared=elsewhere,
    )


@st.composite
def directives(draw: st.DrawFn) -> wire.Directive:
    """Draw a DIRECTIVE of one to three segments."""
    parts = draw(st.lists(segments(), min_size=1, max_size=3))
    n = sum(part.count for part in parts)
    return wire.Directive(draw(U64), draw(U64), draw(U16), draw(U16), n, parts)


@st.composite
def done_rows(draw: st.DrawFn) -> wire.DoneRow:
    """Draw a finished batch: all OK, or of mixed statuses."""
    n = draw(st.integers(1, 4))
    each, parts, lengths = draw(payloads(n))
    return wire.DoneRow(
        batch_id=draw(U64),
        slot=draw(U16),
        credit=draw(U16),
        held=draw(U16),
        n=n,
        waited_ns=draw(DURATION_NS),
        executing_ns=draw(DURATION_NS),
        last_batch=draw(U64),
        running_batch=draw(U64),
        running_for_ns=draw(I64),
        output_bytes=each,
        output=b"".join(parts),
        statuses=draw(st.none() | columns("B", st.sampled_from(Status), n)),
        lengths=lengths,
    )


@st.composite
def cancels(draw: st.DrawFn) -> wire.Cancel:
    """Draw a CANCEL."""
    n = draw(st.integers(1, 6))
    return wire.Cancel(draw(U64), n, draw(columns("Q", U64, n)))


PULL_ROWS = st.builds(wire.PullRow, U16, U16, U16, U16, U64, U64, I64, U64, F32, F32)
BODIES = st.dictionaries(st.text(max_size=5), st.none() | st.integers(-(2**53), 2**53) | st.text(max_size=5))
DATA_MESSAGES: st.SearchStrategy[wire.Message] = st.one_of(
    queries(),
    st.builds(wire.Results, U64, st.lists(groups(), min_size=1, max_size=4)),
    cancels(),
    st.builds(wire.Pull, U64, st.lists(PULL_ROWS, min_size=1, max_size=4)),
    directives(),
    st.builds(wire.Done, U64, st.lists(done_rows(), min_size=1, max_size=4)),
    st.builds(wire.Ping, I64),
    st.builds(wire.Pong, I64, I64),
)
MESSAGES = DATA_MESSAGES | st.builds(wire.Control, st.sampled_from(CONTROL_KINDS), BODIES)


def frames_of(message: wire.Message) -> list[bytes]:
    """Return the message's frames, as bytes."""
    return [bytes(frame) for frame in wire.encode(message)]


# --- between load generators ----------------------------------------------------------------

RUN_TEXT = st.text(max_size=5)
RUN_INTEGER = st.integers(0, 2**63 - 1)
FRACTION = st.floats(0, 100)


@st.composite
def run_columns(draw: st.DrawFn) -> dict[str, bytes]:
    """Draw some of a run's columns, all of one length."""
    n = draw(st.integers(0, 3))
    names = draw(st.lists(st.sampled_from(sorted(wire.RUN_COLUMNS)), unique=True, max_size=4))
    return {name: bytes(n * int(wire.RUN_COLUMNS[name][-1])) for name in names}


RUN_MESSAGES: st.SearchStrategy[wire.RunMessage] = st.one_of(
    st.builds(
        wire.RunShare,
        *(RUN_TEXT, RUN_TEXT, RUN_TEXT, *[RUN_INTEGER] * 6),
        st.integers(0, 4).flatmap(lambda n: columns("q", I64, n)),
    ),
    st.builds(wire.RunReady, RUN_TEXT),
    st.builds(wire.RunStart, RUN_INTEGER, st.none()),
    st.builds(wire.RunStart, st.none(), st.integers(-(2**63) + 1, 2**63 - 1)),
    st.builds(wire.RunStop, st.none() | RUN_INTEGER),
    st.builds(
        wire.RunProgress,
        *[RUN_INTEGER] * 3,
        name=RUN_TEXT,
        rows=st.none() | RUN_INTEGER,
        until_ns=RUN_INTEGER,
    ),
    st.builds(
        wire.RunReport,
        subnets=st.lists(st.tuples(RUN_TEXT, FRACTION), max_size=2).map(tuple),
        reasons=st.dictionaries(RUN_TEXT, RUN_TEXT, max_size=2),
        duplicates=RUN_INTEGER,
        name=RUN_TEXT,
        rows=st.none() | RUN_INTEGER,
        duration_ns=RUN_INTEGER,
        noise_ns=st.none() | RUN_INTEGER,
        columns=run_columns(),
    ),
    st.builds(wire.RunFailed, RUN_TEXT),
)

# --- a later release's form -----------------------------------------------------------------

PRELUDE = struct.Struct("<2sBBHH")
GATHERED, EXTENDED = 32, 128
ROWS: dict[Kind, tuple[struct.Struct, int, int]] = {
    Kind.RESULTS: (struct.Struct("<QIIH2x"), 2, 3),
    Kind.PULL: (struct.Struct("<QIH2x"), 1, 2),
    Kind.DIRECTIVE: (struct.Struct("<QQHHIIH2x"), 5, 6),
    Kind.DONE: (struct.Struct("<QIH2x"), 1, 2),
}
"""Headers of the kinds with rows, as the specification has them, and where the count and the stride stand."""


def n_buffer_bytes(message: wire.Message) -> int:
    """Return the bytes of a message's payloads or outputs."""
    match message:
        case wire.Queries():
            return sum(map(len, message.payloads))
        case wire.Results():
            return sum(len(group.output) for group in message.groups)
        case wire.Directive():
            return sum(len(payload) for s in message.segments for payload in s.payloads)
        case wire.Done():
            return sum(len(row.output) for row in message.rows)
    return 0


def extended(
    message: wire.Message, *, header: bytes = b"", row: bytes = b"", tagged: Sequence[bytes] | None = None
) -> list[bytes]:
    """Return the frames that a later release would send: longer header and rows, and more columns.

    Columns can only be added to a message that has no extension columns yet.
    """
    first, *rest = frames_of(message)
    magic, version, kind, flags, header_bytes = PRELUDE.unpack_from(first)
    known, body = first[8 : 8 + header_bytes], first[8 + header_bytes :]
    if kind in ROWS:
        fixed, count_at, stride_at = ROWS[kind]
        fields = list(fixed.unpack(known))
        n, stride = fields[count_at], fields[stride_at]
        rows = [body[i * stride : (i + 1) * stride] + row for i in range(n)]
        body = b"".join(rows) + body[n * stride :]
        fields[stride_at] += len(row)
        known = fixed.pack(*fields)
    if tagged is not None:
        numbered = enumerate(tagged, start=3)
        columns = b"".join(struct.pack("<H2xI", tag, len(data)) + data for tag, data in numbered)
        at = len(body) - (n_buffer_bytes(message) if flags & GATHERED else 0)
        body = body[:at] + struct.pack("<I", len(columns)) + columns + body[at:]
        flags |= EXTENDED
    prelude = PRELUDE.pack(magic, version, kind, flags, header_bytes + len(header))
    return [prelude + known + header + body, *rest]


@st.composite
def extended_frames(draw: st.DrawFn, message: wire.Message) -> list[bytes]:
    """Draw a later release's form of a message."""
    has_columns = PRELUDE.unpack_from(frames_of(message)[0])[3] & EXTENDED
    header = draw(st.binary(max_size=9))
    if isinstance(message, Pong) and message.price is None:
        # What comes later comes behind the price, so that a PONG without one then says that it has none.
        header = struct.pack("<d", math.nan) + header
    return extended(
        message,
        header=header,
        row=draw(st.binary(max_size=9)),
        tagged=None if has_columns else draw(st.none() | st.lists(st.binary(max_size=9), max_size=3)),
    )
