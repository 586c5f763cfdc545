"""Runs `profiles.cli`: the entry point of the command, and of `python -m profiles`."""

from superserve.roles.command import run


def main() -> None:
    """Run the command."""
    run("profiles.cli")


if __name__ == "__main__":
    run("profiles.cli", "profiles")
