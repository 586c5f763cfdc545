"""Which form of this code runs: pure Python, or its core compiled from the same files.

Python prefers a compiled module to the source beside it. So a source that was changed after it had been
compiled would not run, and nobody would see why: that is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError

__all__ = ("COMPILED", "PURE", "build", "build_of", "mypyc_attr")

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_options: Any) -> Any:
        """Return a decorator that changes nothing: only mypyc, which compiles the core, reads its options."""
        return lambda decorated: decorated


PURE, COMPILED = "pure", "compiled"
_RECORD = "compiled.json"


@functools.cache
def build() -> str:
    """Return COMPILED if modules that were compiled for this Python run here, otherwise PURE.

    Raises:
        ConfigError: The source of a compiled module has changed since.
    """
    return build_of(Path(__file__).parents[1])


def build_of(root: Path) -> str:
    """Return which form of the code below `root` this Python runs.

    Raises:
        ConfigError: The source of a compiled module has changed since.
    """
    try:
        text = (root / "superserve" / _RECORD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return PURE
    record = json.loads(text)
    if record["suffix"] not in EXTENSION_SUFFIXES:
        return PURE  # compiled for another Python, which this one passes over
    for name, digest in record["modules"].items():
        path = root / name
        # Without the source there is nothing that could differ.
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ConfigError(
                f"{path}: the source has changed since it was compiled, and the compiled module would run "
                "instead; type `make compile`, or `make pure` for pure Python"
            )
    return COMPILED
