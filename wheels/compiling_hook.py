"""Puts third-party files into the whole system's wheel, and the compiled core if SUPERSERVE_COMPILE=1 asks.

Without that the wheel is pure Python, for every machine: it needs no compiler, neither here nor there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_VARIABLE = "SUPERSERVE_COMPILE"


class CompilingBuildHook(BuildHookInterface[Any]):
    """Adds `vendor/`; compiles in a copy of the packages, so that the checkout stays as it is."""

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the vendored files, what was compiled, and the tag of this Python and machine.

        Raises:
            RuntimeError: mypyc or the C compiler failed, or mypyc is not installed.
        """
        if version == "editable":
            return  # the checkout has it all; a folder `cluster` beside the packages would be in the way
        build_data["force_include"][str(Path(self.root) / "vendor")] = "cluster/web/vendor"
        if os.environ.get(_VARIABLE) != "1":
            return
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("superserve_compile", root / "wheels" / "compile.py")
        assert spec is not None, "a path gives a spec"
        assert spec.loader is not None, "a Python file has a loader"
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        self._folder = tempfile.TemporaryDirectory()
        copy = Path(self._folder.name)
        for package in self.build_config.packages:
            leave_out = shutil.ignore_patterns("__pycache__", "*.so", "compiled.json", "data")
            shutil.copytree(root / package, copy / package, ignore=leave_out)
        shutil.copy(root / "pyproject.toml", copy)
        for name in tool.compile_in(copy):
            build_data["force_include"][str(copy / name)] = name
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, _version: str, _build_data: dict[str, Any], _artifact_path: str) -> None:
        """Remove the copy."""
        if self._folder is not None:
            self._folder.cleanup()
