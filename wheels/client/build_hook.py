"""Takes superserve/ from the repository, so that the client and the whole system have one source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ClientBuildHook(BuildHookInterface[Any]):
    """Adds the package from two folders up; an sdist has it beside this file and needs nothing."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put superserve/ into the sdist or the wheel that is being built.

        Raises:
            FileNotFoundError: This folder was copied out of the repository alone.
        """
        root = Path(self.root)
        if (root / "superserve").is_dir():
            return
        package = root.parent.parent / "superserve"
        if not package.is_dir():
            raise FileNotFoundError(f"{package}: expected the package; build from the repository or an sdist")
        if version == "editable":
            raise ValueError("superserve-client: install the whole system to edit it: pip install -e <root>")
        build_data["force_include"][str(package)] = "superserve"
