"""hosts.yaml as frozen dataclasses: the hosts of a cluster, what runs on each, and for whom.

    cluster: prod                  # its name, for --name; "default" if not given
    router: {host: a, client_port: 5555, worker_port: 5556}
    hosts:
      - {name: a, address: 10.0.0.1, user: serve, gpus: [0, 1]}
      - {name: b, address: 10.0.0.2, user: serve, workers: 4, device: cpu}
    supernet: digits
    policy: planfit
    security: none

`load_hosts` reads a file and fills in every default, so that no other code has to know them;
`cluster/spec/hosts_file.py` finds the errors. It needs pydantic, whose import takes 0.2 s; only commands
that read a hosts file pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cluster.spec.engines import (  # pydantic looks at them when it reads a file
    EngineName,  # noqa: TC001
    KubernetesSettings,  # noqa: TC001
    RaySettings,  # noqa: TC001
    SlurmSettings,  # noqa: TC001
)
from cluster.spec.gateway import HTTP_PORT
from cluster.spec.plan import MAX_ROUTERS, MAX_WORKERS
from cluster.spec.roles import Tuning
from superserve.roles.local import DEFAULT_NAME

if TYPE_CHECKING:
    from cluster.spec.roles import Model

CLIENT_PORT, WORKER_PORT = 5555, 5556
"""Where a router listens unless the file says otherwise: fixed, so that a restarted one is found again."""

MAX_HOSTS = 1_024
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_WORD = r"^[^\s\x00-\x1f-][^\s\x00-\x1f]*$"  # an address must not be an option of ssh, nor end a line
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"

Name = Annotated[str, Field(pattern=_NAME)]
Word = Annotated[str, Field(pattern=_WORD, max_length=255)]
Port = Annotated[int, Field(ge=1, le=65_535)]
Count = Annotated[int, Field(ge=1, le=MAX_WORKERS)]


def _as_text(value: object) -> object:
    """Read numbers as text: `OMP_NUM_THREADS: 1` means the text "1"."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


EnvName = Annotated[str, Field(pattern=_VARIABLE)]
EnvValue = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^[^\x00\n\r]*$", max_length=4_096)]

# Options for pydantic: no unknown keys, and no "5555" for 5555.
_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True)
class RouterPlace:
    """Where the router runs and is reached.

    Attributes:
        host: A host's name.
        address: Where clients and workers reach it; the host's own if not given. It differs
            if ssh uses an alias, or another network.
        client_port: Where clients connect.
        worker_port: Where workers connect.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    host: Name
    address: Word | None = None
    client_port: Port = CLIENT_PORT
    worker_port: Port = WORKER_PORT


@dataclass(frozen=True, slots=True)
class Host:
    """A host and its workers.

    Attributes:
        name: Unique in the file; in its workers' names.
        address: What ssh connects to, which may be an alias of the ssh configuration; the name if not given.
        user: The user to log in as; None leaves it to the ssh configuration.
        port: Of the ssh server; None leaves it to the ssh configuration.
        gpus: CUDA devices to use, one worker process each.
        workers: Worker processes, if `gpus` is not given.
        device: "cuda" or "cpu"; "cuda" with `workers: N` means devices 0 to N - 1.
        gpus_per_worker: Emulated GPUs of each worker process, with `emulate`.
        threads: CPU threads of each worker's torch.
        env: Environment variables of its roles.
        python: The command for Python there, 3.11 or later.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: Name
    address: Word | None = None
    user: Word | None = None
    port: Port | None = None
    gpus: Annotated[tuple[Annotated[int, Field(ge=0, le=1_023)], ...], Field(min_length=1)] | None = None
    workers: Annotated[int, Field(ge=0, le=MAX_WORKERS)] | None = None
    device: Literal["cpu", "cuda"] | None = None
    gpus_per_worker: Count | None = None
    threads: Count | None = None
    env: dict[EnvName, EnvValue] = field(default_factory=dict)
    python: Word = "python3"

    @property
    def n_workers(self) -> int:
        """How many worker processes it runs."""
        return len(self.gpus) if self.gpus is not None else self.workers or 0

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each worker process: "cuda:1", "cpu"; those of emulated GPUs are "cpu" too."""
        if self.device == "cuda":
            return tuple(f"cuda:{gpu}" for gpu in self.gpus or range(self.n_workers))
        return ("cpu",) * self.n_workers

    @property
    def worker_names(self) -> tuple[str, ...]:
        """The role's name of each worker process, unique in the cluster."""
        return tuple(f"worker-{self.name}-{i}" for i in range(self.n_workers))


@dataclass(frozen=True, slots=True)
class MetricsPorts:
    """Where Prometheus finds metrics; None for nowhere.

    Attributes:
        router: The router's port; others on its host follow it.
        workers: The port of each host's first worker process; the others follow it.
        address: The address that they are bound to; loopback if not given.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    router: Port | None = None
    workers: Port | None = None
    address: Word = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class GatewayPlace:
    """A gateway beside the router.

    Attributes:
        http_port: Where it serves HTTP.
        grpc_port: Where it serves gRPC; None for nowhere.
        address: Where it listens; loopback if not given. Any other needs `callers`, or `security: none`.
        default_slo_ms: For requests without a deadline; None refuses them.
        processes: Processes for each of the two.
        model: The model's name in requests; None for the supernet's.
        tokenizer: The model's tokenizer.json, on the router's host; None serves no requests with texts.
        callers: The file of callers, on the router's host.
        tls_cert: The server's certificate chain there; None serves without TLS.
        tls_key: Its key there.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    http_port: Port = HTTP_PORT
    grpc_port: Port | None = None
    address: Word = "127.0.0.1"
    default_slo_ms: Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)] | None = None
    processes: Count = 1
    model: Word | None = None
    tokenizer: Word | None = None
    callers: Word | None = None
    tls_cert: Word | None = None
    tls_key: Word | None = None

    @property
    def ports(self) -> tuple[int, ...]:
        """Where it listens."""
        return (self.http_port,) if self.grpc_port is None else (self.http_port, self.grpc_port)


