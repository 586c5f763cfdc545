"""From a description to plans for an engine that chooses the machines: what `cluster up` applies there.

plans, files = plans_of(description, folder)
record = record_of(description, folder)
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.engines import kubernetes
from cluster.engines.containers import object_name
from cluster.engines.describe import ROUTER, RolePlace, apart
from cluster.engines.placed.base import UNKNOWN
from cluster.engines.placed.routing import LISTED, ROUTERS
from cluster.remote.record import KnownHost, Record
from cluster.spec.engines import KUBERNETES
from cluster.spec.hostkeys import operator_key
from cluster.spec.hostplan import EVERY
from cluster.spec.roles import ROUTERS_FILE, SETTINGS, HostPlan, HostRole, Target, at, routers_file, timing
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
        ConfigError: It would listen without keys, and the file does not say that it may; or it asks for what
            a pod has not.
    """
    hosts = description.hosts
    if hosts.engine == KUBERNETES:
        kubernetes.checked(description)
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
        contents = [(file.path, file.content) for file in group.files]
        if group.is_router:
            contents.append((SETTINGS, hosts.tuning().content()))
            if description.is_listed and hosts.engine == KUBERNETES:
                contents.append((ROUTERS_FILE, routers_file(*_pod_ends(description))))
        for name, content in contents:
            files[group.host][f"{place}/{name}"] = base64.b64encode(content).decode()
        roles[group.host] += _roles(description, group, str(folder / place), n_workers)
        n_workers += 0 if group.is_router else group.n
    plans = {}
    for host in hosts.hosts:
        interpreter = python if host.python == _DEFAULT_PYTHON else host.python
        plans[host.name] = HostPlan(str(folder), interpreter, "", tuple(roles[host.name]), timing=timing())
    return plans, files


def _roles(description: Description, group: RoleGroup, folder: str, n_before: int) -> list[HostRole]:
    """Return the roles of a group.

    Workers of all groups may share a node, so ports for metrics count through all of them. A pod has all
    ports to itself, and Kubernetes asks there whether it is well.
    """
    found = []
    for i, process in enumerate(group.processes):
        is_pod = description.hosts.engine == KUBERNETES
        place = RolePlace(
            folder=folder,
            connect=(_service_end(description, ROUTER, whose="workers") if is_pod else ROUTERS,),
            listed=_listed(description, folder),
            ports=_ports(description)[description.routers.index(group)] if group.is_router else None,
            name=process.name,
            device="cuda:0" if group.gpus else "cpu",
            settings=f"{folder}/{SETTINGS}",
            metrics=(EVERY, group.metrics_or_default)
            if is_pod
            else _metrics(description, group, n_before + i),
        )
        argv = description.argv(group, place)
        found.append(HostRole(process.name, group.kind, argv, group.env, group.serves, group.gpus))
    return found


def _metrics(description: Description, group: RoleGroup, n: int) -> tuple[str, int] | None:
    """Return where the nth worker of a cluster, or a router, serves metrics; None for nowhere."""
    metrics = description.hosts.metrics
    first = metrics.router if group.is_router else metrics.workers
    if first is None:
        return None
    return metrics.address, first + (description.routers.index(group) if group.is_router else n)


def _ports(description: Description) -> list[tuple[int, int]]:
    """Return the ports of each router: others on a shared node, the same for pods, which one name finds."""
    if description.hosts.engine != KUBERNETES:
        return apart(description.routers)
    client, worker = dict(description.routers[0].ports).values()
    return [(client, worker)] * len(description.routers)


def _listed(description: Description, folder: str) -> str:
    """Return the file that lists several routers, in a router's arguments; "" for the only one."""
    if not description.is_listed:
        return ""
    return f"{folder}/{ROUTERS_FILE}" if description.hosts.engine == KUBERNETES else LISTED


def _service_end(description: Description, *more: str, whose: str) -> str:
    """Return the endpoint of a Service of Kubernetes."""
    name = "-".join((object_name(description.name), *more))
    return at(name, dict(description.routers[0].ports)[whose])


def _pod_ends(description: Description) -> tuple[list[str], list[str]]:
    """Return where each router's pod is found: each is the only one of a set of its own."""
    name = object_name(description.name)
    pods = [f"{name}-{group.name}-0" for group in description.routers]
    return kubernetes.pod_ends(pods, f"{name}-{ROUTER}", dict(description.routers[0].ports))


def _ends(description: Description) -> tuple[str, str]:
    """Return what is known of where clients and workers connect, before anything is started."""
    if description.hosts.engine == KUBERNETES:
        clients = _service_end(description, whose="clients")
        return clients, _service_end(description, ROUTER, whose="workers")
    clients, workers = (
        ",".join(at(UNKNOWN, port) for port in ports) for ports in zip(*_ports(description), strict=True)
    )
    return clients, workers


def record_of(description: Description, folder: Path) -> Record:
    """Return the record of a cluster before anything is started: often where routers are, is not known."""
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
        *_ends(description), hosts.emulate or hosts.serves, known, slots, (), operator_key(hosts),
        hosts.engine, hosts.slurm, hosts.ray, hosts.kubernetes,
    )  # fmt: skip


def check_engine(description: Description, known: Record | None) -> None:
    """Raise ConfigError if a cluster of that name runs on another engine: it would be forgotten."""
    engine = description.hosts.engine
    if known is not None and known.engine != engine:
        raise ConfigError(
            f"{description.file}: engine: the cluster {known.name!r} runs on {known.engine}: stop it with "
            f"`cluster down` first, or write another `cluster:` name; got {engine}"
        )
