"""What is encoded is decoded, and has the bytes that the specification says."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings

from superserve import wire
from superserve.errors import WireError
from superserve.wire import Kind, Pong, decode, encode, layout
from tests.effort import examples
from tests.superserve.wire.messages import MESSAGES, frames_of


@settings(max_examples=examples(250))
@given(message=MESSAGES)
def test_every_message_decodes_to_what_was_encoded(message: wire.Message) -> None:
    """A message survives its frames, as bytes and as memoryviews alike."""
    frames = frames_of(message)

    assert decode(frames) == message
    again = decode([memoryview(frame) for frame in frames])
    assert frames_of(again) == frames


def test_a_control_message_is_not_another_kind() -> None:
    """A Control of a kind with columns is refused before it is sent."""
    with pytest.raises(WireError, match="PING"):
        encode(wire.Control(Kind.PING, {}))


def test_small_queries_are_one_frame_of_these_bytes() -> None:
    """Prelude, header, columns and payloads, written out."""
    ids, slacks = struct.pack("<2Q", 7, 8), struct.pack("<2q", 5, -6)
    message = wire.Queries(11, -12, 2, ids, slacks, 3, [b"abcdef"])

    expected = struct.pack("<2sBBHH", b"SS", 2, 3, 32, 24) + struct.pack("<QqII", 11, -12, 2, 3)
    assert frames_of(message) == [expected + ids + slacks + b"abcdef"]


def test_a_report_of_a_batch_is_one_frame_of_these_bytes() -> None:
    """Header, row, and the output behind it."""
    row = wire.DoneRow(1, 2, 3, 4, 1, 6, 7, 8, 9, 10, 2, b"ok", bytes([0]))

    header = struct.pack("<2sBBHH", b"SS", 2, 8, 32, 16) + struct.pack("<QIH2x", 5, 1, 64)
    known = struct.pack("<QHHHIqqQQqIH", 1, 2, 3, 4, 1, 6, 7, 8, 9, 10, 2, 1)
    assert frames_of(wire.Done(5, [row])) == [header + known + bytes([0]) + b"ok"]


def test_answers_of_one_group_and_of_several_have_one_form() -> None:
    """A group alone is encoded like a group among others."""
    ok = wire.Group(2, 0, 3, 4, 5.0, 6, 7, 8, 9, bytes(16), 1, b"ab")
    no = wire.Group(1, 2, 0, 0, 0.0, 6, 0, 0, 0, bytes(8), 0, b"late", None, struct.pack("<I", 6))

    def rows(count: int, status: int, subnet: int, size: int, *rest: float) -> bytes:
        return struct.pack("<IB3xHHfqqqqI", count, status, subnet, size, *rest)

    prelude = struct.pack("<2sBBHH", b"SS", 2, 4, 32, 20)
    first, second = rows(2, 0, 3, 4, 5.0, 6, 7, 8, 9, 1), rows(1, 2, 0, 0, 0.0, 6, 0, 0, 0, 4)
    alone = prelude + struct.pack("<QIIH2x", 1, 2, 1, 52) + first + bytes(16) + b"ab"
    assert frames_of(wire.Results(1, [ok])) == [alone]
    prelude = struct.pack("<2sBBHH", b"SS", 2, 4, 32 + 64, 20)
    both = prelude + struct.pack("<QIIH2x", 1, 3, 2, 52) + first + second + bytes(24)
    both += struct.pack("<3I", 0, 0, 6) + b"ab" + b"late"
    assert frames_of(wire.Results(1, [ok, no])) == [both]


@pytest.mark.parametrize("n_groups", [1, 2])
def test_large_outputs_ride_in_frames_of_their_own(n_groups: int) -> None:
    """They are handed on as they are, not copied."""
    output = bytes(wire.GATHER_BYTES)
    group = wire.Group(1, 0, 0, 1, 0.0, 0, 0, 0, 0, bytes(8), len(output), output)

    first, *rest = encode(wire.Results(1, [group] * n_groups))
    assert len(rest) == n_groups
    assert all(frame is output for frame in rest)
    assert decode([first, *rest]) == wire.Results(1, [group] * n_groups)


@pytest.mark.parametrize("price", [None, 0.0, 0.75])
def test_a_pong_may_state_a_price(price: float | None) -> None:
    """Routers with others state it; a receiver that does not know it reads the rest."""
    (frame,) = encode(Pong(5, 6, price))

    assert decode([frame]) == Pong(5, 6, price)
    assert len(frame) == layout.PRELUDE.size + (16 if price is None else 24)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_is_skipped(price: float) -> None:
    """It is of no use to a worker, and no reason to drop the PONG."""
    assert decode(encode(Pong(5, 6, price))) == Pong(5, 6)
