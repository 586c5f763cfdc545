"""A reader with an empty folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docs.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Give a reader; whatever the page left running is stopped."""
    folder = tmp_path / "empty"
    folder.mkdir()
    reader = Reader(folder, tmp_path / "state")
    yield reader
    reader.type("cluster down")
