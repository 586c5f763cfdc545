"""A connection's memory: what goes there, what travels in frames, and when a slot is free again."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve.clock import MS, SECOND
from superserve.errors import ConfigError
from superserve.shared import placing as module
from superserve.shared.foreign import ForeignMemory
from superserve.shared.offers import VARIABLE, MemoryAnswer, is_allowed
from superserve.shared.owned import OwnedMemory
from superserve.shared.placing import FORGOTTEN_NS, SHARED_BYTES, PayloadPlacing, _part
from superserve.wire import TRACED, VARIED, Group, Queries, Results, lengths_of, uint64s
from tests.effort import examples
from tests.superserve.shared.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW_NS = 5 * SECOND


class Shared:
    """A placing whose memory a router sees, and that router's view of it."""

    def __init__(self) -> None:
        self.placing = PayloadPlacing(is_possible=True)
        self.placing.welcomed(is_asked_for=True)
        offer = self.placing.offer()
        assert offer is not None
        self.foreign = ForeignMemory(offer)
        self.placing.answered(MemoryAnswer(offer.memory, self.foreign.seen))

    def send(self, queries: Queries, now_ns: int = NOW_NS) -> list[bytes]:
        """Return the payloads of a message as a worker would get them, in order."""
        found: list[bytes] = []
        parts = self.placing.placed(queries, now_ns) if self.placing.takes(queries) else [queries]
        for part in parts:
            if part.shared is None:
                sizes = lengths_of(part.n, part.payload_bytes, part.lengths)
                data, at = b"".join(map(bytes, part.payloads)), 0
                for size in sizes:
                    found.append(data[at : at + size])
                    at += size
                continue
            places = uint64s(part.shared.places)
            sizes = lengths_of(part.n, part.payload_bytes, part.lengths)
            assert self.foreign.contains(places, sizes)
            for i, size in enumerate(sizes):
                into = bytearray(size)
                assert self.foreign.read((places[2 * i], places[2 * i + 1]), into)
                found.append(bytes(into))
        return found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make memories of 2 MiB."""
    monkeypatch.setattr(module, "OwnedMemory", lambda number: OwnedMemory(number, 2 << 20))


def message(ids: Sequence[int], payloads: Sequence[bytes], *, slack_ns: int = 36 * MS) -> Queries:
    """Return a message as a session makes it."""
    sizes = [len(payload) for payload in payloads]
    is_even = len(set(sizes)) == 1
    return Queries(
        3, NOW_NS, len(ids), array("Q", ids).tobytes(), array("q", [slack_ns] * len(ids)).tobytes(),
        sizes[0] if is_even else VARIED, list(payloads), True,
        None if is_even else array("I", sizes).tobytes(),
        array("f", range(len(ids))).tobytes(), bytes(range(len(ids))),
    )  # fmt: skip


def results(*ids: int) -> Results:
    """Return a message that ends these queries, each in a group."""
    group = (0, 0, 0, 0.0, 0, 0, 0, 0)
    return Results(3, [Group(1, *group, array("Q", [i]).tobytes(), 0, b"") for i in ids])


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_a_worker_gets_the_payloads_that_were_sent(data: st.DataObject) -> None:
    """Whatever the sizes, and however often the memory is full: in order, each whole, with its options."""
    shared, outstanding, next_id = Shared(), [], 1
    for _ in range(data.draw(st.integers(1, 8))):
        sizes = data.draw(st.lists(st.integers(SHARED_BYTES - 9, 400_000), min_size=1, max_size=6))
        ids = list(range(next_id, next_id + len(sizes)))
        next_id += len(sizes)
        payloads = [bytes([i % 251]) * size for i, size in zip(ids, sizes, strict=True)]

        assert shared.send(message(ids, payloads)) == payloads

        outstanding += ids
        ended = data.draw(st.lists(st.sampled_from(outstanding), unique=True))
        outstanding = [i for i in outstanding if i not in ended]
        shared.placing.ended(results(*ended))
    shared.placing.ended(results(*outstanding))
    assert shared.placing.n_placed == 0
    shared.placing.close()


def test_what_does_not_fit_travels_in_frames() -> None:
    """One message becomes two: the first payloads in memory, the others in frames, each with its options."""
    shared = Shared()
    payloads = [bytes([i]) * 200_000 for i in range(12)]

    first, second = shared.placing.placed(message(range(12), payloads), NOW_NS)

    assert first.shared is not None
    assert first.n == shared.placing.n_placed
    assert 0 < first.n < 12
    assert (second.shared, second.n, list(second.payloads)) == (None, 12 - first.n, payloads[first.n :])
    for column, fmt in (("ids", "Q"), ("slacks", "q"), ("min_accuracy", "f"), ("priority", "B")):
        values = [array(fmt, getattr(part, column)).tolist() for part in (first, second)]
        whole = array(fmt, getattr(message(range(12), payloads), column)).tolist()
        assert [*values[0], *values[1]] == whole
    shared.placing.close()


def test_trace_contexts_stay_with_their_queries_when_a_message_is_cut() -> None:
    """Indices count from the part's first query."""
    cut = message([1, 2, 3, 4], [b"x" * 8] * 4)
    cut.traced = b"".join([TRACED.pack(i, bytes([i]) * 28) for i in (0, 2, 3)])

    parts = [_part(cut, 0, 2), _part(cut, 1, 2), _part(cut, 2, 4)]

    found = [None if one.traced is None else list(TRACED.iter_unpack(one.traced)) for one in parts]
    assert found == [[(0, bytes(28))], None, [(0, b"\2" * 28), (1, b"\3" * 28)]]


