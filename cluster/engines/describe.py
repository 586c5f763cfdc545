"""A cluster without an engine in it: roles, their command lines, ports, GPUs, files and grace periods.

    description = describe(Path("hosts.yaml"))
    for group in description.groups:
        for process in group.processes:
            argv = description.argv(group, RolePlace("/run/superserve", ("tcp://10.0.0.1:5556",), ...))

hosts.yaml says what is to run; only an engine knows where: the addresses at which routers are found, the
folder in which a role's files lie, the device that a process is given. Those are a `RolePlace`, and
`Description.argv` returns the command line there. A host of the file is a *group* of equal workers: an engine
that schedules puts them where it likes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.spec.hostkeys import keys_of
from cluster.spec.hostplan import EVERY, FOLDER, served_profile
from cluster.spec.hosts import load_hosts
from cluster.spec.hosts_file import path_text
from cluster.spec.roles import KEYS, OPERATOR_KEY, at, emulated, resident, router_role, timing, worker_argv
from cluster.spec.yaml_lines import read_located
from profiles.table import load_profile
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cluster.spec.hosts import Host, Hosts
    from cluster.spec.roles import Served
    from cluster.spec.yaml_lines import Where

ROUTER_METRICS, WORKER_METRICS = 9400, 9401
"""Where roles serve /metrics, /live and /ready if an engine needs them and the file names no port."""

ROUTER = "router"
"""The kind of routers, and the name of the only one."""

_DIGEST_CHARACTERS = 12  # 48 bits: it only tells files apart, and verifies nothing


@dataclass(frozen=True, slots=True)
class RoleFile:
    """A file that a group's processes read.

    Attributes:
        path: Relative to the role's folder: "keys/clients/web.pub".
        content: Never shown.
        is_secret: Whether only the role may read it.
    """

    path: str
    content: bytes = field(repr=False)
    is_secret: bool


@dataclass(frozen=True, slots=True)
class HealthProbe:
    """A question to the metrics port of a role, answered by 200 or 503.

    Attributes:
        path: "/live" or "/ready".
        period_s: Between two questions.
        timeout_s: How long an answer may take.
        failures: Failures in a row until it counts.
    """

    path: str
    period_s: int
    timeout_s: int
    failures: int


LIVE = HealthProbe("/live", period_s=5, timeout_s=3, failures=6)
"""Whether to restart a role: half a minute without an answer, since a busy machine is not a bug."""
READY = HealthProbe("/ready", period_s=2, timeout_s=3, failures=2)
"""Whether to count on a role."""
STARTED = HealthProbe("/live", period_s=2, timeout_s=3, failures=300)
"""Whether a role has loaded: ten minutes for weights, the proof and CUDA graphs."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a group, for engines that name each.

    Attributes:
        name: Unique in the cluster.
        device: The device as hosts.yaml counts it: "cuda:1", "cpu".
        metrics: Its port on a machine that it shares with the group's others; None if the file names none.
    """

    name: str
    device: str
    metrics: int | None


@dataclass(frozen=True, slots=True)
class RoleGroup:
    """Processes that differ in nothing but their name and device: a router, or a host's workers.

    Attributes:
        name: "router", of a list of them "router-HOST-I", or "worker-HOST".
        kind: "router" or "worker".
        host: Its host in the file.
        processes: At least one.
        gpus: CUDA devices that each process needs: 0 or 1.
        ports: What it binds, by name: "clients" and "workers" for the router; without metrics.
        env: Environment variables.
        serves: What it serves, in words.
        files: Files that it reads, sorted by path.
        stop_s: How long it has after SIGTERM before SIGKILL; it drains for less.
        where: In the file, for `Description.error`.
    """

    name: str
    kind: str
    host: str
    processes: tuple[Process, ...]
    gpus: int
    ports: tuple[tuple[str, int], ...]
    env: tuple[tuple[str, str], ...]
    serves: str
    files: tuple[RoleFile, ...]
    stop_s: int
    where: Where

    @property
    def n(self) -> int:
        """How many processes it has."""
        return len(self.processes)

    @property
    def is_router(self) -> bool:
        """Whether it is a router."""
        return self.kind == ROUTER

    @property
    def metrics(self) -> int | None:
        """The port that the file names for /metrics: of the first process; None if it names none."""
        return self.processes[0].metrics

    @property
    def metrics_or_default(self) -> int:
        """The port for /metrics of an engine that needs one for its probes."""
        return self.metrics or (ROUTER_METRICS if self.is_router else WORKER_METRICS)

    @property
    def digest(self) -> str:
        """Tell its own secrets and files apart from other ones; lists of peers, which roles watch, aside."""
        mine = [file for file in self.files if not _is_listed(file.path)]
        return hashlib.sha256(b"\0".join(file.content for file in mine)).hexdigest()[:_DIGEST_CHARACTERS]


@dataclass(frozen=True, slots=True)
class RolePlace:
    """What only an engine knows about a process.

    Attributes:
        folder: Where the group's files lie.
        connect: The endpoints at which a worker reaches the routers; unused for a router. They may have in
            them what the engine replaces later, such as a shell's variable.
        bind: The address that a router binds.
        name: The worker's name; None lets the process make one up.
        device: The device of a worker with a real model, as the process sees it.
        metrics: Address and port of /metrics; None for none.
        router_key: The file with the router's secret, if it does not lie among the lists.
        worker_key: The file with the worker's secret, if it does not lie in the folder.
        settings: The file with the router's settings; "" gives them as options.
        listed: The file with the list of routers; "" for a router that stays the only one.
        ports: What a router binds for clients and workers; None for the ports of the file.
    """

    folder: str
    connect: tuple[str, ...] = ()
    bind: str = EVERY
    name: str | None = None
    device: str = "cpu"
    metrics: tuple[str, int] | None = None
    router_key: str | None = None
    worker_key: str | None = None
    settings: str = ""
    listed: str = ""
    ports: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Description:
    """A cluster to render.

    Attributes:
        name: Of the cluster.
        file: The hosts file.
        hosts: Its content, with every default filled in.
        routers: A group of one process for each router, in the file's order.
        workers: A group for each host with workers, in the file's order.
    """

    name: str
    file: Path
    hosts: Hosts
    routers: tuple[RoleGroup, ...]
    workers: tuple[RoleGroup, ...]
    _lines: Mapping[Where, int] = field(repr=False)

    @property
    def groups(self) -> tuple[RoleGroup, ...]:
        """Every group, the routers' first."""
        return (*self.routers, *self.workers)

    @property
    def is_listed(self) -> bool:
        """Whether the file has a list of routers; then each router is given the list."""
        return self.hosts.routers is not None

    @property
    def has_keys(self) -> bool:
        """Whether connections are encrypted and only listed keys get in."""
        return self.hosts.keys is not None

    @property
    def n_workers(self) -> int:
        """How many worker processes there are."""
        return sum(group.n for group in self.workers)

    def argv(self, group: RoleGroup, place: RolePlace) -> tuple[str, ...]:
        """Return the arguments of Python for a process of a group."""
        more: tuple[str, ...] = ()
        if place.metrics is not None:
            address, port = place.metrics
            more = ("--metrics-port", str(port), "--metrics-address", address)
        if group.is_router:
            return self._router_argv(group, place, more)
        if self.has_keys:
            more = ("--keys", place.worker_key or f"{place.folder}/{KEYS}/worker.key", *more)
        served = _served(self.hosts, self.hosts.host(group.host), place)[0]
        return worker_argv(",".join(place.connect), place.name, served, *more)

    def _router_argv(self, group: RoleGroup, place: RolePlace, more: tuple[str, ...]) -> tuple[str, ...]:
        hosts = self.hosts
        if self.has_keys:
            apart = () if place.router_key is None else ("--router-key", place.router_key)
            more = ("--keys", f"{place.folder}/{KEYS}", *apart, *more)
        elif hosts.security == "none":
            more = ("--security", "none", *more)
        if place.listed:
            more = (*more, "--routers", place.listed)
        ends = [at(place.bind, port) for port in place.ports or dict(group.ports).values()]
        return router_role(ends[0], ends[1], hosts.tuning(place.settings), *more).argv

    def error(self, where: Where, text: str) -> ConfigError:
        """Return the error for a value of the file: `FILE:LINE: path: text`."""
        nearest = where
        while nearest and nearest not in self._lines:
            nearest = nearest[:-1]
        return ConfigError(f"{self.file}:{self._lines.get(nearest, 1)}: {path_text(where)}: {text}")


