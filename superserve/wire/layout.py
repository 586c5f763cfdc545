"""The layout: numbers, flags and fixed parts that encoder and decoder share.

Known fields of a header or a row never move. A later release adds fields at the end.
"""

from __future__ import annotations

import enum
import struct

LOWEST = 2
"""The lowest wire version that this release speaks: its predecessor's."""
HIGHEST = 2
"""The highest wire version that this release speaks. Two successive releases speak each version."""
OURS = (LOWEST, HIGHEST)

MAGIC = b"SS"
VARIED = 0xFFFFFFFF
"""In a *_bytes field: lengths differ and are in the column `lengths`."""

MAX_QUERIES = 65_536
"""Most queries in one message: a bound on what decoding one may allocate."""
MAX_FRAMES = MAX_QUERIES + 1  # the header's, and one for each payload
MAX_SLACK_NS = 86_400 * 10**9
"""No slack is longer than a day: a larger number is a mistaken unit."""
MAX_JSON_BYTES = 16 << 20  # HELLOs carry whole profiles; a bound on what a peer can make us parse
MAX_EXTENSIONS = 64
"""Most extension columns in one message: a bound on the steps to skip them."""

GATHER_BYTES = 16_384
"""Buffers shorter than this together go into frame 0: copying them costs less than a frame each."""

Buffer = bytes | memoryview


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
    RUN_SHARE = 15
    RUN_READY = 16
    RUN_START = 17
    RUN_STOP = 18
    RUN_PROGRESS = 19
    RUN_REPORT = 20
    RUN_FAILED = 21
    SHARE = 22


CONTROL_KINDS = frozenset(
    {Kind.HELLO, Kind.WELCOME, Kind.DRAIN, Kind.BYE, Kind.STATUS, Kind.REFUSED, Kind.SHARE}
)
GREETINGS = frozenset({Kind.HELLO, Kind.STATUS})
"""Kinds that open a conversation: decoded in any wire version, since they state the sender's versions."""
RUN_KINDS = frozenset(kind for kind in Kind if kind.name.startswith("RUN_"))
"""Messages between load generators."""


class Status(enum.IntEnum):
    """How a query ended. OK and LATE carry an output, the others a reason."""

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

# --- flags ----------------------------------------------------------------------------------

MIN_ACCURACY = 1
PRIORITY = 2
LENGTHS = 4
FRAMES = 8
RESUBMITTED = 16
GATHERED = 32
QUEUED = 64
EXTENDED = 128
TAG_SHARED = 1
TAG_TRACED = 2
ROW_MIXED = 1

# --- fixed parts ----------------------------------------------------------------------------

PRELUDE = struct.Struct("<2sBBHH")  # magic, version, kind, flags, header_bytes
PRELUDE_KEYED = struct.Struct("<IHH")  # the same, with magic, version and kind as one number to look up

QUERIES = struct.Struct("<QqII")  # epoch, sent_ns, n, payload_bytes
RESULTS = struct.Struct("<QIIH2x")  # epoch, n, n_groups, row_bytes
GROUP = struct.Struct("<IB3xHHfqqqqI")  # as Group has them, without ids; output_bytes last
RESULTS_OF_ONE = struct.Struct("<QIIH2xIB3xHHfqqqqI")  # RESULTS, and the only GROUP
CANCEL = struct.Struct("<QI")  # epoch, n
PULL = struct.Struct("<QIH2x")  # epoch, n_rows, row_bytes
PULL_ROW = struct.Struct("<HHHHQQqQff")  # as PullRow has them
DIRECTIVE = struct.Struct("<QQHHIIH2x")  # epoch, batch_id, slot, subnet, n, n_segments, row_bytes
SEGMENT = struct.Struct("<III4xq")  # count, payload_bytes, packed, elapsed_ns
DONE = struct.Struct("<QIH2x")  # epoch, n_rows, row_bytes
DONE_ROW = struct.Struct("<QHHHIqqQQqIH")  # as DoneRow has them up to output_bytes; then flags
PING = struct.Struct("<q")  # stamp_ns
PONG = struct.Struct("<qq")  # stamp_ns, own_ns
PRICED_PONG = struct.Struct("<qqd")  # and price, which not every PONG has
EXTENSION = struct.Struct("<H2xI")  # tag, n_bytes
SHARED_OF = struct.Struct("<I4xQ")  # segment, memory; then the places of the segment's queries
PLACE = struct.Struct("<QQ")  # offset, stamp
TRACED = struct.Struct("<I28s")  # index, and its context as `superserve.wire.traceparent.packed` has it

U32 = struct.Struct("<I")
I64 = struct.Struct("<q")

HEADERS: dict[Kind, struct.Struct] = {
    Kind.QUERIES: QUERIES,
    Kind.RESULTS: RESULTS,
    Kind.CANCEL: CANCEL,
    Kind.PULL: PULL,
    Kind.DIRECTIVE: DIRECTIVE,
    Kind.DONE: DONE,
    Kind.PING: PING,
    Kind.PONG: PONG,
}
"""Each header's known fields; kinds that are not listed have no header."""


def key_of(kind: int, version: int) -> int:
    """Return the first four bytes of a message of `kind` as one integer, the key of the decoders' table."""
    key: int = PRELUDE_KEYED.unpack(PRELUDE.pack(MAGIC, version, kind, 0, 0))[0]
    return key
