"""Kubernetes manifests: a StatefulSet for the router, a Deployment for each host's workers.

    NAME                    Service for clients; only a router that is ready is behind it
    NAME-router             headless Service for workers: a router is ready once it has a worker, so its
                            address has to be found before that
    NAME-worker-HOST        Deployment, and a PodDisruptionBudget that takes one worker at a time

deploy/chart is the same with values, for who installs with Helm; a test compares the pods of both.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cluster.engines import kubesecrets
from cluster.engines.containers import FOLDER, SCRATCH, USER, check_network, device_of, project_name
from cluster.engines.describe import LIVE, READY, ROUTER, STARTED, RolePlace
from cluster.engines.text import Rendered, yaml_text
from cluster.spec.hostplan import EVERY
from cluster.spec.roles import FILES, KEYS
from superserve.net.keys import ROUTER_KEY

if TYPE_CHECKING:
    from cluster.engines.containers import RenderOptions
    from cluster.engines.describe import Description, HealthProbe, RoleGroup

FILE, KEYS_FILE = "superserve.yaml", "keys.yaml"
PAST_DRAIN_S = 10
"""How much longer than its drain a pod may take to end."""
GPU = "nvidia.com/gpu"
"""The resource that NVIDIA's device plugin offers."""

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_MAX_CONFIG_BYTES = 1_000_000  # Kubernetes refuses ConfigMaps beyond 1 MiB
_WANTED_NAME = "a name of Kubernetes: up to 40 lower-case letters, digits and '-', a letter first"
_ROUTER_STARTS = 30  # periods: a router loads nothing
_MODE = 0o400


def render(description: Description, options: RenderOptions) -> tuple[Rendered, ...]:
    """Return the manifests; the Secrets with keys are a file of their own.

    Raises:
        ConfigError: The file asks for what a pod has not: a device by number, a host's path, an odd name.
    """
    check_network(description, "kubernetes")
    name = project_name(description, _LABEL, _WANTED_NAME)
    for group in description.workers:
        _check_group(description, group)
    head = ["Made by `cluster render kubernetes`; change hosts.yaml and make it again."]
    files: tuple[Rendered, ...] = ()
    if description.has_keys:
        head.append(f"Apply its Secrets first: `cluster render kubernetes --out DIR` writes DIR/{KEYS_FILE}.")
        files = (Rendered(KEYS_FILE, yaml_text(*_secrets(description, name)), is_secret=True),)
    return (Rendered(FILE, yaml_text(*_objects(description, name, options), head=head)), *files)


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
    files = {file.path: file.content for file in description.router.files}
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
    found += _router(description, name, options)
    for group in description.workers:
        found += _workers(description, name, group, options)
    return [*found, *_policies(description, name)]


