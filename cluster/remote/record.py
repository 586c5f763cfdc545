"""The record of a cluster on several hosts, on the operator's machine, for the commands after `up`.

    STATE/.clusters/NAME.json    0600; STATE as in superserve/roles/local.py

It is written before anything is started, so that `down` finds what an interrupted `up` left. It holds
what only `up` finds out: where the cluster's folder is on each host, and which Python runs there. It
does not show what runs: the commands ask the hosts each time. If it is lost, or on another operator's
machine, `cluster up FILE` writes it again and changes nothing that runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import orjson

from cluster.spec.engines import SSH, KubernetesSettings, RaySettings, SlurmSettings
from cluster.spec.roles import HERE, Target, is_router
from superserve.errors import ConfigError
from superserve.fields import check_schema, read_file
from superserve.files import write_private
from superserve.roles import local

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
_MEND = "remove it, and run `cluster up` with the hosts file again"


@dataclass(frozen=True, slots=True)
class KnownHost:
    """A host that a cluster was started on.

    Attributes:
        name: In hosts.yaml.
        target: Where ssh connects.
        folder: The cluster's folder there.
        interpreter: The Python that runs the roles.
        code: The folder with the package.
        roles: The names of its roles.
    """

    name: str
    target: Target
    folder: str
    interpreter: str
    code: str
    roles: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, where verbs are functions and commands need no ssh."""
        return self.target == HERE

    def python(self, *args: str) -> list[str]:
        """Return a command of the host's Python that finds the package, and ignores the current folder."""
        path = ["env", f"PYTHONPATH={self.code}"] if self.code else []
        return [*path, self.interpreter, "-P", *args]


@dataclass(frozen=True, slots=True)
class Record:
    """A cluster on several hosts, as recorded for its operator.

    Attributes:
        name: Of the cluster.
        file: Its hosts.yaml, as an absolute path.
        ssh_config: The file for `ssh -F`; None for the user's own.
        router_host: The name of the router's host.
        client_endpoint: Where clients connect.
        worker_endpoint: Where workers connect.
        profile: The profile that its workers use.
        hosts: Every host that was prepared.
        slots: How many GPUs each worker registers, by its name.
        left_out: Hosts of the file that are not among them, each with the reason.
        keys: The key file with which this machine's commands ask the router; "" without keys.
        engine: What keeps its roles.
        slurm: Settings of that engine, if it is Slurm.
        ray: Settings of that engine, if it is Ray.
        kubernetes: Settings of that engine, if it is Kubernetes.
        resting: Roles that `cluster scale` has stopped: that they do not run is as asked for.
    """

    name: str
    file: str
    ssh_config: str | None
    router_host: str
    client_endpoint: str
    worker_endpoint: str
    profile: str
    hosts: tuple[KnownHost, ...]
    slots: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]
    keys: str = ""  # older files lack it, and what follows
    engine: str = SSH
    slurm: SlurmSettings | None = None
    ray: RaySettings | None = None
    kubernetes: KubernetesSettings | None = None
    resting: tuple[str, ...] = ()

    @property
    def host_names(self) -> tuple[str, ...]:
        """The hosts' names."""
        return tuple(host.name for host in self.hosts)

    @property
    def router_hosts(self) -> tuple[str, ...]:
        """The names of the hosts with a router."""
        return tuple(host.name for host in self.hosts if any(is_router(role) for role in host.roles))

    @property
    def role_names(self) -> tuple[str, ...]:
        """The roles' names, by host."""
        return tuple(role for host in self.hosts for role in host.roles)

    def host(self, name: str) -> KnownHost:
        """Return a host by its name.

        Raises:
            ConfigError: There is no such host; the error lists them.
        """
        for host in self.hosts:
            if host.name == name:
                return host
        raise ConfigError(
            f"{name}: expected a host of {self.name!r}: {', '.join(h.name for h in self.hosts)}"
        )

    def host_of(self, role: str) -> KnownHost:
        """Return the host that a role runs on.

        Raises:
            ConfigError: There is no such role; the error lists them.
        """
        for host in self.hosts:
            if role in host.roles:
                return host
        known = ", ".join(role for host in self.hosts for role in host.roles)
        raise ConfigError(f"{role}: expected a role of {self.name!r}: {known}")


def path_of(name: str) -> Path:
    """Return the path of the record of the cluster `name`, whether or not it exists.

    Raises:
        ConfigError: The name is invalid.
    """
    local.cluster_folder(name)  # checks the name
    return local.state_folder() / local.REMEMBERED / f"{name}.json"


def load(name: str) -> Record | None:
    """Return the record of a cluster; None if there is none.

    Raises:
        ConfigError: It cannot be read, or was written by another version.
    """
    path = path_of(name)
    try:
        body = orjson.loads(path.read_bytes())
        check_schema(body, SCHEMA, str(path))
        return read_file(Record, body, str(path))
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path}: expected what `cluster up` writes: {error}; {_MEND}") from error
    except ConfigError as error:
        raise ConfigError(f"{error}; {_MEND}") from error


def save(record: Record) -> None:
    """Write a record: readers see the old one or the new one, never a part.

    Raises:
        ConfigError: It cannot be written.
    """
    path = path_of(record.name)
    body = {"schema": SCHEMA, **asdict(record)}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, orjson.dumps(body, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that can be written: {error.strerror}") from error


def forget(name: str) -> None:
    """Remove the record of a cluster, if it exists."""
    path_of(name).unlink(missing_ok=True)


def names() -> list[str]:
    """Return the clusters with a record, by name."""
    return sorted(path.stem for path in (local.state_folder() / local.REMEMBERED).glob("[!.]*.json"))
