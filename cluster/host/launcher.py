"""Where roles run: a launcher starts one somewhere and gives a handle on it.

There is one launcher so far, for this machine. One that reaches other hosts by ssh gives
handles with the same five verbs, and the supervisor need not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from superserve.roles import processes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Handle(Protocol):
    """A role that was started; `superserve.roles.processes.RoleProcess` is one."""

    @property
    def ready(self) -> dict[str, Any]:
        """What it said when it became ready."""

    @property
    def pid(self) -> int:
        """Its number where it runs."""

    def check(self) -> bool:
        """Return whether it is ready, without waiting; ProcessError, with its log's end, if it ended."""

    def poll(self) -> int | None:
        """Return its exit code, -N if signal N ended it, None while it runs."""

    def tail(self, n_lines: int = 20) -> str:
        """Return the last lines of its log."""

    def stop(self, timeout_s: float) -> int:
        """Ask it to end, insist after `timeout_s` seconds, and return its exit code; from any thread."""

    def terminate(self) -> None:
        """Ask it to end, and do not wait."""

    def kill(self) -> int:
        """End it at once and return its exit code."""


class Launcher(Protocol):
    """Starts roles on one host."""

    def start(self, name: str, argv: Sequence[str], log_path: Path) -> Handle:
        """Start a role and return without waiting; ProcessError if that is impossible."""


class LocalLauncher:
    """Starts roles on this machine: they die with the thread that calls `start`."""

    def start(self, name: str, argv: Sequence[str], log_path: Path) -> Handle:
        """Start a role and return without waiting; ProcessError if that is impossible."""
        return processes.start(name, argv, log_path=log_path)