def _config_map(name: str, files: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": files}


# --- labels -----------------------------------------------------------------------------------


def _labels(name: str, kind: str, pool: str = "") -> dict[str, str]:
    """Return the labels of a role's pods, by which they are also selected."""
    labels = {
        "app.kubernetes.io/name": "superserve",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": kind,
    }
    return labels | ({"superserve/pool": pool} if pool else {})


def _meta(name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "labels": labels}


# --- the router -------------------------------------------------------------------------------


def _router(description: Description, name: str, options: RenderOptions) -> list[dict[str, Any]]:
    group = description.router
    labels = _labels(name, ROUTER)
    place = RolePlace(
        FOLDER, metrics=(EVERY, group.metrics_or_default), router_key=f"{FOLDER}/router/{ROUTER_KEY}"
    )
    volumes = [("scratch", _scratch(), SCRATCH)]
    if description.has_keys:
        volumes.append(("router", _secret_volume(f"{name}-router"), f"{FOLDER}/router"))
        volumes += [
            (below, _secret_volume(listed), f"{FOLDER}/{KEYS}/{below}")
            for below, listed in kubesecrets.list_names(name).items()
        ]
    pod = _pod(description, group, place, labels, volumes, options)
    pod["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "500m", "memory": "512Mi"}}
    by_name = dict(group.ports)
    clients, workers = (
        {"name": key, "port": by_name[key], "targetPort": key} for key in ("clients", "workers")
    )
    stateful = {
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": _meta(f"{name}-{ROUTER}", labels),
        "spec": {
            "replicas": 1, "serviceName": f"{name}-{ROUTER}", "selector": {"matchLabels": labels},
            "template": pod,
        },
    }  # fmt: skip
    return [
        _service(name, labels, {"selector": labels, "ports": [clients]}),
        _service(
            f"{name}-{ROUTER}", labels,
            {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels,
             "ports": [clients, workers]},
        ),
        stateful,
    ]  # fmt: skip


def _service(name: str, labels: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": _meta(name, labels), "spec": spec}


# --- workers ----------------------------------------------------------------------------------


def _workers(
    description: Description, name: str, group: RoleGroup, options: RenderOptions
) -> list[dict[str, Any]]:
    labels = _labels(name, "worker", group.host)
    place = RolePlace(
        FOLDER, f"{name}-{ROUTER}", name="$(POD_NAME)", device=device_of(group),
        metrics=(EVERY, group.metrics_or_default),
    )  # fmt: skip
    volumes = [("scratch", _scratch(), SCRATCH)]
    if description.has_keys:
        volumes.append((KEYS, _secret_volume(f"{name}-{group.name}"), f"{FOLDER}/{KEYS}"))
    if any(file.path.startswith(f"{FILES}/") for file in group.files):
        volumes.append((FILES, {"configMap": {"name": f"{name}-{FILES}"}}, f"{FOLDER}/{FILES}"))
    pod = _pod(description, group, place, labels, volumes, options)
    threads = description.hosts.host(group.host).threads
    wanted: dict[str, Any] = {"requests": {"cpu": str(threads or "250m"), "memory": "512Mi"}}
    if group.gpus:
        wanted["limits"] = {GPU: group.gpus}
    pod["spec"]["containers"][0]["resources"] = wanted
    # A worker that is replaced must give its GPU up first: there may be no other.
    surge = {"maxSurge": 0, "maxUnavailable": 1} if group.gpus else {"maxSurge": 1, "maxUnavailable": 0}
    full_name = f"{name}-{group.name}"
    return [
        {
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": _meta(full_name, labels),
            "spec": {
                "replicas": group.n, "selector": {"matchLabels": labels},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": surge},
                "progressDeadlineSeconds": STARTED.period_s * STARTED.failures + 300,
                "template": pod,
            },
        },
        {
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _meta(full_name, labels),
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": labels}},
        },
    ]  # fmt: skip


# --- pods -------------------------------------------------------------------------------------


def _scratch() -> dict[str, Any]:
    return {"emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}}


def _secret_volume(name: str) -> dict[str, Any]:
    return {"secret": {"secretName": name, "defaultMode": _MODE, "optional": False}}


def _pod(
    description: Description,
    group: RoleGroup,
    place: RolePlace,
    labels: dict[str, str],
    volumes: list[tuple[str, dict[str, Any], str]],
    options: RenderOptions,
) -> dict[str, Any]:
    """Return a pod's template; `volumes` have a name, a source and the path in the container."""
    spec = {
        "terminationGracePeriodSeconds": group.stop_s + PAST_DRAIN_S,
        "automountServiceAccountToken": False,
        # A Service named superserve would set SUPERSERVE_* variables.
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(description, group, place, options, volumes)],
        "volumes": [{"name": name, **source} for name, source, _ in volumes],
    }  # fmt: skip
    metadata: dict[str, Any] = {"labels": labels}
    if group.files:
        metadata["annotations"] = {"superserve/files": group.digest}
    return {"metadata": metadata, "spec": spec}


def _container(
    description: Description,
    group: RoleGroup,
    place: RolePlace,
    options: RenderOptions,
    volumes: list[tuple[str, dict[str, Any], str]],
) -> dict[str, Any]:
    assert place.metrics is not None, "probes ask there"
    args = [
        word if word == place.name else word.replace("$(", "$$(") for word in description.argv(group, place)
    ]
    env: list[dict[str, Any]] = [
        {"name": key, "value": value.replace("$(", "$$(")} for key, value in group.env
    ]
    if not group.is_router:
        env.insert(0, {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})
    ports = [*group.ports, ("metrics", place.metrics[1])]
    container: dict[str, Any] = {
        "name": group.kind,
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "args": args,
        "env": env,
        "ports": [{"name": key, "containerPort": port} for key, port in ports],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": _probe(STARTED, _ROUTER_STARTS if group.is_router else STARTED.failures),
        "livenessProbe": _probe(LIVE, LIVE.failures),
        "readinessProbe": _probe(READY, READY.failures),
        "volumeMounts": [
            {"name": key, "mountPath": path, **({} if path == SCRATCH else {"readOnly": True})}
            for key, _, path in volumes
        ],
    }
    return container if env else {key: value for key, value in container.items() if key != "env"}


def _probe(probe: HealthProbe, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": probe.path, "port": "metrics"},
        "periodSeconds": probe.period_s,
        "timeoutSeconds": probe.timeout_s,
        "failureThreshold": failures,
    }


# --- who reaches whom -------------------------------------------------------------------------


def _policies(description: Description, name: str) -> list[dict[str, Any]]:
    """Return who reaches whom: anyone the clients' port and metrics, workers alone the workers' port."""
    ports = dict(description.router.ports)
    workers = {"podSelector": {"matchLabels": _labels(name, "worker")}}
    to_router = [
        {"ports": [_tcp(ports["clients"]), _tcp(description.router.metrics_or_default)]},
        {"ports": [_tcp(ports["workers"])], "from": [workers]},
    ]
    to_workers = [{"ports": [_tcp(description.workers[0].metrics_or_default)]}]
    return [
        _policy(f"{name}-{ROUTER}", _labels(name, ROUTER), to_router),
        _policy(f"{name}-worker", _labels(name, "worker"), to_workers),
    ]


def _tcp(port: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": port}


def _policy(name: str, labels: dict[str, str], ingress: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": _meta(name, labels),
        "spec": {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress"], "ingress": ingress},
    }  # fmt: skip
