"""Kubernetes manifests: a StatefulSet for the routers, a Deployment for each host's workers.

    NAME                    Service for clients; only routers that are ready are behind it
    NAME-router             headless Service for workers: a router is ready once it has a worker, so its
                            address has to be found before that; several have all theirs behind this name
    NAME-router             StatefulSet, and a PodDisruptionBudget that takes one router at a time
    NAME-routers            ConfigMap with the list of routers, which each reads again when it changes
    NAME-worker-HOST        Deployment, and a PodDisruptionBudget that takes one worker at a time

deploy/chart is the same with values, for who installs with Helm; a test compares the pods of both.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cluster.engines import kubesecrets, pods
from cluster.engines.containers import FOLDER, check_network, device_of, project_name
from cluster.engines.describe import ROUTER, RolePlace
from cluster.engines.text import Rendered, yaml_text
from cluster.spec.hostplan import EVERY
from cluster.spec.roles import FILES, KEYS, at, routers_file
from superserve.net.keys import ROUTER_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.engines.containers import RenderOptions
    from cluster.engines.describe import Description, RoleGroup

FILE, KEYS_FILE = "superserve.yaml", "keys.yaml"
LISTED, LIST_FILE = "routers", "routers.json"
"""The end of the name of the ConfigMap with the list of routers, and of where it is mounted; and its key."""

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_MAX_CONFIG_BYTES = 1_000_000  # Kubernetes refuses ConfigMaps beyond 1 MiB
_POD_NAME = "$(POD_NAME)"  # of the variable that a pod sets
_WANTED_NAME = "a name of Kubernetes: up to 40 lower-case letters, digits and '-', a letter first"


def render(description: Description, options: RenderOptions) -> tuple[Rendered, ...]:
    """Return the manifests; the Secrets with keys are a file of their own.

    Raises:
        ConfigError: The file asks for what a pod has not: a device by number, a host's path, an odd name.
    """
    name = checked(description)
    head = ["Made by `cluster render kubernetes`; change hosts.yaml and make it again."]
    files: tuple[Rendered, ...] = ()
    if description.has_keys:
        head.append(f"Apply its Secrets first: `cluster render kubernetes --out DIR` writes DIR/{KEYS_FILE}.")
        files = (Rendered(KEYS_FILE, yaml_text(*_secrets(description, name)), is_secret=True),)
    return (Rendered(FILE, yaml_text(*_objects(description, name, options), head=head)), *files)


def checked(description: Description) -> str:
    """Return the name of a cluster's objects.

    Raises:
        ConfigError: The file asks for what a pod has not: a device by number, a host's path, an odd name.
    """
    check_network(description, "kubernetes")
    name = project_name(description, _LABEL, _WANTED_NAME)
    for group in description.workers:
        _check_group(description, group)
    if description.n_workers < len(description.routers):
        raise description.error(
            ("routers",),
            f"a router without a worker is never ready, and updates wait for it: expected at most "
            f"{description.n_workers}, the workers of the file, got {len(description.routers)}",
        )
    for group in description.routers:
        if _LABEL.fullmatch(group.host) is None:
            raise description.error((*group.where, "name"), f"expected {_WANTED_NAME}, got {group.host!r}")
    return name


def _check_group(description: Description, group: RoleGroup) -> None:
    if _LABEL.fullmatch(group.host) is None:
        raise description.error((*group.where, "name"), f"expected {_WANTED_NAME}, got {group.host!r}")
    devices = [process.device for process in group.processes]
    if group.gpus and devices != [f"cuda:{i}" for i in range(group.n)]:
        raise description.error(
            (*group.where, "gpus"),
            f"kubernetes chooses the devices: expected {list(range(group.n))}, or `workers: {group.n}` with "
            f"`device: cuda`, got {[int(device.partition(':')[2]) for device in devices]}",
        )
    weights = description.hosts.weights
    if weights is not None and weights.startswith("/"):
        raise description.error(
            ("weights",),
            f"a pod has no path of its host: expected 'random' or none, got {weights!r}; deploy/chart "
            f"mounts a volume with weights",
        )
    if description.hosts.family is not None:
        raise description.error(
            ("family",), "a pod has no files of its host: deploy/chart mounts a volume with a family"
        )
    for file in group.files:
        place, _, last = file.path.rpartition("/")
        if place != FILES:
            continue
        if _FILE_NAME.fullmatch(last) is None or len(file.content) > _MAX_CONFIG_BYTES:
            raise description.error(
                ("profile" if description.hosts.emulate is None else "emulate",),
                f"expected a file of at most {_MAX_CONFIG_BYTES:,} bytes whose name has letters, digits, "
                f"'.', '_' and '-', as a ConfigMap holds it, got {last!r} of {len(file.content):,} bytes",
            )


def _secrets(description: Description, name: str) -> list[dict[str, Any]]:
    """Return the Secrets with keys; their names are those of `kubesecrets.secrets_of`."""
    files = {file.path: file.content for file in description.routers[0].files}
    found = [kubesecrets.secret(f"{name}-router", {ROUTER_KEY: files[f"{KEYS}/router.key"]})]
    for below, listed in kubesecrets.list_names(name).items():
        start = f"{KEYS}/{below}/"
        peers = {path.removeprefix(start): text for path, text in files.items() if path.startswith(start)}
        found.append(kubesecrets.secret(listed, peers))
    for group in description.workers:
        own = {file.path: file.content for file in group.files}[f"{KEYS}/{kubesecrets.WORKER_KEY}"]
        found.append(kubesecrets.secret(f"{name}-{group.name}", {kubesecrets.WORKER_KEY: own}))
    return found


def _objects(description: Description, name: str, options: RenderOptions) -> list[dict[str, Any]]:
    profile = {
        file.path.rpartition("/")[2]: file.content.decode()
        for file in description.workers[0].files
        if file.path.startswith(f"{FILES}/")
    }
    found = [_config_map(f"{name}-{FILES}", profile)] if profile else []
    found += _routers(description, name, options)
    for group in description.workers:
        found += _workers(description, name, group, options)
    first = description.routers[0]
    found.append(pods.router_policy(name, dict(first.ports), first.metrics_or_default))
    return [*found, pods.worker_policy(name, description.workers[0].metrics_or_default)]


def _config_map(name: str, files: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": files}


def _routers(description: Description, name: str, options: RenderOptions) -> list[dict[str, Any]]:
    """Return what routers consist of: pods of one set, each with an address, and so with the same ports."""
    group, n = description.routers[0], len(description.routers)
    for i, other in enumerate(description.routers):
        if other.env != group.env:
            raise description.error(
                ("routers", i, "host"),
                f"routers are pods alike on kubernetes: expected hosts with the same env, got those of "
                f"{group.host!r} and {other.host!r}",
            )
    labels = pods.labels(name, ROUTER)
    listed = f"{name}-{LISTED}"
    place = RolePlace(
        FOLDER, metrics=(EVERY, group.metrics_or_default), router_key=f"{FOLDER}/router/{ROUTER_KEY}",
        listed=f"{FOLDER}/{LISTED}/{LIST_FILE}",
    )  # fmt: skip
    volumes: list[pods.Volume] = [(LISTED, {"configMap": {"name": listed}}, f"{FOLDER}/{LISTED}")]
    if description.has_keys:
        volumes.append(("router", pods.secret_volume(f"{name}-router"), f"{FOLDER}/router"))
        volumes += [
            (below, pods.secret_volume(listed), f"{FOLDER}/{KEYS}/{below}")
            for below, listed in kubesecrets.list_names(name).items()
        ]
    pod = _pod(description, group, place, labels, volumes, options, cpu="500m")
    full_name = f"{name}-{ROUTER}"
    ends = pod_ends([f"{full_name}-{i}" for i in range(n)], full_name, dict(group.ports))
    return [
        _config_map(listed, {LIST_FILE: routers_file(*ends).decode()}),
        *pods.services(name, labels, dict(group.ports)),
        pods.router_set(full_name, labels, pod, full_name, n),
        pods.one_at_a_time(full_name, labels, labels),
    ]


def pod_ends(pods: Sequence[str], service: str, ports: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Return where clients and workers reach routers by the names of their pods; nothing for a single one."""
    if len(pods) == 1:
        return [], []
    clients, workers = (
        [at(f"{pod}.{service}", ports[key]) for pod in pods] for key in ("clients", "workers")
    )
    return clients, workers


