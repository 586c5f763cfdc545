"""What a cluster consists of: the roles, the command line of each, and the options behind them.

A plan is made where you type the command, with every option checked. Ports that are not given are chosen
when it is carried out (`Plan.placed`), and stay the same from then on.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.spec.roles import (
    ROUTERS_FILE,
    HostRole,
    Tuning,
    emulated,
    gateway_role,
    resident,
    router_role,
    worker_role,
)
from gpu_worker.cli import MAX_GPUS
from gpu_worker.family.file import NEEDS_PROFILE, check_profile, load_family
from gpu_worker.models.names import DIGITS, SHIPPED_SUPERNETS, is_known
from profiles.table import load_profile, shipped_profiles
from router.policies.registry import make_policy
from superserve.errors import ConfigError
from superserve.roles.local import DEFAULT_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cluster.spec.roles import Model

ANY_PORT = 0
"""The system picks a free one."""

DEFAULT_PROFILE = "digits-cpu"
"""What workers serve by default: the profile of the digits supernet on a CPU."""
MAX_WORKERS = 1_024
"""Most worker processes of one cluster on one machine."""

CLIENT, WORKER = "{client}", "{worker}"
"""In a role's arguments: the router's endpoints, the same for as long as the cluster runs."""

ROUTERS = "{routers}"
"""In a router's arguments: the file that lists all routers, in the cluster's folder."""
MAX_ROUTERS = 16
"""Most routers of a cluster on one machine."""

METRICS_PORT = "{metrics}"
"""In a role's arguments: where it serves /metrics, the same port for as long as the cluster runs."""

_MAX_MARGIN_MS = 60_000.0  # a larger one is a mistaken unit
# One of these exists if an NVIDIA driver is loaded; without a driver torch need not be imported to
# find out, which takes seconds.
_DRIVER_PATHS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


