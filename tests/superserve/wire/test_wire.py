"""The wire: what is encoded is decoded, and what is mangled is a WireError and nothing else."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve import wire
from superserve.errors import WireError
from superserve.wire import VARIED, Kind, decode, encode
from tests.superserve.wire.messages import CONTROL_KINDS, DATA_MESSAGES, MESSAGES, directives

PRELUDE_BYTES = 8


def frames_of(message: wire.Message) -> list[bytes]:
    """Return the message's frames, as bytes."""
    return [bytes(frame) for frame in encode(message)]


def prelude(kind: int, *, magic: bytes = b"SS", version: int = 1, flags: int = 0) -> bytes:
    """Return the first bytes of frame 0."""
    return struct.pack("<2sBBI", magic, version, kind, flags)


@settings(max_examples=250)
@given(message=MESSAGES)
def test_every_message_decodes_to_what_was_encoded(message: wire.Message) -> None:
    """A message survives its frames, as bytes and as memoryviews alike."""
    frames = frames_of(message)

    assert decode(frames) == message
    again = decode([memoryview(frame) for frame in frames])
    assert frames_of(again) == frames


@settings(max_examples=60)
@given(message=DATA_MESSAGES)
def test_a_frame_0_cut_anywhere_is_a_wire_error(message: wire.Message) -> None:
    """Every proper prefix of frame 0 is refused, and so is a byte too many."""
    first, *rest = frames_of(message)

    for end in range(len(first)):
        with pytest.raises(WireError):
            decode([first[:end], *rest])
    with pytest.raises(WireError):
        decode([first + b"\x00", *rest])


@settings(max_examples=100)
@given(message=MESSAGES, extra=st.binary(max_size=8))
def test_a_frame_missing_or_added_is_a_wire_error(message: wire.Message, extra: bytes) -> None:
    """The header says how many frames there are: not one less, not one more."""
    frames = frames_of(message)

    for missing in range(len(frames)):
        with pytest.raises(WireError):
            decode(frames[:missing] + frames[missing + 1 :] if missing == 0 else frames[:missing])
    with pytest.raises(WireError):
        decode([*frames, extra])


@settings(max_examples=100)
@given(message=MESSAGES.filter(lambda m: not isinstance(m, wire.Results)), data=st.data())
def test_a_payload_of_another_length_is_a_wire_error(message: wire.Message, data: st.DataObject) -> None:
    """Payload frames are exactly as long as the columns say."""
    frames = frames_of(message)
    if len(frames) == 1:
        return
    i = data.draw(st.integers(1, len(frames) - 1))
    frames[i] += b"\xff"

    with pytest.raises(WireError):
        decode(frames)


def decode_or_refuse(frames: list[bytes]) -> None:
    """Decode and use what comes out; a WireError is fine, anything else is a bug."""
    try:
        message = decode(frames)
    except WireError:
        return
    encode(message)
    if isinstance(message, wire.Directive):
        assert len(message.payload_list()) == message.n == len(message.slack_left_ns())


@settings(max_examples=500)
@given(message=MESSAGES, data=st.data())
def test_mangled_bytes_decode_or_are_a_wire_error(message: wire.Message, data: st.DataObject) -> None:
    """Random bytes anywhere in a sound message raise WireError or nothing."""
    frames = [bytearray(frame) for frame in frames_of(message)]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.sampled_from(frames))
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(
                st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255)
            )

    decode_or_refuse([bytes(frame) for frame in frames])


@settings(max_examples=500)
@given(
    kind=st.sampled_from(Kind) | st.integers(0, 255),
    flags=st.integers(0, 31) | st.integers(0, 2**32 - 1),
    body=st.binary(max_size=150),
    rest=st.lists(st.binary(max_size=10), max_size=4),
)
def test_random_frames_decode_or_are_a_wire_error(
    kind: int, flags: int, body: bytes, rest: list[bytes]
) -> None:
    """Noise behind a sound prelude raises WireError or nothing."""
    decode_or_refuse([prelude(kind, flags=flags) + body, *rest])


@given(frames=st.lists(st.binary(max_size=40), max_size=3))
def test_noise_is_a_wire_error(frames: list[bytes]) -> None:
    """Frames without our magic are refused, and so is no frame at all."""
    if frames and frames[0][:2] == b"SS":
        return
    with pytest.raises(WireError):
        decode(frames)


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (prelude(9, magic=b"XX") + bytes(8), "magic: expected b'SS', got b'XX'"),
        (prelude(9, version=2) + bytes(8), "version: expected 1, got 2"),
        (prelude(99) + bytes(8), "kind: unknown kind 99"),
        (prelude(0), "kind: unknown kind 0"),
        (prelude(9) + bytes(7), "ping: stamp: expected 8 bytes, got 7"),
        (b"SS\x01", "prelude: the message is too short"),
    ],
)
def test_a_foreign_message_is_refused_with_what_was_expected(first: bytes, says: str) -> None:
    """Another magic, version or kind is named together with ours."""
    with pytest.raises(WireError, match=says.replace("(", r"\(")):
        decode([first])


