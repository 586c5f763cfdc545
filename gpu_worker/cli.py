"""The worker's command: one process, one GPU or many emulated ones, one router at a time."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import random
import secrets
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import psutil  # type: ignore[import-untyped]  # it ships no types

from gpu_worker.core.choice import RouterChoice
from gpu_worker.core.link import Gauges
from gpu_worker.core.played import SPEEDS, Pace
from gpu_worker.family.file import NEEDS_PROFILE, check_profile, load_family
from gpu_worker.models.names import SHIPPED_SUPERNETS, with_example
from gpu_worker.serve.emulated import OUTPUT, emulated_gpus
from gpu_worker.serve.eventlog import EventLogHeader, EventLogWriter
from gpu_worker.serve.metrics import WorkerMetrics, pages
from gpu_worker.serve.routers import WorkerRouters
from gpu_worker.serve.server import Waker, WorkerServer
from profiles.table import Profile, load_profile, statistics_path
from superserve.clock import MonotonicClock
from superserve.errors import ConfigError
from superserve.hello import WorkerHello
from superserve.net.context import new_context
from superserve.net.endpoints import endpoints_of, resolved
from superserve.net.handshake import Handshake
from superserve.net.keys import peer_keys
from superserve.roles.command import plain_errors
from superserve.roles.pages import LOOPBACK, serve_pages
from superserve.roles.processes import announce_ready, die_with_parent
from superserve.roles.version import version
from superserve.shared.offers import is_allowed
from superserve.subnet import Subnet
from superserve.wire import OURS, Control, Directive, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import zmq

    from gpu_worker.core.queue import Gpus
    from gpu_worker.engines.torch_executor import PaddedExecutor
    from superserve.net.keys import PeerKeys
    from superserve.subnet import TensorSpec

SWITCH_S = 0.0005
"""How long a thread of a worker with a real device may compute before another gets the interpreter: with
Python's default of 5 ms a finished batch would wait for the thread that serves the sockets."""

UNPROVEN_VARIABLE = "SUPERSERVE_UNPROVEN"
"""The environment variable that, at 1, stands for --unproven: for workers that `cluster up` starts."""

_OF_FAMILIES = ("--profile", "--device", "--threads", "--cores", "--unproven")
"""Options that go with --family too."""

MAX_GPUS = 1_024
"""Most emulated GPUs in one process; one loop serves them all."""


class WorkerDevice(NamedTuple):
    """What a worker process serves, and how it describes it."""

    gpus: Gpus[Directive]
    profile: Profile
    fingerprint: str
    input_spec: TensorSpec | None
    output_spec: TensorSpec
    gauges: Callable[[], Gauges]


