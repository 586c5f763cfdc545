"""What a client sends: queries as QUERIES, small payloads packed and large ones in their own frames."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from superserve.wire import MAX_QUERIES, TRACED, VARIED, Queries

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAMED_BYTES = 65_536
"""Payloads from this size on get their own frame, uncopied (`superserve.net.sockets.ZERO_COPY_BYTES`)."""

PACKED_BYTES = 8 << 20
"""Smaller payloads are joined into one frame of at most this: far below what ends a connection."""


class Query(Protocol):
    """What a session needs of a query; the shells' futures have it.

    Attributes:
        query_id: Assigned by `submit`; ascending.
        payload: A buffer in C order; b"" once the query has ended.
        n_bytes: Bytes of the payload.
        trace: Its trace context as `superserve.wire.traceparent.packed` has it; b"" for none.
        n_sends: How often it was sent again.
    """

    query_id: int
    payload: Any
    n_bytes: int
    deadline_ns: int
    submitted_ns: int
    min_accuracy: float
    priority: int
    trace: bytes
    n_sends: int


Q = TypeVar("Q", bound=Query)


def messages_of(
    batch: list[Q], epoch: int, now_ns: int, *, has_options: bool, resubmitted: bool
) -> Iterator[Queries]:
    """Yield messages for a batch: small payloads packed, large ones in their own frames."""
    sizes = [query.n_bytes for query in batch]
    parts = [(batch, False)]
    if max(sizes) >= FRAMED_BYTES:
        large = [query for query in batch if query.n_bytes >= FRAMED_BYTES]
        parts = [([query for query in batch if query.n_bytes < FRAMED_BYTES], False), (large, True)]
    is_one = len(parts) == 1 and len(batch) <= MAX_QUERIES and sum(sizes) <= PACKED_BYTES
    for part, is_framed in parts:
        for chunk in [part] if is_one else _chunks(part, is_framed=is_framed):
            yield _message(
                chunk, epoch, now_ns, is_framed=is_framed, has_options=has_options,
                resubmitted=resubmitted,
            )  # fmt: skip


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
    accuracies = priorities = traced = None
    if has_options:
        floors = [query.min_accuracy for query in batch]
        accuracies = array("f", floors).tobytes() if any(floors) else None
        classes = bytes([query.priority for query in batch])
        priorities = classes if any(classes) else None
        rows = [TRACED.pack(i, query.trace) for i, query in enumerate(batch) if query.trace]
        traced = b"".join(rows) or None
    return Queries(
        epoch, now_ns, len(batch), ids, slacks, each, payloads, is_framed, lengths, accuracies, priorities,
        resubmitted, traced=traced,
    )  # fmt: skip


def _frame(payload: Any) -> Any:
    """Return a payload as bytes without copying them."""
    return payload.reshape(-1).view(np.uint8).data if isinstance(payload, np.ndarray) else payload
