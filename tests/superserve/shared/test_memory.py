"""A memory as its owner writes it and another reads it; what is not one is refused, unread."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from superserve.shared.foreign import MAGIC, MEMORY_NAME, MOST_BYTES, ForeignMemory, UnseenMemoryError
from superserve.shared.offers import NONCE_BYTES, MemoryOffer, offered_proof
from superserve.shared.owned import OwnedMemory
from superserve.shared.slots import FIRST_OFFSET, HEAD_BYTES
from tests.superserve.shared.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

N_BYTES = 1 << 20
NONCE = bytes(range(NONCE_BYTES))
SEAL = fcntl.F_SEAL_SHRINK


@pytest.fixture
def owned() -> Iterator[OwnedMemory]:
    """Give a memory of this process."""
    memory = OwnedMemory(7, N_BYTES)
    yield memory
    memory.close()


def read(memory: ForeignMemory, place: tuple[int, int], size: int) -> bytes | None:
    """Return a payload, or None if its slot was used again."""
    into = bytearray(size)
    return bytes(into) if memory.read(place, into) else None


def test_what_one_places_the_other_reads(owned: OwnedMemory) -> None:
    """Every byte, of payloads of several sizes at once."""
    foreign = ForeignMemory(owned.offer)
    payloads = [os.urandom(size) for size in (1, 4_096, 40_000, 150_528)]
    places = [owned.place(payload, len(payload)) for payload in payloads]

    for payload, place in zip(payloads, places, strict=True):
        assert place is not None
        assert read(foreign, place, len(payload)) == payload
    assert owned.is_seen_by(foreign.seen)
    assert not owned.is_seen_by(offered_proof(NONCE))
    assert not owned.is_seen_by("")


def test_a_slot_that_is_used_again_reads_as_taken_back(owned: OwnedMemory) -> None:
    """The old descriptor fails, the new one gives the new payload; until then the old one stays whole."""
    foreign = ForeignMemory(owned.offer)
    first = owned.place(b"a" * 50_000, 50_000)
    assert first is not None
    owned.slots.give_back(first[0])
    assert read(foreign, first, 50_000) == b"a" * 50_000

    second = owned.place(b"b" * 50_000, 50_000)

    assert second is not None
    assert second[0] == first[0]
    assert read(foreign, first, 50_000) is None
    assert read(foreign, second, 50_000) == b"b" * 50_000


def test_a_slot_in_which_others_begin_now_reads_as_taken_back(owned: OwnedMemory) -> None:
    """Slots of another size cover the old one; its stamp is gone although no slot begins there any more."""
    foreign = ForeignMemory(owned.offer)
    old = []
    while (place := owned.place(b"a" * 90_000, 90_000)) is not None:
        old.append(place)
    for offset, _ in old:
        owned.slots.give_back(offset)
    assert owned.place(b"b" * 300_000, 300_000) is not None

    assert [read(foreign, place, 90_000) for place in old] == [None] * len(old)


def test_a_full_memory_takes_no_payload(owned: OwnedMemory) -> None:
    """Nor does one that is smaller than the payload."""
    assert owned.place(bytes(N_BYTES), N_BYTES) is None
    while owned.place(bytes(200_000), 200_000) is not None:
        pass
    assert owned.place(bytes(200_000), 200_000) is None


def test_a_closed_memory_leaves_nothing(owned: OwnedMemory) -> None:
    """A reader that has it open still reads, one that comes later does not."""
    offer = owned.offer
    foreign = ForeignMemory(offer)
    place = owned.place(b"a" * 5_000, 5_000)
    assert place is not None

    owned.close()

    assert read(foreign, place, 5_000) == b"a" * 5_000
    with pytest.raises(UnseenMemoryError):
        ForeignMemory(offer)


def test_a_reader_that_goes_closes_its_descriptor(owned: OwnedMemory) -> None:
    """Once, and reports it; what was refused never was open."""
    before = open_descriptors()
    closed: list[int] = []
    foreign = ForeignMemory(owned.offer, closed.append)
    assert len(open_descriptors()) == len(before) + 1

    del foreign

    assert closed == [7]
    with pytest.raises(UnseenMemoryError):
        ForeignMemory(replace(owned.offer, proof=""), closed.append)
    assert closed == [7]
    assert open_descriptors() == before


# --- hostile offers -------------------------------------------------------------------------


def offer_of(fd: int, n_bytes: int = N_BYTES, proof: str = "") -> MemoryOffer:
    """Return an offer of a descriptor of this process."""
    return MemoryOffer(7, os.getpid(), fd, n_bytes, proof or offered_proof(NONCE))


def memfd(name: str = MEMORY_NAME, *, seals: int = SEAL, size: int = N_BYTES, head: bytes = MAGIC) -> int:
    """Return a memfd as an owner makes it, but for what the caller changes."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, head + NONCE, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_what_an_owner_makes_is_accepted() -> None:
    """So each refusal below is for the one thing that differs."""
    fd = memfd()
    ForeignMemory(offer_of(fd))
    os.close(fd)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: memfd("another"), "another file"),
        (lambda: memfd(seals=fcntl.F_SEAL_GROW), "sealed"),
        (lambda: memfd(size=N_BYTES - 1), "expected 1048576 bytes, got 1048575"),
        (lambda: memfd(head=b"SSOTHER1"), "a memory of a client"),
        (lambda: os.pipe()[0], "another file"),
        (lambda: os.open("/dev/zero", os.O_RDONLY), "another file"),
        (lambda: os.open("/etc/passwd", os.O_RDONLY), "another file"),
        (lambda: socket.socket().detach(), "another file"),
        (lambda: os.open("/proc/self", os.O_RDONLY), "another file"),
    ],
    ids=["name", "seals", "size", "magic", "pipe", "device", "file", "socket", "folder"],
)
def test_what_is_no_memory_of_a_client_is_refused(make: object, says: str) -> None:
    """Without a read, a map or a wait; nothing stays open."""
    assert callable(make)
    fd = make()
    before = open_descriptors()

    with pytest.raises(UnseenMemoryError, match=says):
        ForeignMemory(offer_of(fd))

    assert open_descriptors() == before
    os.close(fd)


