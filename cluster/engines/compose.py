"""A compose file: `docker compose up`, or `podman-compose up`, runs routers and workers on this machine.

    router          the service's name is its address; the clients' port is published; or router-HOST-I
    worker-HOST     one service with replicas; with GPUs a service for each, since replicas share devices

A compose file has one machine, so a hosts file with several hosts is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cluster.engines.containers import FOLDER, SCRATCH, check_network, device_of, project_name
from cluster.engines.describe import LIVE, STARTED, RolePlace
from cluster.engines.text import Rendered, yaml_text
from cluster.spec.hostplan import EVERY, is_loopback, list_of_routers
from cluster.spec.roles import ROUTERS_FILE, SETTINGS, at

if TYPE_CHECKING:
    from cluster.engines.containers import RenderOptions
    from cluster.engines.describe import Description, Process, RoleGroup

FILE = "compose.yaml"
_PROJECT = re.compile(r"[a-z0-9][a-z0-9_-]*")
_PAST_DRAIN_S = 2  # beyond the time that a role takes to drain, since containers take some to end


def render(description: Description, options: RenderOptions) -> tuple[Rendered, ...]:
    """Return the compose file, and the files that its services read.

    Raises:
        ConfigError: The file asks for what compose has not: several hosts, or a name that it does not take.
    """
    check_network(description, "compose")
    _check_one_host(description)
    name = project_name(
        description, _PROJECT, "lower-case letters, digits, '_' and '-', as compose has for projects"
    )
    services = {group.name: _router(description, i, options) for i, group in enumerate(description.routers)}
    for group in description.workers:
        services |= _workers(description, group, options)
    text = yaml_text(
        {"name": name, "services": services},
        head=("Made by `cluster render compose`; change hosts.yaml and make it again.",),
    )
    beside = tuple(
        Rendered(f"{group.name}/{file.path}", file.content.decode(), file.is_secret, is_beside=True)
        for group in description.groups
        for file in group.files
    )
    return (Rendered(FILE, text), *beside, *_of_routers(description))


def _of_routers(description: Description) -> list[Rendered]:
    """Return what routers read, and read again when it changes: settings, and the list of all of them."""
    files = {SETTINGS: description.hosts.tuning().content().decode()}
    if description.is_listed:
        # For clients, which reach what is published; workers are given the services' names.
        files[ROUTERS_FILE] = list_of_routers(description.hosts, _worker_ends(description)).decode()
    return [
        Rendered(f"{group.name}/{path}", text, is_beside=True)
        for group in description.routers
        for path, text in files.items()
    ]


def _worker_ends(description: Description) -> tuple[str, ...]:
    """Return where workers reach each router: at its service's name."""
    return tuple(at(group.name, dict(group.ports)["workers"]) for group in description.routers)


def _check_one_host(description: Description) -> None:
    hosts = description.hosts
    others = [i for i, host in enumerate(hosts.hosts) if host.name != hosts.router.host]
    if others:
        raise description.error(
            ("hosts", others[0]),
            f"compose runs on one machine: expected the router's host {hosts.router.host!r} alone; several "
            f"take ssh (`cluster up`), kubernetes, slurm or systemd",
        )


def _router(description: Description, i: int, options: RenderOptions) -> dict[str, Any]:
    group, hosts = description.routers[i], description.hosts
    router = hosts.places[i]
    assert router.address is not None, "load_hosts fills it in"
    place = RolePlace(
        FOLDER, metrics=(EVERY, group.metrics_or_default), settings=f"{FOLDER}/{SETTINGS}",
        listed=f"{FOLDER}/{ROUTERS_FILE}" if description.is_listed else "",
    )  # fmt: skip
    near = "127.0.0.1:" if is_loopback(router.address) else ""
    published = [f"{near}{router.client_port}:{router.client_port}"]
    if group.metrics is not None:
        published.append(f"{hosts.metrics.address}:{group.metrics}:{group.metrics}")
    return _service(description, group, place, options) | {"ports": published}


def _workers(description: Description, group: RoleGroup, options: RenderOptions) -> dict[str, Any]:
    place = RolePlace(
        FOLDER, _worker_ends(description), device=device_of(group),
        metrics=(EVERY, group.metrics_or_default),
    )  # fmt: skip
    routers = [router.name for router in description.routers]
    service = _service(description, group, place, options) | {"depends_on": routers}
    if not group.gpus:
        return {group.name: service | {"deploy": {"mode": "replicated", "replicas": group.n}}}
    return {process.name: service | {"deploy": _with_gpu(process)} for process in group.processes}


def _with_gpu(process: Process) -> dict[str, Any]:
    """Return the part of a service that gives it the process's GPU."""
    gpu = {"driver": "nvidia", "device_ids": [process.device.partition(":")[2]], "capabilities": ["gpu"]}
    return {"resources": {"reservations": {"devices": [gpu]}}}


def _service(
    description: Description, group: RoleGroup, place: RolePlace, options: RenderOptions
) -> dict[str, Any]:
    """Return a service: not root, without capabilities, nothing written but in memory."""
    assert place.metrics is not None, "its health is asked there"
    service: dict[str, Any] = {
        "image": options.image,
        "command": [_literal(word) for word in description.argv(group, place)],
        "user": f"{options.owner[0]}:{options.owner[1]}",
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": f"{group.stop_s + _PAST_DRAIN_S}s",
        "read_only": True,
        "tmpfs": [SCRATCH],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": _healthcheck(place.metrics[1]),
    }
    if group.env:
        service["environment"] = {name: _literal(value) for name, value in group.env}
    if volumes := _volumes(description, group):
        service["volumes"] = volumes
    return service


def _literal(text: str) -> str:
    """Return text in which compose replaces no variable."""
    return text.replace("$", "$$")


def _healthcheck(port: int) -> dict[str, Any]:
    """Return the question whether it lives; the image has no curl."""
    url = f"http://127.0.0.1:{port}{LIVE.path}"
    ask = f"import urllib.request as u; u.urlopen('{url}', timeout={LIVE.timeout_s})"
    return {
        "test": ["CMD", "python3", "-c", ask],
        "interval": f"{LIVE.period_s}s",
        "timeout": f"{LIVE.timeout_s + 1}s",
        "retries": LIVE.failures,
        "start_period": f"{STARTED.period_s * STARTED.failures}s",
    }


def _volumes(description: Description, group: RoleGroup) -> list[str]:
    """Return the mounts of a group: folders, so that a list that is written again is seen at once."""
    paths = [file.path for file in group.files] + ([SETTINGS] if group.is_router else [])
    tops = sorted({path.partition("/")[0] for path in paths})
    volumes = [f"./{group.name}/{top}:{FOLDER}/{top}:ro" for top in tops]
    weights = description.hosts.weights
    if not group.is_router and weights is not None and weights.startswith("/"):
        volumes.append(f"{weights}:{weights}:ro")
    family = description.hosts.family
    if not group.is_router and family is not None:  # its models lie beside it
        folder = family.rpartition("/")[0] or "/"
        volumes.append(f"{folder}:{folder}:ro")
    return volumes
