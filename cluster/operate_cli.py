"""What `cluster drain`, `restart` and `doctor` do, after their options are parsed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from cluster.operable import LocalOperable
from cluster.rolling import Operator
from cluster.up import name_option
from superserve import local
from superserve.errors import ConfigError
from superserve.local import Liveness

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.operable import Operable

ROUTER_COSTS = (
    "the router: while it is away, some seconds, new queries are refused as DRAINING or wait at their "
    "clients; it answers what it holds first, for up to 5 s"
)


@contextlib.contextmanager
def opened(name: str) -> Iterator[Operable]:
    """Give the cluster of that name.

    Raises:
        ConfigError: None runs; says what to type.
    """
    cluster = local.load(local.cluster_folder(name))
    if cluster is None:
        raise ConfigError(f"no cluster {name!r} runs on this machine: start one with `cluster up`")
    if cluster.liveness() is not Liveness.ALIVE:
        raise ConfigError(f"the cluster {name!r} {local.remains(cluster)}")
    yield LocalOperable(name)


def drain(name: str, names: Sequence[str]) -> None:
    """Drain workers, and say how they come back."""
    with opened(name) as cluster:
        Operator(cluster, click.echo).drain(names)
    again = f"cluster restart{name_option(name)} {' '.join(names)}"
    click.echo(f"start again: `{again}`, or whatever has ended: `cluster up`")


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
    """Restart workers, and the router if asked to.

    Raises:
        ConfigError: Neither names nor --rolling say which, or no live worker would be left.
        ProcessError: A role did not come back.
    """
    if not names and not rolling and not router:
        raise ConfigError(
            "expected workers or hosts to restart, or --rolling for all workers, a few at a time"
        )
    with opened(name) as cluster:
        operator = Operator(cluster, click.echo)
        if router:
            click.echo(ROUTER_COSTS)
            operator.restart_router(timeout_s)
        if names or rolling:
            n = at_once if rolling else len(cluster.roles())
            operator.restart(names, at_once=n, force=force, timeout_s=timeout_s)
