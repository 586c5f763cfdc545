"""A group of commands that imports each of them when it is run.

The commands of `loadgen` and `cluster` together import most of this project, and one run needs a part of it:
`cluster status` is there without the simulator, the adversary and the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable


class Commands(click.Group):
    """A click group that also has commands whose modules are not imported yet.

    Args:
        plain: What a group takes.
        later: By name, a function that imports a command and returns it.
    """

    def __init__(self, *plain: Any, later: dict[str, Callable[[], click.Command]], **more: Any) -> None:
        super().__init__(*plain, **more)
        self._later = later

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, imported or not."""
        return sorted({*super().list_commands(ctx), *self._later})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, imported now if it is not yet; None if there is none of this name."""
        if cmd_name not in self.commands and cmd_name in self._later:
            self.add_command(self._later[cmd_name](), cmd_name)
        return super().get_command(ctx, cmd_name)
