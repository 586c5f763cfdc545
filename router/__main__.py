"""Runs `router.cli`: the entry point of the command, and of `python -m router`."""

from superserve.roles.command import run


def main() -> None:
    """Run the command."""
    run("router.cli")


if __name__ == "__main__":
    run("router.cli", "python -m router")
