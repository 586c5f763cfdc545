"""A worker copies the payloads of a batch out of a client's memory, or refuses those that are gone."""

from __future__ import annotations

import os
import struct
from array import array
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gpu_worker.serve import memories as module
from gpu_worker.serve.compute import run_batch
from gpu_worker.serve.memories import BatchBuffers, WorkerMemories
from superserve.errors import WireError
from superserve.shared.offers import MemoryAnswer
from superserve.shared.owned import OwnedMemory
from superserve.subnet import TensorSpec
from superserve.wire import VARIED, Control, Directive, Kind, Segment, SharedPayloads, Status, decode, encode
from tests.superserve.shared.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    import numpy.typing as npt

SLACK_NS = 10**10
NUMBER = 77


@pytest.fixture
def owned() -> Iterator[OwnedMemory]:
    """Give a client's memory."""
    memory = OwnedMemory(NUMBER, 1 << 20)
    yield memory
    memory.close()


def memories(owned: OwnedMemory) -> WorkerMemories:
    """Return a worker's memories, with this one open."""
    found = WorkerMemories(Counter(), is_allowed=True)
    answer = found.share(Control(Kind.SHARE, owned.offer.body()))
    assert answer is not None
    assert owned.is_seen_by(MemoryAnswer.from_body(answer.body).seen)
    return found


def place(owned: OwnedMemory, payload: bytes) -> tuple[int, int]:
    """Place a payload."""
    placed = owned.place(payload, len(payload))
    assert placed is not None
    return placed


def segment(places: Sequence[tuple[int, int]], sizes: Sequence[int], number: int = NUMBER) -> Segment:
    """Return a segment whose payloads lie in a memory."""
    n = len(places)
    each = sizes[0] if len(set(sizes)) == 1 else VARIED
    return Segment(
        n, each, False, 0, bytes(8 * n), array("q", [SLACK_NS] * n).tobytes(), (),
        array("I", sizes).tobytes() if each == VARIED else None,
        SharedPayloads(number, b"".join(struct.pack("<QQ", *one) for one in places)),
    )  # fmt: skip


def directive(*segments: Segment) -> Directive:
    """Return a directive as a worker receives it."""
    n = sum(one.count for one in segments)
    message = decode(encode(Directive(1, 1, 0, 0, n, list(segments))))
    assert isinstance(message, Directive)
    return message


@pytest.mark.parametrize("sizes", [(40_000,), (40_000,) * 3, (40_000, 50_000, 33_000)])
def test_a_segments_payloads_are_copied_end_to_end(owned: OwnedMemory, sizes: tuple[int, ...]) -> None:
    """A model takes this buffer as a batch without another copy; segments with frames stay as they are."""
    payloads = [os.urandom(size) for size in sizes]
    places = [place(owned, payload) for payload in payloads]
    in_frames = Segment(1, 5, False, 0, bytes(8), struct.pack("<q", SLACK_NS), [b"frame"])

    message = directive(segment(places, sizes), in_frames)
    memories(owned).fill(message)

    assert [bytes(one) for one in message.payload_list()] == [*payloads, b"frame"]
    assert message.segments[0].packed
    assert bytes(message.segments[0].payloads[0]) == b"".join(payloads)


