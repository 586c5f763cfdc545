"""What one host is to run and to have: the words in which a plan speaks to an engine.

Plain data, and nothing but the standard library: this module is imported on every host.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

OURS_VARIABLE = "SUPERSERVE_HOST_FOLDER"
"""Environment variable of every role: the folder of its cluster on its host."""

KEYS, FILES = FILLED = ("keys", "files")
"""Folders of a cluster on its host that hold exactly what `up` puts there."""

OPERATOR_KEY = "operator.key"
"""In KEYS of the router's host: what its STATUS is asked with."""


@dataclass(frozen=True, slots=True)
class HostRole:
    """One process to run on a host.

    Attributes:
        name: Unique in the cluster.
        kind: "router" or "worker".
        argv: The arguments of the host's Python.
        env: Environment variables, besides the host's own.
        serves: What it serves, in words.
    """

    name: str
    kind: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    serves: str

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Self:
        """Read what `asdict` wrote and JSON carried."""
        env = tuple((str(name), str(value)) for name, value in body["env"])
        return cls(body["name"], body["kind"], tuple(body["argv"]), env, body["serves"])


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What one host is to run.

    Attributes:
        folder: Of the cluster on that host.
        interpreter: The Python that runs the roles.
        code: The folder with the package.
        roles: The router first, where it is here.
        log_bytes: How large a log grows before it is put aside.
        log_files: How many put aside are kept.
    """

    folder: str
    interpreter: str
    code: str
    roles: tuple[HostRole, ...]
    log_bytes: int = 10 << 20
    log_files: int = 3

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave and JSON carried."""
        return cls(**{**body, "roles": tuple(HostRole.from_dict(role) for role in body["roles"])})


@dataclass(frozen=True, slots=True)
class Target:
    """Where ssh connects, each field as in ssh's own words; None leaves it to the configuration.

    Attributes:
        address: A name or address, or an alias of the configuration.
        user: Who logs in.
        port: Where its server listens.
    """

    address: str
    user: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a host is to have.

    Attributes:
        name: Of the host.
        target: Where ssh connects.
        python: The command of its Python.
        ports: Where roles of ours are to listen.
        gpus: CUDA devices to use.
        serves_supernet: Whether its workers need torch.
        roles: The names of the roles it is to run.
    """

    name: str
    target: Target
    python: str
    ports: tuple[int, ...]
    gpus: tuple[int, ...]
    serves_supernet: bool
    roles: tuple[str, ...]
