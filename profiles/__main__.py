"""Runs `profiles.cli` for `python -m profiles`."""

from profiles.cli import cli

cli(prog_name="profiles")
