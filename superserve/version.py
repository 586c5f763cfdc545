"""Which code a process runs: the release, and a digest of the source it was started from.

Two hosts with the same release may run different code, say a checkout in the midst of a change.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from pathlib import Path

_SERVING = ("superserve", "router", "gpu_worker", "profiles")  # what a router or worker may run


@functools.cache
def version() -> str:
    """Return this process's version, such as "0.1.0+3f9c21aa"; it reads some 80 files, once."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in _SERVING:
        for path in sorted((root / package).glob("*.py")):
            digest.update(f"{package}/{path.name}\0".encode())
            digest.update(path.read_bytes())
    try:
        release = metadata.version("superserve")
    except metadata.PackageNotFoundError:  # run from a folder
        release = "0"
    return f"{release}+{digest.hexdigest()[:8]}"
