"""What the tests of the cluster share."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.cluster.machine import Machine, machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    """Yield a state folder of this test's own; whatever runs in it is gone at the end."""
    # A signal that is ignored stays so in children: a suite in a shell's background ignores Ctrl-C.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with machine(tmp_path) as here:
            yield here
    finally:
        signal.signal(signal.SIGINT, previous)