class Summing:
    """A model that adds up its input's bytes; it counts what it has run."""

    input_spec = TensorSpec("uint8", (40_000,))
    output_spec = TensorSpec("int64", ())

    def __init__(self) -> None:
        self.ran: list[int] = []

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the sums."""
        del subnet
        self.ran += batch[:, 0].tolist()
        sums: npt.NDArray[Any] = batch.sum(axis=1, dtype=np.int64)
        return sums


def test_a_query_whose_slot_was_used_again_is_refused_and_the_others_run(owned: OwnedMemory) -> None:
    """This worker lost the race for it: the copy may be torn, and the model never sees it."""
    own = memories(owned)
    places = [place(owned, bytes([i]) * 40_000) for i in (1, 2, 3)]
    message = directive(segment(places, [40_000] * 3))
    owned.slots.give_back(places[1][0])
    assert place(owned, b"\x09" * 40_000)[0] == places[1][0]

    own.fill(message)

    model = Summing()
    outcome = run_batch(model, message, 0)
    assert outcome.statuses is not None
    assert list(outcome.statuses) == [Status.OK, Status.INVALID, Status.OK]
    assert model.ran == [1, 3]
    assert own._counts == {"payloads taken back": 1}


@pytest.mark.parametrize("why", ["never offered", "gone", "outside", "more than the memory", "not filled"])
def test_places_that_cannot_be_read_refuse_their_queries(
    owned: OwnedMemory, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a router says, the worker lives: it takes no buffer for them, and runs no model on them."""

    def refuse(_self: BatchBuffers, n_bytes: int) -> memoryview:
        raise AssertionError(f"{n_bytes} bytes for payloads that are not there")

    monkeypatch.setattr(BatchBuffers, "take", refuse)
    own = memories(owned)
    placed, sizes, number = place(owned, bytes(40_000)), [40_000] * 2, NUMBER
    if why == "never offered":
        number = 78
    elif why == "gone":
        assert own.share(Control(Kind.SHARE, {"gone": [NUMBER, 99]})) is None
    elif why == "outside":
        placed = (2**64 - 1, 1)
    elif why == "more than the memory":
        sizes = [2**31] * 2
    message = directive(segment([placed] * 2, sizes, number))

    if why != "not filled":
        own.fill(message)

    assert [len(payload) for payload in message.payload_list()] == [0, 0]
    outcome = run_batch(Summing(), message, 0)
    assert outcome.statuses is not None
    assert list(outcome.statuses) == [Status.INVALID] * 2


def test_another_routers_memories_are_closed(owned: OwnedMemory) -> None:
    """Under one epoch they stay; with the next, and without a router, no descriptor is left."""
    before = open_descriptors()
    own = WorkerMemories(Counter(), is_allowed=True)
    for epoch in (1, 2, None):
        own.follow(epoch)
        own.share(Control(Kind.SHARE, owned.offer.body()))
        own.follow(epoch)
        assert own.n_open == 1
    own.follow(3)
    assert (own.n_open, open_descriptors()) == (0, before)


def test_a_worker_without_shared_memory_opens_none(owned: OwnedMemory) -> None:
    """Its answer is as from another host."""
    own = WorkerMemories(Counter(), is_allowed=False)

    answer = own.share(Control(Kind.SHARE, owned.offer.body()))

    assert answer is not None
    assert MemoryAnswer.from_body(answer.body) == MemoryAnswer(NUMBER, "")
    assert own.n_open == 0


@pytest.mark.parametrize("body", [{}, {"gone": 5}, {"gone": ["x"]}, {"memory": 1}, {"memory": -1, "pid": 1}])
def test_a_malformed_share_is_a_wire_error(owned: OwnedMemory, body: dict[str, Any]) -> None:
    """The server counts it and goes on."""
    with pytest.raises(WireError, match="share"):
        memories(owned).share(Control(Kind.SHARE, body))


def test_an_offer_that_comes_again_replaces_the_first(owned: OwnedMemory) -> None:
    """No descriptor is lost."""
    before = open_descriptors()
    own = memories(owned)
    own.share(Control(Kind.SHARE, owned.offer.body()))
    assert len(open_descriptors()) == len(before) + 1
    own.close()
    assert open_descriptors() == before


def address(view: memoryview) -> int:
    """Return where a buffer begins."""
    return np.frombuffer(view, np.uint8).ctypes.data


def test_a_batchs_buffer_is_used_again_once_nothing_refers_to_it() -> None:
    """A part of it, or an array on it as a model makes one, keeps it; the last to go gives it back."""
    buffers = BatchBuffers()
    view = buffers.take(100_000)
    where, part = address(view), view[50_000:]
    array_on_it = np.frombuffer(part, np.float32)
    del view
    assert address(buffers.take(100_000)) != where
    del part
    assert address(buffers.take(100_000)) != where

    del array_on_it

    assert address(buffers.take(99_000)) == where, "of about the same size"
    assert buffers._lent == {}


def test_spare_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a burst of batches the rest goes back to the system."""
    monkeypatch.setattr(module, "SPARE_BYTES", 1_000_000)
    buffers = BatchBuffers()
    views = [buffers.take(200_000) for _ in range(20)]
    del views

    spare = sum(len(whole) for of in buffers._spare.values() for whole in of)

    assert 200_000 <= spare == buffers._spare_bytes <= 1_000_000
