"""What one host will run and must have: the types with which a plan drives an engine.

Plain data: every host imports this module, so it needs only the packages that every host has.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import orjson

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

Environment = tuple[tuple[str, str], ...]
"""Names and values of variables."""
Served = tuple[tuple[str, ...], str]
"""A worker's arguments for what it serves, and that in words."""

Model = tuple[str, str]
"""What a real worker serves: `--supernet` and its name, or `--family` and its file."""

OURS_VARIABLE = "SUPERSERVE_HOST_FOLDER"
"""Environment variable of every role: the folder of its cluster on its host."""

KEYS, FILES = FILLED = ("keys", "files")
"""Folders of a cluster on its host that contain exactly what `up` puts there."""

SETTINGS = f"{FILES}/router.json"
"""The router's settings: what `cluster apply` replaces while it runs."""
ROUTERS_FILE = f"{FILES}/routers.json"
"""The list of a cluster's routers, which each of them reads again when it changes."""
GATEWAY = "gateway"
"""The gateway's name, and its kind."""

_ROUTER = re.compile(r"router(-.+)?")

OPERATOR_KEY = "operator.key"
"""In KEYS of the router's host: the key to ask for its STATUS with."""


@dataclass(frozen=True, slots=True)
class HostRole:
    """One process to run on a host.

    Attributes:
        name: Unique in the cluster.
        kind: "router", "worker" or "gateway".
        argv: The arguments of the host's Python.
        env: Environment variables, in addition to the host's own.
        serves: What it serves, in words.
        gpus: GPUs that an engine must give it; 0 where `argv` names the device, or it needs none.
    """

    name: str
    kind: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    serves: str
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a router decides and what it holds; None is its own default.

    Attributes:
        policy: Its policy.
        margin_ms: Slack that it holds back.
        max_queries: Most queries held.
        max_bytes: Most payload bytes held.
        file: The path of a file with all this, which it reads again; "" gives it as options.
    """

    policy: str
    margin_ms: float | None = None
    max_queries: int | None = None
    max_bytes: int | None = None
    file: str = ""

    def words(self) -> tuple[str, ...]:
        """Return the options of a router."""
        if self.file:
            return ("--settings", self.file)
        given = {name: value for name, value in self._fields().items() if value is not None}
        return tuple(
            word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", _plain(value))
        )

    def content(self) -> bytes:
        """Return the content of the file."""
        return json.dumps({k: v for k, v in self._fields().items() if v is not None}).encode() + b"\n"

    def _fields(self) -> dict[str, str | float | None]:
        return {name: value for name, value in asdict(self).items() if name != "file"}


def _plain(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def router_role(client: str, worker: str, tuning: Tuning, *more: str, env: Environment = ()) -> HostRole:
    """Return a router that binds these endpoints."""
    argv = (
        "-m", "router", "--client-endpoint", client, "--worker-endpoint", worker, *tuning.words(), *more,
    )  # fmt: skip
    return HostRole("router", "router", argv, env, f"policy {tuning.policy}")


def at(address: str, port: int) -> str:
    """Return the endpoint of a port at a name or an address; IPv6 addresses get brackets."""
    bare = address.strip("[]")
    return f"tcp://[{bare}]:{port}" if ":" in bare else f"tcp://{address}:{port}"


def routers_file(clients: Sequence[str], workers: Sequence[str]) -> bytes:
    """Return the content of the file that lists a cluster's routers: `router.serve.listed` reads it."""
    pairs = zip(clients, workers, strict=True)
    return orjson.dumps({"routers": [{"client": client, "worker": worker} for client, worker in pairs]})


def is_router(name: str) -> bool:
    """Return whether a role of that name is a router: `router`, or `router-HOST-I` of several."""
    return _ROUTER.fullmatch(name) is not None


def is_worker(name: str) -> bool:
    """Return whether a role of that name takes batches."""
    return name != GATEWAY and not is_router(name)


def gateway_role(
    connect: str, http_port: int, grpc_port: int | None, default_slo_ms: float | None
) -> HostRole:
    """Return a gateway in front of the router at `connect`."""
    argv = (
        "-m", "gateway", "--connect", connect, "--http-port", str(http_port),
        *(() if grpc_port is None else ("--grpc-port", str(grpc_port))),
        *(() if default_slo_ms is None else ("--default-slo-ms", f"{default_slo_ms:g}")),
    )  # fmt: skip
    words = f"http://127.0.0.1:{http_port}/v2" + (
        "" if grpc_port is None else f", gRPC at 127.0.0.1:{grpc_port}"
    )
    return HostRole(GATEWAY, GATEWAY, argv, (), words)


