"""Facts about a host for `cluster doctor`."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Facts:
    """A host, seen through a cluster's folder and processes.

    Attributes:
        time_s: Its wall clock, in seconds since 1970.
        free_bytes: Free space of the disk with the folder.
        log_bytes: Size of all logs of the cluster.
        largest_log: The path of the largest one; "" without logs.
        open_files: For each process, how many files it has open, and how many it may have.
    """

    time_s: float
    free_bytes: int
    log_bytes: int
    largest_log: str
    open_files: dict[str, tuple[int, int]]


def look(folder: Path, pids: Iterable[int]) -> Facts:
    """Return the facts; OSError if the folder does not exist."""
    logs = sorted((path.stat().st_size, str(path)) for path in folder.glob("*.log*"))
    found = {str(pid): files for pid in pids if (files := _open_files(pid)) is not None}
    return Facts(
        time.time(), shutil.disk_usage(folder).free, sum(size for size, _ in logs),
        logs[-1][1] if logs else "", found,
    )  # fmt: skip


def _open_files(pid: int) -> tuple[int, int] | None:
    """Return how many files a process has open and may have; None if it ended, or belongs to another user."""
    try:
        limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
        n_open = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None
    soft = next(line.split()[3] for line in limits.splitlines() if line.startswith("Max open files"))
    return n_open, int(soft) if soft.isdecimal() else 1 << 30
