"""Files are there whole or not at all, and a command line that no file could hold is refused."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from typing import TYPE_CHECKING

import pytest

from superserve.errors import ConfigError
from superserve.files import check_text, write_private, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """Limit files to this many bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """It keeps its mode, and nothing lies beside it."""
    path = tmp_path / "result.json"
    write_whole(path, "old")
    path.chmod(0o640)
    write_whole(path, b"new")

    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """The old result, or none; never the first part of a new one."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("old")
    with full_after(1_000):
        for path in (old, new):
            with pytest.raises(OSError, match="File too large"):
                write_whole(path, b"x" * 2_000)

    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert old.read_text() == "old"


def test_links_devices_and_pipes_are_written_through(tmp_path: Path) -> None:
    """A link still leads to its file; a pipe is no file to be replaced."""
    real, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(real)
    write_whole(link, "linked")
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "piped")
    reader.join()

    assert (link.is_symlink(), real.read_text(), read) == (True, "linked", ["piped"])
    write_whole(tmp_path.__class__(os.devnull), "nothing")


def test_a_private_file_is_replaced_whole_and_is_its_users_alone(tmp_path: Path) -> None:
    """Where it cannot be written, what was there stays, and nothing lies beside it."""
    path = tmp_path / "state.json"
    write_private(path, b"old")
    with full_after(1_000), pytest.raises(OSError, match="File too large"):
        write_private(path, bytes(2_000))

    assert path.read_bytes() == b"old"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_word_that_is_not_utf8_is_refused() -> None:
    """It is shown in a way that can be printed."""
    check_text(["run", "--json", "r\u00e9sultat.json"])
    with pytest.raises(ConfigError, match=r"^r\\xe9sultat.json: expected UTF-8"):
        check_text(["run", "--json", os.fsdecode(b"r\xe9sultat.json")])
