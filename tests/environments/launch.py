"""Starts a command in a spoiled environment, and finds what it leaves: processes and files."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from tests.environments.hostile import Hostile

MARK = "SUPERSERVE_TEST_PAIR"
"""A variable by which the processes of a pair are known, whichever process is their parent."""

_NEW_MOUNTS, _NEW_USERS = 0x0002_0000, 0x1000_0000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4_096, 16_384, 1 << 18
_TINY = 8_192
_LOOK_S = 0.01
_LISTENS = "0A"


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Mounts:
    """A mount namespace of this process alone; it goes with the process."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def enter(self) -> None:
        """Enter it.

        Raises:
            OSError: This machine does not allow it.
        """
        if os.geteuid() == 0:
            _checked(self._libc.unshare(_NEW_MOUNTS), "unshare")
        else:
            user, group = os.geteuid(), os.getegid()
            _checked(self._libc.unshare(_NEW_MOUNTS | _NEW_USERS), "unshare")
            Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
        self._mount("none", "/", None, _RECURSIVE | _PRIVATE)

    def put(self, folder: Path, kind: str) -> None:
        """Put a file system over a folder: see `Hostile.mounts`."""
        if kind == "readonly":
            self._mount(str(folder), str(folder), None, _BIND)
            self._mount(str(folder), str(folder), None, _BIND | _REMOUNT | _READ_ONLY)
            return
        self._mount("tmpfs", str(folder), "tmpfs", 0, f"size={_TINY},mode=755")
        if kind == "full":
            (folder / "ballast").write_bytes(bytes(_TINY))

    def over(self, source: Path, target: str) -> None:
        """Show one file in the place of another."""
        self._mount(str(source), target, None, _BIND)

    def open_way(self, to: Path) -> None:
        """Let everybody reach a folder below one that is closed, as an interpreter in root's home is."""
        closed = [parent for parent in to.parents if not parent.stat().st_mode & 0o001]
        if not closed:
            return
        kept = Path(tempfile.mkdtemp(prefix="ss-way-", dir="/tmp"))
        try:
            self._mount(str(to), str(kept), None, _BIND)
            self._mount("tmpfs", str(closed[-1]), "tmpfs", 0, "size=64k,mode=755")
            to.mkdir(parents=True)
            self._mount(str(kept), str(to), None, _BIND)
            _checked(self._libc.umount(os.fsencode(kept)), "umount")
        finally:
            kept.rmdir()

    def _mount(self, source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
        _checked(self._libc.mount(*encoded[:3], flags, encoded[3]), f"mount {target}")


def enter(hostile: Hostile, base: Path) -> None:
    """Spoil this process, which is about to become the command."""
    for number in hostile.ignored:
        signal.signal(number, signal.SIG_IGN)
    if hostile.blocked:
        signal.pthread_sigmask(signal.SIG_BLOCK, hostile.blocked)
    if hostile.user is not None:
        os.setgroups([])  # the group stays, as in containers with a user of their own
        os.setuid(hostile.user)
    os.umask(hostile.umask)
    for name, limit in hostile.limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(which, (limit, limit))
    if not hostile.cwd:
        (base / "gone").rmdir()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if hostile.streams.get(name) == "closed":
            os.close(number)


def started(
    argv: list[str], hostile: Hostile, base: Path, env: dict[str, str], cwd: Path, outputs: tuple[int, int]
) -> subprocess.Popen[bytes]:
    """Start a command; its output goes to two descriptors."""

    def spoil() -> None:
        cwd.mkdir(exist_ok=True)
        os.chdir(cwd)
        enter(hostile, base)

    streams = [
        _stream(hostile.streams.get(name, ""), own)
        for name, own in zip(("stdout", "stderr"), outputs, strict=True)
    ]
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=streams[0], stderr=streams[1], env=env,
            preexec_fn=spoil, start_new_session=True,  # noqa: PLW1509  no other thread runs yet
        )  # fmt: skip
    finally:
        for stream in streams:
            if stream not in outputs:
                os.close(stream)


def _stream(kind: str, own: int) -> int:
    if kind == "full":
        return os.open("/dev/full", os.O_WRONLY)
    if kind == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return own


def serves(process: subprocess.Popen[bytes], door: socket.socket, how: str, wait_s: float) -> bool:
    """Wait until a process listens, or connects to `door`; False if it ends first, or time does."""
    end_s = time.monotonic() + wait_s
    door.settimeout(_LOOK_S)
    has_door = False
    while time.monotonic() < end_s and process.poll() is None:
        if how == "connects" and not has_door:
            with contextlib.suppress(TimeoutError):
                door.accept()[0].detach()  # left open: it is being served
                has_door = True
        elif how == "connects" or _listens(process.pid):
            return True
        else:
            time.sleep(_LOOK_S)
    return False


def _listens(pid: int) -> bool:
    listening = set()
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        words = line.split()
        if words[3] == _LISTENS:
            listening.add(f"socket:[{words[9]}]")
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if str(Path(entry.path).readlink()) in listening:
                    return True
    return False


def relatives(mark: str) -> dict[int, str]:
    """Return the processes that carry a mark, by number, with their command lines."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words:  # a zombie has none
                    found[int(entry.name)] = words.strip()
    return found


def listing(base: Path) -> dict[str, int | None]:
    """Return what lies in the pair's folder, with sizes; None is a folder."""
    found: dict[str, int | None] = {}
    for path in _walk(base):
        with contextlib.suppress(OSError):
            state = path.lstat()
            found[str(path.relative_to(base))] = None if stat.S_ISDIR(state.st_mode) else state.st_size
    return found


def _walk(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
