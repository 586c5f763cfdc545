"""Memory that clients share: which connection offered it, and which worker processes read it by themselves.

A client offers its memory to the router. Once a batch refers to it, the router offers it to that batch's
worker, under a number of its own, and copies the payloads into frames until the worker has proved that it
sees the memory too; for a worker on another host, always.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

from superserve.errors import WireError
from superserve.shared.foreign import ForeignMemory, UnseenMemoryError
from superserve.shared.offers import MemoryAnswer, MemoryOffer, is_same
from superserve.wire import lengths_of, uint64s

if TYPE_CHECKING:
    from collections import Counter
    from typing import Any

    from superserve.wire import Buffer, Queries

log = logging.getLogger("router")

MOST_MEMORIES = 512
"""Memories that the router holds open, each with a file descriptor; clients beyond these send frames."""


class ClientMemory:
    """One client's memory, from its offer to the last query in it.

    Args:
        theirs: How the client calls it.
        memory: What was opened; its number is the router's.
        counts: Receives `copied_payloads`.
    """

    __slots__ = ("_counts", "memory", "theirs")

    def __init__(self, theirs: int, memory: ForeignMemory, counts: Counter[str]) -> None:
        self._counts = counts
        self.theirs = theirs
        self.memory = memory

    @property
    def number(self) -> int:
        """How the router calls it: unique, also among routers."""
        return self.memory.offer.memory

    def payloads(self, places: Buffer, sizes: list[int]) -> list[Buffer]:
        """Return copies of payloads, for a worker that does not see the memory.

        The copy of a slot that was used again may be torn: its query has ended, or its client gave it up,
        and what a worker makes of it is dropped.
        """
        found: list[Buffer] = []
        numbers = uint64s(places)
        self._counts["copied_payloads"] += len(sizes)
        for i, size in enumerate(sizes):
            payload = bytearray(size)
            self.memory.read((numbers[2 * i], numbers[2 * i + 1]), payload)
            found.append(memoryview(payload))
        return found


class RouterMemories:
    """The memories that the router has open.

    Args:
        counts: Receives `shared_payloads`, `copied_payloads`, `refused_memories` and `refused_payloads`.
        is_allowed: Whether clients may offer any.

    Attributes:
        gone: Numbers of memories that were closed and that workers may still hold open.
    """

    def __init__(self, counts: Counter[str], *, is_allowed: bool) -> None:
        self.is_allowed = is_allowed
        self.gone: list[int] = []
        self.counts = counts
        self._n_open = 0

    def opened(self, body: dict[str, Any]) -> tuple[ClientMemory | None, MemoryAnswer]:
        """Open what a client offers; return it, or None, and the answer to send.

        Raises:
            WireError: The offer is malformed.
        """
        offer = MemoryOffer.from_body(body)
        try:
            if not self.is_allowed or self._n_open >= MOST_MEMORIES:
                raise UnseenMemoryError(f"at most {MOST_MEMORIES if self.is_allowed else 0} memories")
            memory = ForeignMemory(replace(offer, memory=secrets.randbits(63)), self._closed)
        except UnseenMemoryError as error:
            # One answer for every reason: a peer must not learn which files and processes there are.
            self.counts["refused_memories"] += 1
            log.info("a client's payloads will travel in messages: %s", error)
            return None, MemoryAnswer(offer.memory)
        self._n_open += 1
        return ClientMemory(offer.memory, memory, self.counts), MemoryAnswer(offer.memory, memory.seen)

    def _closed(self, number: int) -> None:
        self._n_open -= 1
        self.gone.append(number)

    def taken_gone(self) -> list[int]:
        """Return the numbers of memories that were closed since the last call."""
        gone, self.gone = self.gone, []
        return gone

    def find(self, queries: Queries, memory: ClientMemory | None) -> None:
        """Attach the memory to a message that refers to it.

        Args:
            queries: A message with places.
            memory: What its connection has offered.

        Raises:
            WireError: The connection offered no such memory, or a place is not in it.
        """
        shared = queries.shared
        assert shared is not None, "the caller looked"
        if memory is None or memory.theirs != shared.memory:
            self.counts["refused_payloads"] += queries.n
            raise WireError("queries: shared: expected a memory that this connection has offered")
        sizes = lengths_of(queries.n, queries.payload_bytes, queries.lengths)
        if not memory.memory.contains(uint64s(shared.places), sizes):
            self.counts["refused_payloads"] += queries.n
            raise WireError("queries: shared: expected places within the memory")
        self.counts["shared_payloads"] += queries.n
        shared.source = memory


class WorkerReads:
    """Which memories one worker process reads by itself.

    Args:
        is_asked_for: Whether its HELLO asks for offers.

    Attributes:
        to_offer: Memories that it should be offered.
    """

    __slots__ = ("_seen", "is_asked_for", "to_offer")

    def __init__(self, *, is_asked_for: bool) -> None:
        self.is_asked_for = is_asked_for
        self.to_offer: list[ClientMemory] = []
        # By the router's number: the proof that its answer must have, then True or False.
        self._seen: dict[int, bool | str] = {}

    def sees(self, source: ClientMemory) -> bool:
        """Return whether the worker reads payloads from a memory; if it was not asked yet, ask it."""
        number = source.number
        seen = self._seen.get(number)
        if seen is None and self.is_asked_for:
            self._seen[number] = source.memory.seen
            self.to_offer.append(source)
        return seen is True

    def answered(self, answer: MemoryAnswer) -> None:
        """Take in the worker's answer to an offer."""
        expected = self._seen.get(answer.memory)
        if isinstance(expected, str):
            self._seen[answer.memory] = is_same(answer.seen, expected)

    def forget(self, numbers: list[int]) -> list[int]:
        """Forget memories that are closed; return those that it was offered."""
        return [number for number in numbers if self._seen.pop(number, None) is not None]


NO_READS = WorkerReads(is_asked_for=False)
"""Of a peer that never gets an offer."""
