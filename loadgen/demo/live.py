"""The demo's live page: a process that shows the run in a browser, and a recording of it at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import urllib.request
from typing import TYPE_CHECKING

import click

from superserve.errors import ProcessError
from superserve.files import write_whole
from superserve.roles.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORDING = "live.html"
"""The recording's file, which plays back without a server."""

_START_S, _SAVE_S = 30.0, 10.0


@contextlib.contextmanager
def live_page(endpoint: str, saved: Path | None) -> Iterator[None]:
    """Show the router at `endpoint` in a page, and save a recording at the end.

    A page that does not start or save is a line of text: it is no part of what the demo checks.

    Args:
        endpoint: The router's client endpoint.
        saved: Where the recording goes; None for no page at all.
    """
    if saved is None or importlib.util.find_spec("starlette") is None:
        yield
        return
    with ProcessGroup() as group:
        try:
            page = group.start("web", ["-m", "cluster", "web", "--connect", endpoint, "--port", "0"])
            group.wait_ready(_START_S)
        except ProcessError as error:
            click.echo(f"  no live page: {error}")
            yield
            return
        address: str = page.ready["address"]
        click.echo(f"  watch it in a browser: {address}")
        yield
        try:
            with urllib.request.urlopen(f"{address}recording", timeout=_SAVE_S) as answer:  # noqa: S310  ours
                write_whole(saved, answer.read())
        except OSError as error:
            click.echo(f"  no recording: {error}")