def test_packed_payloads_are_placed_one_by_one() -> None:
    """A session joins payloads below 64 KiB; in memory each has its slot, since each ends on its own."""
    shared = Shared()
    payloads = [bytes([i]) * 40_000 for i in range(3)]
    packed = message((1, 2, 3), payloads)
    packed.payloads, packed.framed = [b"".join(payloads)], False

    assert shared.send(packed) == payloads
    assert shared.placing.n_placed == 3
    shared.placing.close()


@pytest.mark.parametrize("sizes", [(SHARED_BYTES - 1,), (SHARED_BYTES, SHARED_BYTES - 1), (0, 400_000)])
def test_small_payloads_travel_in_frames(sizes: tuple[int, ...]) -> None:
    """So does a message in which one is small; no memory is made for it."""
    placing = PayloadPlacing(is_possible=True)
    placing.welcomed(is_asked_for=True)
    assert not placing.takes(message(range(len(sizes)), [bytes(size) for size in sizes]))
    assert placing.takes(message((1, 2), [bytes(SHARED_BYTES), bytes(SHARED_BYTES + 1)]))


@pytest.mark.parametrize("why", ["not asked for", "off", "not answered", "not seen", "another's"])
def test_payloads_travel_in_frames_unless_the_router_sees_the_memory(why: str) -> None:
    """A router of an older release, the option, and an answer that is missing or wrong."""
    placing = PayloadPlacing(is_possible=why != "off")
    placing.welcomed(is_asked_for=why != "not asked for")
    offer = placing.offer()
    assert (offer is None) == (why in ("off", "not asked for"))
    if offer is not None and why != "not answered":
        seen = ForeignMemory(offer).seen if why != "not seen" else ""
        placing.answered(MemoryAnswer(offer.memory + (why == "another's"), seen))
    query = message((1,), [bytes(SHARED_BYTES)])

    assert placing.takes(query) == (offer is not None)
    assert placing.placed(query, NOW_NS) == [query]
    assert not placing.is_shared
    assert placing.offer() is None, "a router is asked once"
    placing.close()


def test_another_router_is_asked_again() -> None:
    """Until it answers, payloads travel in frames; it gets the same memory."""
    shared = Shared()
    query = message((1,), [bytes(SHARED_BYTES)])
    assert shared.placing.placed(query, NOW_NS) != [query]

    shared.placing.welcomed(is_asked_for=True)

    assert shared.placing.placed(query, NOW_NS) == [query]
    assert shared.placing.offer() == shared.foreign.offer
    shared.placing.close()


def test_a_query_that_is_sent_again_keeps_its_slot() -> None:
    """The router may still hold its first copy, and answers that one."""
    shared = Shared()
    first = shared.placing.placed(message((1,), [b"a" * 50_000]), NOW_NS)

    again = shared.placing.placed(message((1,), [b"a" * 50_000]), NOW_NS + MS)

    assert first[0].shared is not None
    assert again[0].shared == first[0].shared
    shared.placing.ended(results(1))
    assert shared.placing.n_placed == 0
    shared.placing.ended(results(1))  # the second copy's answer, if any
    shared.placing.close()


def test_a_message_that_was_not_sent_frees_its_slots() -> None:
    """But not those of queries that are sent again."""
    shared = Shared()
    (part,) = shared.placing.placed(message((1, 2), [b"a" * 50_000] * 2), NOW_NS)
    part.resubmitted = True
    shared.placing.unsent(part)
    assert shared.placing.n_placed == 2

    part.resubmitted = False
    shared.placing.unsent(part)

    assert shared.placing.n_placed == 0
    shared.placing.close()


def test_a_query_without_an_answer_loses_its_slot_at_last() -> None:
    """Long after its client gave it up, and only if the memory is full: no answer frees it any more."""
    shared = Shared()
    payloads = [bytes(400_000)] * 4
    shared.placing.placed(message(range(4), payloads, slack_ns=MS), NOW_NS)
    late = message((9,), [bytes(400_000)])
    assert shared.placing.placed(late, NOW_NS + MS + FORGOTTEN_NS) == [late]
    assert shared.placing.n_placed == 4

    (part,) = shared.placing.placed(late, NOW_NS + 2 * MS + FORGOTTEN_NS)

    assert part.shared is not None
    assert shared.placing.n_placed == 1
    shared.placing.close()


def test_a_closed_connection_leaves_no_descriptor() -> None:
    """Nor does one that never placed anything."""
    before = open_descriptors()
    shared = Shared()
    shared.send(message((1,), [bytes(50_000)]))

    shared.placing.close()
    shared.foreign.close()
    PayloadPlacing(is_possible=True).close()

    assert open_descriptors() == before


@pytest.mark.parametrize("why", ["the kernel", "Python"])
def test_without_memory_payloads_travel_in_frames(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A kernel that gives no memfd, or a Python that was built without it, costs only speed."""

    def refuse(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    if why == "Python":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", refuse)
    placing = PayloadPlacing(is_possible=True)
    placing.welcomed(is_asked_for=True)

    assert placing.offer() is None
    query = message((1,), [bytes(SHARED_BYTES)])
    assert placing.placed(query, NOW_NS) == [query]


def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the program says otherwise; a word that is neither 0 nor 1 is an error."""
    for word, expected in (("0", False), ("1", True)):
        monkeypatch.setenv(VARIABLE, word)
        assert is_allowed(None) is expected
    assert not is_allowed(False)
    monkeypatch.setenv(VARIABLE, "off")
    with pytest.raises(ConfigError, match="SUPERSERVE_SHARED_MEMORY: expected 0 or 1, got 'off'"):
        is_allowed(None)
    monkeypatch.delenv(VARIABLE)
    assert is_allowed(None)
