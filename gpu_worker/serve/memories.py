"""The memories of clients that a worker reads payloads from; see `superserve.shared`."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve.shared.foreign import ForeignMemory, UnseenMemoryError
from superserve.shared.offers import MemoriesGone, MemoryAnswer, MemoryOffer
from superserve.shared.slots import room_of
from superserve.wire import Control, Kind, lengths_of, uint64s

if TYPE_CHECKING:
    from collections import Counter

    import numpy.typing as npt

    from superserve.wire import Buffer, Directive, Segment

    _Bytes = npt.NDArray[np.uint8]

_LOG = logging.getLogger(__name__)

MOST_MEMORIES = 1_024
"""Memories that a worker holds open, each with a file descriptor; the router sends it frames beyond these."""
_TAKEN_BACK = b""
"""In place of a payload whose slot was used again: no model takes a payload of this size."""


SPARE_BYTES = 64 << 20
"""Of buffers that wait for the next batch: more go back to the system."""


class _Lent(weakref.ref["_Bytes"]):
    """What is left of a buffer that was handed out, until nothing uses it."""

    __slots__ = ("whole",)

    whole: _Bytes


class BatchBuffers:
    """Buffers for the payloads of batches, used again once nothing refers to them.

    The system gives a large new buffer page by page, as it is written, and clears each page: 100 us for a
    payload of 150 kB, while copying it costs 25.
    """

    def __init__(self) -> None:
        self._spare: dict[int, list[_Bytes]] = {}
        self._spare_bytes = 0
        self._lent: dict[int, _Lent] = {}
        # Reentrant: a buffer may come back in the middle of `take`, when the garbage collector runs.
        self._guard = threading.RLock()

    def take(self, n_bytes: int) -> memoryview:
        """Return a buffer of `n_bytes` with any content; a view of it keeps it."""
        room = room_of(n_bytes)
        with self._guard:
            spare = self._spare.get(room)
            whole = spare.pop() if spare else None
            self._spare_bytes -= 0 if whole is None else room
        if whole is None:
            whole = np.empty(room, np.uint8)
        part = whole[:n_bytes]
        lent = _Lent(part, self._came_back)
        lent.whole = whole
        self._lent[id(lent)] = lent
        return part.data

    def _came_back(self, lent: Any) -> None:
        """Keep a buffer that nothing uses any more; called by the thread that let go of it."""
        del self._lent[id(lent)]
        room = len(lent.whole)
        with self._guard:
            if self._spare_bytes + room <= SPARE_BYTES:
                self._spare_bytes += room
                self._spare.setdefault(room, []).append(lent.whole)


class WorkerMemories:
    """The memories that one worker process has open, by the router's number.

    Args:
        counts: Receives `payloads taken back`.
        is_allowed: Whether to open any.
    """

    def __init__(self, counts: Counter[str], *, is_allowed: bool) -> None:
        self._counts = counts
        self._is_allowed = is_allowed
        self._epoch: int | None = None
        self._open: dict[int, ForeignMemory] = {}
        self._buffers = BatchBuffers()

    @property
    def n_open(self) -> int:
        """Memories that it has open."""
        return len(self._open)

    def follow(self, epoch: int | None) -> None:
        """Close every memory if the router is another one now, or has gone."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.close()

    def share(self, message: Control) -> Control | None:
        """Handle a SHARE; return the answer to an offer.

        Raises:
            WireError: It is malformed.
        """
        if "gone" in message.body:
            for number in MemoriesGone.from_body(message.body).gone:
                if (memory := self._open.pop(number, None)) is not None:
                    memory.close()
            return None
        offer = MemoryOffer.from_body(message.body)
        answer = MemoryAnswer(offer.memory)
        if self._is_allowed and len(self._open) < MOST_MEMORIES:
            try:
                memory = self._open[offer.memory] = ForeignMemory(offer)
                answer = MemoryAnswer(offer.memory, memory.seen)
            except UnseenMemoryError as error:
                _LOG.info("payloads of a client will come in messages: %s", error)
        return Control(Kind.SHARE, answer.body())

    def fill(self, directive: Directive) -> None:
        """Copy the payloads of a batch that lie in memory, those of a segment end to end.

        At once, not when the batch starts: a query may end elsewhere meanwhile, and its slot is used again.
        """
        for segment in directive.segments:
            if segment.shared is not None:
                self._fill(segment, segment.shared.memory, uint64s(segment.shared.places))

    def _fill(self, segment: Segment, number: int, places: list[int]) -> None:
        memory = self._open.get(number)
        sizes = lengths_of(segment.count, segment.payload_bytes, segment.lengths)
        payloads: list[Buffer] = []
        if memory is None or not memory.contains(places, sizes):
            payloads = [_TAKEN_BACK] * segment.count
        else:
            whole = self._buffers.take(sum(sizes))
            at = 0
            for i, size in enumerate(sizes):
                part = whole[at : at + size]
                at += size
                is_whole = memory.read((places[2 * i], places[2 * i + 1]), part)
                payloads.append(part if is_whole else _TAKEN_BACK)
            if all(map(len, payloads)):
                segment.packed, payloads = True, [whole]
        segment.payloads, segment.shared = payloads, None
        if not segment.packed:
            self._counts["payloads taken back"] += sum(not payload for payload in payloads)

    def close(self) -> None:
        """Close every memory."""
        for memory in self._open.values():
            memory.close()
        self._open.clear()