@pytest.mark.parametrize("kind", [k for k in Kind if k not in CONTROL_KINDS])
def test_a_hostile_count_allocates_nothing(kind: Kind) -> None:
    """A count without its bytes costs less than 64 kB, be it 4 billion or just allowed."""
    tracemalloc.start()
    try:
        for fill in (b"\xff" * 64, struct.pack("<16I", *[wire.MAX_QUERIES] * 16)):
            for flags in (0, 4, 31):
                with pytest.raises(WireError):
                    decode([prelude(kind, flags=flags) + fill, b"", b""])
        assert tracemalloc.get_traced_memory()[1] < 65_536
    finally:
        tracemalloc.stop()


def test_lengths_that_overflow_are_a_wire_error() -> None:
    """Lengths are summed in 64 bits: 2 x 2**31 is not 0."""
    message = wire.Queries(
        1, 0, 2, bytes(16), bytes(16), VARIED, [b""], lengths=struct.pack("<2I", 1 << 31, 1 << 31)
    )

    with pytest.raises(WireError, match="frame 0: expected 4294967296 bytes, got 0"):
        decode(frames_of(message))


@pytest.mark.parametrize("slack_ns", [wire.MAX_SLACK_NS + 1, -wire.MAX_SLACK_NS - 1, 2**63 - 1, -(2**63)])
def test_a_slack_beyond_a_day_is_a_wire_error(slack_ns: int) -> None:
    """A slack of more than a day is a unit mistaken, and never reaches arithmetic."""
    message = wire.Queries(1, 0, 1, bytes(8), struct.pack("<q", slack_ns), 0, [b""])

    with pytest.raises(WireError, match="slacks"):
        decode(frames_of(message))


@pytest.mark.parametrize("field", ["waited_ns", "executing_ns"])
def test_a_negative_duration_is_a_wire_error(field: str) -> None:
    """A worker cannot push the router's estimates up with durations below 0."""
    row = wire.DoneRow(1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, b"")
    setattr(row, field, -1)

    with pytest.raises(WireError, match="duration"):
        decode(frames_of(wire.Done(1, [row])))


@pytest.mark.parametrize("kind", CONTROL_KINDS)
@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_a_control_message_carries_a_json_object(kind: Kind, body: bytes) -> None:
    """Whatever is not a JSON object is refused."""
    with pytest.raises(WireError):
        decode([prelude(kind), body])


def test_a_control_message_is_not_another_kind() -> None:
    """A Control of a kind with columns is refused before it is sent."""
    with pytest.raises(WireError, match="PING"):
        encode(wire.Control(Kind.PING, {}))


def test_json_beyond_the_limit_is_not_parsed() -> None:
    """JSON of more than MAX_JSON_BYTES is refused by its length."""
    with pytest.raises(WireError, match="at most"):
        decode([prelude(Kind.HELLO), b" " * (wire.MAX_JSON_BYTES + 1)])


@given(message=directives())
def test_a_directive_hands_out_payloads_and_slacks_in_order(message: wire.Directive) -> None:
    """Packed or framed, of one length or of many: payloads and slacks come in the order of the ids."""
    decoded = decode(frames_of(message))
    assert isinstance(decoded, wire.Directive)

    whole = b"".join(bytes(p) for s in message.segments for p in s.payloads)
    parts = decoded.payload_list()
    assert len(parts) == message.n
    assert b"".join(bytes(part) for part in parts) == whole
    expected = [
        slack - s.elapsed_ns for s in message.segments for slack in np.frombuffer(s.slacks, "<i8").tolist()
    ]
    assert decoded.slack_left_ns().tolist() == expected


def test_payloads_are_not_copied() -> None:
    """What a directive hands out are views of the frames that arrived."""
    frame = b"abcdef"
    segment = wire.Segment(2, VARIED, True, 0, bytes(16), bytes(16), [frame], struct.pack("<2I", 2, 4))
    first, second = wire.Directive(1, 1, 0, 0, 2, [segment]).payload_list()

    assert isinstance(first, memoryview)
    assert isinstance(second, memoryview)
    assert first.obj is frame
    assert (bytes(first), bytes(second)) == (b"ab", b"cdef")


def test_kinds_and_statuses_keep_their_numbers() -> None:
    """A number once given is never given to another kind or status."""
    assert [kind.value for kind in Kind] == list(range(1, 15))
    assert [status.name for status in wire.STATUSES] == [
        *("OK", "LATE", "EXPIRED", "INFEASIBLE", "OVERLOADED"),
        *("FAILED", "WORKER_LOST", "INVALID", "CANCELLED", "DRAINING"),
    ]