@dataclass(frozen=True, slots=True)
class Options:
    """The requested options; None means whatever suits this machine.

    Attributes:
        policy: The router's policy.
        margin_ms: Slack that the router holds back; None for what it measures.
        client_port: Where clients connect, on loopback.
        worker_port: Where workers connect, on loopback.
        emulate: A profile; its GPUs are emulated.
        n_gpus: How many of them.
        gpus: CUDA devices to use, one worker process each.
        workers: Worker processes.
        device: "cpu" or "cuda".
        supernet: What real workers serve.
        family: A family file that they serve instead.
        weights: Its checkpoint, or "random".
        profile: Their profile.
        threads: CPU threads of each.
        metrics: Whether every process serves /metrics, on a free port of loopback.
        routers: How many routers.
        gateway: Whether a gateway runs in front of the router.
        http_port: Where it serves HTTP, on loopback.
        grpc_port: Where it serves gRPC; None for nowhere.
        default_slo_ms: Its SLO for requests without a time.
    """

    policy: str = "planfit"
    margin_ms: float | None = None
    client_port: int = ANY_PORT
    worker_port: int = ANY_PORT
    emulate: str | None = None
    n_gpus: int | None = None
    gpus: tuple[int, ...] | None = None
    workers: int | None = None
    device: str | None = None
    supernet: str | None = None
    family: Path | None = None
    weights: str | None = None
    profile: str | None = None
    threads: int | None = None
    metrics: bool = False
    routers: int = 1
    gateway: bool = False
    http_port: int | None = None
    grpc_port: int | None = None
    default_slo_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster to run.

    Attributes:
        name: Of the cluster.
        roles: The routers first.
        options: What differs between clusters, to compare and to show.
        ready_timeout_s: How long the roles may take to be ready, together.
        profile: The profile that the workers use.
    """

    name: str
    roles: tuple[HostRole, ...]
    options: dict[str, Any] = field(default_factory=dict)
    ready_timeout_s: float = 60.0
    profile: str = DEFAULT_PROFILE

    @property
    def n_routers(self) -> int:
        """How many of the roles are routers."""
        return sum(role.kind == "router" for role in self.roles)

    def placed(
        self, port: Callable[[], int], folder: str
    ) -> tuple[tuple[HostRole, ...], list[str], list[str]]:
        """Return what this machine will run, and where clients and workers connect, by router.

        Args:
            port: Returns a free port of loopback, another one each time.
            folder: Of the cluster.
        """
        n = self.n_routers
        clients, workers = (
            [endpoint(self.options[f"{whose}_port"] or port()) for _ in range(n)]
            for whose in ("client", "worker")
        )
        roles = []
        n_placed = dict.fromkeys([role.kind for role in self.roles], 0)
        for role in self.roles:
            i = n_placed[role.kind]
            n_placed[role.kind] += 1
            words = {ROUTERS: f"{folder}/{ROUTERS_FILE}", CLIENT: clients[i % n], WORKER: workers[i % n]}
            if role.kind == "worker":
                # Each begins its list with another router: of routers that are alike it joins the first.
                words[WORKER] = ",".join(workers[i % n :] + workers[: i % n])
            if METRICS_PORT in role.argv:
                words[METRICS_PORT] = str(port())
            roles.append(replace(role, argv=tuple(words.get(word, word) for word in role.argv)))
        return tuple(roles), clients, workers


def make_plan(name: str, options: Options, ready_timeout_s: float) -> Plan:
    """Check the options and return the roles for them.

    Raises:
        ConfigError: An option is invalid, or this machine lacks what it names.
    """
    margin_ms = options.margin_ms
    if margin_ms is not None and not 0 <= margin_ms <= _MAX_MARGIN_MS:  # a FloatRange lets NaN pass
        raise ConfigError(f"--margin-ms: expected 0 to {_MAX_MARGIN_MS:g} ms, got {margin_ms}")
    if options.client_port == options.worker_port != ANY_PORT:
        raise ConfigError(
            f"--client-port and --worker-port: expected two ports, got {options.client_port} twice"
        )
    if not 0 < ready_timeout_s <= 86_400:
        raise ConfigError(
            f"--ready-timeout-s: expected seconds above 0 and up to a day, got {ready_timeout_s}"
        )
    workers, profile, asked = _emulated(options) if options.emulate is not None else _real(options)
    make_policy(options.policy, load_profile(profile))
    router = {name: getattr(options, name) for name in ("policy", "margin_ms", "client_port", "worker_port")}
    if options.routers > 1:
        if options.client_port or options.worker_port:
            raise ConfigError("--client-port and --worker-port: of one router; expected without --routers")
        router["routers"] = options.routers
    roles = [*_routers(options, margin_ms), *workers, *_gateway(options, asked)]
    if options.metrics:
        roles = [replace(role, argv=(*role.argv, "--metrics-port", METRICS_PORT)) for role in roles]
        asked["metrics"] = "on"
    return Plan(name, tuple(roles), router | asked, ready_timeout_s, profile)


def _gateway(options: Options, asked: dict[str, Any]) -> list[HostRole]:
    """Return the gateway, if there is to be one, and enter it in the request's words."""
    http_port = 8000 if options.http_port is None else options.http_port
    given = {name: getattr(options, name) for name in ("http_port", "grpc_port", "default_slo_ms")}
    if not options.gateway:
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: expected with --gateway only")
        return []
    missing = [name for name in ("grpc", "httptools") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--gateway: {', '.join(missing)}: not installed; try: pip install 'superserve[gateway]'"
        )
    if not http_port or options.grpc_port == 0 or http_port == options.grpc_port:
        raise ConfigError("--http-port and --grpc-port: expected two ports above 0, which callers know")
    slo_ms = options.default_slo_ms
    if slo_ms is not None and not 0 < slo_ms <= 86_400_000:
        raise ConfigError(f"--default-slo-ms: expected milliseconds above 0 and up to a day, got {slo_ms}")
    role = gateway_role(CLIENT, http_port, options.grpc_port, slo_ms)
    asked["gateway"] = role.serves + ("" if slo_ms is None else f", {slo_ms:g} ms by default")
    return [role]


