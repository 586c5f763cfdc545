"""`superserve explain`: why a query was late, and what would have helped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from loadgen import options
from loadgen.live.targets import keys_of, target_of
from loadgen.results.tables import echo
from loadgen.study.explain.causes import cause_of
from loadgen.study.explain.flight import ask_flights, load_flight
from loadgen.study.explain.show import body_of, change_lines, lines_of, summary_lines
from loadgen.study.explain.story import story_of
from loadgen.study.explain.whatif import WhatIf, play, window_of
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.roles import local
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from loadgen.study.explain.flight import Flight, FlownQuery
    from loadgen.study.explain.whatif import Replayed

LIVE = "live"


@click.command("explain")
@click.argument("run")
@click.argument("query", required=False, metavar="[ID]")
@click.option(
    "--worst", type=click.IntRange(1), help="The queries that missed by most.  [default: 1, without ID]"
)
@click.option("--client", type=click.IntRange(1), help="Only those of a client, by its number on the router.")
@click.option(
    "--slo-ms", type=float, help="From due to deadline; shows what passed before the query was sent."
)
@click.option(
    "--gpus", type=click.IntRange(-64, 64), multiple=True, help="Play it again with so many GPUs more."
)
@click.option("--policy", multiple=True, help="Play it again under this policy.")
@click.option("--with-slo-ms", type=float, multiple=True, help="Play it again with this SLO.")
@click.option("--no-changes", is_flag=True, help="Play nothing again.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each query.")
@click.option("--save", type=options.FILE, help="Write the record to a file that RUN may name later.")
@options.connect
@options.keys
@plain_errors()
def cli(
    run: str,
    query: str | None,
    worst: int | None,
    client: int | None,
    slo_ms: float | None,
    gpus: tuple[int, ...],
    policy: tuple[str, ...],
    with_slo_ms: tuple[float, ...],
    no_changes: bool,
    as_json: bool,
    save: Path | None,
    connect: str | None,
    keys: str | None,
) -> None:
    """Explain where the time of queries went, why they missed, and what would have helped.

    RUN is a router's event log (`python -m router --record`), a folder with one (`loadgen run --logs`), a
    saved record, or `live`: the last minutes of the router that runs here, or at --connect. ID is a query's,
    as `query_id` and error messages have it; CLIENT:ID if several clients use it.
    """
    flights = _flights(run, connect, keys)
    if save is not None:
        if len(flights) > 1:
            raise ConfigError(f"--save: expected one router, got {len(flights)}: name it with --connect")
        flights[0][1].save(save)
    slo_ns = None if slo_ms is None else options.slo_ns_of(slo_ms)
    chosen = _chosen(flights, query, worst, client)
    if not as_json and query is None:
        for where, flight in flights:
            if len(flights) > 1:
                echo(f"{where}:")
            missed = [one for one in flight.missed() if client in (None, one.client)]
            for line in summary_lines(flight, missed):
                echo(line)
    changes = [WhatIf(gpus=n) for n in gpus] + [WhatIf(policy=one) for one in policy]
    changes += [WhatIf(slo_ns=options.slo_ns_of(one)) for one in with_slo_ms]
    for where, flight, one in chosen:
        story = story_of(flight, one, slo_ns)
        cause = cause_of(flight, story)
        played: list[Replayed] = []
        if not no_changes:
            wanted = changes or _usual(flight, one, story.latency_ns)
            window = window_of(flight, [one])
            played = [play(flight, window, change, one) for change in [WhatIf(), *wanted]]
        if as_json:
            echo(orjson.dumps(body_of(flight, story, cause, played)).decode())
            continue
        echo(f"\n{where}:" if len(flights) > 1 else "")
        for line in [*lines_of(story, cause), *change_lines(one, played)]:
            echo(line)


def _flights(run: str, connect: str | None, keys: str | None) -> list[tuple[str, Flight]]:
    """Return the records, each with where it is from: several if several routers run."""
    if run != LIVE:
        if connect is not None:
            raise ConfigError(f"--connect: expected it with `{LIVE}` as RUN, got {run!r}")
        return [(run, load_flight(Path(run)))]
    endpoint = local.client_endpoint() if connect is None else target_of(connect, None, None, None)
    assert isinstance(endpoint, str), "without --emulate it is a running router"
    return ask_flights(endpoint, keys_of(endpoint, keys))


def _chosen(
    flights: list[tuple[str, Flight]], query: str | None, worst: int | None, client: int | None
) -> list[tuple[str, Flight, FlownQuery]]:
    """Return the queries to explain, each with its record: the one named, or those that missed by most.

    A query that several routers had, since one was lost or in doubt, is explained as each of them saw it.
    """
    if query is not None:
        if worst is not None:
            raise ConfigError("--worst: expected it or an ID, got both")
        return _named(flights, query)
    missed = [
        (story_of(flight, one).late_ns, where, flight, one)
        for where, flight in flights
        for one in flight.missed()
        if client in (None, one.client)
    ]
    missed.sort(key=lambda each: -each[0])
    return [each[1:] for each in missed[: worst or 1]]


def _named(flights: list[tuple[str, Flight]], query: str) -> list[tuple[str, Flight, FlownQuery]]:
    found, reasons = [], []
    for where, flight in flights:
        try:
            found.append((where, flight, flight.find(query)))
        except ConfigError as error:
            reasons.append(str(error) if len(flights) == 1 else f"{where}: {error}")
    if not found:
        raise ConfigError("; ".join(reasons))
    return found


def _usual(flight: Flight, query: FlownQuery, latency_ns: int) -> list[WhatIf]:
    """Return the changes that are worth a look for any query."""
    other = "planfit" if flight.policy == "slackfit" else "slackfit"
    slo_ms = math.ceil(max(latency_ns, query.slack_ns) / MS) + 5
    return [WhatIf(gpus=1), WhatIf(policy=other), WhatIf(slo_ns=slo_ms * MS)]
