"""The messages, as dataclasses whose columns are bytes: the router never reads most of them.

They are not frozen, although no message changes once sent: making a frozen one takes three times as long.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from superserve.wire.layout import HIGHEST, I64, U32, VARIED, Buffer, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


def int64s(column: Buffer) -> list[int]:
    """Return a column of i64. The protocol is little-endian, like every machine with CUDA."""
    values: list[int] = memoryview(column).cast("q").tolist()
    return values


def uint64s(column: Buffer) -> list[int]:
    """Return a column of u64, such as `ids`."""
    values: list[int] = memoryview(column).cast("Q").tolist()
    return values


def lengths_of(count: int, uniform: int, column: Buffer | None) -> list[int]:
    """Return the length of each of `count` buffers: all `uniform`, or the column's."""
    if uniform != VARIED:
        return [uniform] * count
    assert column is not None, "VARIED without a column of lengths"
    lengths: list[int] = np.frombuffer(column, "<u4").tolist()
    return lengths


@dataclass(slots=True)
class SharedPayloads:
    """Where payloads lie in a memory that its client shares; see `superserve.shared`.

    Attributes:
        memory: The memory's number: to the router the client's own, to a worker the router's.
        places: Of each query, offset and stamp of its slot, 2 u64, as bytes.
        source: The memory, where the router has opened it; not on the wire.
    """

    memory: int
    places: Buffer
    source: Any = None


@dataclass(slots=True)
class Queries:
    """Client to router: queries, as columns of equal length n.

    Attributes:
        epoch: The epoch of the WELCOME that this connection received.
        sent_ns: The sender's own clock at the moment of sending.
        ids: n u64, little-endian, as bytes: the router never decodes them.
        slacks: n i64 ns as bytes.
        payload_bytes: Bytes of each payload, or VARIED.
        payloads: One buffer holding all payloads, or n buffers if `framed`.
        lengths: n u32 as bytes when VARIED, else None.
        min_accuracy: n f32 percent as bytes, or None.
        priority: n u8 as bytes, or None.
        shared: Where the payloads lie, if they are not in `payloads`, which is then empty; such a message
            is `framed`.
        traced: Rows of TRACED as bytes, of the queries with a trace context; None if none has one.
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
    shared: SharedPayloads | None = None
    traced: Buffer | None = None

    def slack_ns(self) -> list[int]:
        """Return the slacks, ns. As a list: most messages are too short for an array to pay off."""
        return list(I64.unpack(self.slacks)) if self.n == 1 else int64s(self.slacks)

    def n_bytes(self) -> int:
        """Return the bytes of all payloads."""
        if self.shared is not None:
            return sum(lengths_of(self.n, self.payload_bytes, self.lengths))
        return len(self.payloads[0]) if len(self.payloads) == 1 else sum(map(len, self.payloads))


@dataclass(slots=True)
class Group:
    """A stretch of RESULTS whose queries ended alike. Durations in ns; accuracy in percent.

    Attributes:
        ids: count u64 as bytes.
        output_bytes: Bytes of each output, or VARIED.
        output: Outputs end to end (OK, LATE), or one UTF-8 reason.
        lengths: count u32 as bytes when VARIED, else None.
        queued_us: count u32 us as bytes if the queries waited for different times, else
            None; `queued_ns` is the first one's.
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
    """One GPU's queue state: see the package's docstring. The router deducts from `credit` as it sends."""

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
    """Worker to router: what its GPUs hold, and what they can take."""

    kind: ClassVar[Kind] = Kind.PULL

    epoch: int
    rows: list[PullRow]


@dataclass(slots=True)
class Segment:
    """A stretch of one client's message within a directive.

    Attributes:
        payload_bytes: Bytes of each payload, or VARIED.
        payloads: One buffer if `packed`, else `count` buffers.
        elapsed_ns: How much of the slack was used up when the router sent it.
        ids: count u64 as bytes.
        slacks: count i64 ns as bytes, as the client sent them.
        lengths: count u32 as bytes when VARIED, else None.
        shared: Where the payloads lie, if they are not in `payloads`, which is then empty and not `packed`.
    """

    count: int
    payload_bytes: int
    packed: bool
    elapsed_ns: int
    ids: Buffer
    slacks: Buffer
    payloads: Sequence[Buffer]
    lengths: Buffer | None = None
    shared: SharedPayloads | None = None


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
        """Return the slack of each query that was left at sending, shape (n,), ns."""
        parts = [np.frombuffer(s.slacks, "<i8") - s.elapsed_ns for s in self.segments]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def least_slack_left_ns(self) -> int:
        """Return the minimum of `slack_left_ns`, without making an array of a few numbers."""
        return min([min(memoryview(s.slacks).cast("q")) - s.elapsed_ns for s in self.segments])

    def payload_list(self) -> list[Buffer]:
        """Return the n payloads, each a buffer; nothing is copied. Those in shared memory are empty."""
        payloads: list[Buffer] = []
        for segment in self.segments:
            if segment.shared is not None:
                payloads += [b""] * segment.count
                continue
            if not segment.packed:
                payloads.extend(segment.payloads)
                continue
            view, at = memoryview(segment.payloads[0]), 0
            for length in lengths_of(segment.count, segment.payload_bytes, segment.lengths):
                payloads.append(view[at : at + length])
                at += length
        return payloads


@dataclass(slots=True)
class DoneRow:
    """One finished batch. `statuses` is n u8 if not all are OK."""

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
    """Worker to router: finished batches, and the queue state after them."""

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
    """The PING's stamp, and the clock of the peer that answers it.

    Attributes:
        price: What GPU time is worth to a router now, for its workers; None if it does not say.
    """

    kind: ClassVar[Kind] = Kind.PONG

    stamp_ns: int
    own_ns: int
    price: float | None = None


@dataclass(slots=True)
class Control:
    """HELLO, WELCOME, DRAIN, BYE, STATUS, REFUSED and SHARE: a JSON object.

    Attributes:
        version: The wire version of this message.
    """

    kind: Kind
    body: dict[str, Any] = field(default_factory=dict)
    version: int = HIGHEST


Message = Queries | Results | Cancel | Pull | Directive | Done | Ping | Pong | Control


def queued_us_of(group: Group) -> Buffer:
    """Return the column `queued` of a group: its own, or the wait that its queries share."""
    if group.queued_us is not None:
        return group.queued_us
    return pack_queued_us(group.queued_ns) * group.count


def pack_queued_us(queued_ns: int) -> bytes:
    """Return one entry of the column `queued`: microseconds, capped to a u32."""
    return U32.pack(min(max(0, queued_ns) // 1000, 0xFFFFFFFF))
