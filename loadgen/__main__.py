"""Runs `loadgen.cli`: the entry point of the command, and of `python -m loadgen`."""

from superserve.roles.command import run


def main() -> None:
    """Run the command."""
    run("loadgen.cli")


if __name__ == "__main__":
    run("loadgen.cli", "loadgen")
