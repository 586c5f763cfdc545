"""A cluster's folder on its host: one keeper and one command at a time, and what a dead keeper left in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.spec.roles import OURS_VARIABLE
from superserve.errors import ConfigError
from superserve.roles import local
from superserve.roles.local import Liveness, ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from superserve.roles.local import LocalCluster

_LOCK, _BUSY = "lock", "busy"
_KEPT = (_LOCK, _BUSY, "code", "venv")
_ASK_AGAIN_S = 0.05
_DEATH_S = 5.0  # far more than the kernel needs to end processes whose parent is gone


class HeldError(ConfigError):
    """Another keeper, or another command, has the folder."""


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
def hold(folder: Path, lock: str = _LOCK) -> Iterator[None]:
    """Have the folder for the block, which removes the lock at its end; the kernel ends a dead one's.

    Raises:
        HeldError: Another process has it.
        ConfigError: The folder cannot be made or written.
    """
    path = folder / lock
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
            raise HeldError(f"{folder}: another process has it") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the one who had it removed it: begin again


@contextlib.contextmanager
def alone(folder: Path, *, wait_s: float) -> Iterator[None]:
    """Keep other commands out of the folder for the block.

    Raises:
        HeldError: Another one has had it for `wait_s` seconds.
    """
    give_up_s = time.monotonic() + wait_s
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(folder, _BUSY))
                break
            except HeldError:
                if time.monotonic() >= give_up_s:
                    raise HeldError(f"{folder}: it is being started or stopped by another command") from None
                time.sleep(_ASK_AGAIN_S)
        yield


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
            end(outliving(folder), wait_s=0.0)
            clean(folder)
            return left
    except HeldError:
        return None


def clean(folder: Path) -> None:
    """Remove what a cluster needs while it runs; its logs stay, and on other hosts the package."""
    for path in folder.iterdir():
        if path.name in _KEPT or ".log" in path.suffixes:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def tidy_unowned(folder: Path) -> None:
    """Remove what a keeper left that nobody's state file names; does nothing where a keeper lives."""
    if folder.is_dir():
        with contextlib.suppress(HeldError), hold(folder):
            end(outliving(folder), wait_s=0.0)
            clean(folder)


def forget_unused(folder: Path) -> None:
    """Remove a folder that was made for a cluster that never was, with its logs."""
    with contextlib.suppress(HeldError, ConfigError):
        if folder.is_dir() and local.load(folder) is None:
            with hold(folder):
                shutil.rmtree(folder, ignore_errors=True)


def outliving(folder: Path) -> list[ProcessId]:
    """Return the roles of the cluster in `folder` that run, by their environment: nobody need know them."""
    mark = f"{OURS_VARIABLE}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(ProcessId.of(int(process.name)))
    return [process for process in found if process is not None]


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
    return process.await_end(timeout_s)
