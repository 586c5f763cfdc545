"""How much work a call is, in Python's own instructions: the same on every machine, unlike its time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def instructions(call: Callable[[], object]) -> int:
    """Return how many instructions of Python a call runs; what it does in C counts as one each."""
    n = 0

    def count(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal n
        frame.f_trace_opcodes = True
        n += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        call()
    finally:
        sys.settrace(before)
    return n