def test_another_file_is_told_by_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened, not even to look at: that may wait for a file system that hangs."""
    fd = memfd("another")
    opened: list[object] = []
    monkeypatch.setattr(os, "open", lambda *args: opened.append(args))

    with pytest.raises(UnseenMemoryError, match="another file"):
        ForeignMemory(offer_of(fd))

    assert opened == []
    os.close(fd)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 0}, {"pid": 2**63 - 1}, {"fd": 2**63 - 1}, {"fd": 9_999}, {"n_bytes": 0},
        {"n_bytes": 2**63 - 1}, {"n_bytes": MOST_BYTES + 1}, {"proof": ""}, {"proof": "\xe9"},
        {"proof": offered_proof(bytes(NONCE_BYTES))},
    ],
)  # fmt: skip
def test_numbers_and_proofs_that_are_guessed_are_refused(change: dict[str, int | str]) -> None:
    """A peer that does not see the memory cannot make a router open one, even if it guesses where it is."""
    fd = memfd()

    with pytest.raises(UnseenMemoryError):
        ForeignMemory(MemoryOffer(**(offer_of(fd).body() | change)))

    os.close(fd)


def test_another_users_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may open every user's, and must not."""
    fd = memfd()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)

    with pytest.raises(UnseenMemoryError, match="expected user"):
        ForeignMemory(offer_of(fd))
    os.close(fd)


def test_a_file_with_the_name_of_a_memory_is_refused(tmp_path: Path) -> None:
    """Its name alone does not make a file a memory: a file system may hang, or shrink the file."""
    path = tmp_path / f"memfd:{MEMORY_NAME} (deleted)"
    path.write_bytes(bytes(N_BYTES))
    fd = os.open(path, os.O_RDONLY)

    with pytest.raises(UnseenMemoryError):
        ForeignMemory(offer_of(fd))
    os.close(fd)


def test_a_memory_that_loses_its_pages_gives_zeros() -> None:
    """Its owner may punch holes into it, and the reader lives: it copies by reading, and maps nothing."""
    fd = memfd()
    foreign = ForeignMemory(offer_of(fd))
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(fd, 0)
    with mmap.mmap(fd, N_BYTES) as pages:
        pages[:] = b"x" * N_BYTES
        pages.madvise(mmap.MADV_REMOVE)
    into = bytearray(100)

    assert not foreign.read((N_BYTES - 50, 1), into)
    assert not foreign.read((2**40, 1), into)
    assert not foreign.read((2**63 - 1, 1), into)
    assert foreign.read((FIRST_OFFSET, 0), into)
    assert into == bytes(100)
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "sizes", "is_inside"),
    [
        (FIRST_OFFSET, [100], True),
        (FIRST_OFFSET - 1, [100], False),
        (0, [100], False),
        (N_BYTES - HEAD_BYTES - 100, [100], True),
        (N_BYTES - HEAD_BYTES - 99, [100], False),
        (2**64 - 1, [100], False),
        (FIRST_OFFSET, [2**32 - 1], False),
        (FIRST_OFFSET, [600_000, 600_000], False),  # the same slot twice: more bytes than there are
    ],
)
def test_places_lie_in_the_memory(
    owned: OwnedMemory, offset: int, sizes: list[int], *, is_inside: bool
) -> None:
    """Behind the first page, head and payload before the end, and together no more than the memory."""
    foreign = ForeignMemory(owned.offer)

    assert foreign.contains([offset, 1] * len(sizes), sizes) == is_inside