def _workers(
    description: Description, name: str, group: RoleGroup, options: RenderOptions
) -> list[dict[str, Any]]:
    labels = pods.labels(name, "worker", pool=group.host)
    place = RolePlace(
        FOLDER, (at(f"{name}-{ROUTER}", dict(description.routers[0].ports)["workers"]),),
        name=_POD_NAME, device=device_of(group),
        metrics=(EVERY, group.metrics_or_default),
    )  # fmt: skip
    volumes: list[pods.Volume] = []
    if description.has_keys:
        volumes.append((KEYS, pods.secret_volume(f"{name}-{group.name}"), f"{FOLDER}/{KEYS}"))
    if any(file.path.startswith(f"{FILES}/") for file in group.files):
        volumes.append((FILES, {"configMap": {"name": f"{name}-{FILES}"}}, f"{FOLDER}/{FILES}"))
    threads = description.hosts.host(group.host).threads
    pod = _pod(description, group, place, labels, volumes, options, cpu=str(threads or "250m"))
    # A worker that is replaced must give its GPU up first: there may be no other.
    surge = {"maxSurge": 0, "maxUnavailable": 1} if group.gpus else {"maxSurge": 1, "maxUnavailable": 0}
    strategy = {"type": "RollingUpdate", "rollingUpdate": surge}
    full_name = f"{name}-{group.name}"
    return [
        pods.deployment(full_name, labels, group.n, strategy, pod),
        pods.one_at_a_time(full_name, labels, labels),
    ]


def _pod(
    description: Description,
    group: RoleGroup,
    place: RolePlace,
    labels: dict[str, str],
    volumes: list[pods.Volume],
    options: RenderOptions,
    cpu: str,
) -> dict[str, Any]:
    assert place.metrics is not None, "probes ask there"
    env = pods.variables(group.env)
    if not group.is_router:
        env.insert(0, {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})
    return pods.template(
        pods.PodParts(
            kind=group.kind,
            image=options.image,
            args=tuple(
                word if word == place.name else pods.literal(word) for word in description.argv(group, place)
            ),
            env=tuple(env),
            ports=(*group.ports, ("metrics", place.metrics[1])),
            stop_s=group.stop_s,
            volumes=tuple(volumes),
            labels=labels,
            annotations={"superserve/files": group.digest} if group.files else {},
            cpu=cpu,
            gpus=group.gpus,
        )
    )
