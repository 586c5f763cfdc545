"""Runs `router.cli` for `python -m router`."""

from router.cli import cli

cli(prog_name="python -m router")
