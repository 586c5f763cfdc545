"""What is mangled is a WireError and nothing else; what a later release adds is skipped."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve import wire
from superserve.errors import WireError
from superserve.wire import VARIED, Kind, decode, encode
from superserve.wire.layout import HEADERS, MAX_EXTENSIONS
from tests.effort import examples
from tests.superserve.wire.messages import (
    CONTROL_KINDS,
    DATA_MESSAGES,
    MESSAGES,
    PRELUDE,
    ROWS,
    extended,
    extended_frames,
    frames_of,
)

EXTENDED_MESSAGES = DATA_MESSAGES.flatmap(extended_frames)


def prelude(
    kind: int, *, magic: bytes = b"SS", version: int = 2, flags: int = 0, header_bytes: int = 0
) -> bytes:
    """Return the first bytes of frame 0."""
    return PRELUDE.pack(magic, version, kind, flags, header_bytes)


@settings(max_examples=examples(60))
@given(frames=DATA_MESSAGES.map(frames_of) | EXTENDED_MESSAGES)
def test_a_frame_0_cut_anywhere_is_a_wire_error(frames: list[bytes]) -> None:
    """Every proper prefix of frame 0 is refused, and so is a byte too many."""
    first, *rest = frames

    for end in range(len(first)):
        with pytest.raises(WireError):
            decode([first[:end], *rest])
    with pytest.raises(WireError):
        decode([first + b"\x00", *rest])


@given(message=MESSAGES, extra=st.binary(max_size=8))
def test_a_frame_missing_or_added_is_a_wire_error(message: wire.Message, extra: bytes) -> None:
    """The header says how many frames there are: not one less, not one more."""
    frames = frames_of(message)

    for missing in range(len(frames)):
        with pytest.raises(WireError):
            decode(frames[:missing] + frames[missing + 1 :] if missing == 0 else frames[:missing])
    with pytest.raises(WireError):
        decode([*frames, extra])


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


@settings(max_examples=examples(500))
@given(frames=MESSAGES.map(frames_of) | EXTENDED_MESSAGES, data=st.data())
def test_mangled_bytes_decode_or_are_a_wire_error(frames: list[bytes], data: st.DataObject) -> None:
    """Random bytes anywhere in a sound message, of this or a later release, raise WireError or nothing."""
    mangled = [bytearray(frame) for frame in frames]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.sampled_from(mangled))
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(
                st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255)
            )

    decode_or_refuse([bytes(frame) for frame in mangled])


@settings(max_examples=examples(500))
@given(
    kind=st.sampled_from(Kind) | st.integers(0, 255),
    flags=st.integers(0, 255) | st.integers(0, 2**16 - 1),
    header_bytes=st.integers(0, 40) | st.integers(0, 2**16 - 1),
    body=st.binary(max_size=150),
    rest=st.lists(st.binary(max_size=10), max_size=4),
)
def test_random_frames_decode_or_are_a_wire_error(
    kind: int, flags: int, header_bytes: int, body: bytes, rest: list[bytes]
) -> None:
    """Noise behind a sound prelude raises WireError or nothing."""
    decode_or_refuse([prelude(kind, flags=flags, header_bytes=header_bytes) + body, *rest])


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
        (prelude(9, version=3) + bytes(8), "wire version: expected 2, got 3: both sides need releases"),
        (prelude(99) + bytes(8), "kind: unknown kind 99"),
        (prelude(0), "kind: unknown kind 0"),
        (prelude(9, header_bytes=8) + bytes(7), "ping: header: expected 8 bytes, got 7"),
        (prelude(9, header_bytes=7) + bytes(8), "ping: header: expected 8 bytes, got 7"),
        (prelude(17), "kind: RUN_START is between load generators"),
        (b"SS\x02", "prelude: the message is too short"),
    ],
)
def test_a_foreign_message_is_refused_with_what_was_expected(first: bytes, says: str) -> None:
    """Another magic, version or kind is named together with ours."""
    with pytest.raises(WireError, match=says.replace("(", r"\(")):
        decode([first])


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_count_allocates_nothing(kind: Kind) -> None:
    """A count without its bytes costs less than 64 kB, be it 4 billion or just allowed."""
    tracemalloc.start()
    try:
        for fill in (b"\xff" * 64, struct.pack("<16I", *[wire.MAX_QUERIES] * 16)):
            for flags in (0, 4, 31, 255):
                with pytest.raises(WireError):
                    decode([prelude(kind, flags=flags, header_bytes=HEADERS[kind].size) + fill, b"", b""])
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


# --- what later releases add ----------------------------------------------------------------


@settings(max_examples=examples(250))
@given(message=DATA_MESSAGES, data=st.data())
def test_what_a_later_release_adds_is_skipped(message: wire.Message, data: st.DataObject) -> None:
    """A longer header, longer rows and unknown columns leave what is known as it is."""
    frames = data.draw(extended_frames(message))

    assert decode(frames) == message
    assert decode([memoryview(frame) for frame in frames]) == message


PULL = wire.Pull(1, [wire.PullRow(slot, 1, 0, 0, 2, 3, 4, 5, 0.5, 40.0) for slot in range(3)])


def test_rows_may_have_gaps_and_columns_any_tag() -> None:
    """Each of the three ways to add something, alone and together."""
    for header in (b"", b"12345678"):
        for row in (b"", b"1234567"):
            for tagged in (None, (), (b"", b"abc"), (b"x",) * MAX_EXTENSIONS):
                assert decode(extended(PULL, header=header, row=row, tagged=tagged)) == PULL


@pytest.mark.parametrize("kind", ROWS)
def test_rows_shorter_than_their_known_fields_are_refused(kind: Kind) -> None:
    """A stride that is too small would read one row's fields from the next."""
    fixed, count_at, stride_at = ROWS[kind]
    fields = [1] * (stride_at + 1)
    fields[stride_at] = {Kind.RESULTS: 51, Kind.PULL: 47, Kind.DIRECTIVE: 23, Kind.DONE: 63}[kind]
    first = prelude(kind, header_bytes=fixed.size) + fixed.pack(*fields) + bytes(200)
    expected = fields[stride_at] + 1

    with pytest.raises(WireError, match=f"row_bytes: expected {expected} or more, got {expected - 1}"):
        decode([first])
    assert fields[count_at] == 1


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (b"", "extensions: expected 4 bytes, got 0"),
        (b"\xff\xff\xff\xff", "extensions: expected 4294967295 bytes, got 0"),
        (struct.pack("<I", 7) + bytes(7), "extension: expected 8 bytes, got 7"),
        (struct.pack("<IH2xI", 8, 1, 1), "extension: the last is 1 bytes too long"),
        (struct.pack("<IH2xI", 8, 1, 2**32 - 1), "extension: the last is 4294967295 bytes too long"),
        (struct.pack("<IH2xI", 8, 1, 0) + b"x", "1 bytes follow the last column"),
        (struct.pack("<I", 8 * 65) + bytes(8 * 65), "expected at most 64 extension columns"),
    ],
    ids=["missing", "overflow", "torn", "long", "sum", "behind", "many"],
)
def test_extension_columns_that_do_not_add_up_are_refused(block: bytes, says: str) -> None:
    """Each column lies in the block, and the block in the frame."""
    (first,) = frames_of(PULL)
    magic, version, kind, flags, header_bytes = PRELUDE.unpack_from(first)
    flags |= 128

    with pytest.raises(WireError, match=says):
        decode([PRELUDE.pack(magic, version, kind, flags, header_bytes) + first[8:] + block])


