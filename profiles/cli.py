"""The `profiles` command."""

from __future__ import annotations

import sys

import click

from profiles.measuring import commands
from profiles.measuring.train import train_command
from superserve.files import check_text
from superserve.roles.command import plain_errors


@click.group()
@plain_errors()
def cli() -> None:
    """Make and show profiles: how long each subnet takes at each batch size."""
    check_text(sys.argv[1:])


for _command in (
    commands.measure_command, commands.search_command, commands.show_command, commands.calibrate_command,
    commands.accuracy_command, commands.exits_command, commands.advise_command, train_command,
):  # fmt: skip
    cli.add_command(_command)
