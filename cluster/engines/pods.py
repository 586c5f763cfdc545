"""The objects of Kubernetes that a cluster consists of, one function each.

`kubernetes` and `placed.kubernetes_engine` put them together. Pods are confined: not root, a read-only root
file system, no capabilities, no token of the API.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.engines.containers import SCRATCH, USER
from cluster.engines.describe import LIVE, READY, ROUTER, STARTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.engines.describe import HealthProbe

PAST_DRAIN_S = 10
"""How much longer than its drain a pod may take to end."""
GPU = "nvidia.com/gpu"
"""The resource that NVIDIA's device plugin offers."""
INSTANCE = "app.kubernetes.io/instance"
"""The label with a cluster's name."""

HOST_NAME = "kubernetes.io/hostname"
"""The label of nodes by which routers are spread."""
LEAVE_S = 2
"""How long a router that is about to end serves on, while its Service forgets it: no new client meets it."""
LEAVE = ["python3", "-c", f"import time; time.sleep({LEAVE_S})"]
"""What a router's pod runs before its SIGTERM, upon which it drains."""

_ROUTER_STARTS = 30  # periods: a router loads nothing
_MODE = 0o400

Volume = tuple[str, dict[str, Any], str]
"""A volume's name, its source and the path in the container."""


@dataclass(frozen=True, slots=True)
class PodParts:
    """What differs between pods.

    Attributes:
        kind: "router" or "worker".
        image: Its image.
        args: The arguments of Python, ready for Kubernetes.
        env: As Kubernetes takes it.
        ports: Every port, by name, with "metrics" among them.
        stop_s: How long the role has after SIGTERM.
        volumes: What is mounted, scratch space aside.
        labels: Of the pod.
        annotations: Of the pod.
        cpu: Processors that it asks for.
        gpus: GPUs that it asks for.
        settings: Further fields of its specification.
    """

    kind: str
    image: str
    args: tuple[str, ...]
    env: tuple[dict[str, Any], ...]
    ports: tuple[tuple[str, int], ...]
    stop_s: float
    volumes: tuple[Volume, ...]
    labels: dict[str, str]
    annotations: dict[str, str] = field(default_factory=dict)
    cpu: str = "250m"
    gpus: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def labels(name: str, kind: str, **more: str) -> dict[str, str]:
    """Return the labels of a role's pods, by which they are also selected; `more` are superserve/KEY."""
    found = {"app.kubernetes.io/name": "superserve", INSTANCE: name, "app.kubernetes.io/component": kind}
    return found | {f"superserve/{key}": value for key, value in more.items()}


def meta(name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata of an object."""
    return {"name": name, "labels": dict(labels)}


def literal(text: str) -> str:
    """Return a text that Kubernetes leaves alone: it replaces $(NAME)."""
    return text.replace("$(", "$$(")


def variables(env: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return environment variables as Kubernetes takes them."""
    return [{"name": key, "value": literal(value)} for key, value in env]


def secret_volume(name: str) -> dict[str, Any]:
    """Return a volume's source: a Secret that only the role may read."""
    return {"secret": {"secretName": name, "defaultMode": _MODE, "optional": False}}


def template(parts: PodParts) -> dict[str, Any]:
    """Return a pod's template."""
    volumes: tuple[Volume, ...] = (
        ("scratch", {"emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}}, SCRATCH),
        *parts.volumes,
    )
    is_router = parts.kind == ROUTER
    spec = {
        "terminationGracePeriodSeconds": int(parts.stop_s) + PAST_DRAIN_S + (LEAVE_S if is_router else 0),
        "automountServiceAccountToken": False,
        # A Service named superserve would set SUPERSERVE_* variables.
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"topologySpreadConstraints": [_spread(parts.labels)]} if is_router else {}),
        **parts.settings,
        "containers": [_container(parts, volumes)],
        "volumes": [{"name": name, **source} for name, source, _ in volumes],
    }  # fmt: skip
    metadata: dict[str, Any] = {"labels": parts.labels}
    if parts.annotations:
        metadata["annotations"] = parts.annotations
    return {"metadata": metadata, "spec": spec}


def _spread(labels: Mapping[str, str]) -> dict[str, Any]:
    """Return that routers of a cluster are on different nodes, as far as there are some."""
    alike = {key: value for key, value in labels.items() if key.startswith("app.")}
    return {
        "maxSkew": 1, "topologyKey": HOST_NAME, "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": alike},
    }  # fmt: skip


