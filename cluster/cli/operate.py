"""What `cluster drain`, `restart` and `doctor` do, once their options are parsed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import orjson

from cluster.cli import hosts as hosts_cli
from cluster.operate import scaling
from cluster.operate.doctor import Finding, Seen, Verdict, examine
from cluster.operate.engine import here, open_cluster
from cluster.operate.rolling import RollingOperator
from cluster.operate.supervised import SupervisedCluster
from cluster.show import tables as show
from cluster.spec.plan import name_option
from router.report.scaler import Scaler, ScalerSettings
from superserve.errors import ConfigError
from superserve.roles import local
from superserve.roles.local import Liveness

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cluster.engines.engine import ClusterEngine

_COUNT_S = 1.0  # between two reads of the counters: those that grow are faults of now, not of last week
ROUTER_COSTS = (
    "the router: while it is away, some seconds, new queries are refused as DRAINING or wait at their "
    "clients; it answers what it holds first, for up to 5 s"
)


ROUTERS_COST = "the routers, one after the other: the others take over its queries and workers meanwhile"


@contextlib.contextmanager
def opened(name: str) -> Iterator[SupervisedCluster]:
    """Give the cluster of that name.

    Raises:
        ConfigError: It does not run; the error shows what to type.
    """
    if hosts_cli.is_on_hosts(name):
        with open_cluster(name) as fleet:
            yield SupervisedCluster(fleet)
        return
    cluster = local.load(local.cluster_folder(name))
    if cluster is None:
        raise ConfigError(f"no cluster {name!r} runs on this machine: start one with `cluster up`")
    if cluster.liveness() is not Liveness.ALIVE:
        raise ConfigError(f"the cluster {name!r} {local.remains(cluster)}")
    yield SupervisedCluster(here(name, cluster))


def drain(name: str, names: Sequence[str]) -> None:
    """Drain workers, and print how to start them again."""
    with opened(name) as cluster:
        RollingOperator(cluster, click.echo).drain(names)
    again = f"cluster restart{name_option(name)} {' '.join(names)}"
    click.echo(f"start again: `{again}`, or whatever has ended: `cluster up`")


def scale(name: str, n: int, *, timeout_s: float) -> None:
    """Make `n` workers of a cluster run."""
    with opened_engine(name) as engine:
        planned = scaling.scale(engine, n, click.echo, timeout_s=timeout_s)
    if not planned.start and not planned.stop:
        click.echo(f"{n} worker{'s' if n > 1 else ''} run{'s' if n == 1 else ''} already")


def apply(hosts_file: Path, *, timeout_s: float) -> None:
    """Let the router of a hosts file's cluster take the file's settings; print what changed."""
    from cluster.spec.hosts import load_hosts  # noqa: PLC0415  it reads a file with pydantic, 0.2 s

    hosts = load_hosts(hosts_file)
    with opened_engine(hosts.cluster) as engine:
        lines = scaling.tune(engine, hosts.tuning(), timeout_s=timeout_s)
    for line in lines or ["nothing differs: the router runs with these settings already"]:
        click.echo(line)


def autoscale(name: str, settings: ScalerSettings, *, need: str, every_s: float) -> None:
    """Scale a cluster by its load, until Ctrl-C."""
    with opened_engine(name) as engine:
        slots = set(dict(engine.record.slots).values())
        if len(slots) > 1:
            raise ConfigError(
                "autoscale: expected workers with equally many GPUs, got "
                f"{' and '.join(map(str, sorted(slots)))}: how many more workers a load needs is not known"
            )
        settings = replace(settings, gpus_per_worker=max(slots, default=1))
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the way to leave
            scaling.follow(engine, Scaler(settings), click.echo, need=need, every_s=every_s)


@contextlib.contextmanager
def opened_engine(name: str) -> Iterator[ClusterEngine]:
    """Give the engine of a cluster that has a hosts file.

    Raises:
        ConfigError: It does not run, or is one of this machine.
    """
    if local.load(local.cluster_folder(name)) is not None:
        raise ConfigError(
            f"{name}: expected a cluster of a hosts file: on this machine, `cluster down` and then "
            f"`cluster up --workers N` give another number"
        )
    with open_cluster(name) as engine:
        yield engine


def restart(
    name: str,
    names: Sequence[str],
    *,
    rolling: bool,
    at_once: int,
    router: bool,
    force: bool,
    timeout_s: float,
) -> None:
    """Restart workers, and the router if requested.

    Raises:
        ConfigError: Neither names nor --rolling are given, or no live worker would be left.
        ProcessError: A role did not come back.
    """
    if not names and not rolling and not router:
        raise ConfigError(
            "expected workers or hosts to restart, or --rolling for all workers, a few at a time"
        )
    with opened(name) as cluster:
        operator = RollingOperator(cluster, click.echo)
        if router:
            is_one = sum(role.kind == "router" for role in cluster.roles()) == 1
            click.echo(ROUTER_COSTS if is_one else ROUTERS_COST)
            operator.restart_router(timeout_s)
        if names or rolling:
            n = at_once if rolling else len(cluster.roles())
            operator.restart(names, at_once=n, force=force, timeout_s=timeout_s)


def doctor(name: str, *, as_json: bool) -> bool:
    """Print the findings of every check, and what to type; return whether all is well."""
    with opened(name) as cluster:
        before = cluster.status()
        time.sleep(_COUNT_S)  # counters that still grow are worse than old counts
        roles = cluster.roles()
        seen = Seen(name, cluster.is_local, roles, cluster.status(), before, cluster.facts(roles))
    findings = examine(seen)
    n_wrong = sum(finding.verdict is Verdict.WRONG for finding in findings)
    if as_json:
        body = {"cluster": name, "wrong": n_wrong, "findings": findings}
        click.echo(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
    else:
        for line in _page(findings, n_wrong):
            click.echo(line)
    return n_wrong == 0


def _page(findings: Sequence[Finding], n_wrong: int) -> Iterator[str]:
    yield show.table(
        ("check", "verdict", "what was seen"), [(f.check, str(f.verdict), f.text) for f in findings]
    )
    yield ""
    for finding in findings:
        if finding.verdict is not Verdict.OK:
            yield f"{finding.verdict}: {finding.text}"
            yield from (f"    {line}" for line in finding.more.splitlines())
            yield f"    do: {finding.fix}"
    yield "nothing is wrong" if n_wrong == 0 else f"{n_wrong} wrong"
