"""`cluster`: a router and workers, on this machine or several, started, watched and stopped together.

The top floor: each command parses its options, calls one function of `cluster.operate`, and prints what
`cluster.show` makes of the result.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from cluster.cli import hosts as hosts_cli
from cluster.cli import operate as operate_cli
from cluster.operate.down import down as take_down
from cluster.operate.engine import here
from cluster.operate.health import ask_router, problems, seen_by, unasked
from cluster.operate.up import StartError
from cluster.operate.up import up as bring_up
from cluster.show import tables as show
from cluster.spec.plan import MAX_ROUTERS, Options, make_plan, name_option
from loadgen.commands import Commands
from loadgen.options import profile_and_n
from router.report.scaler import AS_SERVED, NEEDS, ScalerSettings
from superserve.errors import ConfigError
from superserve.files import check_text
from superserve.roles import local
from superserve.roles.command import plain_errors
from superserve.roles.local import DEFAULT_NAME, Liveness

if TYPE_CHECKING:
    from cluster.spec.hosts import Hosts
    from superserve.roles.local import LocalCluster

_PORT = click.IntRange(0, 65_535)
_MAX_EMULATED = 4_096  # a larger number is a typing error
_name = click.option("--name", default=DEFAULT_NAME, show_default=True, help="A cluster of this machine.")


# What commands of their own files need is imported when they are run.


def _top() -> click.Command:
    from cluster.cli.top import top  # noqa: PLC0415

    return top


def _web() -> click.Command:
    from cluster.cli.web import web  # noqa: PLC0415

    return web


def _trace() -> click.Command:
    from cluster.cli.trace import trace  # noqa: PLC0415

    return trace


def _explain() -> click.Command:
    from cluster.cli.trace import explain  # noqa: PLC0415

    return explain


def _keys() -> click.Command:
    from cluster.cli.keys import keys_command  # noqa: PLC0415

    return keys_command


def _render() -> click.Command:
    from cluster.cli.render import render  # noqa: PLC0415

    return render


_LATER = {
    "top": _top, "web": _web, "trace": _trace, "explain": _explain, "keys": _keys, "render": _render,
}  # fmt: skip


@click.group(cls=Commands, later=_LATER)
@plain_errors()
def cli() -> None:
    """Run a cluster: a router and its workers, on this machine or on several hosts."""
    check_text(sys.argv[1:])


@cli.command()
@click.argument("hosts_file", required=False, type=click.Path(path_type=Path))
@_name
@click.option("--emulate", metavar="PROFILE:N", help="N emulated GPUs instead of real ones.")
@click.option(
    "--routers", type=click.IntRange(1, MAX_ROUTERS), default=1, show_default=True,
    help="Equal routers: if one ends, the others serve its queries.",
)  # fmt: skip
@click.option("--gpus", metavar="LIST", help="These CUDA devices, such as 0,2: one worker on each.")
@click.option(
    "--workers", type=click.IntRange(1, 1_024), help="Worker processes.  [default: one a GPU, or 1]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda if torch sees GPUs]")
@click.option(
    "--supernet",
    metavar="NAME",
    help="digits, ofa-resnet50, bert-encoder, ... (docs/supernets.md), or module:attribute.",
)
@click.option(
    "--family",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ordinary models instead: docs/families.md.",
)
@click.option(
    "--weights", metavar="FILE", help='A checkpoint, a folder, or "random".  [default: the shipped one]'
)
@click.option("--profile", metavar="PROFILE", help="The model's on this device.  [default: digits-cpu]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each worker's torch.  [default: 1]")
@click.option(
    "--policy",
    default="planfit",
    show_default=True,
    help="planfit, demandfit, slackfit, fixed:<subnet>, maxacc, ...",
)
@click.option(
    "--margin-ms",
    type=float,
    help="Slack held back for late messages.  [default: by the latest ones measured, 0.1 to 1]",
)
@click.option("--client-port", type=_PORT, default=0, help="Where clients connect.  [default: any free one]")
@click.option("--worker-port", type=_PORT, default=0, help="Where workers connect.  [default: any free one]")
@click.option("--metrics", is_flag=True, help="Each process serves /metrics to Prometheus, on loopback.")
@click.option("--gateway", is_flag=True, help="Serve the Open Inference Protocol too: docs/gateway.md.")
@click.option("--http-port", type=_PORT, help="Of the gateway, on loopback.  [default: 8000]")
@click.option("--grpc-port", type=_PORT, help="Of the gateway, on loopback.  [default: no gRPC]")
@click.option("--default-slo-ms", type=float, help="Of the gateway, for requests without a deadline.")
@click.option(
    "--ready-timeout-s", default=60.0, show_default=True, help="Wait this long for all to be ready."
)
@click.option("--rollback", is_flag=True, help="With HOSTS_FILE: undo everything if any part fails.")
@click.pass_context
@plain_errors()
def up(
    context: click.Context,
    /,
    hosts_file: Path | None,
    name: str,
    ready_timeout_s: float,
    rollback: bool,
    **asked: Any,
) -> None:
    """Start a router and workers; return when all are ready, and print a table.

    On this machine, or over ssh on the hosts of HOSTS_FILE. They run until `cluster down`.
    What already runs is left alone.
    """
    if hosts_file is not None:
        _only_in_file(context)
        hosts_cli.up(hosts_file, ready_timeout_s=ready_timeout_s, rollback=rollback)
        return
    try:
        if rollback:
            raise ConfigError("--rollback goes with HOSTS_FILE: on one machine nothing stays of what failed")
        _check_name(name)
        plan = make_plan(name, options(**asked), ready_timeout_s)
        done = bring_up(plan)
    except StartError as error:
        if error.cluster is not None:
            _say([show.processes(error.cluster), "", *show.reasons(error.cluster)])
        raise click.ClickException(f"cluster {name!r} is not up: {error}") from error
    if done.tidied is not None:
        click.echo(show.tidied(done.tidied))
    words = "is up" if done.is_new else "runs already, as asked for"
    if done.restarted:
        words += f"; started again: {', '.join(done.restarted)}"
    _say([f"cluster {name!r} {words}", "", show.processes(done.cluster), ""])
    _say(show.what_next(done.cluster, done.status, plan.profile))


_WITH_FILE = ("hosts_file", "ready_timeout_s", "rollback")


def _only_in_file(context: click.Context) -> None:
    """Refuse options that are fields of a hosts file."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in _WITH_FILE and source is click.core.ParameterSource.COMMANDLINE:
            raise click.ClickException(
                f"--{name.replace('_', '-')}: expected none beside HOSTS_FILE, which has fields for them"
            )


