"""The header `traceparent` of W3C Trace Context, level 1: which trace a query is a part of, and whose child.

    00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01     version, trace, parent, flags

Source: https://www.w3.org/TR/trace-context/, section 3.2. A header that is malformed is ignored, as it asks.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

SAMPLED = 1
"""The flag of a caller that records this trace."""
PACKED_BYTES = 28
"""Of a context as `packed` gives it."""

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_NO_TRACE, _NO_PARENT = "0" * 32, "0" * 16


class TraceContext(NamedTuple):
    """Where a query belongs in its caller's trace.

    Attributes:
        trace_id: 16 bytes.
        parent_id: The caller's span, 8 bytes.
        flags: As sent; of them only `SAMPLED` means something here.
    """

    trace_id: bytes
    parent_id: bytes
    flags: int

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records this trace."""
        return bool(self.flags & SAMPLED)

    @property
    def is_valid(self) -> bool:
        """Whether neither id is all zeros, which stands for none."""
        return any(self.trace_id) and any(self.parent_id)


def parsed(text: Any) -> TraceContext | None:
    """Return the context in a header's text; None if it is malformed, and has to be ignored.

    Version 00 ends after the flags. A later version may go on behind another dash; ff is no version.
    """
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return None
    version, trace, parent, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or trace == _NO_TRACE or parent == _NO_PARENT:
        return None
    return TraceContext(bytes.fromhex(trace), bytes.fromhex(parent), int(flags, 16))


def packed(context: TraceContext) -> bytes:
    """Return a context as the wire has it: flags, 3 bytes of padding, trace, parent."""
    return bytes((context.flags, 0, 0, 0)) + context.trace_id + context.parent_id


def unpacked(data: bytes) -> TraceContext:
    """Return what `packed` packed."""
    return TraceContext(data[4:20], data[20:28], data[0])