@click.command()
@click.option(
    "--connect", "endpoints", required=True, multiple=True, metavar="tcp://HOST:PORT",
    help="The router; several, with commas or the option again: it belongs to one and knows the others.",
)  # fmt: skip
@click.option(
    "--name", help="The worker's name in the cluster.  [default: host, process number and a random end]"
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="The worker's key file, for a router with keys; or a folder with worker.key.",
)
@click.option("--no-shared-memory", is_flag=True, help="Take large payloads only in messages.")
@click.option("--emulate", metavar="PROFILE", help="Emulate GPUs: a shipped profile's name, or a file.")
@click.option("--gpus", type=click.IntRange(1, MAX_GPUS), help="Emulated GPUs in this process.  [default: 1]")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65_535),
    help="Serve /metrics to Prometheus here; 0 is any free port.  [default: off]",
)  # fmt: skip
@click.option("--metrics-address", default=LOOPBACK, show_default=True, help="Where /metrics listens.")
@click.option(
    "--speed", type=click.FloatRange(*SPEEDS),
    help="Speed as a multiple of the profile's; 0.67 is 1.5 x slower.  [default: 1]",
)  # fmt: skip
@click.option(
    "--drift", type=click.FloatRange(-1, 1),
    help="Share of that speed added each minute; negative throttles.  [default: 0]",
)  # fmt: skip
@click.option(
    "--event-log", type=click.Path(dir_okay=False, path_type=Path), help="Log what they ran and when."
)
@click.option(
    "--supernet",
    metavar="NAME",
    help=f"Serve a supernet: {', '.join(SHIPPED_SUPERNETS)}, or module:attribute.",
)
@click.option(
    "--family",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Serve the ordinary models of this file: see docs/families.md.",
)
@click.option(
    "--example-input", metavar="SHAPE:DTYPE",
    help="One query of a module:function that returns a supernet: 3x224x224:float32, or a .npy file.",
)  # fmt: skip
@click.option(
    "--weights",
    metavar="FILE",
    help='A checkpoint, a folder, or "random".  [default: those that come with it]',
)
@click.option(
    "--statistics",
    type=click.Path(dir_okay=False, path_type=Path),
    help="SubnetNorm's, for the profile's subnets.  [default: those beside the profile, if any]",
)
@click.option("--profile", help="The model's profile on this device.  [default: the shipped one]")
@click.option("--device", help="cpu, cuda or cuda:<n>.  [default: cpu]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of torch.  [default: one a core, or 1]")
@click.option("--cores", metavar="LIST", help="Pin the process to these cores, such as 0,2 or 0-3.")
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    help="Precision to compute in; auto is float16 on CUDA if it holds.  [default: auto]",
)  # fmt: skip
@click.option("--eager", is_flag=True, default=None, help="Capture no CUDA graphs.")
@click.option("--no-trim", is_flag=True, default=None, help="Keep what no subnet of the profile uses.")
@click.option(
    "--unproven", is_flag=True, default=None,
    help="Serve without the proof that subnets answer as their labels say.",
)  # fmt: skip
@plain_errors()
def cli(
    endpoints: tuple[str, ...],
    name: str | None,
    keys: Path | None,
    emulate: str | None,
    gpus: int | None,
    speed: float | None,
    drift: float | None,
    event_log: Path | None,
    supernet: str | None,
    family: Path | None,
    metrics_port: int | None,
    metrics_address: str,
    no_shared_memory: bool,
    **of_model: Any,
) -> None:
    """Serve a supernet, a family of models, or emulated GPUs, to a router until SIGTERM."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Containers share host names, and each has a process 1.
    name = name or f"{platform.node()}-{os.getpid()}-{secrets.token_hex(3)}"
    _only_with("--emulate", emulate, _given(gpus, speed, drift, event_log))
    if sum(one is not None for one in (emulate, supernet, family)) != 1:
        raise ConfigError("expected one of --emulate, --supernet and --family")
    named = {f"--{option.replace('_', '-')}": value for option, value in of_model.items()}
    _only_with("--supernet", supernet, {k: v for k, v in named.items() if k not in _OF_FAMILIES})
    _only_with("--supernet or --family", supernet or family, named)
    own = peer_keys(keys or "", "worker")
    with ExitStack() as stack:
        waker = stack.enter_context(Waker())
        if emulate is not None:
            pace = Pace(1.0 if speed is None else speed, drift or 0.0, MonotonicClock().now_ns())
            served = stack.enter_context(emulated(emulate, gpus or 1, name, event_log, pace))
        else:
            served = stack.enter_context(resident(Asked(supernet, family=family, **of_model), waker))
        exports = None if metrics_port is None else (metrics_address, metrics_port)
        sharing = False if no_shared_memory else None
        serve(
            endpoints_of(",".join(endpoints), "--connect"),
            name,
            served,
            waker,
            exports,
            own,
            shared_memory=sharing,
        )


def _given(
    gpus: int | None, speed: float | None, drift: float | None, event_log: Path | None
) -> dict[str, object]:
    """Return the options that require --emulate."""
    return {"--gpus": gpus, "--speed": speed, "--drift": drift, "--event-log": event_log}


def _only_with(option: str, value: object, others: dict[str, object]) -> None:
    if value is not None:
        return
    for other, given in others.items():
        if given is not None:
            raise ConfigError(f"{other} goes with {option}")


@contextmanager
def emulated(
    profile_name: str, n_gpus: int, name: str, event_log: Path | None, pace: Pace
) -> Iterator[WorkerDevice]:
    """Give emulated GPUs; their event log, if any, is complete when the block ends.

    Raises:
        ConfigError: There is no such profile, or the log cannot be created.
    """
    profile = load_profile(profile_name)
    fingerprint = hashlib.sha256(profile.to_json()).hexdigest()[:16]
    with ExitStack() as stack:
        log = None
        if event_log is not None:
            latencies = tuple(subnet.latency_ns for subnet in profile.subnets)
            header = EventLogHeader(name, profile.name, profile.batch_sizes, latencies, pace)
            log = stack.enter_context(EventLogWriter(event_log, header))
        gpus = emulated_gpus(profile, n_gpus, log, pace)
        yield WorkerDevice(gpus, profile, fingerprint, None, OUTPUT, _memory_of_process)


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a worker with a real model: a supernet or a family; None is the default."""

    supernet: str | None
    family: Path | None = None
    example_input: str | None = None
    profile: str | None = None
    weights: str | None = None
    statistics: Path | None = None
    device: str | None = None
    threads: int | None = None
    cores: str | None = None
    precision: str | None = None
    eager: bool | None = None
    no_trim: bool | None = None
    unproven: bool | None = None


