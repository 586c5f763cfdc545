"""The engine of clusters on Ray: a detached actor for each role.

    namespace superserve-NAME, actor ROLE    by which every command finds it again

A worker's actor asks for a GPU, so that Ray places it, and its autoscaler adds nodes for those that wait. Ray
restarts an actor for ever (`max_restarts=-1`), on another node if its own dies; workers follow the routers.
This package must be installed in the Python of Ray's nodes; keys are sent with the actors.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.engines.engine import TAIL_LINES, RoleSeen
from cluster.engines.placed.base import ASK_AGAIN_S, PlacedEngine
from cluster.engines.placed.ray_actor import RoleActor, keep_files, namespace
from cluster.remote.shell import RemoteError
from cluster.spec.engines import RaySettings
from cluster.spec.roles import is_router
from superserve.errors import ConfigError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator, Sequence

    from cluster.engines.placed.base import Started
    from cluster.remote.record import Record

_ANSWER_S = 2.0  # of an actor that runs; one that waits for a node, or is being restarted, takes longer
_GONE_S = 20.0  # until a killed actor's name is free again
_AT_ONCE = 8  # calls that an actor takes beside each other: a slow one must not hide the others


@contextlib.contextmanager
def connected(record: Record) -> Iterator[RayEngine]:
    """Give the engine of a cluster on Ray.

    Raises:
        ConfigError: Ray is not installed.
        RemoteError: There is no Ray cluster at its address.
    """
    try:
        import ray  # noqa: PLC0415  only this engine needs it
    except ImportError:
        raise ConfigError(
            "engine: ray needs the package ray in this Python: pip install 'superserve[ray]'"
        ) from None
    settings = record.ray or RaySettings()
    _hush(ray)
    try:
        ray.init(
            address=settings.address, namespace=namespace(record.name), log_to_driver=False,
            configure_logging=False, logging_level=logging.ERROR, ignore_reinit_error=True,
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise RemoteError(f"ray: {settings.address}: {error}") from error
    try:
        yield RayEngine(record, ray)
    finally:
        ray.shutdown()


def _hush(ray: Any) -> None:
    """Send to stderr what Ray prints about nodes that die: it would be in the midst of `status --json`.

    Ray has no setting for it: those lines come even without `log_to_driver`.
    """
    worker: Any = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = _to_stderr


def _to_stderr(data: dict[str, Any], *_: object, **__: object) -> None:
    for line in data.get("lines", ()):
        sys.stderr.write(f"ray: {line}\n")


class RayEngine(PlacedEngine):
    """A detached actor for each role. Its verbs are those of `cluster.engines.engine.ClusterEngine`.

    Args:
        record: What is known about the cluster.
        ray: The module, connected.
    """

    def __init__(self, record: Record, ray: Any) -> None:
        super().__init__(record)
        self._ray = ray
        self._settings = record.ray or RaySettings()
        self._namespace = namespace(record.name)

    def settings(self, kind: str) -> tuple[str, ...]:
        """Return what decides where a role's actor is placed."""
        own = self._settings
        if kind == "router":
            return (f"router_node={own.router_node}",)
        return (f"worker_cpus={own.worker_cpus:g}", f"spread={own.spread}")

    def start(self, role: Started) -> None:
        """Create a role's actor, without waiting for a place."""
        actor = self._ray.remote(RoleActor)
        is_router = role.kind == "router"
        files = self._files(role)
        if is_router:
            keep_files(self.record.name, role.name, files)
        try:
            actor.options(
                name=role.name, namespace=self._namespace, lifetime="detached", max_restarts=-1,
                num_cpus=0 if is_router else self._settings.worker_cpus, num_gpus=role.gpus,
                max_concurrency=_AT_ONCE, scheduling_strategy=self._strategy(role.name),
            ).remote(self.record.name, asdict(role), str(self.folder), files)  # fmt: skip
        except (ValueError, self._ray.exceptions.RayError) as error:
            raise RemoteError(f"ray: {role.name}: {error}") from error

    def end(self, name: str) -> None:
        """Drain a role; an actor that has no place yet is removed."""
        actor = self._actors().get(name)
        if actor is None:
            return
        try:
            self._ray.get(actor.stop.remote(), timeout=_ANSWER_S)
        except self._ray.exceptions.GetTimeoutError:
            self._ray.kill(actor, no_restart=True)
        except self._ray.exceptions.RayActorError:
            return  # it has drained meanwhile

    def gone(self, names: Iterable[str]) -> None:
        """Remove actors that are left, and wait until their names are free."""
        names = list(names)
        for name in filter(is_router, names):
            keep_files(self.record.name, name, {})
        for name, actor in self._actors().items():
            if name in names:
                self._ray.kill(actor, no_restart=True)
        give_up_s = time.monotonic() + _GONE_S
        while left := sorted(set(names) & set(self._actors())):
            if time.monotonic() > give_up_s:
                raise RemoteError(f"ray: {', '.join(left)}: expected to be gone within {_GONE_S:g} s")
            time.sleep(ASK_AGAIN_S)

    def seen(self) -> dict[str, RoleSeen]:
        """Return every role with an actor."""
        actors = self._actors()
        asked = {name: actor.state.remote() for name, actor in actors.items()}
        if asked:
            self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
        return {name: self._seen(name, reference) for name, reference in asked.items()}

    def sent(self, changed: Sequence[str]) -> None:
        """Give the routers' actors their files, and keep them for when Ray starts an actor again."""
        del changed
        actors = self._actors()
        for name in self.routers:
            if name not in actors or not self._path(name).exists():
                continue
            files = self._files(self.last(name))
            keep_files(self.record.name, name, files)
            # One that has no place yet takes them once it has, and one that is being restarted those kept.
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(actors[name].put.remote(files), timeout=_ANSWER_S)

    def router_addresses(self) -> dict[str, str]:
        """Return the address of each router's node, by name; without those whose actor does not answer."""
        actors = self._actors()
        found = {}
        for name in self.routers:
            if name in actors:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    found[name] = str(self._ray.get(actors[name].address.remote(), timeout=_ANSWER_S))
        return found

    def logs(self, role: str, n_lines: int = TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log; they end with its actor."""
        self.record.host_of(role)  # an error that lists the roles
        actor = self._actors().get(role)
        if actor is None:
            return []
        try:
            lines: list[str] = self._ray.get(actor.tail.remote(n_lines), timeout=_ANSWER_S)
        except self._ray.exceptions.RayError as error:
            raise RemoteError(f"ray: {role}: no answer: {error}") from error
        return lines

    def follow(self, role: str, n_lines: int) -> subprocess.Popen[bytes]:
        """Raise ConfigError: logs are on the nodes."""
        del role, n_lines
        raise ConfigError("logs: expected no --follow with engine: ray, whose logs are on its nodes")

    # --- actors -------------------------------------------------------------------------------

    def _actors(self) -> dict[str, Any]:
        """Return the handle of each role's actor, by name."""
        found = {}
        for one in self._ray.util.list_named_actors(all_namespaces=True):
            if one["namespace"] == self._namespace:
                with contextlib.suppress(ValueError):  # it has ended meanwhile
                    found[one["name"]] = self._ray.get_actor(one["name"], namespace=self._namespace)
        return found

    def _seen(self, name: str, reference: Any) -> RoleSeen:
        role = self.last(name) if self._path(name).exists() else None
        why = ""
        try:
            said = self._ray.get(reference, timeout=0)
        except self._ray.exceptions.GetTimeoutError:
            said = {"state": "STARTING", "pid": 0, "up_s": 0, "node": ""}
            why = "Ray has not placed its actor, or restarts it"
        except self._ray.exceptions.RayError as error:
            said = {"state": "BACKOFF", "pid": 0, "up_s": 0, "node": ""}
            why = str(error).splitlines()[0]
        place = f"pid {said['pid']} on {said['node']}" if said["pid"] else said["node"]
        return RoleSeen(
            "" if role is None else role.host, name, "router" if is_router(name) else "worker",
            "" if role is None else role.serves, said["state"], None, said["up_s"], 0,
            f"actor {name} in {self._namespace}", (), why=why, place=place,
        )  # fmt: skip

    def _strategy(self, name: str) -> Any:
        node = self._settings.router_node
        if not is_router(name) or node is None:
            # Several routers are on different nodes, so that no node takes all along.
            is_apart = len(self.routers) > 1 if is_router(name) else self._settings.spread
            return "SPREAD" if is_apart else "DEFAULT"
        alive = [one for one in self._ray.nodes() if one["Alive"]]
        for one in alive:
            if node in (one["NodeManagerAddress"], one["NodeManagerHostname"]):
                from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

                return NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)
        known = ", ".join(sorted(one["NodeManagerAddress"] for one in alive))
        raise RemoteError(f"ray: router_node: expected a node of the cluster, one of {known}, got {node!r}")

    def _files(self, role: Started) -> dict[str, bytes]:
        """Return the files below the cluster's folder that a role's arguments lead to."""
        head = f"{self.folder}/files/"
        groups = {word.removeprefix(head).partition("/")[0] for word in role.argv if word.startswith(head)}
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for group in sorted(groups)
            for path in sorted((self.folder / "files" / group).rglob("*"))
            if path.is_file()
        }
