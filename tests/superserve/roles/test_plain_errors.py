"""What is the user's to mend is one line on stderr; what is ours keeps its traceback."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from superserve.errors import ConfigError, ProcessError
from superserve.roles.command import plain_errors

pytestmark = pytest.mark.timeout(30)


def command(raised: Exception, *more: type[Exception]) -> click.Command:
    """Return a command that raises."""

    @click.command()
    @plain_errors(*more)
    def raising() -> None:
        raise raised

    return raising


@pytest.mark.parametrize("error", [ConfigError("--rate: expected a number"), ProcessError("it ended")])
def test_an_error_of_ours_is_one_line_and_exit_code_1(error: Exception) -> None:
    """Without a traceback."""
    done = CliRunner().invoke(command(error))

    assert (done.exit_code, done.stderr) == (1, f"Error: {error}\n")


def test_other_errors_are_so_only_where_a_command_says_it() -> None:
    """A bug keeps its traceback, and a reader that has left is click's affair."""
    shown = CliRunner().invoke(command(OSError("no space"), OSError))
    bug = CliRunner().invoke(command(OSError("no space")))
    left = CliRunner().invoke(command(BrokenPipeError(), OSError))

    assert (shown.exit_code, shown.stderr) == (1, "Error: no space\n")
    assert isinstance(bug.exception, OSError)
    assert isinstance(left.exception, BrokenPipeError)
