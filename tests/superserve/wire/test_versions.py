"""Two peers agree on the highest wire version that both speak, or one refuses the other by name."""

from __future__ import annotations

import struct
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superserve import wire
from superserve.errors import VersionError, WireError
from superserve.wire import Control, Kind, agreed, decode, encode_control, refusal, version_refused

OURS = (wire.LOWEST, wire.HIGHEST)
VERSION = st.integers(1, 255)


def frames(version: int, kind: Kind, body: Any) -> list[bytes]:
    """Return a control message in any wire version."""
    return [struct.pack("<2sBBI", b"SS", version, kind, 0), orjson.dumps(body)]


def test_this_release_speaks_version_2_alone() -> None:
    """Version 1 is refused; the next release will speak 2 and 3."""
    assert OURS == wire.OURS == (2, 2)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.STATUS])
@pytest.mark.parametrize(
    ("version", "stated", "chosen"), [(2, [2, 2], 2), (2, [2, 3], 2), (1, [1, 3], 2), (2, None, 2)]
)
def test_the_highest_version_in_common_is_chosen(kind: Kind, version: int, stated: Any, chosen: int) -> None:
    """Whatever version the greeting itself is written in; without a range it speaks that one."""
    greeting = decode(frames(version, kind, {} if stated is None else {"wire": stated}))

    assert isinstance(greeting, Control)
    assert greeting.version == version
    assert agreed(greeting) == chosen


@given(lowest=VERSION, highest=VERSION, written=VERSION)
def test_a_range_is_accepted_exactly_where_it_overlaps(lowest: int, highest: int, written: int) -> None:
    """The error names both ranges, and the version to answer in."""
    lowest, highest = sorted((lowest, highest))
    greeting = frames(written, Kind.HELLO, {"wire": [lowest, highest]})
    if lowest <= wire.HIGHEST and highest >= wire.LOWEST:
        assert agreed(Control(Kind.HELLO, orjson.loads(greeting[1]), written)) == min(wire.HIGHEST, highest)
        return
    with pytest.raises(VersionError) as caught:
        decode(greeting)

    error = caught.value
    assert (error.ours, error.theirs, error.version) == (OURS, (lowest, highest), written)


@pytest.mark.parametrize(
    ("version", "kind", "body", "says"),
    [
        (1, Kind.HELLO, {"role": "client"}, "wire version: expected 2, got 1: both sides need releases"),
        (1, Kind.HELLO, {"role": "worker", "wire": 1}, "expected 2, got 1:"),
        (1, Kind.WELCOME, {"epoch": 1}, "expected 2, got 1:"),
        (3, Kind.HELLO, {"wire": [3, 4]}, "expected 2, got 3 to 4:"),
        (3, Kind.BYE, {}, "expected 2, got 3:"),
        (7, Kind.HELLO, {"wire": "any"}, "expected 2, got 7:"),
    ],
)
def test_another_version_is_refused_by_name(version: int, kind: Kind, body: Any, says: str) -> None:
    """The refusal, in the version that the peer wrote in, names both."""
    with pytest.raises(VersionError, match=says) as caught:
        decode(frames(version, kind, body))

    first, second = encode_control(refusal(caught.value))
    assert bytes(first) == struct.pack("<2sBBI", b"SS", version, Kind.REFUSED, 0)
    assert orjson.loads(second) == {"code": "version", "reason": str(caught.value), "wire": [2, 2]}


@pytest.mark.parametrize(
    "stated", [2, "2", [2], [3, 2], [0, 2], [2, 256], [2.0, 2], [True, 2], [1, 2, 3], {"a": 1}]
)
def test_a_malformed_range_is_a_wire_error(stated: Any) -> None:
    """In our own version; it names the field."""
    with pytest.raises(WireError, match=r"hello: wire: expected \[lowest, highest\], got") as caught:
        decode(frames(2, Kind.HELLO, {"wire": stated}))
    assert not isinstance(caught.value, VersionError)


@pytest.mark.parametrize(
    ("version", "body", "theirs"),
    [
        (1, {"code": "malformed", "reason": "version: expected 1, got 2"}, (1, 1)),
        (2, {"code": "version", "wire": [3, 4]}, (3, 4)),
        (2, {"code": "version", "wire": "?"}, (2, 2)),
        (5, {"code": "version", "wire": [4, 5]}, (4, 5)),
    ],
)
def test_a_refusal_of_our_versions_is_understood_in_any(version: int, body: Any, theirs: Any) -> None:
    """Version 1 has no code for it: that it answers in version 1 says enough."""
    message = decode(frames(version, Kind.REFUSED, body))

    assert isinstance(message, Control)
    error = version_refused(message)
    assert error is not None
    assert (error.ours, error.theirs) == (OURS, theirs)


@pytest.mark.parametrize(
    "message",
    [
        Control(Kind.REFUSED, {"code": "say-hello", "reason": "version"}),
        Control(Kind.WELCOME, {"code": "version"}),
        Control(Kind.REFUSED),
    ],
)
def test_other_refusals_are_not_about_versions(message: Control) -> None:
    """They leave the connection as it is."""
    assert version_refused(message) is None
