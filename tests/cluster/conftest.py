"""What the tests of the cluster share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cluster.machine import Machine, machine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    """Yield a state folder of this test's own; whatever runs in it is gone at the end."""
    with machine(tmp_path) as here:
        yield here