def _check_name(name: str) -> None:
    if hosts_cli.is_on_hosts(name):
        raise ConfigError(
            f"--name: a cluster {name!r} on several hosts is known to this machine: choose another name, or "
            f"stop that one with `cluster down{name_option(name)}`"
        )


@cli.command()
@click.argument("hosts_file", type=click.Path(path_type=Path))
@click.option("--effective", is_flag=True, help="Print the file with every default filled in.")
@plain_errors()
def config(hosts_file: Path, effective: bool) -> None:
    """Check HOSTS_FILE; print every error in it, with its line, and exit 1 if there is one."""
    from cluster.spec.hosts import load_hosts  # noqa: PLC0415  it takes pydantic's import, 0.2 s
    from cluster.spec.hosts_file import dump  # noqa: PLC0415

    hosts = load_hosts(hosts_file)
    if effective:
        click.echo(dump(hosts).rstrip())
        return
    n_workers, n_hosts = sum(host.n_workers for host in hosts.hosts), len(hosts.hosts)
    click.echo(
        f"{hosts_file}: no errors: cluster {hosts.cluster!r}, the {_router_words(hosts)}, "
        f"{n_workers} worker{'s' if n_workers > 1 else ''} on {n_hosts} host{'s' if n_hosts > 1 else ''}"
    )


def _router_words(hosts: Hosts) -> str:
    names = [place.host for place in hosts.places]
    return f"router on {names[0]}" if len(names) == 1 else f"routers on {' and '.join(names)}"


