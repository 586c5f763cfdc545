"""What is judged live counts on a calm machine; on a busy one it is repeated, and given up at last.

A slow machine is calm too, so such a test judges by a control of the same minute, not by times.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, ParamSpec

import pytest

from loadgen.demo.machine import MachineWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    Arguments = ParamSpec("Arguments")

TRIES = 3
_LOOK_S = 0.5


def is_calm() -> bool:
    """Look for a moment, and tell whether other work leaves this machine to the tests."""
    with MachineWatch(()) as watch:
        time.sleep(_LOOK_S)  # what is measured
        return watch.use().is_calm


def judged_live(test: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Have a failure count if the machine was calm before it and after it.

    Otherwise the test runs again, `TRIES` times in all; then it is skipped, and says why.
    """

    @functools.wraps(test)
    def repeated(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        for _ in range(TRIES):
            was_calm = is_calm()
            try:
                test(*args, **kwargs)
            except AssertionError as error:
                if was_calm and is_calm():
                    raise
                why = str(error).partition("\n")[0]
            else:
                return
        pytest.skip(f"other work on this machine disturbed each of {TRIES} runs: {why}")

    return repeated
