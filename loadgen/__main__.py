"""Runs `loadgen.cli` for `python -m loadgen`."""

from loadgen.cli import cli

cli(prog_name="loadgen")
