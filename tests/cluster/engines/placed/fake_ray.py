"""Ray as an object: actors are Python objects of this process, in one namespace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """As Ray's."""


class GetTimeoutError(RayError):
    """As Ray's: no answer in time."""


class RayActorError(RayError):
    """As Ray's: the actor has ended."""


class FakeRay:
    """What the engine asks of Ray.

    Attributes:
        actors: The object and the options of each actor, by name.
        waiting: Actors that have no place yet.
    """

    def __init__(self) -> None:
        self.actors: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.waiting: set[str] = set()
        self.exceptions = SimpleNamespace(
            RayError=RayError, GetTimeoutError=GetTimeoutError, RayActorError=RayActorError
        )
        self.util = SimpleNamespace(
            list_named_actors=self._names, get_node_ip_address=lambda: "10.0.0.1",
        )  # fmt: skip
        self.make: Any = FakeActor

    def remote(self, kind: type) -> Any:
        """Return what makes actors."""
        del kind

        def options(**of: Any) -> Any:
            def create(*args: Any) -> None:
                self.actors[of["name"]] = (self.make(*args), of)

            return SimpleNamespace(remote=create)

        return SimpleNamespace(options=options)

    def _names(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        ours = [{"name": name, "namespace": of["namespace"]} for name, (_, of) in self.actors.items()]
        return [*ours, {"name": "router", "namespace": "of-another"}]

    def get_actor(self, name: str, namespace: str) -> Any:
        """Return a handle."""
        if name not in self.actors or self.actors[name][1]["namespace"] != namespace:
            raise ValueError(name)
        return Handle(self, name)

    def get(self, asked: tuple[Handle, str, tuple[Any, ...]], timeout: float) -> Any:
        """Return the answer of a call."""
        del timeout
        handle, method, args = asked
        if handle.name in self.waiting:
            raise GetTimeoutError
        if handle.name not in self.actors:
            raise RayActorError
        return getattr(self.actors[handle.name][0], method)(*args)

    def wait(self, asked: list[Any], num_returns: int, timeout: float) -> None:
        """Wait for nothing."""

    def kill(self, handle: Handle, *, no_restart: bool) -> None:
        """End an actor."""
        assert no_restart
        self.actors.pop(handle.name, None)

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes."""
        return [{"Alive": True, "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "n1", "NodeID": "f"}]


class Handle:
    """An actor, by name."""

    def __init__(self, ray: FakeRay, name: str) -> None:
        self._ray = ray
        self.name = name

    def __getattr__(self, method: str) -> Any:
        """Return a remote method."""
        return SimpleNamespace(remote=lambda *args: (self, method, args))


class FakeActor:
    """A role that is up at once."""

    def __init__(self, cluster: str, role: dict[str, Any], folder: str, files: dict[str, bytes]) -> None:
        self.cluster, self.role, self.folder, self.files = cluster, role, folder, files
        self.is_stopping = False

    def address(self) -> str:
        """Return the node's address."""
        return "10.0.0.1"

    def ends(self) -> tuple[str, str]:
        """Return where it is reached, as a router."""
        return "tcp://10.0.0.1:5555", "tcp://10.0.0.1:5556"

    def state(self) -> dict[str, Any]:
        """Return that it runs."""
        return {
            "state": "STOPPING" if self.is_stopping else "RUNNING",
            "pid": 7,
            "up_s": 3,
            "node": "10.0.0.1",
        }

    def tail(self, n: int) -> list[str]:
        """Return its log."""
        return ["one", "two"][-n:]

    def stop(self) -> None:
        """Drain."""
        self.is_stopping = True

    def put(self, files: dict[str, bytes]) -> None:
        """Take other files."""
        self.files = files