def differences(running: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return the differences between a running and the requested cluster; without a port, any matches."""
    lines = []
    for key in sorted(running.keys() | asked.keys()):
        old, new = running.get(key, "none"), asked.get(key, "none")
        if old != new and not (key.endswith("_port") and new == ANY_PORT):
            lines.append(f"{key}: it runs with {old}, asked for {new}")
    return lines


def endpoint(port: int) -> str:
    """Return the endpoint that a router on this machine binds."""
    return f"tcp://127.0.0.1:{port}"


def python_path() -> str:
    """Return the PYTHONPATH with which a Python finds the package that runs here, even with -P."""
    own = os.environ.get("PYTHONPATH", "")
    root = Path(__file__).parents[2]
    if root.name in ("site-packages", "dist-packages"):  # found without it, and its order must not change
        return own
    return os.pathsep.join(dict.fromkeys([str(root), *filter(None, own.split(os.pathsep))]))


def name_option(name: str) -> str:
    """Return the option that names a cluster: nothing for the default one."""
    return "" if name == DEFAULT_NAME else f" --name {name}"


def _routers(options: Options, margin_ms: float | None) -> list[HostRole]:
    """Return the roles of the routers; several know the file that lists them."""
    n, role = options.routers, router_role(CLIENT, WORKER, Tuning(options.policy, margin_ms))
    if n == 1:
        return [role]
    return [replace(role, name=f"router-{i}", argv=(*role.argv, "--routers", ROUTERS)) for i in range(n)]


# --- workers ----------------------------------------------------------------------------------


def _emulated(options: Options) -> tuple[list[HostRole], str, dict[str, Any]]:
    """Return worker processes that share the emulated GPUs, their profile, and the request in words."""
    assert options.emulate is not None, "the caller checked it"
    for option in ("gpus", "device", "supernet", "family", "weights", "profile", "threads"):
        if getattr(options, option) is not None:
            raise ConfigError(f"--{option} and --emulate: expected one of them, got both")
    n_gpus = options.n_gpus or 1
    least = -(-n_gpus // MAX_GPUS)
    n_processes = options.workers or least
    if not least <= n_processes <= n_gpus:
        raise ConfigError(
            f"--workers: expected {least} to {n_gpus} processes for {n_gpus} emulated GPUs, got {n_processes}"
        )
    profile = _profile(options.emulate)
    shares = [n_gpus // n_processes + (i < n_gpus % n_processes) for i in range(n_processes)]
    name = load_profile(profile).name
    roles = [worker_role(f"worker-{i}", WORKER, emulated(profile, n, name)) for i, n in enumerate(shares)]
    words = f"{n_gpus} emulated GPU{'s' if n_gpus > 1 else ''} of {profile} in {n_processes}"
    asked = {"workers": f"{words} process{'es' if n_processes > 1 else ''}", "profile": profile}
    return roles, profile, asked


def _real(options: Options) -> tuple[list[HostRole], str, dict[str, Any]]:
    """Return a worker process for each device, their profile, and the request in words."""
    model = _model(options)
    _check_installed()
    profile = _profile(options.profile or DEFAULT_PROFILE)
    if options.family is not None:
        check_profile(load_family(options.family), load_profile(profile))
    weights = None if options.weights is None else _weights(options.weights)
    threads = options.threads or 1
    devices = _devices(options)
    served = [resident(model, profile, device, threads, weights) for device in devices]
    roles = [worker_role(f"worker-{i}", WORKER, one) for i, one in enumerate(served)]
    asked = {"workers": f"{model[1]} on {', '.join(devices)}", "profile": profile, "threads": threads}
    return roles, profile, asked if weights is None else {**asked, "weights": weights}


def _model(options: Options) -> Model:
    """Return what workers serve: a family's absolute path, since a role may run in another folder."""
    if options.family is not None:
        for option in ("supernet", "weights"):
            if getattr(options, option) is not None:
                raise ConfigError(f"--{option} and --family: expected one of them, got both")
        if options.profile is None:
            raise ConfigError(f"--profile: {NEEDS_PROFILE}")
        return "--family", str(options.family.absolute())
    supernet = options.supernet or DIGITS
    if not is_known(supernet):
        raise ConfigError(
            f"--supernet: expected one of {', '.join(SHIPPED_SUPERNETS)}, or package.module:attribute, "
            f"got {supernet!r}"
        )
    if supernet != DIGITS and options.profile is None:
        raise ConfigError(f"--profile: {supernet} comes without one: expected one, from `profiles search`")
    return "--supernet", supernet


def _profile(name: str) -> str:
    """Return a shipped profile's name, or a file's absolute path: a role may run in another folder."""
    load_profile(name)
    return name if name in shipped_profiles() else str(Path(name).absolute())


def _weights(text: str) -> str:
    """Return "random", or the absolute path of a checkpoint or a model's folder: a role may run elsewhere."""
    if text == "random":
        return text
    if not Path(text).exists():
        raise ConfigError(f"--weights: expected a checkpoint's file, a folder or 'random', got {text!r}")
    return str(Path(text).absolute())


def _check_installed() -> None:
    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: not installed; try: pip install 'superserve[worker]', "
            f"or emulate GPUs: --emulate cnn-8gpu-modelled:8"
        )


def _devices(options: Options) -> tuple[str, ...]:
    """Return the device of each worker process: the GPUs if there are any, otherwise one on the CPU."""
    if options.gpus is not None and (options.workers is not None or options.device == "cpu"):
        raise ConfigError("--gpus: one worker on each of them; expected without --workers and --device cpu")
    if options.device == "cpu":
        return ("cpu",) * (options.workers or 1)
    n_here = n_cuda_devices()
    if options.gpus is None and options.device is None and not n_here:
        return ("cpu",) * (options.workers or 1)
    wanted = options.gpus or tuple(range(options.workers or max(1, n_here)))
    if lacking := [gpu for gpu in wanted if gpu >= n_here]:
        raise ConfigError(
            f"GPU {', '.join(map(str, lacking))}: expected CUDA devices that torch sees, "
            f"and it sees {n_here}; try --device cpu"
        )
    return tuple(f"cuda:{gpu}" for gpu in wanted)


def n_cuda_devices() -> int:
    """Return how many CUDA devices torch sees here."""
    if not any(path.exists() for path in _DRIVER_PATHS):
        return 0
    import torch  # noqa: PLC0415  it takes seconds

    return int(torch.cuda.device_count())
