"""Trace contexts: which headers count by the rules of W3C Trace Context; none is changed on its way."""

from __future__ import annotations

from typing import Any

import pytest

from superserve.wire.traceparent import PACKED_BYTES, TraceContext, packed, parsed, unpacked

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = TraceContext(bytes.fromhex(TRACE), bytes.fromhex(PARENT), 1)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (f"00-{TRACE}-{PARENT}-01", 1),
        (f"00-{TRACE}-{PARENT}-00", 0),
        (f"00-{TRACE}-{PARENT}-ff", 255),  # unknown flags are no mistake
        (f"01-{TRACE}-{PARENT}-01", 1),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like", 1),
    ],
)
def test_a_sound_header_is_taken(text: str, flags: int) -> None:
    """Of a later version the known fields count."""
    assert parsed(text) == CONTEXT._replace(flags=flags)
    assert CONTEXT._replace(flags=flags).is_sampled == bool(flags & 1)


@pytest.mark.parametrize(
    "text",
    [
        "", TRACE, None, 7, f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-1", f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01-", f"cc-{TRACE}-{PARENT}-01.more", f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01",
        f" 00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01\n", f"00_{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01", f"00-{TRACE[:-1]}٣-{PARENT}-01",
    ],
)  # fmt: skip
def test_a_malformed_header_is_ignored(text: Any) -> None:
    """The standard's examples: too short, too long, upper case, zeros, two headers joined."""
    assert parsed(text) is None


def test_a_context_is_not_changed_by_packing() -> None:
    """As on the wire and in the flight record."""
    assert len(packed(CONTEXT)) == PACKED_BYTES
    assert unpacked(packed(CONTEXT)) == CONTEXT
    assert CONTEXT.is_valid
    assert not unpacked(bytes(PACKED_BYTES)).is_valid