@contextmanager
def resident(asked: Asked, waker: Waker) -> Iterator[WorkerDevice]:
    """Give one real device with a resident model, warmed up; its threads end with the block.

    Raises:
        ConfigError: The model, the device or the profile is invalid.
    """
    cores = None if asked.cores is None else pin(asked.cores)
    threads = asked.threads or len(cores or (0,))
    # With OpenMP a count set by torch applies only to the thread that sets it: without this, which must
    # precede torch's import, the compute thread would use every core.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # torch takes seconds to import, and emulated GPUs do not need it.
    from gpu_worker.serve.compute import ComputeGpu  # noqa: PLC0415

    profile, executor = load_executor(asked, threads)
    stager = executor if executor.stages_ahead else None
    gpu = ComputeGpu(executor, profile, MonotonicClock(), waker.wake, stager=stager)
    gpu.start(executor.warm_up)
    sys.setswitchinterval(SWITCH_S)
    logging.getLogger(__name__).info("%s, %s: %s", profile.supernet, executor.precision, executor.memory())
    gauges = _memory_of_process
    if executor.device.type == "cuda":
        from gpu_worker.serve.gauges import CudaGauges  # noqa: PLC0415

        gauges = CudaGauges(executor.device)
    try:
        yield WorkerDevice(
            gpu, profile, executor.fingerprint, executor.input_spec, executor.output_spec, gauges
        )
    finally:
        gpu.close()


def load_executor(asked: Asked, threads: int) -> tuple[Profile, PaddedExecutor]:
    """Return the profile and the resident model that hosts its subnets."""
    if asked.family is not None:
        return _family_executor(asked, asked.family, threads)
    assert asked.supernet is not None, "the caller checked it"
    return _supernet_executor(asked, asked.supernet, threads)


def _supernet_executor(asked: Asked, supernet: str, threads: int) -> tuple[Profile, PaddedExecutor]:
    from gpu_worker.engines.torch_executor import Placement, TorchExecutor  # noqa: PLC0415
    from gpu_worker.models.kinds import supernet_kind  # noqa: PLC0415  these import torch
    from gpu_worker.proof.kept import require_proof  # noqa: PLC0415

    is_proved = _is_proved(asked, supernet)
    supernet = with_example(supernet, asked.example_input)
    kind = supernet_kind(supernet)
    name = asked.profile or kind.profile
    if name is None:
        raise ConfigError(f"--profile: {kind.name} comes without one: expected one, from `profiles search`")
    profile = load_profile(name)
    if profile.supernet != kind.name:
        raise ConfigError(
            f"profile {profile.name!r}: expected one of {kind.name}, got one of {profile.supernet}"
        )
    subnets = [Subnet(row.name, row.control) for row in profile.subnets]
    placement = Placement(
        device=asked.device or "cpu",
        threads=threads,
        batch_sizes=profile.batch_sizes,
        precision=asked.precision or "auto",
        uses_graphs=not asked.eager,
        trims=not asked.no_trim,
    )
    statistics = asked.statistics
    if statistics is None and (beside := statistics_path(name)).exists():
        statistics = beside
    try:
        executor = TorchExecutor.load(
            supernet,
            subnets,
            weights=asked.weights,
            statistics=statistics,
            placement=placement,
            check=require_proof if is_proved else None,
        )
    except ConfigError as error:
        raise ConfigError(f"profile {profile.name!r}: {error}") from error
    return profile, executor


def _family_executor(asked: Asked, path: Path, threads: int) -> tuple[Profile, PaddedExecutor]:
    from gpu_worker.engines.torch_executor import Placement  # noqa: PLC0415  it imports torch
    from gpu_worker.family.engine import FamilyExecutor  # noqa: PLC0415  it imports torch

    family = load_family(path)
    if asked.profile is None:
        raise ConfigError(f"--profile: {NEEDS_PROFILE}")
    profile = load_profile(asked.profile)
    check_profile(family, profile)
    placement = Placement(asked.device or "cpu", threads, profile.batch_sizes)
    subnets = [Subnet(row.name, row.control) for row in profile.subnets]
    is_proved = _is_proved(asked, str(path))
    return profile, FamilyExecutor.load(family, placement, subnets, is_proved=is_proved)


