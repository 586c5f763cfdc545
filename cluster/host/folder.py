"""A cluster's folder on this machine: one keeper at a time, and what a dead one left in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time
from typing import TYPE_CHECKING

from cluster.host import orders
from superserve.errors import ConfigError
from superserve.roles import local
from superserve.roles.local import Liveness

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from superserve.roles.local import LocalCluster, ProcessId

_LOCK = "lock"
_DEATH_S = 5.0  # far more than the kernel needs to end processes whose parent is gone


class HeldError(ConfigError):
    """Another keeper has the folder."""


def make(folder: Path) -> None:
    """Make the folder, for this user alone.

    Raises:
        ConfigError: It cannot be made, or is another user's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"{folder}: expected a folder of this user that can be made and written: {error.strerror}; "
            f"set {local.STATE_VARIABLE} to another one"
        ) from error


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Have the folder for the block, which removes the lock at its end; the kernel ends a dead one's.

    Raises:
        HeldError: Another process has it.
        ConfigError: The folder cannot be made or written.
    """
    path = folder / _LOCK
    descriptor = _locked(folder, path)
    try:
        yield
    finally:
        # While it is still held: whoever opened this file meanwhile finds that it is not the path's.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(folder: Path, path: Path) -> int:
    while True:
        make(folder)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the folder was removed just now
            continue
        except OSError as error:
            raise ConfigError(f"{path}: expected a file that can be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise HeldError(f"{folder}: another keeper has it") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the one who had it removed it: begin again


def tidy(folder: Path, *, wait_s: float = _DEATH_S) -> LocalCluster | None:
    """Remove what a dead keeper left: its file, and any process that outlived it after all.

    Args:
        folder: The cluster's.
        wait_s: How long its processes may take to end by themselves.

    Returns:
        What the file said; None if there was nothing to remove.

    Raises:
        ConfigError: The file is malformed.
    """
    left = local.load(folder)
    if left is None or left.liveness() is not Liveness.GONE:
        return None
    try:
        with hold(folder):
            left = local.load(folder)  # somebody else may have tidied up, or begun anew
            if left is None or left.liveness() is not Liveness.GONE:
                return None
            end([role.process for role in left.roles if role.process is not None], wait_s=wait_s)
            local.forget(folder)
            (folder / orders.SOCKET).unlink(missing_ok=True)
            return left
    except HeldError:
        return None


def end(processes: Iterable[ProcessId], *, wait_s: float) -> list[ProcessId]:
    """Give processes `wait_s` seconds to end, together, then kill them; return those killed."""
    deadline_s = time.monotonic() + wait_s
    killed = []
    for process in processes:
        if not await_end(process, deadline_s - time.monotonic()) and process.signal(signal.SIGKILL):
            await_end(process, _DEATH_S)
            killed.append(process)
    return killed


def await_end(process: ProcessId, timeout_s: float) -> bool:
    """Wait until a process has ended; return whether it has, within `timeout_s` seconds."""
    descriptor = process.open()
    if descriptor is None:
        return True
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(max(0, round(timeout_s * 1_000))))
    finally:
        os.close(descriptor)
