"""`loadgen search`: the highest rate with the requested attainment, live or simulated."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click
import orjson

from loadgen import options
from loadgen.live.environment import environment_of
from loadgen.live.run import Emulation, RunSettings
from loadgen.live.targets import keys_of, payload_bytes_of, target_of
from loadgen.results.tables import check_outputs, echo, write
from loadgen.simulator.workloads import parse_cluster
from loadgen.study.rate_search import Bounds
from loadgen.study.search import Search, find_rate, live_offer, private_cluster, simulated_offer, warm_up
from loadgen.traces.arrivals import MAX_RATE_QPS, check_positive
from loadgen.traces.azure import Invocations
from loadgen.traces.trace import Trace, open_source
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from superserve.roles.command import plain_errors

if TYPE_CHECKING:
    from pathlib import Path

    from gpu_worker.serve.eventlog import EventLogReport
    from loadgen.study.search import RateAnswer

_DRAWN_S = 5.0  # of a spec, for each probe


@click.command("search")
@click.option("--attainment", type=click.FloatRange(0, 1, min_open=True), default=0.999, show_default=True)
@click.option(
    "--trace", "spec", default="poisson", show_default=True, help="A file or spec; its rate varies."
)
@options.connect
@options.keys
@options.emulate
@click.option(
    "--simulate", "is_simulated", is_flag=True, help="Use a virtual clock; PROFILE:N[,PROFILE:N...]."
)
@options.policy
@options.slo_ms
@click.option(
    "--duration", type=float,
    help="Seconds of each probe.  [default: 5; a recorded trace is played as a whole]",
)  # fmt: skip
@click.option("--start", type=float, default=1000.0, show_default=True, help="The first rate, q/s.")
@click.option("--lowest", type=float, default=1.0, show_default=True, help="The lowest rate, q/s.")
@click.option("--highest", type=float, default=400_000.0, show_default=True, help="The highest rate, q/s.")
@click.option(
    "--tolerance", type=click.FloatRange(0.001, 1), default=0.03, show_default=True,
    help="How far the least failing rate may be above the answer, as a share of it.",
)  # fmt: skip
@click.option("--max-probes", type=click.IntRange(1, 100), default=20, show_default=True, help="Rates tried.")
@options.senders
@options.payload_bytes
@options.seed
@options.json_file
@plain_errors()
def search_command(
    attainment: float,
    spec: str,
    connect: str | None,
    keys: str | None,
    emulate: str | None,
    is_simulated: bool,
    policy: str | None,
    slo_ms: float,
    duration: float | None,
    start: float,
    lowest: float,
    highest: float,
    tolerance: float,
    max_probes: int,
    senders: int,
    payload_bytes: int | None,
    seed: int,
    json_path: Path | None,
) -> None:
    """Find the highest rate at which enough queries are answered in time, by bisection.

    A probe that fails in noise is repeated, and the resulting rate must hold twice. Exit 1 if no rate
    holds, or an event log shows a violation.
    """
    reports: list[EventLogReport] = []
    check_outputs({"--json": json_path})
    bounds = _bounds(start, lowest, highest, tolerance, max_probes)
    search = _search(spec, attainment, slo_ms, duration, seed, bounds)
    if is_simulated:
        answer = _simulated(search, connect, emulate, policy or options.DEFAULT_POLICY)
    else:
        target = target_of(connect, emulate, policy, None)
        shown = keys_of(target, keys)
        if payload_bytes is None:
            payload_bytes = payload_bytes_of(target, shown)
        settings = RunSettings(search.slo_ns, senders, payload_bytes, keys=shown)
        answer = _live(search, target, settings, reports)
    for line in (*answer.to_lines(search), *(report.to_text() for report in reports)):
        echo(line)
    if json_path is not None:
        cluster = f"{'simulated: ' if is_simulated else ''}{emulate or connect or 'of this machine'}"
        body = answer.to_dict(search) | {"environment": environment_of(cluster=cluster, seed=seed)}
        write(json_path, orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    if answer.rate_qps is None or any(report.n_violations for report in reports):
        sys.exit(1)


def _bounds(start: float, lowest: float, highest: float, tolerance: float, max_probes: int) -> Bounds:
    for name, rate_qps in (("--start", start), ("--lowest", lowest), ("--highest", highest)):
        check_positive(name, rate_qps, at_most=MAX_RATE_QPS)
    if not lowest <= start <= highest:
        raise ConfigError(f"--start: expected a rate from --lowest to --highest, got {start:g}")
    return Bounds(start, lowest, highest, tolerance, max_probes)


def _search(
    spec: str, attainment: float, slo_ms: float, duration: float | None, seed: int, bounds: Bounds
) -> Search:
    slo_ns = options.slo_ns_of(slo_ms)
    source = open_source(spec, rate_qps=bounds.start_qps)
    if duration is None and not isinstance(source, Trace | Invocations):
        duration = _DRAWN_S
    return Search(source, spec, attainment, slo_ns, bounds, duration, seed)


def _simulated(search: Search, connect: str | None, emulate: str | None, policy: str) -> RateAnswer:
    if emulate is None or connect is not None:
        raise ConfigError("--simulate: expected the GPUs as --emulate PROFILE:N, and no --connect")
    cluster = parse_cluster(emulate)
    for profile in {id(profile): profile for profile in cluster}.values():
        make_policy(policy, profile)
    return find_rate(search, simulated_offer(cluster, policy, search.slo_ns), echo)


def _live(
    search: Search, target: Emulation | str, settings: RunSettings, reports: list[EventLogReport]
) -> RateAnswer:
    with contextlib.ExitStack() as stack:
        if isinstance(target, Emulation):
            target = stack.enter_context(private_cluster(target, reports))
        offer = live_offer(target, settings, search.noisy_ns)
        warm_up(search, offer)
        return find_rate(search, offer, echo)