def worker_role(name: str, connect: str, served: Served, *more: str, env: Environment = ()) -> HostRole:
    """Return a worker that connects to a router and serves what `emulated` or `resident` gives."""
    argv, words = served
    return HostRole(name, "worker", worker_argv(connect, name, argv, *more), env, words)


def worker_argv(connect: str, name: str | None, served: Sequence[str], *more: str) -> tuple[str, ...]:
    """Return the arguments of Python for a worker; without a name it makes one up."""
    named = () if name is None else ("--name", name)
    return ("-m", "gpu_worker", "--connect", connect, *named, *served, *more)


def emulated(profile: str, n: int, name: str) -> Served:
    """Return a worker's arguments for `n` emulated GPUs, and that in words, with the profile's name."""
    words = f"{n} emulated GPU{'s' if n > 1 else ''} of {name}"
    return ("--emulate", profile, "--gpus", str(n)), words


def resident(model: Model, profile: str, device: str, threads: int, weights: str | None) -> Served:
    """Return a worker's arguments for a real model, and that in words."""
    option, name = model
    argv = (
        option, name, "--profile", profile, "--device", device, "--threads", str(threads),
        *(() if weights is None else ("--weights", weights)),
    )  # fmt: skip
    return argv, f"{name} on {device}"


@dataclass(frozen=True, slots=True)
class Timing:
    """How long roles may take, and how often they are restarted.

    Attributes:
        first_backoff_s: Wait before a crashed role's first restart; it doubles with each further one.
        most_restarts: Most restarts in a row: after that, another one would not help.
        good_service_s: After being ready for this long, a role that crashes counts its restarts from 0.
        ready_timeout_s: How long a restarted role may take to be ready.
        gateway_stop_s: How long a gateway has after SIGTERM; it drains for up to 10.5 s.
        router_stop_s: How long a router has after SIGTERM; it drains for up to 5 s.
        worker_stop_s: How long a worker has after SIGTERM; it drains for up to 4 s.
    """

    first_backoff_s: float = 0.5
    most_restarts: int = 5
    good_service_s: float = 60.0
    ready_timeout_s: float = 60.0
    gateway_stop_s: float = 14.0
    router_stop_s: float = 8.0
    worker_stop_s: float = 5.0


TIMING_VARIABLE = "SUPERSERVE_TIMING"
"""Environment variable of `cluster up`: fields of `Timing` to change, as `name=number,...`."""


def timing(**given: float) -> Timing:
    """Return the timing of a cluster: the default, changed by TIMING_VARIABLE and `given`.

    Raises:
        ConfigError: The variable is malformed.
    """
    text = os.environ.get(TIMING_VARIABLE, "")
    found: dict[str, Any] = dict(given)
    kinds = {name: type(value) for name, value in asdict(Timing()).items()}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            found[name.strip()] = kinds[name.strip()](value)
        except (KeyError, ValueError):
            known = ", ".join(kinds)
            raise ConfigError(f"{TIMING_VARIABLE}: expected {known}, each =number, got {pair!r}") from None
    return Timing(**found)


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What one host will run.

    Attributes:
        folder: Of the cluster on that host.
        interpreter: The Python that runs the roles.
        code: The PYTHONPATH with which the package is found; "" if none is needed.
        roles: The router first, if it is on this host.
        log_bytes: Size at which a log is rotated.
        log_files: How many rotated logs are kept.
        cwd: Where the roles run.
        timing: Restarts and grace periods.
        local: For a cluster of this machine the contents of its state file: its name, options,
            client_endpoint and worker_endpoint; None on other hosts, where clients do not look for one.
    """

    folder: str
    interpreter: str
    code: str
    roles: tuple[HostRole, ...]
    log_bytes: int = 10 << 20
    log_files: int = 3
    cwd: str = "/"
    timing: Timing = Timing()
    local: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where ssh connects, each field as in ssh's options; None leaves it to the configuration.

    Attributes:
        address: A name or address, or an alias of the configuration.
        user: The user to log in as.
        port: Where the ssh server listens.
    """

    address: str
    user: str | None = None
    port: int | None = None


HERE = Target("")
"""This machine, which is reached without ssh."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a host must have.

    Attributes:
        name: Of the host.
        target: Where ssh connects.
        python: The command for its Python.
        ports: Where roles will listen.
        gpus: CUDA devices to use.
        serves_supernet: Whether its workers need torch.
        roles: The names of the roles that it will run.
        router: The router's name, which its workers look up; "" if they do not.
        serves_family: Whether they read a family file.
        serves_gateway: Whether a gateway runs there.
        serves_texts: Whether that takes texts.
    """

    name: str
    target: Target
    python: str
    ports: tuple[int, ...]
    gpus: tuple[int, ...]
    serves_supernet: bool
    roles: tuple[str, ...]
    router: str = ""
    serves_family: bool = False
    serves_gateway: bool = False
    serves_texts: bool = False