def describe(path: Path) -> Description:
    """Read a hosts file and return what it describes.

    Args:
        path: The file; its keys, if any, are made already (`cluster.spec.hostkeys.complete`).

    Raises:
        ConfigError: The file has errors, or a key is missing.
    """
    hosts = load_hosts(path)
    _, files = served_profile(hosts)
    own = tuple(RoleFile(name, content, is_secret=False) for name, content in files)
    places = {host.name: i for i, host in enumerate(hosts.hosts)}
    workers = tuple(
        _workers(hosts, host, ("hosts", places[host.name]), own) for host in hosts.hosts if host.n_workers
    )
    routers = tuple(_router(hosts, i, ("hosts", places[place.host])) for i, place in enumerate(hosts.places))
    description = Description(hosts.cluster, path, hosts, routers, workers, read_located(path).lines)
    if hosts.gateway is not None:
        raise description.error(
            ("gateway",),
            "expected none: it is started over ssh only; run `python -m gateway` as a service of its own",
        )
    return description


def _router(hosts: Hosts, i: int, where: Where) -> RoleGroup:
    place, name = hosts.places[i], hosts.router_names[i]
    ports = (("clients", place.client_port), ("workers", place.worker_port))
    process = Process(name, "cpu", hosts.router_metrics(i))
    env = tuple(sorted(hosts.host(place.host).env.items()))
    return RoleGroup(
        name, ROUTER, place.host, (process,), 0, ports, env, f"policy {hosts.policy}",
        _key_files(hosts, place.host, ROUTER), math.ceil(timing().router_stop_s), where,
    )  # fmt: skip


