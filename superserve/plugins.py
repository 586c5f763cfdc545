"""Code of the user's own, named as `package.module:attribute` on a command line.

It is searched for last in the folder where the command is typed. Last, since such a folder may hold anything:
a `router.py` or a `random.py` there must not take the place of ours, or of Python's. That is also why every
process that we start runs under `python -P`, which leaves that folder out.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load_attribute(module: str, attribute: str) -> Any:
    """Return an attribute of a module, from what is installed or from the working folder.

    Raises:
        ImportError: There is no such module, or it cannot be imported.
        AttributeError: It has no such attribute.
    """
    try:
        folder = str(Path.cwd())
    except FileNotFoundError:
        folder = ""  # removed under our feet: nothing is in it
    if folder and folder not in sys.path:
        sys.path.append(folder)
    if not all(part.isidentifier() for part in module.split(".")):
        raise ModuleNotFoundError(f"no module is called {module!r}", name=module)
    return getattr(importlib.import_module(module), attribute)
