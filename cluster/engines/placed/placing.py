"""From a description to plans for an engine that chooses the machines: what `cluster up` applies there.

plans, files = plans_of(description, folder)
record = record_of(description, folder)
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.engines.describe import RolePlace
from cluster.engines.placed.base import ROUTER_HOST
from cluster.remote.record import KnownHost, Record
from cluster.spec.hostkeys import operator_key
from cluster.spec.hostplan import at
from cluster.spec.roles import HostPlan, HostRole, Target, timing
from superserve.errors import ConfigError
from superserve.roles import local

if TYPE_CHECKING:
    from cluster.engines.describe import Description, RoleGroup

_DEFAULT_PYTHON = "python3"
"""What hosts.yaml fills in: such a group runs with the engine's own Python."""


def folder_of(description: Description) -> Path:
    """Return the cluster's folder, as every node that needs it sees it."""
    slurm = description.hosts.slurm
    if slurm is not None and slurm.folder is not None:
        return Path(slurm.folder)
    return local.state_folder() / local.REMEMBERED / f"{description.name}.placed"


def plans_of(
    description: Description, folder: Path, python: str
) -> tuple[dict[str, HostPlan], dict[str, dict[str, str]]]:
    """Return what each host of the file runs, and its files by path: what `ClusterEngine.apply` takes.

    Args:
        description: The cluster.
        folder: Its folder.
        python: The engine's own Python; "" leaves it to the engine.

    Raises:
        ConfigError: It would listen without keys, and the file does not say that it may.
    """
    hosts = description.hosts
    if hosts.keys is None and hosts.security != "none":
        raise description.error(
            ("security",),
            f"engine: {hosts.engine} listens on every address of the router's node: make keys with "
            f"`cluster keys make` and write `keys: FOLDER`, or write `security: none` if every host "
            f"that reaches it may use it",
        )
    roles: dict[str, list[HostRole]] = {host.name: [] for host in hosts.hosts}
    files: dict[str, dict[str, str]] = {host.name: {} for host in hosts.hosts}
    n_workers = 0
    for group in description.groups:
        place = f"files/{group.name}-{group.digest}"
        for name, content in ((f"{place}/{file.path}", file.content) for file in group.files):
            files[group.host][name] = base64.b64encode(content).decode()
        roles[group.host] += _roles(description, group, str(folder / place), n_workers)
        n_workers += 0 if group.is_router else group.n
    plans = {}
    for host in hosts.hosts:
        interpreter = python if host.python == _DEFAULT_PYTHON else host.python
        plans[host.name] = HostPlan(str(folder), interpreter, "", tuple(roles[host.name]), timing=timing())
    return plans, files


def _roles(description: Description, group: RoleGroup, folder: str, n_before: int) -> list[HostRole]:
    """Return the roles of a group.

    Workers of all groups may share a node, so ports for metrics count through all of them.
    """
    metrics = description.hosts.metrics
    found = []
    for i, process in enumerate(group.processes):
        first = metrics.router if group.is_router else metrics.workers
        port = None if first is None else first if group.is_router else first + n_before + i
        place = RolePlace(
            folder=folder,
            router=ROUTER_HOST,
            name=process.name,
            device="cuda:0" if group.gpus else "cpu",
            metrics=None if port is None else (metrics.address, port),
        )
        argv = description.argv(group, place)
        found.append(HostRole(process.name, group.kind, argv, group.env, group.serves, group.gpus))
    return found


def record_of(description: Description, folder: Path) -> Record:
    """Return the record of a cluster before anything is started: where the router is, is not known yet."""
    hosts = description.hosts
    names: dict[str, list[str]] = {host.name: [] for host in hosts.hosts}
    for group in description.groups:
        names[group.host] += [process.name for process in group.processes]
    slots = tuple((name, host.gpus_per_worker or 1) for host in hosts.hosts for name in host.worker_names)
    known = tuple(
        KnownHost(host.name, Target(hosts.engine), str(folder), "", "", tuple(names[host.name]))
        for host in hosts.hosts
    )
    return Record(
        description.name, str(description.file.absolute()), None, hosts.router.host,
        at(ROUTER_HOST, hosts.router.client_port), at(ROUTER_HOST, hosts.router.worker_port),
        hosts.emulate or hosts.serves, known, slots, (), operator_key(hosts), hosts.engine, hosts.slurm,
        hosts.ray,
    )  # fmt: skip


def check_engine(description: Description, known: Record | None) -> None:
    """Raise ConfigError if a cluster of that name runs on another engine: it would be forgotten."""
    engine = description.hosts.engine
    if known is not None and known.engine != engine:
        raise ConfigError(
            f"{description.file}: engine: the cluster {known.name!r} runs on {known.engine}: stop it with "
            f"`cluster down` first, or write another `cluster:` name; got {engine}"
        )
