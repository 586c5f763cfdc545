"""`cluster trace` and `cluster explain`: what the router did, as a file, as spans, or in words."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.top import endpoint_of
from loadgen.cli.questions.explain import LIVE
from loadgen.cli.questions.explain import cli as explain_cli
from loadgen.study.explain.flight import Flight, FlightReader, entries_in
from loadgen.study.spans.ended import EndedQueries
from loadgen.study.spans.perfetto import write_trace
from profiles.table import Profile
from superserve.errors import ConfigError
from superserve.net.endpoints import endpoints_of
from superserve.net.keys import ENVIRONMENT
from superserve.roles import local
from superserve.roles.command import plain_errors
from superserve.roles.local import DEFAULT_NAME
from superserve.wire.flight import entries_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superserve.status import RouterStatus

_EVERY_S = 0.25


@click.command()
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which cluster.")
@click.option("--connect", metavar="HOST:PORT", help="The router of a cluster elsewhere.")
@click.option("--keys", envvar=ENVIRONMENT, help="A client's key file, for a router with keys.")
@click.option(
    "--seconds", type=click.FloatRange(0.1, 86_400.0),
    help="How long.  [default: 5 for a file; for a collector, until Ctrl-C]",
)  # fmt: skip
@click.option("--perfetto", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write this file.")
@click.option(
    "--otlp", "url", metavar="URL", help="Send spans here, such as http://127.0.0.1:4318/v1/traces."
)
@click.option(
    "--one-in", type=click.IntRange(1), default=100, show_default=True,
    help="Of the queries in time; all that missed are traced.",
)  # fmt: skip
@plain_errors()
def trace(
    name: str, connect: str | None, keys: str | None, seconds: float | None, path: Path | None,
    url: str | None, one_in: int,
) -> None:  # fmt: skip
    """Trace a running router from outside: a Chrome trace of some seconds, or spans as queries end.

    Its loop does nothing for this but answer four questions a second.
    """
    if (path is None) == (url is None):
        raise ConfigError("expected --perfetto FILE or --otlp URL")
    if url is not None and importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is None:
        raise ConfigError("opentelemetry: not installed; try: pip install 'superserve[otel]'")
    endpoint = endpoint_of(name, connect)
    shown = (local.remembered_keys(endpoint) if keys is None else keys) or ""
    routers = endpoints_of(endpoint)
    if len(routers) > 1:
        raise ConfigError(
            f"{len(routers)} routers run: expected --connect with one of {', '.join(routers)}; each has its "
            "own clock, GPUs and queries"
        )
    reader = FlightReader(endpoint, shown)
    try:
        if path is not None:
            _to_file(reader, path, seconds or 5.0, one_in)
        elif url is not None:
            _to_collector(reader, url, seconds, one_in)
    finally:
        reader.close()


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[ID] [OPTIONS]")
def explain(words: tuple[str, ...]) -> None:
    """Explain why a query was late; the same as `superserve explain live`."""
    explain_cli.main([LIVE, *words], prog_name="cluster explain")


def _readings(
    reader: FlightReader, seconds: float | None
) -> Iterator[tuple[RouterStatus, dict[str, Any], bytes]]:
    """Yield STATUS, what came with it, and the new entries, a few times a second; at first there are none."""
    end_s = None if seconds is None else time.monotonic() + seconds
    since: int | None = None
    while True:
        asked = {"profiles": True} if since is None else {"since": since}
        status, found = reader.ask(asked)
        if found is None:
            raise ConfigError(f"{reader.endpoint}: this router keeps no flight record: --flight-mb is 0")
        yield status, found, entries_in(found, reader.endpoint)
        since = found["cursor"]
        if found["more"]:
            continue
        if end_s is not None and time.monotonic() >= end_s:
            return
        time.sleep(_EVERY_S)


def _to_file(reader: FlightReader, path: Path, seconds: float, one_in: int) -> None:
    flight: Flight | None = None
    for status, found, data in _readings(reader, seconds):
        if flight is None:
            profiles = [Profile.from_dict(one) for one in found["profiles"]]
            flight = Flight(status.router.policy, [], profiles, found["profile_of"])
        flight.gpus = [(name, slot) for name, slot in found["gpus"]]
        flight.add(entries_of(data))
    assert flight is not None, "there is one reading at least"
    write_trace(path, flight, one_in)
    n = len(flight.queries)
    click.echo(f"{path}: {n:,} queries in {len(flight.batches):,} batches; open it at ui.perfetto.dev")


def _to_collector(reader: FlightReader, url: str, seconds: float | None, one_in: int) -> None:
    from loadgen.study.spans.otel import SpanSender  # noqa: PLC0415  an optional extra

    ended: EndedQueries | None = None
    sender: SpanSender | None = None
    n_queries = 0
    try:
        for status, found, data in _readings(reader, seconds):
            if ended is None or sender is None:
                profiles = [Profile.from_dict(one) for one in found["profiles"]]
                ended = EndedQueries(profiles, found["profile_of"], one_in)
                sender = SpanSender(url, status.router.epoch, time.time_ns() - found["now_ns"])
                click.echo(f"spans of {reader.endpoint} go to {url} (Ctrl-C ends it)")
            gpus = [(name, slot) for name, slot in found["gpus"]]
            queries = ended.take(list(entries_of(data)), gpus)
            n_queries += len(queries)
            sender.send(ended.flight, queries)
        if ended is not None and sender is not None:
            rest = ended.rest()
            n_queries += len(rest)
            sender.send(ended.flight, rest)
    except KeyboardInterrupt:
        pass  # Ctrl-C is the way to leave
    finally:
        if sender is not None:
            click.echo(f"{n_queries:,} queries, {sender.n_sent:,} spans")
            sender.close()
