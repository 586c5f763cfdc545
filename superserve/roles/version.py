"""Which code a process runs, as the release and a digest of its source, and on which processor.

Two hosts with the same release may run different code, for example a checkout with changes.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

_SERVING = ("superserve", "router", "gpu_worker", "profiles")  # what a router or worker may run


@functools.cache
def version() -> str:
    """Return this process's version, such as "0.1.0+3f9c21aa"; reads some 130 files, once."""
    try:
        release = metadata.version("superserve")
    except metadata.PackageNotFoundError:  # run from a folder
        release = "0"
    return f"{release}+{digest(Path(__file__).parents[2])[:8]}"


def digest(root: Path) -> str:
    """Return a digest of the Python files below `root` that a router or a worker may run, in hex.

    A file's path counts as well as its content: a module moved to another folder makes another
    program.
    """
    found = hashlib.sha256()
    for package in _SERVING:
        for path in sorted((root / package).rglob("*.py")):
            found.update(f"{path.relative_to(root).as_posix()}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def cpu_name() -> str:
    """Return the name of this machine's processor, or its architecture if the system gives no name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
