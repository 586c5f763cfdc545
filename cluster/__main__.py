"""Runs `cluster.cli` for `python -m cluster`."""

from cluster.cli import cli

cli(prog_name="cluster")
