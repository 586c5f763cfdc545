"""The engine of clusters on Kubernetes: a StatefulSet of one for each router, a Deployment for each worker.

    NAME-ROLE    the object of a role; its label superserve/role is by what every command finds it again

A Deployment of several would be fewer objects, but the verbs are about single roles: one that is drained must
be the one that was named, and stay away. It is scaled to 0 for that, and to 1 to come back. For fleets that
KEDA scales there is deploy/chart.

The operator's machine need not reach the pods' network: STATUS is asked for through `kubectl port-forward`.
Files come as Secrets: a role's own under a name with their digest, so that others restart it, and the lists
of keys under names that stay, so that kubelets update them in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.engines import kubesecrets, pods
from cluster.engines.containers import FOLDER, object_name
from cluster.engines.describe import ROUTER
from cluster.engines.engine import TAIL_LINES, RoleSeen
from cluster.engines.placed.base import PlacedEngine, tail_lines
from cluster.engines.placed.kubectl import Kubectl
from cluster.engines.placed.podseen import PodFound, seen_in
from cluster.remote.shell import RemoteError
from cluster.spec.engines import KubernetesSettings
from cluster.spec.roles import KEYS, is_router
from superserve.errors import NoRouterError
from superserve.net.connection import ask_status
from superserve.net.keys import ROUTER_KEY
from superserve.whole import whole_of

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cluster.engines.engine import Stopped
    from cluster.engines.placed.base import Started
    from cluster.engines.placed.kubectl import Forward
    from cluster.remote.record import Record
    from superserve.status import RouterStatus

ROLE = "superserve/role"
"""The label with a role's name."""

_MADE_BY = {"app.kubernetes.io/managed-by": "superserve"}
_ALL = "services,secrets,poddisruptionbudgets,networkpolicies"
_STATUS_S = 2.0
_GONE_S = 10  # a pod on a node that is gone is replaced after that, instead of five minutes


@contextlib.contextmanager
def connected(record: Record) -> Iterator[KubernetesEngine]:
    """Give the engine of a cluster on Kubernetes; end what it has started here."""
    engine = KubernetesEngine(record)
    try:
        yield engine
    finally:
        engine.close()


