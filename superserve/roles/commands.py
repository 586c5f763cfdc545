"""What the commands of every role share: a SuperServeError is one line on stderr, and exit code 1."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from superserve.errors import SuperServeError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def plain_errors(*more: type[Exception]) -> Iterator[None]:
    """Print a command's errors without a traceback; the innermost decorator of its function.

    Args:
        more: Other errors that the user can fix.
    """
    errors: tuple[type[Exception], ...] = (SuperServeError, *more)
    try:
        yield
    except BrokenPipeError:
        raise  # an OSError that no user can fix: click ends the command
    except errors as error:
        import click  # noqa: PLC0415  applications that embed the client may not have it

        raise click.ClickException(str(error)) from error
