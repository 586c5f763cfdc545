"""Runs `gpu_worker.cli`: the entry point of the command, and of `python -m gpu_worker`."""

from superserve.roles.command import run


def main() -> None:
    """Run the command."""
    run("gpu_worker.cli")


if __name__ == "__main__":
    run("gpu_worker.cli", "python -m gpu_worker")
