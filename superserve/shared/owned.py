"""A client's memory: a sealed memfd that it alone writes. For the thread of the client's connection."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
from typing import Any

from superserve.shared.foreign import F_SEAL_SHRINK, MAGIC, MEMORY_NAME, STAMP
from superserve.shared.offers import NONCE_BYTES, MemoryOffer, is_same, offered_proof, seen_proof
from superserve.shared.slots import HEAD_BYTES, PayloadSlots

MEMORY_BYTES = 64 << 20
"""Of a client's memory: 400 images of 150 kB. Pages that no payload has touched take no memory."""

# By number: a Python that was built for an old C library has neither these names nor `memfd_create`.
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_GROW = 1, 4
_NO_STAMP = STAMP.pack(0)


class OwnedMemory:
    """The payload memory of one client.

    Args:
        number: How the client calls it.
        n_bytes: Its size.

    Raises:
        OSError: The kernel gives no memory or descriptor.

    Attributes:
        slots: Which part of it is taken.
    """

    def __init__(self, number: int, n_bytes: int = MEMORY_BYTES) -> None:
        self.slots = PayloadSlots(n_bytes)
        self._number = number
        self._n_bytes = n_bytes
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        # Random, so that no payload that later lies where a slot began is taken for its stamp.
        self._last_stamp = secrets.randbits(62)
        self._pid = os.getpid()
        self._fd = _memfd()
        try:
            os.ftruncate(self._fd, n_bytes)
            fcntl.fcntl(self._fd, _F_ADD_SEALS, F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
            os.pwrite(self._fd, MAGIC + self._nonce, 0)
            # Sealed, so that mapping it is safe; a copy into a mapping takes a third of a write's time.
            self._map = mmap.mmap(self._fd, n_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)

    @property
    def offer(self) -> MemoryOffer:
        """What a router on this host needs to read it."""
        return MemoryOffer(self._number, self._pid, self._fd, self._n_bytes, offered_proof(self._nonce))

    def is_seen_by(self, seen: str) -> bool:
        """Return whether an answer proves that its sender sees this memory."""
        return is_same(seen, seen_proof(self._nonce))

    def place(self, payload: Any, n_bytes: int) -> tuple[int, int] | None:
        """Copy a payload into a free slot; return the slot's offset and its stamp, or None if it is full."""
        slots = self.slots
        offset = slots.take(n_bytes)
        if offset is None:
            if slots.n_used:
                return None
            for old in slots.clear():
                os.pwrite(self._fd, _NO_STAMP, old)
            offset = slots.take(n_bytes)
            if offset is None:
                return None
        self._last_stamp = stamp = self._last_stamp + 1
        # First the stamp, by a system call: it orders these writes for a reader on another core.
        os.pwrite(self._fd, STAMP.pack(stamp), offset)
        start = offset + HEAD_BYTES
        self._view[start : start + n_bytes] = memoryview(payload).cast("B")
        return offset, stamp

    def close(self) -> None:
        """Give the memory back; readers keep what they have open until they close it."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._view.release()
            self._map.close()
            os.close(fd)


def _memfd() -> int:
    """Return a new memfd that can be sealed.

    Raises:
        OSError: The kernel gives none, or this Python does not offer it.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, "this Python has no os.memfd_create")
    return os.memfd_create(MEMORY_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
