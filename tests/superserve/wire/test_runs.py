"""Messages between load generators: what is encoded is decoded, and all else is a WireError."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superserve import wire
from superserve.errors import VersionError, WireError
from superserve.wire import RUN_KINDS, Control, Kind, Ping, Pong, decode_run, encode_run
from superserve.wire.runs import MAX_COLUMNS
from tests.effort import examples
from tests.superserve.wire.messages import RUN_MESSAGES, frames_of

if TYPE_CHECKING:
    from superserve.wire import RunMessage

REPORT = wire.RunReport(
    (("small", 70.0),), {"FAILED": "why"}, 2, columns={"status": b"ab", "subnet": b"1234"}
)
SHARE = wire.RunShare("t", "p", "tcp://a:1", 10, 20, 30, 1, 4, 0, bytes(16))


def sent(message: RunMessage) -> list[bytes]:
    """Return the message's frames, as bytes."""
    return [bytes(frame) for frame in encode_run(message)]


def changed(message: RunMessage, **changes: Any) -> list[bytes]:
    """Return the message's frames with other values in its JSON."""
    first, body, *columns = sent(message)
    return [first, orjson.dumps(orjson.loads(body) | changes), *columns]


@settings(max_examples=examples(200))
@given(message=RUN_MESSAGES)
def test_every_message_between_load_generators_survives_its_frames(message: RunMessage) -> None:
    """With all of its fields and columns; as bytes and as memoryviews."""
    frames = sent(message)

    assert decode_run(frames) == message
    assert decode_run([memoryview(frame) for frame in frames]) == message


@given(message=RUN_MESSAGES)
def test_nobody_else_takes_them(message: RunMessage) -> None:
    """Routers, workers and clients refuse them, naming the kind; nothing rides in STATUS."""
    with pytest.raises(WireError, match=f"kind: {message.kind.name} is between load generators"):
        wire.decode(sent(message))
    assert message.kind in RUN_KINDS


@settings(max_examples=examples(300))
@given(message=RUN_MESSAGES, data=st.data())
def test_mangled_messages_decode_or_are_a_wire_error(message: RunMessage, data: st.DataObject) -> None:
    """Random bytes anywhere, a frame cut or added: WireError or nothing."""
    frames = [bytearray(frame) for frame in sent(message)]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.sampled_from(frames))
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(frames) + 1))
    mangled = [bytes(frame) for frame in [*frames, bytearray(b"x")][:end]]

    try:
        decode_run(mangled)
    except WireError:
        return


def test_what_a_later_release_adds_to_a_run_is_skipped() -> None:
    """Keys, columns and a header."""
    first, body, *columns = sent(REPORT)
    values = orjson.loads(body)
    values["columns"] = ["confidence", *values["columns"]]
    values["model"] = {"id": 7}
    header = struct.pack("<2sBBHH", b"SS", 2, Kind.RUN_REPORT, 0, 3) + b"abc"

    assert decode_run([header, orjson.dumps(values), b"12345", *columns]) == REPORT
    assert first == struct.pack("<2sBBHH", b"SS", 2, Kind.RUN_REPORT, 0, 0)


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (changed(REPORT, columns=["status"]), "columns: expected at most 64 names"),
        (changed(REPORT, columns=["status", "status"]), "columns: expected at most 64 names"),
        (changed(REPORT, columns=7), "columns: expected a list of texts, got 7"),
        (changed(REPORT, duplicates=-1), "duplicates: expected an integer from 0 on, got -1"),
        (changed(REPORT, duplicates=True), "duplicates: expected an integer from 0 on, got True"),
        (changed(REPORT, reasons={"a": 1}), "reasons: a: expected text, got 1"),
        (changed(REPORT, subnets=[["a"]]), r"subnets\[0\]: expected a list of 2"),
        (changed(REPORT, subnets=5), "subnets: expected a list, got 5"),
        ([*sent(REPORT)[:3], b"12345"], "columns: expected subnet as long as the others"),
        ([*sent(REPORT)[:3], b"123456"], "columns: expected subnet as long as the others"),
        (changed(SHARE, columns=["sent_ns"]), "run_share: columns: expected due_ns"),
        (changed(SHARE, slo_ns="20"), "run_share: slo_ns: expected an integer from 0 on, got '20'"),
        (changed(SHARE, seed=2**63), "run_share: seed: expected an integer"),
        (changed(SHARE, endpoint=None), "run_share: endpoint: expected text, got None"),
        (changed(wire.RunStart(at_ns=1), in_ns=1), "run_start: at_ns: expected either at_ns or in_ns"),
        (changed(wire.RunStart(at_ns=1), at_ns=None), "run_start: at_ns: expected either at_ns or in_ns"),
        (sent(REPORT)[:1], "run_report: expected 2 frames, got 1"),
        ([sent(REPORT)[0] + b"x", *sent(REPORT)[1:]], "run_report: 1 bytes follow the header"),
        ([sent(REPORT)[0], b"[]"], "run_report: expected a JSON object, got list"),
        (frames_of(wire.Control(Kind.STATUS)), "expected a message between load generators, got STATUS"),
        (frames_of(wire.Cancel(1, 1, bytes(8))), "expected a message between load generators, got CANCEL"),
        ([b"SS"], "prelude: the message is too short"),
        ([], "prelude: the message is too short"),
    ],
)
def test_what_is_wrong_is_named(frames: list[bytes], says: str) -> None:
    """The kind, the field, and what was expected."""
    with pytest.raises(WireError, match=says.replace("(", r"\(")):
        decode_run(frames)


def test_columns_are_bounded() -> None:
    """However many a later release has."""
    first, body = sent(wire.RunReady())
    names = [str(i) for i in range(MAX_COLUMNS + 1)]
    frames = [first, orjson.dumps(orjson.loads(body) | {"columns": names}), *[b""] * len(names)]

    with pytest.raises(WireError, match="columns: expected at most 64 names"):
        decode_run(frames)


def test_heartbeats_are_theirs_too() -> None:
    """Round trips are measured with the same PING and PONG as everywhere."""
    assert decode_run(frames_of(Ping(5))) == Ping(5)
    assert decode_run(frames_of(Pong(5, 6))) == Pong(5, 6)


@pytest.mark.parametrize(
    "frames",
    [
        [struct.pack("<2sBBI", b"SS", 3, Kind.RUN_STOP, 0), b"{}"],
        [struct.pack("<2sBBI", b"SS", 1, Kind.REFUSED, 0), b'{"code":"malformed"}'],
        frames_of(Control(Kind.REFUSED, {"code": "version", "wire": [3, 3]})),
    ],
    ids=["later", "older's refusal", "later's refusal"],
)
def test_a_load_generator_of_another_wire_version_is_known_as_such(frames: list[bytes]) -> None:
    """Whether it speaks first or refuses what we said."""
    with pytest.raises(VersionError, match="expected 2, got"):
        decode_run(frames)