def _is_proved(asked: Asked, what: str) -> bool:
    """Return whether a proof is asked for; warn if not."""
    unproven = asked.unproven or os.environ.get(UNPROVEN_VARIABLE) == "1"
    if unproven:
        logging.getLogger(__name__).warning(
            "%s is served unproven: a subnet may answer for another without an error", what
        )
    return not unproven


def pin(text: str) -> list[int]:
    """Pin this process to the cores that `text` lists, such as "0,2" or "0-3"; return them.

    Raises:
        ConfigError: It is malformed, or lists a core that this process may not use.
    """
    allowed = os.sched_getaffinity(0)
    try:
        ends = [(part.split("-") * 2)[:2] for part in text.split(",")]
        cores = sorted({core for first, last in ends for core in range(int(first), int(last) + 1)})
    except ValueError as error:
        raise ConfigError(f"--cores: expected numbers such as 0,2 or 0-3, got {text!r}") from error
    if not cores or not set(cores) <= allowed:
        raise ConfigError(f"--cores: expected some of {sorted(allowed)}, got {text!r}")
    os.sched_setaffinity(0, cores)
    return cores


def serve(
    endpoints: Sequence[str],
    name: str,
    device: WorkerDevice,
    waker: Waker,
    exports: tuple[str, int] | None = None,
    keys: PeerKeys | None = None,
    *,
    shared_memory: bool | None = None,
) -> None:
    """Serve a device to one of the routers until a signal; metrics at address and port `exports`.

    `shared_memory` as in `superserve.shared`; None asks the environment.

    Raises:
        SuperServeError: The endpoint is malformed, the port taken, or the router has refused this worker.
    """
    context: zmq.Context[zmq.Socket[bytes]] = new_context()
    asked_early: list[bool] = []
    waker.on_signals(lambda: asked_early.append(True))  # before its router can know that it is there
    try:
        with ExitStack() as stack:

            def connect(endpoint: str) -> Handshake:
                handshake = Handshake(context, endpoint, keys)
                stack.enter_context(handshake.socket)
                return stack.enter_context(handshake)  # ends before the socket that it watches

            choice = RouterChoice(
                resolved(endpoints), device.gpus.n_slots, MonotonicClock().now_ns(),
                partial(random.uniform, 0.7, 1.3),
            )  # fmt: skip
            routers = WorkerRouters(choice, connect, Control(Kind.BYE, {"worker": name}))
            first = routers.doors[0]
            assert first is not None, "it raises if it cannot be opened"
            ready: dict[str, Any] = {"name": name, "n_slots": device.gpus.n_slots}
            metrics = None if exports is None else WorkerMetrics(name, device.profile, device.gpus.n_slots)
            server = WorkerServer(
                first.socket,
                device.gpus,
                hello(name, device, shared_memory=shared_memory),
                clock=MonotonicClock(),
                waker=waker,
                handshake=first.handshake,
                gauges=device.gauges,
                on_ready=lambda: announce_ready(ready),
                metrics=metrics,
                routers=routers,
            )
            if metrics is not None and exports is not None:
                address, port = exports
                exporter = serve_pages(pages(server, metrics), address=address, port=port)
                ready["metrics"] = stack.enter_context(exporter)
            waker.on_signals(server.stop)
            if asked_early:
                server.stop()
            server.run()
    finally:
        context.destroy(0)  # not term(): it would wait for ever for a socket that a signal left open


def hello(name: str, device: WorkerDevice, *, shared_memory: bool | None = None) -> WorkerHello:
    """Return HELLO: the worker's name, what its GPUs run and how fast, and whether it reads shared memory."""
    return WorkerHello(
        name=name,
        host=platform.node(),
        version=version(),
        pid=os.getpid(),
        life=secrets.token_hex(8),
        device=device.profile.device,
        fingerprint=device.fingerprint,
        profiles=(device.profile.to_dict(),),
        n_slots=device.gpus.n_slots,
        input=device.input_spec,
        output=device.output_spec,
        shared=is_allowed(shared_memory) or None,
        wire=OURS,
    )


_PROCESS = psutil.Process()


def _memory_of_process() -> Gauges:
    return Gauges(memory_bytes=int(_PROCESS.memory_info().rss))