def options(*, emulate: str | None, gpus: str | None, **plain: Any) -> Options:
    """Return the options of `up`; those with their own syntax are parsed.

    Raises:
        ConfigError: One of those is malformed.
    """
    profile, n_gpus = (None, None) if emulate is None else profile_and_n(emulate, most=_MAX_EMULATED)
    return Options(emulate=profile, n_gpus=n_gpus, gpus=None if gpus is None else _gpus(gpus), **plain)


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
@plain_errors()
def status(name: str, as_json: bool) -> None:
    """Show the router and every worker; exit 1 if none runs or one is unwell."""
    if hosts_cli.is_on_hosts(name):
        hosts_cli.status(name, as_json=as_json)
        return
    cluster = _running(name)
    seen = here(name, cluster).roles()
    cluster = seen_by(cluster, seen)
    said = ask_router(cluster)
    wrong = [*unasked(seen), *problems(cluster, said)]
    if as_json:
        found = None if said is None else said.body()
        body = {
            "cluster": orjson.loads(cluster.to_json()), "roles": show.roles_of(cluster), "status": found,
            "problems": wrong,
        }  # fmt: skip
        click.echo(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
    else:
        _say(
            [f"cluster {name!r}, {cluster.phase} since {cluster.since}, keeper pid {cluster.keeper.pid}", ""]
        )
        _say([*(show.router(cluster, said) if said is not None else ()), "", show.roles(cluster, said)])
        _say(["", *wrong] if wrong else [])
    sys.exit(1 if wrong else 0)


def _running(name: str) -> LocalCluster:
    """Return the running cluster of a name; if none runs, raise ConfigError that shows what to type."""
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
@click.option("--timeout-s", default=20.0, show_default=True, help="Drain for this long, then kill.")
@plain_errors()
def down(name: str, timeout_s: float) -> None:
    """Drain and stop everything; print what was stopped."""
    if hosts_cli.is_on_hosts(name):
        hosts_cli.down(name)
        return
    done = take_down(name, timeout_s)
    _say(
        [f"no cluster {name!r} runs on this machine: nothing to stop"] if done is None else show.stopped(done)
    )


@cli.command()
@_name
@click.argument("names", nargs=-1, required=True, metavar="HOST|WORKER...")
@plain_errors()
def drain(name: str, names: tuple[str, ...]) -> None:
    """Drain workers: they take no new queries, answer the ones they have, and end."""
    operate_cli.drain(name, names)


@cli.command()
@_name
@click.argument("n", type=int, metavar="N")
@click.option(
    "--timeout-s", default=120.0, show_default=True, help="Wait this long for new workers to be live."
)
@plain_errors()
def scale(name: str, n: int, timeout_s: float) -> None:
    """Run N workers of a hosts file's cluster: start some, or drain some.

    Over ssh at most those of the file; Slurm, Ray and Kubernetes get further ones.
    """
    operate_cli.scale(name, n, timeout_s=timeout_s)


@cli.command()
@click.argument("hosts_file", type=click.Path(path_type=Path))
@click.option("--timeout-s", default=90.0, show_default=True, help="Wait this long for the router.")
@plain_errors()
def apply(hosts_file: Path, timeout_s: float) -> None:
    """Let the running router take policy, margin and bounds of HOSTS_FILE; nothing is restarted.

    Everything else in the file takes effect with `cluster up`.
    """
    operate_cli.apply(hosts_file, timeout_s=timeout_s)


@cli.command()
@_name
@click.option("--floor", type=click.IntRange(1), default=1, show_default=True, help="The fewest workers.")
@click.option("--ceiling", type=click.IntRange(1), required=True, help="The most workers.")
@click.option(
    "--need", type=click.Choice(NEEDS), default=AS_SERVED, show_default=True,
    help="Keep the present accuracy, or meet deadlines at the lowest.",
)  # fmt: skip
@click.option("--every-s", type=click.FloatRange(0.5, 600.0), default=5.0, show_default=True)
@click.option(
    "--down-after-s", type=click.FloatRange(0.0), default=300.0, show_default=True,
    help="Drain what was not needed for this long.",
)  # fmt: skip
@click.option(
    "--up-cool-s", type=click.FloatRange(0.0), default=15.0, show_default=True,
    help="Least time after a change until more are started.",
)  # fmt: skip
@click.option(
    "--down-cool-s", type=click.FloatRange(0.0), default=60.0, show_default=True,
    help="Least time after a change until some are drained.",
)  # fmt: skip
@plain_errors()
def autoscale(name: str, need: str, every_s: float, **settings: Any) -> None:
    """Scale a hosts file's cluster by the workers that its router needs, until Ctrl-C."""
    operate_cli.autoscale(name, ScalerSettings(**settings), need=need, every_s=every_s)


@cli.command()
@_name
@click.option("--rolling", is_flag=True, help="A few at a time; all workers, unless some are named.")
@click.option("--at-once", type=click.IntRange(1), default=1, show_default=True, help="How many, if rolling.")
@click.option("--router", is_flag=True, help="Also restart the router, first; prints what that costs.")
@click.option("--force", is_flag=True, help="Also take the last live worker.")
@click.option(
    "--timeout-s", default=120.0, show_default=True, help="Wait this long for each to be live again."
)
@click.argument("names", nargs=-1, metavar="[HOST|WORKER]...")
@plain_errors()
def restart(name: str, names: tuple[str, ...], **how: Any) -> None:
    """Drain workers, restart them, and wait until the router gives them work."""
    operate_cli.restart(name, names, **how)


@cli.command()
@_name
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@plain_errors()
def doctor(name: str, as_json: bool) -> None:
    """Check for problems, and print what to type; exit 1 if there are any."""
    is_well = operate_cli.doctor(name, as_json=as_json)
    sys.exit(0 if is_well else 1)


@cli.command()
@_name
@click.option("-f", "--follow", is_flag=True, help="Also show what is written from now on.")
@click.argument("roles", nargs=-1, metavar="[HOST|ROLE]...")
@plain_errors()
def logs(name: str, follow: bool, roles: tuple[str, ...]) -> None:
    """Show the last lines of the logs: of ROLEs, of HOSTs, or of all.

    The logs of a cluster of this machine stay until the next one with its name.
    """
    if hosts_cli.is_on_hosts(name):
        hosts_cli.logs(name, roles, is_followed=follow)
        return
    paths = _logs(local.cluster_folder(name), roles)
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
