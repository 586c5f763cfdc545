"""`cluster`: a router and workers on this machine, started, watched and stopped together."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from cluster import show
from cluster.down import down as take_down
from cluster.health import ask_router, problems
from cluster.keys_cli import keys_command
from cluster.plan import Options, make_plan
from cluster.up import StartError
from cluster.up import up as bring_up
from superserve import local
from superserve.errors import ConfigError, SuperServeError
from superserve.local import DEFAULT_NAME, Liveness

if TYPE_CHECKING:
    from superserve.local import LocalCluster

_PORT = click.IntRange(0, 65_535)
_MAX_EMULATED = 4_096
_name = click.option("--name", default=DEFAULT_NAME, show_default=True, help="Which cluster of this machine.")


@click.group()
def cli() -> None:
    """Run a cluster: a router and its workers, on this machine so far."""


cli.add_command(keys_command)


@cli.command()
@click.argument("hosts_file", required=False, type=click.Path(path_type=Path))
@_name
@click.option("--emulate", metavar="PROFILE:N", help="N emulated GPUs instead of real ones.")
@click.option("--gpus", metavar="LIST", help="These CUDA devices, such as 0,2: one worker on each.")
@click.option(
    "--workers", type=click.IntRange(1, 1_024), help="Worker processes.  [default: one a GPU, or 1]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if torch sees GPUs]")
@click.option("--supernet", metavar="NAME", help="digits, ofa-resnet50, dynabert, or module:attribute.")
@click.option(
    "--weights", metavar="FILE", help='Its checkpoint, or "random".  [default: the one it comes with]'
)
@click.option("--profile", metavar="PROFILE", help="Of the supernet on this device.  [default: digits-cpu]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each worker's torch.  [default: 1]")
@click.option(
    "--policy",
    default="demandfit",
    show_default=True,
    help="demandfit, slackfit, fixed:<subnet>, maxacc, ...",
)
@click.option("--margin-ms", default=1.0, show_default=True, help="Slack held back for the unforeseen.")
@click.option("--client-port", type=_PORT, default=0, help="Where clients connect.  [default: any free one]")
@click.option("--worker-port", type=_PORT, default=0, help="Where workers connect.  [default: any free one]")
@click.option("--ready-timeout-s", default=60.0, show_default=True, help="Wait so long for all to be ready.")
def up(hosts_file: Path | None, name: str, ready_timeout_s: float, **asked: Any) -> None:
    """Start a router and workers; return when all are ready, with a table.

    They run until `cluster down`. If they run already, this says so.
    """
    try:
        if hosts_file is not None:
            raise ConfigError(no_hosts_yet(hosts_file))
        plan = make_plan(name, options(**asked), ready_timeout_s)
        done = bring_up(plan)
    except StartError as error:
        if error.cluster is not None:
            _say([show.processes(error.cluster), "", *show.reasons(error.cluster)])
        raise click.ClickException(f"cluster {name!r} is not up: {error}") from error
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    if done.tidied is not None:
        click.echo(show.tidied(done.tidied))
    words = "is up" if done.is_new else "runs already, as asked for"
    _say([f"cluster {name!r} {words}", "", show.processes(done.cluster), ""])
    _say(show.what_next(done.cluster, done.status, plan.profile))


def no_hosts_yet(path: Path) -> str:
    """Say that a hosts file cannot be used so far, and what can be done instead."""
    return (
        f"{path}: starting a cluster on several hosts is not built yet; without a file `cluster up` starts "
        f"one on this machine, and `python -m gpu_worker --connect tcp://HOST:PORT` joins a router by hand"
    )


def options(*, emulate: str | None, gpus: str | None, **plain: Any) -> Options:
    """Return the options of `up`, those with a syntax of their own parsed.

    Raises:
        ConfigError: One of those is malformed.
    """
    profile, n_gpus = (None, None) if emulate is None else _emulation(emulate)
    return Options(emulate=profile, n_gpus=n_gpus, gpus=None if gpus is None else _gpus(gpus), **plain)


def _emulation(text: str) -> tuple[str, int]:
    profile, colon, count = text.rpartition(":")
    if not colon or not count.isdecimal() or not 1 <= int(count) <= _MAX_EMULATED:
        raise ConfigError(f"--emulate: expected PROFILE:N with N from 1 to {_MAX_EMULATED}, got {text!r}")
    return profile, int(count)


def _gpus(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(
            f"--gpus: expected numbers of devices with commas between, such as 0,2, got {text!r}"
        )
    gpus = tuple(int(part) for part in parts)
    if len(set(gpus)) < len(gpus):
        raise ConfigError(f"--gpus: expected each device once, got {text!r}")
    return gpus


@cli.command()
@_name
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def status(name: str, as_json: bool) -> None:
    """Show the router and every worker; exit 1 if none runs or one is unwell."""
    try:
        cluster = _running(name)
        said = ask_router(cluster)
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    wrong = problems(cluster, said)
    if as_json:
        body = {"cluster": orjson.loads(cluster.to_json()), "status": said, "problems": wrong}
        click.echo(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
    else:
        _say(
            [f"cluster {name!r}, {cluster.phase} since {cluster.since}, keeper pid {cluster.keeper.pid}", ""]
        )
        _say([*(show.router(cluster, said) if said is not None else ()), "", show.roles(cluster, said)])
        _say(["", *wrong] if wrong else [])
    sys.exit(1 if wrong else 0)


def _running(name: str) -> LocalCluster:
    """Return the cluster that runs under a name; ConfigError, with what to type, if none does."""
    cluster = local.load(local.cluster_folder(name))
    if cluster is None:
        raise ConfigError(
            f"no cluster {name!r} runs on this machine: start one with `cluster up`{_others(name)}"
        )
    if cluster.liveness() is not Liveness.ALIVE:
        raise ConfigError(f"the cluster {name!r} {local.remains(cluster)}")
    return cluster


def _others(name: str) -> str:
    others = [other for other in local.names() if other != name]
    return f"; or name one of: {', '.join(others)}" if others else ""


@cli.command()
@_name
@click.option("--timeout-s", default=20.0, show_default=True, help="Drain so long, then kill.")
def down(name: str, timeout_s: float) -> None:
    """Drain and stop everything; say what was stopped."""
    try:
        done = take_down(name, timeout_s)
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    _say(
        [f"no cluster {name!r} runs on this machine: nothing to stop"] if done is None else show.stopped(done)
    )


@cli.command()
@_name
@click.option("-f", "--follow", is_flag=True, help="Show what is written from now on, too.")
@click.argument("roles", nargs=-1, metavar="[ROLE]...")
def logs(name: str, follow: bool, roles: tuple[str, ...]) -> None:
    """Show the last lines of the logs, of ROLEs or of all; a stopped cluster's stay until the next."""
    try:
        paths = _logs(local.cluster_folder(name), roles)
    except SuperServeError as error:
        raise click.ClickException(str(error)) from error
    os.execvp("tail", ["tail", "-n", "20", *(["-F"] if follow else []), *paths])  # noqa: S606, S607  by design


def _logs(folder: Path, roles: tuple[str, ...]) -> list[str]:
    found = {path.stem: str(path) for path in sorted(folder.glob("*.log"))}
    for role in roles:
        if role not in found:
            raise ConfigError(f"{role}: expected one of {', '.join(found) or 'nothing: there are no logs'}")
    if not found:
        raise ConfigError(f"{folder}: there are no logs")
    return [found[role] for role in roles] if roles else list(found.values())


def _say(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)