class KubernetesEngine(PlacedEngine):
    """Pods for roles. Its verbs are those of `cluster.engines.engine.ClusterEngine`."""

    shares_network = False

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self._settings = record.kubernetes or KubernetesSettings()
        self._name = object_name(record.name)
        self._kubectl = Kubectl(self._settings.namespace, self._settings.context)
        self._forwards: dict[str, Forward] = {}

    def close(self) -> None:
        """End the ways to the routers."""
        for name in list(self._forwards):
            self._close(name)

    def _close(self, name: str) -> None:
        forward = self._forwards.pop(name, None)
        if forward is not None:
            forward.close()

    # --- what differs -------------------------------------------------------------------------

    def settings(self, kind: str) -> tuple[str, ...]:
        """Return what decides which pod a role gets."""
        del kind
        return (f"image={self._settings.image}",)

    def sent(self, changed: Sequence[str]) -> None:
        """Replace the routers' Secrets, and make kubelets look at them now instead of within a minute."""
        del changed
        for name in self.routers:
            if not self._path(name).exists():
                continue
            listed, own = self._files(self.last(name))
            self._kubectl.apply([*listed, *own])
            digest = hashlib.sha256(json.dumps([listed, own]).encode()).hexdigest()[:12]
            with contextlib.suppress(RemoteError):  # no pod runs: the next one mounts what there is
                pod = f"{self._name}-{name}-0"
                self._kubectl.call("annotate", "pod", pod, f"superserve/sent={digest}", "--overwrite")

    def start(self, role: Started) -> None:
        """Create a role's objects, without waiting for a node."""
        self._kubectl.apply(list(self._objects(role)))

    def end(self, name: str) -> None:
        """Drain a role; a pod that waits for a node is removed."""
        self._kubectl.scale(self._object(name), 0)

    def gone(self, names: Iterable[str]) -> None:
        """Delete what is left of roles."""
        self._kubectl.delete(self._object(name) for name in sorted(names))

    def seen(self) -> dict[str, RoleSeen]:
        """Return every role that has an object."""
        objects = self._kubectl.get("statefulsets,deployments,pods", f"{pods.INSTANCE}={self._name},{ROLE}")
        return {name: self._seen(name, found) for name, found in seen_in(objects, ROLE).items()}

    def router_addresses(self) -> dict[str, str]:
        """Return nothing: a Service of Kubernetes finds them."""
        return {}

    def logs(self, role: str, n_lines: int = TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log; they end with its pod."""
        self.record.host_of(role)  # an error that lists the roles
        return tail_lines(self._kubectl.call("logs", self._object(role), f"--tail={n_lines}"), n_lines)

    def follow(self, role: str, n_lines: int) -> subprocess.Popen[bytes]:
        """Start what prints the last lines of a role's log and then each new one."""
        return self._kubectl.follow(self._object(role), n_lines)

    def stop(self) -> Stopped:
        """Stop the router, while workers still answer what it holds, then everything; delete every object."""
        done = super().stop()
        if not done.wrong:
            made = ",".join(f"{key}={value}" for key, value in _MADE_BY.items())
            self._kubectl.delete_all(_ALL, f"{pods.INSTANCE}={self._name},{made}")
        return done

    def router_status(self) -> RouterStatus | None:
        """Return the router's STATUS; None if it does not answer, WireError if it cannot be read."""
        found = [(f"{self._name}-{name}-0", self._status_of(name)) for name in self.routers]
        if len(found) == 1:
            return found[0][1]
        return whole_of(found) if any(status is not None for _, status in found) else None

    def _status_of(self, name: str) -> RouterStatus | None:
        if name not in self._forwards or not self._forwards[name].is_alive():
            self._close(name)
            self._forwards[name] = self._kubectl.forward(f"{self._name}-{name}-0", self._port())
        if not self._forwards[name].is_alive():
            self._close(name)
            return None
        try:
            return ask_status(self._forwards[name].endpoint, _STATUS_S, keys=self.record.keys)
        except NoRouterError:
            self._close(name)  # its pod may be another one now
            return None

    # --- objects ------------------------------------------------------------------------------

    def _object(self, name: str) -> str:
        kind = "statefulset" if is_router(name) else "deployment"
        return f"{kind}/{self._name}-{name}"

    def _labels(self, kind: str, role: str = "") -> dict[str, str]:
        return pods.labels(self._name, kind, **({"role": role} if role else {}))

    def _port(self) -> int:
        return int(self.record.client_endpoint.rpartition(":")[2])

    def _objects(self, role: Started) -> Iterator[dict[str, Any]]:
        """Yield what a role consists of, in the order in which it is needed."""
        labels = self._labels(role.kind, role.name)
        listed, own = self._files(role)
        yield from (*listed, *own)
        pod = pods.template(self._parts(role, labels))
        if role.kind != ROUTER:
            # Two with one name would confuse the router: the first must have ended.
            made = pods.deployment(f"{self._name}-{role.name}", labels, 1, {"type": "Recreate"}, pod)
            yield _mine(made)
            yield _mine(pods.worker_policy(self._name, dict(self._ports(role))["metrics"]))
            return
        ports = dict(self._ports(role))
        version = "policy/v1" if "policy/v1" in self._kubectl.versions() else "policy/v1beta1"
        workers, routers = self._labels("worker"), self._labels(ROUTER)
        service = f"{self._name}-{ROUTER}"
        for each in (
            *pods.services(self._name, routers, ports),
            pods.router_policy(self._name, ports, ports["metrics"]),
            pods.one_at_a_time(f"{self._name}-worker", workers, workers, version),
            pods.one_at_a_time(service, routers, routers, version),
            pods.router_set(f"{self._name}-{role.name}", labels, pod, service),
        ):
            yield _mine(each)

    def _parts(self, role: Started, labels: dict[str, str]) -> pods.PodParts:
        listed, own = self._files(role)
        volumes = [
            (f"list-{below}", pods.secret_volume(name), f"{FOLDER}/{KEYS}/{below}")
            for below, name in kubesecrets.list_names(self._name).items()
            if listed
        ]
        for i, secret in enumerate(own):
            path = secret["metadata"]["annotations"]["superserve/path"]
            volumes.append((f"files-{i}", pods.secret_volume(secret["metadata"]["name"]), f"{FOLDER}/{path}"))
        args = tuple(pods.literal(word) for word in self._args(role))
        return pods.PodParts(
            kind=role.kind, image=self._settings.image, args=args, env=tuple(pods.variables(role.env)),
            ports=self._ports(role), stop_s=role.stop_s, volumes=tuple(volumes), labels=labels,
            cpu="500m" if role.kind == ROUTER else "250m", gpus=role.gpus,
            settings={"tolerations": _soon()},
        )  # fmt: skip

    def _args(self, role: Started) -> list[str]:
        """Return a role's arguments with paths of its container."""
        here = re.compile(re.escape(f"{self.folder}/files/") + r"[^/]+")
        args = [here.sub(FOLDER, word) for word in role.argv]
        if role.kind == ROUTER and "--keys" in args:
            args += ["--router-key", f"{FOLDER}/router/{ROUTER_KEY}"]
        return args

    def _ports(self, role: Started) -> tuple[tuple[str, int], ...]:
        def after(option: str) -> int:
            return int(role.argv[role.argv.index(option) + 1].rpartition(":")[2])

        metrics = ("metrics", after("--metrics-port"))
        if role.kind != ROUTER:
            return (metrics,)
        return (("clients", after("--client-endpoint")), ("workers", after("--worker-endpoint")), metrics)

    # --- files --------------------------------------------------------------------------------

    def _files(self, role: Started) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return a role's files as Secrets: the lists of keys, and its own, one for each folder."""
        here = f"{self.folder}/files/"
        groups = {word.removeprefix(here).partition("/")[0] for word in role.argv if word.startswith(here)}
        listed: dict[str, dict[str, bytes]] = {}
        own: dict[tuple[str, str], dict[str, bytes]] = {}
        for group in sorted(groups):
            root = Path(here) / group
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                below = path.parent.relative_to(root)
                if len(below.parts) > 1:
                    listed.setdefault(below.parts[-1], {})[path.name] = path.read_bytes()
                else:
                    place = ROUTER if role.kind == ROUTER and str(below) == KEYS else str(below)
                    own.setdefault((group, place), {})[path.name] = path.read_bytes()
        has_keys = role.kind == ROUTER and "--keys" in role.argv
        names = kubesecrets.list_names(self._name) if has_keys else {}
        lists = [_mine(self._secret(name, listed.get(below, {}))) for below, name in names.items()]
        found = []
        for (group, place), files in own.items():
            secret = _mine(self._secret(f"{self._name}-{group.lower()}-{place}", files))
            secret["metadata"]["annotations"] = {"superserve/path": place}
            found.append(secret)
        return lists, found

    def _secret(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        secret = kubesecrets.secret(name, files)
        secret["metadata"]["labels"] = {pods.INSTANCE: self._name}
        return secret

    # --- what is there ------------------------------------------------------------------------

    def _seen(self, name: str, found: PodFound) -> RoleSeen:
        role = self.last(name) if self._path(name).exists() else None
        tail: tuple[str, ...] = ()
        if found.state in ("BACKOFF", "FATAL"):
            with contextlib.suppress(RemoteError):
                tail = tuple(self.logs(name))
        why = "; its log ends: ".join((found.why, *tail[-1:]))
        return RoleSeen(
            "" if role is None else role.host, name, "router" if is_router(name) else "worker",
            "" if role is None else role.serves, found.state, None, found.up_s, found.exit_code,
            self._object(name), tail, restarts=found.restarts, why=why, place=found.place,
        )  # fmt: skip


def _mine(made: dict[str, Any]) -> dict[str, Any]:
    """Mark an object as made by these commands, by which `down` finds it."""
    made["metadata"]["labels"] = {**made["metadata"].get("labels", {}), **_MADE_BY}
    return made


def _soon() -> list[dict[str, Any]]:
    """Return how long a pod stays on a node that is gone."""
    return [
        {
            "key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute",
            "tolerationSeconds": _GONE_S,
        }
        for what in ("not-ready", "unreachable")
    ]  # fmt: skip
