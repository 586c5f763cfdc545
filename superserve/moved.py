"""Modules that have moved keep their old names for one release, with a DeprecationWarning.

    router.policy  ->  router.policies      the same module object under both names

A package installs its table when it is imported. From then on importing an old name imports the new
module and registers it under the old name too. `python -m` finds old names as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import CodeType, ModuleType


class _Finder(MetaPathFinder):
    """Answers for old names only: other imports pay one dictionary look-up."""

    def __init__(self) -> None:
        self.moved: dict[str, str] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that loads the new module; None for any other name."""
        del path, target
        new = self.moved.get(fullname)
        if new is None:
            return None
        warnings.warn(f"{fullname} is now {new}; the old name goes in the next release",
                      DeprecationWarning, stacklevel=2)  # fmt: skip
        return ModuleSpec(fullname, _Alias(new), origin=new)


class _Alias(InspectLoader):
    """Loads an old name as the new module itself, so that each class exists once under both names."""

    def __init__(self, new: str) -> None:
        self._new = new
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the new module."""
        del spec
        module = importlib.import_module(self._new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec: the import system has just replaced it by the old name's."""
        module.__spec__ = self._spec

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the new module's code, for `python -m` with the old name."""
        del fullname
        spec = importlib.util.find_spec(self._new)
        assert spec is not None, f"{self._new} is where modules moved to"
        assert isinstance(spec.loader, InspectLoader), "modules of this project are files"
        return spec.loader.get_code(self._new)

    def get_source(self, fullname: str) -> str | None:
        """Return nothing: tracebacks find the source by the new file's name."""
        del fullname
        return None


_FINDER = _Finder()


def moved(package: str, names: Mapping[str, str]) -> None:
    """Make `package.OLD` importable as `package.NEW`, for each pair of `names`.

    Args:
        package: The package whose modules have moved.
        names: Old to new, both below `package`, such as {"edf": "core.edf"}.
    """
    _FINDER.moved.update({f"{package}.{old}": f"{package}.{new}" for old, new in names.items()})
    if _FINDER not in sys.meta_path:
        # First, because an old checkout may have left a file of the old name in the folder.
        sys.meta_path.insert(0, _FINDER)
