"""Another process's memory, read by a router or a worker: checked before it is opened, never mapped."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from superserve.errors import SuperServeError
from superserve.shared.offers import NONCE_BYTES, is_same, offered_proof, seen_proof
from superserve.shared.slots import FIRST_OFFSET, HEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from superserve.shared.offers import MemoryOffer

MEMORY_NAME = "superserve-payloads"
"""Of the memfd; the kernel shows it as /memfd:superserve-payloads."""
MAGIC = b"SSPAYLD1"
"""The first bytes of a memory; the nonce follows."""
STAMP = struct.Struct("<Q")
MOST_BYTES = 256 << 20
"""Size of the largest memory that is accepted."""

# By number: a Python that was built for an old C library does not have these names.
_F_GET_SEALS = 1034
F_SEAL_SHRINK = 2
"""The seal by which a file cannot shrink."""
_LINK = f"/memfd:{MEMORY_NAME} (deleted)"


class UnseenMemoryError(SuperServeError):
    """A memory that this process cannot read, or that is not what its offer says."""


class ForeignMemory:
    """A memory that another process offers.

    It closes itself once nothing refers to it: its connection, or a query in it that has not ended.

    Args:
        offer: As received.
        on_close: Called with its number when it closes.

    Raises:
        UnseenMemoryError: It is on another host, another user's, or not what it should be.

    Attributes:
        offer: What was checked.
        seen: The proof that this process sees it.
    """

    __slots__ = ("_fd", "_on_close", "offer", "seen")

    def __init__(self, offer: MemoryOffer, on_close: Callable[[int], None] | None = None) -> None:
        self._fd = -1
        self._on_close = on_close
        self.offer = offer
        try:
            self._fd = _opened(offer)
            nonce = _checked(self._fd, offer)
        except (OSError, ValueError, OverflowError) as error:  # the last two: numbers that are no descriptor
            self._on_close = None
            self.close()
            raise UnseenMemoryError(f"memory {offer.memory}: {error}") from error
        self.seen = seen_proof(nonce)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a memory that was closed reads nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            if self._on_close is not None:
                self._on_close(self.offer.memory)

    def contains(self, places: Sequence[int], sizes: Sequence[int]) -> bool:
        """Return whether descriptors lie within the memory, as far as one message may refer to it.

        Args:
            places: Offset and stamp of each slot, alternating.
            sizes: Bytes of each payload.
        """
        n_bytes = self.offer.n_bytes
        # Slots do not overlap, so a message cannot hold more than the memory: a few bytes must not make
        # a worker copy gigabytes.
        if sum(sizes) > n_bytes - FIRST_OFFSET:
            return False
        for offset, size in zip(places[::2], sizes, strict=True):
            if not FIRST_OFFSET <= offset <= n_bytes - HEAD_BYTES - size:
                return False
        return True

    def read(self, place: tuple[int, int], into: Any) -> bool:
        """Copy a payload; False if its slot has been used again, so that the copy may be torn.

        Args:
            place: Offset and stamp of its slot.
            into: A writable buffer of the payload's size.
        """
        offset, stamp = place
        try:
            # In this order: the next payload's stamp is written before its first byte.
            n_read = os.preadv(self._fd, [into], offset + HEAD_BYTES)
            return n_read == len(into) and os.pread(self._fd, STAMP.size, offset) == STAMP.pack(stamp)
        except (OSError, OverflowError):  # the latter: an offset beyond any file
            return False


def _opened(offer: MemoryOffer) -> int:
    """Open the memory, once it is clear that this has no side effect, as opening a device may."""
    if offer.n_bytes > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_BYTES} bytes, got {offer.n_bytes}")
    theirs = f"/proc/{offer.pid}/fd/{offer.fd}"
    if str(Path(theirs).readlink()) != _LINK:  # a look at the name asks no file system, which may hang
        raise ValueError("expected a memory of a client, got another file")
    handle = os.open(theirs, os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        own = f"/proc/self/fd/{handle}"
        if not stat.S_ISREG(found.st_mode) or str(Path(own).readlink()) != _LINK:
            raise ValueError("expected a memory of a client, got another file")
        if found.st_uid != os.geteuid():
            raise ValueError(f"expected user {os.geteuid()}'s, got {found.st_uid}'s")
        if found.st_size != offer.n_bytes:
            raise ValueError(f"expected {offer.n_bytes} bytes, got {found.st_size}")
        return os.open(own, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(handle)


def _checked(fd: int, offer: MemoryOffer) -> bytes:
    """Return the nonce of an opened memory; its size cannot shrink, and its offer knows its content."""
    # Fails for what is no memfd, such as a file of that name on a file system that may hang.
    if not fcntl.fcntl(fd, _F_GET_SEALS) & F_SEAL_SHRINK:
        raise ValueError("expected a memory that is sealed against shrinking")
    if os.fstat(fd).st_size != offer.n_bytes:  # it may have shrunk before it was sealed
        raise ValueError(f"expected {offer.n_bytes} bytes")
    head = os.pread(fd, len(MAGIC) + NONCE_BYTES, 0)
    nonce = head[len(MAGIC) :]
    if len(nonce) != NONCE_BYTES or head[: len(MAGIC)] != MAGIC:
        raise ValueError("expected a memory of a client")
    if not is_same(offer.proof, offered_proof(nonce)):
        raise ValueError("the offer does not know its content")
    return nonce
