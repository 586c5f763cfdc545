"""`python -m gpu_worker`."""

from __future__ import annotations

from gpu_worker.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m gpu_worker")
