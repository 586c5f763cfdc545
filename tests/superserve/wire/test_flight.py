"""The flight record's bytes: what is written is read, and what is cut short is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve.errors import WireError
from superserve.wire.flight import (
    Missed,
    RanBatch,
    SentBatch,
    Waiting,
    batch_bytes,
    entries_of,
    miss_bytes,
    report_bytes,
    waiting_bytes,
)

I64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def waiting(draw: st.DrawFn) -> Waiting:
    """Draw a stretch of queries."""
    n = draw(st.integers(1, 5))

    def column(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.lists(values, min_size=n, max_size=n)))

    return Waiting(
        draw(st.integers(0, 2**32 - 1)), draw(I64), draw(I64), column(st.integers(0, 2**64 - 1)), column(I64),
        column(st.integers(0, 2**16 - 1)) if draw(st.booleans()) else None,
        column(st.integers(0, 255)) if draw(st.booleans()) else None,
    )  # fmt: skip


def written(one: Waiting) -> bytes:
    """Return a stretch as bytes."""
    return waiting_bytes(
        one.client, one.arrived_ns, one.sent_ns, struct.pack(f"<{len(one.ids)}Q", *one.ids),
        list(one.deadlines_ns), None if one.floors is None else list(one.floors),
        None if one.classes is None else bytes(one.classes),
    )  # fmt: skip


@settings(max_examples=30)
@given(
    stretches=st.lists(waiting(), max_size=4), reason=st.text(max_size=40), numbers=st.tuples(I64, I64, I64)
)
def test_what_is_written_is_read(
    stretches: list[Waiting], reason: str, numbers: tuple[int, int, int]
) -> None:
    """Each kind of entry comes back as it was, in order."""
    one, two, three = numbers
    data = batch_bytes(one, 7, 3, two, three, one, [written(each) for each in stretches])
    data += report_bytes(one, two, three, one, two, three)
    expected: list[object] = [SentBatch(one, 7, 3, two, three, one, tuple(stretches)),
                              RanBatch(one, two, three, one, two, three)]  # fmt: skip
    for each in stretches:
        data += miss_bytes(3, one, two, three, one, reason, written(each))
        expected.append(Missed(3, one, two, three, one, reason, each))

    assert list(entries_of(data)) == expected


def test_a_record_that_is_cut_short_is_refused() -> None:
    """Whatever is missing at the end, the error says where."""
    one = Waiting(1, 2, 3, (4, 5), (6, 7), (1, 2), (3, 4))
    data = batch_bytes(1, 0, 0, 1, 2, 3, [written(one)])

    for length in range(1, len(data)):
        with pytest.raises(WireError, match=f"cut short near byte 0 of {length}"):
            list(entries_of(data[:length]))


def test_other_bytes_are_refused() -> None:
    """A kind that does not exist names itself and its place."""
    with pytest.raises(WireError, match="byte 0: expected an entry of kind 1 to 4, got 9"):
        list(entries_of(b"\x09"))


def test_a_long_reason_is_cut() -> None:
    """A reason takes 300 bytes at most, even if that splits a character."""
    data = miss_bytes(3, 1, 2, 3, 4, "ä" * 400, written(Waiting(1, 2, 3, (4,), (6,))))

    (entry,) = entries_of(data)
    assert isinstance(entry, Missed)
    assert len(entry.reason) == 150
