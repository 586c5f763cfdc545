"""Runs `cluster.cli`: the entry point of the command, and of `python -m cluster`."""

from superserve.roles.command import run


def main() -> None:
    """Run the command."""
    run("cluster.cli")


if __name__ == "__main__":
    run("cluster.cli", "cluster")
