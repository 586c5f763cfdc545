"""Runs `gateway.cli`: the entry point of the command, and of `python -m gateway`."""

from superserve.roles.command import run


def main() -> None:
    """Run the command."""
    run("gateway.cli")


if __name__ == "__main__":
    run("gateway.cli", "python -m gateway")
