"""A cluster's folder on its host: one keeper and one command at a time, and the remains of a dead keeper."""

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
_ASK_AGAIN_S = 0.05  # a file lock gives no wake-up
_DEATH_S = 5.0  # far more than the kernel needs to end processes whose parent has died


class HeldError(ConfigError):
    """Another keeper, or another command, holds the folder."""


def make(folder: Path) -> None:
    """Make the folder, for this user alone.

    Raises:
        ConfigError: It cannot be made, or belongs to another user.
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
    """Hold the folder during the block, and remove the lock at its end; the kernel releases a dead holder's.

    Raises:
        HeldError: Another process holds it.
        ConfigError: The folder cannot be made or written.
    """
    path = folder / lock
    descriptor = _locked(folder, path)
    try:
        yield
    finally:
        # While it is still held: a process that opened this file meanwhile finds that the path has changed.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(folder: Path, path: Path) -> int:
    while True:
        make(folder)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the folder has just been removed
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
        os.close(descriptor)  # its holder removed it: try again


@contextlib.contextmanager
def alone(folder: Path, *, wait_s: float) -> Iterator[None]:
    """Keep other commands out of the folder during the block.

    Raises:
        HeldError: Another command has held it for `wait_s` seconds.
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
    """Remove the remains of a dead keeper: its file, and any process that outlived it.

    Args:
        folder: The cluster's.
        wait_s: How long its processes may take to end by themselves.

    Returns:
        The cluster in the file; None if there was nothing to remove.

    Raises:
        ConfigError: The file is malformed.
    """
    left = local.load(folder)
    if left is None or left.liveness() is not Liveness.GONE:
        return None
    try:
        with hold(folder):
            left = local.load(folder)  # another command may have tidied up, or started again
            if left is None or left.liveness() is not Liveness.GONE:
                return None
            end([role.process for role in left.roles if role.process is not None], wait_s=wait_s)
            end(outliving(folder), wait_s=0.0)
            clean(folder)
            return left
    except HeldError:
        return None


def clean(folder: Path) -> None:
    """Remove what a cluster needs while it runs; its logs stay, and on other hosts the package too."""
    for path in folder.iterdir():
        if path.name in _KEPT or ".log" in path.suffixes:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def tidy_unowned(folder: Path) -> None:
    """Remove a keeper's remains that no state file names; do nothing if a keeper lives."""
    if folder.is_dir():
        with contextlib.suppress(HeldError), hold(folder):
            end(outliving(folder), wait_s=0.0)
            clean(folder)


def forget_unused(folder: Path) -> None:
    """Remove a folder, with its logs, that was made for a cluster that never ran."""
    with contextlib.suppress(HeldError, ConfigError):
        if folder.is_dir() and local.load(folder) is None:
            with hold(folder):
                shutil.rmtree(folder, ignore_errors=True)


def outliving(folder: Path) -> list[ProcessId]:
    """Return the running roles of the cluster in `folder`, found by their environment without a list."""
    mark = f"{OURS_VARIABLE}={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or belongs to another user
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(ProcessId.of(int(process.name)))
    return [process for process in found if process is not None]


def end(processes: Iterable[ProcessId], *, wait_s: float) -> list[ProcessId]:
    """Give processes `wait_s` seconds together to end, then kill them; return the killed ones."""
    deadline_s = time.monotonic() + wait_s
    killed = []
    for process in processes:
        if not await_end(process, deadline_s - time.monotonic()) and process.signal(signal.SIGKILL):
            await_end(process, _DEATH_S)
            killed.append(process)
    return killed


def await_end(process: ProcessId, timeout_s: float) -> bool:
    """Wait until a process has ended; return whether it ended within `timeout_s` seconds."""
    return process.await_end(timeout_s)