def test_a_flag_of_a_later_release_adds_no_bytes() -> None:
    """It is ignored: what adds bytes is a header, a row or an extension column."""
    (first,) = frames_of(PULL)
    magic, version, kind, flags, header_bytes = PRELUDE.unpack_from(first)

    for bit in range(8, 16):
        again = PRELUDE.pack(magic, version, kind, flags | 1 << bit, header_bytes) + first[8:]
        assert decode([again]) == PULL


@pytest.mark.parametrize("kind", CONTROL_KINDS)
def test_a_control_message_may_get_a_header(kind: Kind) -> None:
    """It has none today; what a later release puts there is skipped, and nothing may follow it."""
    assert decode([prelude(kind, header_bytes=3) + b"abc", b"{}"]) == wire.Control(kind, {})
    with pytest.raises(WireError, match="follow the header"):
        decode([prelude(kind, header_bytes=3) + b"abcd", b"{}"])


@pytest.mark.parametrize("kind", CONTROL_KINDS)
@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_a_control_message_carries_a_json_object(kind: Kind, body: bytes) -> None:
    """Whatever is not a JSON object is refused."""
    with pytest.raises(WireError):
        decode([prelude(kind), body])


def test_json_beyond_the_limit_is_not_parsed() -> None:
    """JSON of more than MAX_JSON_BYTES is refused by its length."""
    with pytest.raises(WireError, match="at most"):
        decode([prelude(Kind.HELLO), b" " * (wire.MAX_JSON_BYTES + 1)])


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (b"1234567", "shared: expected 16 bytes, got 7"),
        (struct.pack("<I4xQ", 0, 7) + bytes(31), "shared: expected 32 bytes, got 31"),
        (struct.pack("<I4xQ", 1, 7) + bytes(32), "shared: segment 1: expected each once"),
        ((struct.pack("<I4xQ", 0, 7) + bytes(32)) * 2, "shared: segment 0: expected each once"),
    ],
    ids=["torn", "short", "absent", "twice"],
)
def test_places_that_do_not_add_up_are_refused(column: bytes, says: str) -> None:
    """Each query whose payload is in shared memory has exactly one place."""
    message = wire.Queries(1, 0, 2, bytes(16), bytes(16), 9, [], framed=True)
    (first,) = frames_of(message)
    magic, version, kind, flags, header_bytes = PRELUDE.unpack_from(first)
    block = struct.pack("<IH2xI", 8 + len(column), 1, len(column)) + column

    with pytest.raises(WireError, match=says):
        decode([PRELUDE.pack(magic, version, kind, flags | 128, header_bytes) + first[8:] + block])


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (bytes(33), "traced: expected rows of 32 bytes, got 33 bytes"),
        (struct.pack("<I28x", 2), "traced: expected ascending indices below 2, got 2"),
        (struct.pack("<I28xI28x", 1, 0), "traced: expected ascending indices below 2, got 0"),
        (struct.pack("<I28xI28x", 1, 1), "traced: expected ascending indices below 2, got 1"),
    ],
    ids=["torn", "beyond", "descending", "twice"],
)
def test_trace_contexts_that_do_not_add_up_are_refused(column: bytes, says: str) -> None:
    """Each is that of one query of the message."""
    message = wire.Queries(1, 0, 2, bytes(16), bytes(16), 0, [b""], traced=column)

    with pytest.raises(WireError, match=says):
        decode(frames_of(message))


def test_a_message_without_places_needs_its_payloads() -> None:
    """An empty column of places stands for no payload: the frames must be there."""
    message = wire.Queries(1, 0, 2, bytes(16), bytes(16), 9, [], framed=True)
    (first,) = frames_of(message)
    magic, version, kind, flags, header_bytes = PRELUDE.unpack_from(first)
    block = struct.pack("<IH2xI", 8, 1, 0)

    with pytest.raises(WireError, match="expected 18 bytes"):
        decode([PRELUDE.pack(magic, version, kind, flags | 128, header_bytes) + first[8:] + block])