def _container(parts: PodParts, volumes: Sequence[Volume]) -> dict[str, Any]:
    is_router = parts.kind == ROUTER
    wanted: dict[str, Any] = {"requests": {"cpu": parts.cpu, "memory": "512Mi"}}
    if parts.gpus:
        wanted["limits"] = {GPU: parts.gpus}
    container: dict[str, Any] = {
        "name": parts.kind,
        "image": parts.image,
        "imagePullPolicy": "IfNotPresent",
        "args": list(parts.args),
        "env": list(parts.env),
        "ports": [{"name": key, "containerPort": port, "protocol": "TCP"} for key, port in parts.ports],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": _probe(STARTED, _ROUTER_STARTS if is_router else STARTED.failures),
        "livenessProbe": _probe(LIVE, LIVE.failures),
        "readinessProbe": _probe(READY, READY.failures),
        "volumeMounts": [
            {"name": key, "mountPath": path, **({} if path == SCRATCH else {"readOnly": True})}
            for key, _, path in volumes
        ],
        "resources": wanted,
    }
    if is_router:
        container["lifecycle"] = {"preStop": {"exec": {"command": LEAVE}}}
    return container if parts.env else {key: value for key, value in container.items() if key != "env"}


def _probe(probe: HealthProbe, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": probe.path, "port": "metrics"},
        "periodSeconds": probe.period_s,
        "timeoutSeconds": probe.timeout_s,
        "failureThreshold": failures,
    }


# --- around pods ------------------------------------------------------------------------------


def services(
    name: str, labels: Mapping[str, str], ports: Mapping[str, int], selector: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return the Service for clients, and the headless one for workers, whose router is not ready yet.

    With several routers the headless one's name has the address of each.
    """
    selected = dict(selector or labels)
    clients, workers = (
        {"name": key, "port": ports[key], "targetPort": key, "protocol": "TCP"}
        for key in ("clients", "workers")
    )
    headless = {
        "clusterIP": "None", "publishNotReadyAddresses": True, "selector": selected,
        "ports": [clients, workers],
    }  # fmt: skip
    return [
        _service(name, labels, {"selector": selected, "ports": [clients]}),
        _service(f"{name}-{ROUTER}", labels, headless),
    ]


def _service(name: str, labels: Mapping[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta(name, labels), "spec": spec}


def router_set(
    full_name: str, labels: Mapping[str, str], pod: dict[str, Any], service: str, n: int | None = None
) -> dict[str, Any]:
    """Return the StatefulSet of a router, of which there are never two, or of `n` that are named one by one.

    Those start at once, since each is ready only when it has a worker; updates take one after the other.
    """
    policy = {} if n is None else {"podManagementPolicy": "Parallel"}
    return {
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta(full_name, labels),
        "spec": {
            "replicas": 1 if n is None else n, "serviceName": service, **policy,
            "selector": {"matchLabels": dict(labels)}, "template": pod,
        },
    }  # fmt: skip


def deployment(
    name: str, labels: Mapping[str, str], n: int, strategy: dict[str, Any], pod: dict[str, Any]
) -> dict[str, Any]:
    """Return a Deployment of `n` workers."""
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta(name, labels),
        "spec": {
            "replicas": n, "selector": {"matchLabels": dict(labels)}, "strategy": strategy,
            "progressDeadlineSeconds": STARTED.period_s * STARTED.failures + 300,
            "template": pod,
        },
    }  # fmt: skip


def one_at_a_time(
    name: str, labels: Mapping[str, str], selected: Mapping[str, str], version: str = "policy/v1"
) -> dict[str, Any]:
    """Return a PodDisruptionBudget: of what is selected, nodes that are drained take one at a time."""
    return {
        "apiVersion": version, "kind": "PodDisruptionBudget", "metadata": meta(name, labels),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": dict(selected)}},
    }  # fmt: skip


def router_policy(name: str, ports: Mapping[str, int], metrics: int) -> dict[str, Any]:
    """Return who reaches the router: anyone the clients' port and metrics, workers alone their port."""
    workers = {"podSelector": {"matchLabels": labels(name, "worker")}}
    ingress = [
        {"ports": [_tcp(ports["clients"]), _tcp(metrics)]},
        {"ports": [_tcp(ports["workers"])], "from": [workers]},
    ]
    return _policy(f"{name}-{ROUTER}", labels(name, ROUTER), ingress)


def worker_policy(name: str, metrics: int) -> dict[str, Any]:
    """Return who reaches workers: anyone their metrics."""
    return _policy(f"{name}-worker", labels(name, "worker"), [{"ports": [_tcp(metrics)]}])


def _tcp(port: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": port}


def _policy(name: str, labels: dict[str, str], ingress: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta(name, labels),
        "spec": {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress"], "ingress": ingress},
    }  # fmt: skip
