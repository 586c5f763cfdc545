"""`cluster top`: a live page of a cluster, once a second; single pages if the output is not a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cluster.remote import record as records
from cluster.show.top import Sample, page, plain
from superserve.errors import ConfigError
from superserve.net.connection import ask_status
from superserve.net.keys import ENVIRONMENT
from superserve.roles import local
from superserve.roles.command import plain_errors
from superserve.roles.local import DEFAULT_NAME, Liveness

if TYPE_CHECKING:
    from rich.console import RenderableType

_HEADER_LINES = 8  # of the header, the table's head and the line below it
_ANSWER_S = 2.0  # a router that works answers in milliseconds; longer, the screen would seem to hang


@click.command()
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which cluster.")
@click.option("--connect", metavar="HOST:PORT", help="Watch the router of a cluster elsewhere.")
@click.option("--once", is_flag=True, help="Print one page, of two samples a second apart, as plain text.")
@click.option("--interval-s", type=click.FloatRange(0.1, 60.0), default=1.0, show_default=True)
@plain_errors()
def top(name: str, connect: str | None, once: bool, interval_s: float) -> None:
    """Watch the router and every GPU, once a second, until Ctrl-C.

    If the output is not a terminal, pages follow each other as plain text.
    """
    try:
        endpoint = endpoint_of(name, connect)
        if once:
            click.echo(plain(_two_looks(endpoint, interval_s)))
        elif sys.stdout.isatty():
            _watch(endpoint, interval_s)
        else:
            _print(endpoint, interval_s)
    except KeyboardInterrupt:
        return  # Ctrl-C is the way to leave
    except BrokenPipeError:
        sys.stderr.close()  # the reader closed the pipe; otherwise Python would complain at exit
        sys.exit(0)


def endpoint_of(name: str, connect: str | None) -> str:
    """Return the client endpoint of a cluster: the one given, of this machine, or of a file."""
    if connect is not None:
        parts = [one.strip() for one in connect.split(",")]
        return ",".join(one if "://" in one else f"tcp://{one}" for one in parts)
    cluster = local.load(local.cluster_folder(name))
    if cluster is None and (record := records.load(name)) is not None:
        return record.client_endpoint
    if cluster is None:
        raise ConfigError(f"no cluster {name!r} runs on this machine: start one with `cluster up`")
    if cluster.liveness() is not Liveness.ALIVE or not cluster.client_endpoint:
        raise ConfigError(f"the cluster {name!r} {local.remains(cluster)}")
    return cluster.client_endpoint


def _look(endpoint: str) -> Sample:
    """Return a sample; ConfigError if the router does not answer."""
    keys = os.environ.get(ENVIRONMENT) or local.remembered_keys(endpoint)
    status = ask_status(endpoint, _ANSWER_S, keys=keys)
    return Sample(status, time.monotonic_ns())


def _two_looks(endpoint: str, interval_s: float) -> RenderableType:
    before = _look(endpoint)
    time.sleep(interval_s)  # rates are differences of two samples
    return page(_look(endpoint), before)


def _print(endpoint: str, interval_s: float) -> None:
    """Print a page every `interval_s`, for a pipe or a file; end when the router does."""
    before: Sample | None = None
    while True:
        now = _look(endpoint)
        click.echo(plain(page(now, before)) + "\n")
        sys.stdout.flush()
        before = now
        time.sleep(interval_s)


def _watch(endpoint: str, interval_s: float) -> None:
    """Redraw the page every `interval_s`; show it while the router does not answer."""
    console = Console()
    before: Sample | None = None
    now = _look(endpoint)  # if the router never answered: an error, not an empty page
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(page(now, before, max_rows=_room(console)), refresh=True)
            time.sleep(interval_s)
            try:
                before, now = now, _look(endpoint)
            except ConfigError as error:
                live.update(Group(_gone(error, now), page(now, None, max_rows=_room(console))), refresh=True)


def _room(console: Console) -> int:
    return max(1, console.height - _HEADER_LINES - 1)


def _gone(error: ConfigError, last: Sample) -> Text:
    ago_s = (time.monotonic_ns() - last.at_ns) / 1e9
    return Text(f"{error}; what follows is {ago_s:.0f} s old", style="bold red")
