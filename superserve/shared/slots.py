"""Which part of a memory holds which payload: slots of a few sizes, the one freed last used first."""

from __future__ import annotations

PAGE_BYTES = 4_096
HEAD_BYTES = 1_536
"""Of a slot, before its payload: the stamp, and space. Copying is ten times slower if the target begins up to
64 bytes after the source within a page: 91 us instead of 6 for 150 kB. Large arrays begin 16 to 48 bytes
after a page, and rows of one at multiples of 1,024 from there: with this distance neither copy meets that."""
FIRST_OFFSET = PAGE_BYTES
"""Of the first slot; the page before it holds the memory's nonce."""


def room_of(n_bytes: int) -> int:
    """Return the bytes of the slot for a payload: pages, or a quarter of a power of two, whichever is more.

    So payloads whose sizes differ a little use the same slots, and less than a quarter is wasted.
    """
    needed = n_bytes + HEAD_BYTES
    step = max(PAGE_BYTES, 1 << max(0, needed.bit_length() - 3))
    return -(-needed // step) * step


class PayloadSlots:
    """The slots of one memory.

    The slot that was freed last is used first: it is still in the processor's cache, and a memory with few
    payloads at a time touches few pages.

    Args:
        n_bytes: The memory's size.

    Attributes:
        n_used: Slots that are taken.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_used = 0
        self._n_bytes = n_bytes
        self._end = FIRST_OFFSET
        self._rooms: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}

    def take(self, n_bytes: int) -> int | None:
        """Return the offset of a free slot for a payload of `n_bytes`, or None if there is none."""
        room = room_of(n_bytes)
        free = self._free.setdefault(room, [])
        if free:
            self.n_used += 1
            return free.pop()
        offset = self._end
        if offset + room > self._n_bytes:
            return None
        self._end += room
        self._rooms[offset] = room
        self.n_used += 1
        return offset

    def give_back(self, offset: int) -> None:
        """Free the slot at `offset`, which `take` returned."""
        assert offset in self._rooms, "only slots that were taken come back"
        self.n_used -= 1
        self._free[self._rooms[offset]].append(offset)

    def clear(self) -> list[int]:
        """Forget every slot, so that other sizes find room; return where their stamps have to be wiped.

        Only while none is taken.
        """
        assert self.n_used == 0, "a slot is taken"
        offsets = list(self._rooms)
        self._end = FIRST_OFFSET
        self._rooms.clear()
        self._free.clear()
        return offsets
