"""A connection's use of its memory: what goes there, and when a slot is free again. For its thread."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from superserve.clock import SECOND
from superserve.shared.owned import OwnedMemory
from superserve.wire import PLACE, TRACED, Queries, SharedPayloads, lengths_of, uint64s

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from superserve.shared.offers import MemoryAnswer, MemoryOffer
    from superserve.wire import Buffer, Results

log = logging.getLogger("superserve")

SHARED_BYTES = 32 << 10
"""Payloads from this size on go to shared memory. Below, the descriptor and its checks cost as much as the
copies that they save."""

FORGOTTEN_NS = 10 * SECOND
"""How long after its deadline a query keeps its slot if no answer comes. A client gives it up after two
seconds, and then nothing uses what a worker makes of the slot."""


class PayloadPlacing:
    """Places a connection's large payloads in memory, once the router has shown that it sees it.

    The memory is made and offered with the first large payload; until the answer, and whenever the memory is
    full, payloads travel in frames.

    Args:
        is_possible: Whether to share at all: the option is on, and the router may be on this host.
    """

    def __init__(self, *, is_possible: bool) -> None:
        self._is_possible = is_possible
        self._is_asked_for = False
        self._has_offered = False
        self._is_seen = False
        self._memory: OwnedMemory | None = None
        self._n_memories = 0
        # By id: offset and stamp of its slot, and when the slot is free without an answer.
        self._placed: dict[int, tuple[int, int, int]] = {}

    @property
    def n_placed(self) -> int:
        """Queries whose payloads lie in the memory."""
        return len(self._placed)

    @property
    def is_shared(self) -> bool:
        """Whether the router reads payloads from the memory."""
        return self._is_seen

    def welcomed(self, *, is_asked_for: bool) -> None:
        """Start over with a router that does not know this client; `is_asked_for` is in its WELCOME."""
        self._is_asked_for = is_asked_for
        self._has_offered = self._is_seen = False

    def takes(self, queries: Queries) -> bool:
        """Return whether a message's payloads, all large, may go to memory; if so, `offer` it first."""
        if not (self._is_possible and self._is_asked_for):
            return False
        sizes = lengths_of(queries.n, queries.payload_bytes, queries.lengths)
        return min(sizes) >= SHARED_BYTES

    def offer(self) -> MemoryOffer | None:
        """Return the offer to send to this router; None if it was sent already."""
        if self._has_offered or not (self._is_possible and self._is_asked_for):
            return None
        self._has_offered = True
        if self._memory is None:
            try:
                self._n_memories += 1
                self._memory = OwnedMemory(self._n_memories)
            except OSError as error:
                self._is_possible = False
                log.info("payloads travel in messages: no memory to share: %s", error)
                return None
        return self._memory.offer

    def answered(self, answer: MemoryAnswer) -> None:
        """Take in the router's answer to the offer."""
        memory = self._memory
        if memory is None or answer.memory != memory.offer.memory or not self._has_offered:
            return
        self._is_seen = memory.is_seen_by(answer.seen)
        if not self._is_seen:
            log.debug("payloads travel in messages: the router does not see this client's memory")

    def placed(self, queries: Queries, now_ns: int) -> list[Queries]:
        """Return messages for the same queries, which it `takes`, with as many payloads in memory as fit.

        A query that is sent again keeps its slot: the router may still have its first copy.
        """
        memory = self._memory
        if memory is None or not self._is_seen:
            return [queries]
        sizes = lengths_of(queries.n, queries.payload_bytes, queries.lengths)
        slacks_ns, payloads = queries.slack_ns(), _separate(queries, sizes)
        places: list[tuple[int, int]] = []
        for query_id, size, slack_ns, payload in zip(
            uint64s(queries.ids), sizes, slacks_ns, payloads, strict=True
        ):
            place = self._place(memory, query_id, payload, size, now_ns + slack_ns + FORGOTTEN_NS, now_ns)
            if place is None:
                break
            places.append(place)
        n = len(places)
        if n == 0:
            return [queries]
        parts = [_part(queries, 0, n)]
        parts[0].shared = SharedPayloads(memory.offer.memory, b"".join([PLACE.pack(*one) for one in places]))
        if n < queries.n:
            parts.append(_part(queries, n, queries.n, payloads[n:]))
        return parts

    def _place(
        self, memory: OwnedMemory, query_id: int, payload: Any, size: int, until_ns: int, now_ns: int
    ) -> tuple[int, int] | None:
        known = self._placed.get(query_id)
        if known is not None:
            self._placed[query_id] = (*known[:2], max(known[2], until_ns))
            return known[:2]
        place = memory.place(payload, size)
        if place is None:
            if not self._forget(now_ns):
                return None
            place = memory.place(payload, size)
            if place is None:
                return None
        self._placed[query_id] = (*place, until_ns)
        return place

    def _forget(self, now_ns: int) -> int:
        """Free the slots of queries whose answer never came; return how many."""
        gone = [query_id for query_id, placed in self._placed.items() if placed[2] < now_ns]
        self._free(gone)
        return len(gone)

    def ended(self, results: Results) -> None:
        """Free the slots of the queries that a message answers."""
        if self._placed:
            for group in results.groups:
                self._free(uint64s(group.ids))

    def unsent(self, queries: Queries) -> None:
        """Free the slots of a message that was not sent."""
        if queries.shared is not None and not queries.resubmitted:
            self._free(uint64s(queries.ids))

    def _free(self, ids: Sequence[int]) -> None:
        memory, pop = self._memory, self._placed.pop
        for query_id in ids:
            placed = pop(query_id, None)
            if placed is not None:
                assert memory is not None, "something lies in it"
                memory.slots.give_back(placed[0])

    def close(self) -> None:
        """Give the memory back."""
        self._has_offered = self._is_seen = False
        self._placed.clear()
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory.close()


def _separate(queries: Queries, sizes: Sequence[int]) -> Sequence[Buffer]:
    """Return the payloads, each a buffer; nothing is copied."""
    if queries.framed:
        return queries.payloads
    view, at, payloads = memoryview(queries.payloads[0]), 0, []
    for size in sizes:
        payloads.append(view[at : at + size])
        at += size
    return payloads


def _part(queries: Queries, lo: int, hi: int, payloads: Sequence[Buffer] = ()) -> Queries:
    """Return queries lo to hi of a message as one of their own, each payload a buffer."""

    def cut(column: Buffer | None, each: int) -> Buffer | None:
        return None if column is None else column[each * lo : each * hi]

    return Queries(
        queries.epoch, queries.sent_ns, hi - lo, queries.ids[8 * lo : 8 * hi],
        queries.slacks[8 * lo : 8 * hi], queries.payload_bytes, payloads, True, cut(queries.lengths, 4),
        cut(queries.min_accuracy, 4), cut(queries.priority, 1), queries.resubmitted,
        traced=None if queries.traced is None else _traced_part(queries.traced, lo, hi),
    )  # fmt: skip


def _traced_part(traced: Buffer, lo: int, hi: int) -> bytes | None:
    """Return the rows of TRACED of queries lo to hi, counted from lo; None if there is none."""
    rows = [TRACED.pack(i - lo, context) for i, context in TRACED.iter_unpack(traced) if lo <= i < hi]
    return b"".join(rows) or None
