"""What the commands of every role have in common: an error of ours is one line on stderr, and exit code 1."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from superserve.errors import SuperServeError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def plain_errors(*more: type[Exception]) -> Iterator[None]:
    """Have a command print errors without a traceback; the innermost decorator of its function.

    Args:
        more: Errors besides SuperServeError that are the user's to mend.
    """
    errors: tuple[type[Exception], ...] = (SuperServeError, *more)
    try:
        yield
    except BrokenPipeError:
        raise  # an OSError that is nobody's to mend: click ends the command
    except errors as error:
        import click  # noqa: PLC0415  applications that embed the client have none

        raise click.ClickException(str(error)) from error
