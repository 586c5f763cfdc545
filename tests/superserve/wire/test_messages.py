"""Messages hand out what they hold in order, and without copying."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given

from superserve import wire
from superserve.wire import VARIED, decode
from tests.superserve.wire.messages import directives, frames_of


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
