"""Write files whole or not at all, and check that command lines can be written into them."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

_IN_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
"""No new file may be made in the folder, or the file is a mount: it can be written, but not replaced."""


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that readers, and a process that dies meanwhile, find the old one or the new one.

    A temporary file beside it is written and renamed. Anything but a regular file (a pipe, a device) is
    written in place, and so is a file whose folder accepts no new file.

    Raises:
        OSError: It cannot be written; the old content is still there.
    """
    content = data.encode() if isinstance(data, str) else data
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        target.write_bytes(content)
        return
    part = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power cut the new name must not be empty
        if mode is not None:
            part.chmod(stat.S_IMODE(mode))
        part.replace(target)
    except OSError as error:
        if error.errno not in _IN_PLACE:
            raise
        target.write_bytes(content)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its user alone, whole: readers find the old one or the new one.

    Raises:
        OSError: It cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_all(file: IO[bytes], data: bytes | bytearray) -> None:
    """Write all of `data` to an unbuffered file, which may accept a part at a time.

    Raises:
        OSError: It does not accept all of it.
    """
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def in_place_of(start: bytes) -> str:
    """Say what a file is that stands where another was expected; "" if nothing is known of it.

    Args:
        start: Its first bytes, 64 or more if it has them.
    """
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, which `git lfs pull` replaces by the file"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 text: save it as UTF-8"
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, as a download that failed leaves it"
    return ""


def check_text(words: Sequence[str]) -> None:
    """Raise ConfigError at a word of the command line that is not UTF-8: results could not record it."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(word).decode(errors="backslashreplace")
            raise ConfigError(f"{shown[:200]}: expected UTF-8: rename it, or link to it") from None
