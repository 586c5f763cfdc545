"""The commands for a cluster on several hosts: `cluster.cli` calls them for a hosts file or its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from cluster.operate import logs as hosts_logs
from cluster.operate.engine import open_cluster
from cluster.operate.hosts_health import problems
from cluster.remote import record as records
from cluster.remote.shell import RemoteError
from cluster.show import hosts as hosts_show
from cluster.show import tables as show
from cluster.spec.engines import SSH
from cluster.spec.plan import name_option
from superserve.errors import ConfigError
from superserve.roles import local

if TYPE_CHECKING:
    from cluster.engines.engine import ClusterEngine
    from cluster.operate.hosts_up import HostsUp
    from superserve.status import RouterStatus


def is_on_hosts(name: str) -> bool:
    """Return whether a name belongs to a cluster on several hosts, and to none of this machine."""
    return local.load(local.cluster_folder(name)) is None and records.load(name) is not None


def up(hosts_file: Path, *, ready_timeout_s: float, rollback: bool) -> None:
    """Start the cluster of a hosts file; exit 1, with the reasons, if any part of it does not run."""
    from cluster.operate.hosts_up import up as bring_up  # noqa: PLC0415
    from cluster.remote.shell import OpenSsh  # noqa: PLC0415
    from cluster.remote.wheel import pack  # noqa: PLC0415
    from cluster.spec.hostkeys import complete  # noqa: PLC0415
    from cluster.spec.hostplan import plan_of  # noqa: PLC0415  these read the file, or are of use here only
    from cluster.spec.hosts import load_hosts  # noqa: PLC0415

    try:
        hosts = load_hosts(hosts_file)
        say([f"made {path}" for path in complete(hosts)])
        if hosts.engine != SSH:
            _placed_up(hosts_file, hosts.cluster, ready_timeout_s=ready_timeout_s, rollback=rollback)
            return
        plan = plan_of(hosts, hosts_file)
        _check_free(hosts_file, plan.name)
        with OpenSsh(None if plan.ssh_config is None else Path(plan.ssh_config)) as shell:
            done = bring_up(
                shell, plan, pack(), ready_timeout_s=ready_timeout_s, rollback=rollback,
                on_preflight=lambda done: say([*hosts_show.findings(done.findings), ""]),
            )  # fmt: skip
    except KeyboardInterrupt:
        raise click.ClickException(
            "interrupted: the same command completes it, `cluster down` takes it down"
        ) from None
    _say_up(plan.name, done)


def _check_free(hosts_file: Path, name: str) -> None:
    if local.load(local.cluster_folder(name)) is not None:
        raise ConfigError(
            f"{hosts_file}: a cluster {name!r} runs on this machine: stop it with `cluster "
            f"down{name_option(name)}`, or give this one another name with `cluster:`"
        )


def _placed_up(hosts_file: Path, name: str, *, ready_timeout_s: float, rollback: bool) -> None:
    """Start a cluster whose engine chooses the machines."""
    from cluster.engines.describe import describe  # noqa: PLC0415  it reads the file: see `up`
    from cluster.operate.placed_up import up as bring_up  # noqa: PLC0415

    if rollback:
        raise ConfigError("--rollback: expected with engine: ssh only; `cluster down` takes everything down")
    _check_free(hosts_file, name)
    _say_up(name, bring_up(describe(hosts_file), ready_timeout_s=ready_timeout_s))


def _say_up(name: str, done: HostsUp) -> None:
    found_before = {line for finding in done.findings for line in finding.wrong}
    later = [line for line in done.wrong if line not in found_before]
    if done.rolled_back:
        say([*later, "", f"cluster {name!r}: what this call had started has been taken down again"])
        sys.exit(1)
    words = "is up" if any(done.changed.values()) or done.removed else "runs already, as asked for"
    if done.wrong:
        words = "is not up as asked for; what is well runs"
    elif not any(done.changed.values()) and not done.removed:
        words += ": nothing was restarted" if done.sent else ": nothing was changed"
        words += "".join(f"; new files for {host}" for host in done.sent)
    say([f"cluster {name!r} {words}", "", hosts_show.processes(done), *hosts_show.removals(done), ""])
    if done.wrong:
        say(
            [
                *later,
                *([""] if later else []),
                f"{len(done.wrong)} wrong; fix it and run the same command again",
            ]
        )
        sys.exit(1)
    assert done.status is not None, "the router answered, or something is wrong"
    record = records.load(name)
    assert record is not None, "it was written before anything was started"
    say(hosts_show.what_next(record, done.status))


def status(name: str, *, as_json: bool) -> None:
    """Print a cluster's status; exit 1 if anything is wrong."""
    with open_cluster(name) as fleet:
        seen = fleet.roles()
        said = _ask(fleet)
    wrong = problems(fleet.record, seen, said)
    if as_json:
        roles = [role for host in seen for role in host.roles]
        status = None if said is None else said.body()
        body = {"cluster": fleet.record, "hosts": seen, "roles": roles, "status": status, "problems": wrong}
        click.echo(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
    else:
        say([f"cluster {name!r} on {len(fleet.record.hosts)} hosts, from {fleet.record.file}", ""])
        say([*(show.router(fleet.record, said) if said is not None else ()), ""])
        say([hosts_show.roles(seen, said), *(["", *wrong] if wrong else [])])
    if wrong:
        sys.exit(1)


def _ask(fleet: ClusterEngine) -> RouterStatus | None:
    try:
        return fleet.router_status()
    except RemoteError:  # the hosts' states contain the reason
        return None


def down(name: str) -> None:
    """Stop a cluster everywhere; exit 1, naming the hosts, if it did not stop on all."""
    with open_cluster(name) as fleet:
        done = fleet.stop()
    if not done.wrong:  # else its record stays, for another try
        records.forget(name)
    say(hosts_show.stopped(fleet.record, done))
    if done.wrong:
        sys.exit(1)


def logs(name: str, names: tuple[str, ...], *, is_followed: bool) -> None:
    """Print the last lines of the logs of hosts and roles, or of all, and optionally what follows."""
    with open_cluster(name) as fleet:
        roles = hosts_logs.chosen(fleet, names)
        if is_followed:
            hosts_logs.follow(fleet, roles)
            return
        wrong = hosts_logs.show_tails(fleet, roles)
    if wrong:
        say(wrong)
        sys.exit(1)


def say(lines: list[str]) -> None:
    """Print lines."""
    for line in lines:
        click.echo(line)
