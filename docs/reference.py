"""The API reference: pages made from the docstrings of what users touch.

    python docs/reference.py out/docs

`make docs` runs it. Where torch is not installed it leaves out the modules that need it, and prints which.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

PLAIN = (
    "superserve",
    "superserve.errors",
    "superserve.subnet",
    "superserve.status",
    "superserve.hello",
    "superserve.roles.local",
    "superserve.wire",
    "router.policies",
    "profiles.table",
    "loadgen.traces.trace",
    "loadgen.traces.specs",
    "loadgen.results.result",
    "loadgen.results.run",
    "loadgen.simulator.simulate",
    "loadgen.live.run",
)
"""Modules whose pages need no torch. A package without `__all__` brings its modules along."""

WITH_TORCH = (
    "gpu_worker.supernet.insertion",
    "gpu_worker.supernet.control",
    "gpu_worker.supernet.supernet",
    "gpu_worker.supernet.actuation",
    "gpu_worker.supernet.calibration",
    "gpu_worker.models.kinds",
    "gpu_worker.models.examples",
    "profiles.measuring.declared",
    "profiles.measuring.measure",
    "profiles.measuring.accuracy",
)
"""Modules whose pages do."""


def modules() -> tuple[str, ...]:
    """Return the modules that have a page here."""
    return (*PLAIN, *WITH_TORCH) if _is_installed("torch") else PLAIN


def loaded(name: str) -> ModuleType:
    """Import a module, with the public names that it only imports when one asks for them.

    pdoc looks public names up in the module itself, and takes one that is not there for a submodule.
    """
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
    return module


def write(folder: Path, names: tuple[str, ...]) -> None:
    """Write a page for each module, and an index with a search.

    Raises:
        RuntimeError: A module cannot be imported, or pdoc warns of an annotation that it cannot read.
    """
    import pdoc  # noqa: PLC0415  the tests of this list do without

    for name in names:
        _bare_constructors(name)
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text="SuperServe, from its docstrings"
    )
    # An error would end pdoc inside a page; so collect the warnings, and fail once with all of them.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc(*names, output_directory=folder)
    if caught:
        raise RuntimeError("\n".join(str(one.message) for one in caught))


def _is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def _bare_constructors(name: str) -> None:
    """Drop the annotations of the constructors that a module's NamedTuples get; their fields keep theirs.

    pdoc looks their names up where `collections` made the constructor, and finds none of them.
    """
    for found in vars(loaded(name)).values():
        if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
            found.__new__.__annotations__ = {}


def main() -> None:
    """Write the pages to the folder that the command line names."""
    if not _is_installed("pdoc"):
        sys.exit("docs: pdoc is not installed: pip install 'superserve[docs]'")
    folder, names = Path(sys.argv[1]), modules()
    try:
        write(folder, names)
    except RuntimeError as error:
        sys.exit(f"docs: {error}")
    left_out = [name for name in WITH_TORCH if name not in names]
    if left_out:
        print(f"left out, since torch is not installed: {', '.join(left_out)}")
    print(f"wrote {folder / 'index.html'}: {len(names)} modules")


if __name__ == "__main__":
    main()
