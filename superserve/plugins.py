"""Your own code, named as `package.module:attribute` on a command line.

The working folder is searched last, because it may hold anything: a `router.py` or a `random.py` there must
not replace this project's, or Python's. For the same reason every process that this project starts runs
under `python -P`, which leaves that folder out.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load_attribute(module: str, attribute: str) -> Any:
    """Return an attribute of a module that is installed or lies in the working folder.

    Raises:
        ImportError: There is no such module, or it cannot be imported.
        AttributeError: It has no such attribute.
    """
    try:
        folder = str(Path.cwd())
    except FileNotFoundError:
        folder = ""  # removed while we run in it: it holds no module
    if folder and folder not in sys.path:
        sys.path.append(folder)
    if not all(part.isidentifier() for part in module.split(".")):
        raise ModuleNotFoundError(f"no module is called {module!r}", name=module)
    return getattr(importlib.import_module(module), attribute)