@dataclass(frozen=True, slots=True)
class LogBounds:
    """How much of each role's output is kept: `files` full ones of `megabytes` each, and the current one."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    megabytes: Annotated[int, Field(ge=1, le=10_000)] = 10
    files: Annotated[int, Field(ge=0, le=100)] = 3


@dataclass(frozen=True, slots=True)
class Hosts:
    """A hosts file.

    Attributes:
        router: Where the router is; of several, the first.
        hosts: Every host, at least one.
        cluster: The cluster's name.
        engine: What starts and keeps the roles. Other engines than ssh choose the machines themselves: to
            them a host is a group of workers, and its address, user, port and the numbers of its GPUs mean
            nothing.
        slurm: Settings of `engine: slurm`.
        ray: Settings of `engine: ray`.
        kubernetes: Settings of `engine: kubernetes`.
        emulate: A profile whose GPUs are emulated, instead of `supernet`, `family`, `weights` and `profile`.
        supernet: What real workers serve; None with `emulate` and with `family`.
        family: The path of a family file on each host, served instead of a supernet.
        weights: Its checkpoint's path on each host, or "random"; None for the shipped one.
        profile: A shipped profile's name, or a file's absolute path on this machine.
        policy: The router's policy.
        margin_ms: Slack that the router holds back; None for what it measures.
        max_queries: Most queries that the router holds; None for its own bound.
        max_bytes: Most payload bytes that it holds; None for its own bound.
        security: "keys", or "none" for a trusted network.
        keys: The folder of `cluster keys`, as an absolute path on this machine; None for no keys, and then
            nothing listens beyond loopback unless `security` is "none".
        metrics: Where Prometheus finds figures.
        gateway: A gateway beside the router; None for none.
        ssh_config: A file for `ssh -F`, as an absolute path; None for the user's own.
        log: How much output is kept.
        routers: Equal routers, instead of `router`; None for one that stays the only one.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    hosts: Annotated[tuple[Host, ...], Field(min_length=1, max_length=MAX_HOSTS)]
    router: RouterPlace = None  # type: ignore[assignment]  # `load_hosts` fills it in, if there are several
    cluster: Name = DEFAULT_NAME
    engine: EngineName = "ssh"
    slurm: SlurmSettings | None = None
    ray: RaySettings | None = None
    kubernetes: KubernetesSettings | None = None
    emulate: Word | None = None
    supernet: Word | None = None
    family: Word | None = None
    weights: Word | None = None
    profile: Word | None = None
    policy: Word = "planfit"
    margin_ms: Annotated[float, Field(ge=0, le=60_000, allow_inf_nan=False)] | None = None
    max_queries: Annotated[int, Field(ge=1)] | None = None
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    security: Literal["keys", "none"] = "keys"
    keys: Word | None = None
    metrics: MetricsPorts = field(default_factory=MetricsPorts)
    gateway: GatewayPlace | None = None
    ssh_config: Word | None = None
    log: LogBounds = field(default_factory=LogBounds)
    routers: Annotated[tuple[RouterPlace, ...], Field(min_length=1, max_length=MAX_ROUTERS)] | None = None

    def host(self, name: str) -> Host:
        """Return the host of that name, which must be there."""
        return next(host for host in self.hosts if host.name == name)

    def tuning(self, file: str = "") -> Tuning:
        """Return how the router decides: as options, or from a file."""
        return Tuning(self.policy, self.margin_ms, self.max_queries, self.max_bytes, file)

    @property
    def places(self) -> tuple[RouterPlace, ...]:
        """Where each router is."""
        return (self.router,) if self.routers is None else self.routers

    @property
    def router_names(self) -> tuple[str, ...]:
        """The role's name of each router: `router`, or of a list `router-HOST-I`.

        A router keeps its name while others of the list come and go on other hosts, and so runs on.
        """
        if self.routers is None:
            return ("router",)
        hosts = [place.host for place in self.routers]
        return tuple(f"router-{host}-{hosts[:i].count(host)}" for i, host in enumerate(hosts))

    def router_metrics(self, i: int) -> int | None:
        """Return the port of a router's metrics: of several on one host, each has the next one."""
        if self.metrics.router is None:
            return None
        return self.metrics.router + [place.host for place in self.places[:i]].count(self.places[i].host)

    @property
    def router_address(self) -> str:
        """Where clients and workers reach the router's host; of several, the first one's."""
        assert self.router.address is not None, "load_hosts fills it in"
        return self.router.address

    @property
    def model(self) -> Model:
        """What real workers serve, as the worker's option and its value."""
        if self.family is not None:
            return "--family", self.family
        assert self.supernet is not None, "load_hosts fills it in"
        return "--supernet", self.supernet

    @property
    def serves(self) -> str:
        """The profile that workers use, emulated or not."""
        assert self.profile is not None, "load_hosts fills it in"
        return self.emulate or self.profile


def load_hosts(path: Path) -> Hosts:
    """Read a hosts file, check it, and fill in every default.

    Raises:
        ConfigError: It has errors; the message has a line for each, with file, line and path.
    """
    from cluster.spec.hosts_file import read  # noqa: PLC0415  it needs the classes above

    return read(Path(path))
