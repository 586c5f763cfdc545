"""What Kubernetes says about roles, in supervisor's words: from objects as `kubectl get` prints them."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Reasons for which a container waits although it was tried: another try may not help.
_FAILING = ("CrashLoopBackOff", "CreateContainerError", "RunContainerError")


@dataclass(frozen=True, slots=True)
class PodFound:
    """A role's object and its pod.

    Attributes:
        state: One of `superserve.roles.local.RoleState`.
        up_s: How long its container has run.
        exit_code: Of its last end.
        restarts: How often it was restarted.
        why: What keeps it from running; "" if it runs.
        place: Its pod and node, in words.
    """

    state: str
    up_s: int = 0
    exit_code: int = 0
    restarts: int = 0
    why: str = ""
    place: str = ""


def seen_in(
    objects: Iterable[Mapping[str, Any]], label: str, now: dt.datetime | None = None
) -> dict[str, PodFound]:
    """Return each role that has an object among these.

    Args:
        objects: StatefulSets, Deployments and pods.
        label: The label with a role's name.
        now: The time; None for this machine's.
    """
    now = now or dt.datetime.now(dt.UTC)
    wanted: dict[str, int] = {}
    pods: dict[str, list[Mapping[str, Any]]] = {}
    for each in objects:
        role = each["metadata"]["labels"][label]
        if each["kind"] == "Pod":
            pods.setdefault(role, []).append(each)
        else:
            wanted[role] = each["spec"].get("replicas", 1)
    return {role: _found(n, pods.get(role, []), now) for role, n in wanted.items()}


def _found(n: int, pods: list[Mapping[str, Any]], now: dt.datetime) -> PodFound:
    living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and not _has_ended(pod)]
    if n == 0:
        leaving = [pod for pod in pods if not _has_ended(pod)]
        return PodFound("STOPPING" if leaving else "STOPPED", place=_place(leaving[0]) if leaving else "")
    if not living:
        return PodFound("STARTING", why="its pod is not there yet")
    pod = max(living, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    return _pod(pod, now)


def _has_ended(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _place(pod: Mapping[str, Any]) -> str:
    name, node = pod["metadata"]["name"], pod["spec"].get("nodeName", "")
    return f"pod {name} on {node}" if node else f"pod {name}"


def _pod(pod: Mapping[str, Any], now: dt.datetime) -> PodFound:
    """Return what a pod of a role that should run says."""
    status, place = pod.get("status", {}), _place(pod)
    containers = status.get("containerStatuses", [])
    if not containers:
        return PodFound("STARTING", why=_unscheduled(status), place=place)
    container = containers[0]
    restarts = container.get("restartCount", 0)
    state = container.get("state", {})
    ended = container.get("lastState", {}).get("terminated", {})
    code = ended.get("exitCode", 0)
    if "running" in state:
        began = dt.datetime.fromisoformat(state["running"]["startedAt"])
        is_up = container.get("started", container.get("ready", False))
        up_s = max(0, int((now - began).total_seconds()))
        return PodFound("RUNNING" if is_up else "STARTING", up_s, code, restarts, "", place)
    waiting = state.get("waiting", state.get("terminated", {}))
    words = [waiting.get("reason", ""), waiting.get("message", "")]
    why = ": ".join(word for word in words if word) or "its container does not run"
    name = "BACKOFF" if waiting.get("reason") in _FAILING or "terminated" in state else "STARTING"
    return PodFound(name, 0, state.get("terminated", ended).get("exitCode", code), restarts, why, place)


def _unscheduled(status: Mapping[str, Any]) -> str:
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return str(condition.get("message") or condition.get("reason") or "it has no node")
    return "its container is not there yet"