def _workers(hosts: Hosts, host: Host, where: Where, files: tuple[RoleFile, ...]) -> RoleGroup:
    first = hosts.metrics.workers
    processes = tuple(
        Process(name, device, None if first is None else first + i)
        for i, (name, device) in enumerate(zip(host.worker_names, host.devices, strict=True))
    )
    device = "a GPU" if host.device == "cuda" else "a CPU"
    return RoleGroup(
        f"worker-{host.name}", "worker", host.name, processes, int(host.device == "cuda"), (),
        tuple(sorted(host.env.items())), _served(hosts, host, RolePlace("", device=device))[1],
        tuple(sorted((*files, *_key_files(hosts, host.name, "worker")), key=lambda file: file.path)),
        math.ceil(timing().worker_stop_s), where,
    )  # fmt: skip


def _served(hosts: Hosts, host: Host, place: RolePlace) -> Served:
    """Return a worker's arguments for what it serves, and that in words."""
    profile = served_profile(hosts)[0].replace(FOLDER, place.folder)
    if hosts.emulate is not None:
        return emulated(profile, host.gpus_per_worker or 1, load_profile(hosts.emulate).name)
    return resident(hosts.model, profile, place.device, host.threads or 1, hosts.weights)


def _key_files(hosts: Hosts, host: str, kind: str) -> tuple[RoleFile, ...]:
    """Return the key files of a host for one kind of role: under plain names, and none of the other kind's.

    On hosts of their own, paths have a digest, so that other keys make another command line and the role is
    restarted. An engine restarts by `RoleGroup.digest` instead.
    """
    keys = keys_of(hosts, host)
    found = {}
    for name, content in keys.files:
        if kind == ROUTER and keys.ring and name.startswith(f"{keys.ring}/"):
            found[f"{KEYS}/{name.removeprefix(keys.ring + '/')}"] = content
        elif kind != ROUTER and name == keys.worker:
            found[f"{KEYS}/worker.key"] = content
    assert f"{KEYS}/{OPERATOR_KEY}" not in found, "no role needs an operator's secret"
    return tuple(
        RoleFile(name, content, is_secret=name.endswith(".key")) for name, content in sorted(found.items())
    )


def apart(routers: Sequence[RoleGroup]) -> list[tuple[int, int]]:
    """Return ports for each router such that all can be on one machine, where an engine may put them.

    A router has the ports of the file if no earlier one has them, else the next ones that are free.
    """
    found: list[tuple[int, int]] = []
    taken: set[int] = set()
    for group in routers:
        client, worker = dict(group.ports).values()
        while {client, worker} & taken:
            client, worker = client + 2, worker + 2
        taken |= {client, worker}
        found.append((client, worker))
    return found


def _is_listed(path: str) -> bool:
    """Return whether a path is of a list of peers: keys/clients/web.pub."""
    return path.startswith(f"{KEYS}/") and path.count("/") == 2
