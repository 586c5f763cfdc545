"""A run: offer a trace to a router from several senders, and compute the result."""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_worker.core.played import AS_PROFILED, Pace
from gpu_worker.serve.eventlog import check_logs
from loadgen.live.coordinator import Offering, coordinated
from loadgen.live.jitter import apart
from loadgen.live.records import UNANSWERED, SenderPlan
from loadgen.results.result import (
    LAG_QUANTILES,
    MAX_EXACT,
    RunResult,
    judge_validity,
    quantile_ns,
    quantiles_ms,
)
from loadgen.results.run import Run, in_time
from loadgen.traces.arrivals import arrivals_cv2
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError, WireError
from superserve.net.connection import ask_status
from superserve.roles.processes import ProcessGroup
from superserve.wire import STATUSES, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from gpu_worker.serve.eventlog import EventLogReport
    from loadgen.live.coordinator import Hooks
    from loadgen.live.progress import Watch
    from loadgen.traces.trace import Trace
    from superserve.roles.processes import RoleProcess
    from superserve.status import RouterStatus


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a trace is offered.

    Attributes:
        slo_ns: From a query's due instant to its deadline.
        n_senders: Sender processes; the queries go to them in turn.
        payload_bytes: Bytes of each payload, unless payloads are given.
        payloads: Real payloads, uint8, shape (n_payloads, n_bytes); each query draws one.
        seed: Of that draw.
        keep_outputs: Whether outputs are kept, for checking them.
        grace_ns: How long after its deadline an answer is awaited.
        keys: A client's key file, or a folder with one, for a router with keys.
    """

    slo_ns: int
    n_senders: int = 1
    payload_bytes: int = 64
    payloads: npt.NDArray[np.uint8] | None = None
    seed: int = 0
    keep_outputs: bool = False
    grace_ns: int = 3_000 * MS
    keys: str = ""


@dataclass(frozen=True, slots=True)
class Emulation:
    """A private cluster for one run: a router, and emulated GPUs of one profile.

    Attributes:
        profile: A shipped profile's name, or a path.
        n_gpus: Emulated GPUs, split among the processes.
        policy: The router's policy.
        n_processes: Worker processes that emulate them.
        folder: Where logs are written.
        record: Whether the router records its event log there.
        pace: The GPUs' speed relative to their profile; drift counts from their start.
        jitter_ns: Each packet between the router and its peers takes up to this much longer; the caller
            has entered a private network (`loadgen.live.jitter`).
    """

    profile: str
    n_gpus: int
    policy: str = "slackfit"
    n_processes: int = 1
    folder: Path | None = None
    record: bool = False
    pace: Pace = AS_PROFILED
    jitter_ns: int = 0


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster, as a run sees it; `router` and `workers` are the processes of a private one."""

    client_endpoint: str
    event_logs: tuple[Path, ...] = ()
    record: Path | None = None
    router: RoleProcess | None = None
    workers: tuple[RoleProcess, ...] = ()


@contextlib.contextmanager
def emulated(emulation: Emulation) -> Iterator[Cluster]:
    """Run a private cluster of emulated GPUs; every process is gone when the block ends."""
    with contextlib.ExitStack() as stack:
        folder = emulation.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="superserve-")))
        group = stack.enter_context(ProcessGroup())
        record = folder / "router.jsonl" if emulation.record else None
        argv = ["-m", "router", "--policy", emulation.policy]
        with _placed(stack, emulation) as where:
            router = group.start(
                "router", [*argv, *where, *([] if record is None else ["--record", str(record)])]
            )
        group.wait_ready(20.0)
        logs = []
        for i, n_gpus in enumerate(_shares(emulation.n_gpus, emulation.n_processes)):
            logs.append(folder / f"gpus-{i}.log")
            group.start(
                f"worker-{i}",
                ["-m", "gpu_worker", "--connect", router.ready["worker"], "--name", f"emulated-{i}",
                 "--emulate", emulation.profile, "--gpus", str(n_gpus), "--event-log", str(logs[-1]),
                 "--speed", str(emulation.pace.speed), "--drift", str(emulation.pace.drift)],
            )  # fmt: skip
        group.wait_ready(60.0)
        yield Cluster(router.ready["client"], tuple(logs), record, router, group.processes[1:])


@contextlib.contextmanager
def _placed(stack: contextlib.ExitStack, emulation: Emulation) -> Iterator[list[str]]:
    """Be where the router runs for a block, and give its arguments for that."""
    if not emulation.jitter_ns:
        yield []
        return
    far = stack.enter_context(apart(emulation.jitter_ns))
    bound = f"tcp://{far.address}:*"  # reached from the namespace beside it only
    with far.there():
        yield ["--client-endpoint", bound, "--worker-endpoint", bound, "--security", "none"]


def _shares(n: int, parts: int) -> list[int]:
    parts = min(n, parts)
    return [n // parts + (i < n % parts) for i in range(parts)]


def run_emulated(
    trace: Trace,
    settings: RunSettings,
    emulation: Emulation,
    watch: Watch | None = None,
    on_end: Callable[[str], None] | None = None,
) -> tuple[Run, EventLogReport]:
    """Offer `trace` to a private cluster, then check the event logs of its GPUs: see `check_logs`.

    `on_end` receives the router's endpoint after the run, while the cluster is still there.
    """
    with contextlib.ExitStack() as stack:
        if emulation.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="superserve-")))
            emulation = replace(emulation, folder=folder)
        with emulated(emulation) as cluster:
            run = run_trace(trace, settings, cluster.client_endpoint, watch=watch)
            if on_end is not None:
                on_end(cluster.client_endpoint)
        return run, check_logs(cluster.event_logs)


def run_trace(
    trace: Trace,
    settings: RunSettings,
    endpoint: str,
    on_progress: Callable[[dict[str, int]], None] | None = None,
    watch: Watch | None = None,
    *,
    hooks: Hooks | None = None,
) -> Run:
    """Offer `trace` to the router at `endpoint`, open loop, and merge the senders' records.

    If `watch` or `hooks` ends it early, the result covers the trace up to then, and is marked as partial.

    Raises:
        ConfigError: No router answers, or the payloads do not fit its model.
        ProcessError: A sender died.
        KeyboardInterrupt: It ended before any query was due.
    """
    if trace.n == 0:
        raise ConfigError(f"trace {trace.name}: expected at least one query")
    before = ask_status(endpoint, keys=settings.keys)
    plan = SenderPlan(
        endpoint, settings.slo_ns, settings.payload_bytes, settings.grace_ns, settings.keep_outputs,
        is_watched=watch is not None, keys=settings.keys,
    )  # fmt: skip
    schedule = Offering(trace, settings.n_senders, settings.payloads, settings.seed)
    with coordinated(plan, schedule, hooks=hooks, watch=watch) as senders:
        with contextlib.nullcontext() if watch is None else watch.endings.gently():
            senders.start()
            senders.follow(on_progress)
        router_cpu_s = _router_cpu_s(endpoint, settings.keys, before)
        columns = senders.columns()
    is_partial = senders.stop_ns is not None and senders.stop_ns < trace.duration_ns
    if is_partial:
        trace, columns = until(trace, columns, senders.stop_ns or 0)
    noise = quantile_ns(senders.noise[1], 999)
    result = summarise(trace, settings.slo_ns, before.router.policy, columns, senders.subnets, noise)
    if is_partial:
        result = replace(result, partial=True)
    return Run(
        result, columns, senders.subnets, senders.reasons, router_cpu_s, senders.n_duplicates, noise,
        senders.noise,
    )  # fmt: skip


def until(
    trace: Trace, columns: dict[str, npt.NDArray[Any]], stop_ns: int
) -> tuple[Trace, dict[str, npt.NDArray[Any]]]:
    """Return the part of a run up to `stop_ns`.

    Raises:
        KeyboardInterrupt: There is none.
    """
    n = int(np.searchsorted(trace.due_ns, stop_ns))
    if not n:
        raise KeyboardInterrupt
    return trace.scaled(duration_s=stop_ns / SECOND), {name: one[:n] for name, one in columns.items()}


def _router_cpu_s(endpoint: str, keys: str, before: RouterStatus) -> float:
    """Return the router's CPU time since `before`; NaN if it is gone or was replaced."""
    try:
        after = ask_status(endpoint, keys=keys)
    except (ConfigError, WireError):
        return math.nan  # the senders' records still count
    if after.router.pid != before.router.pid:
        return math.nan
    return after.router.cpu_s - before.router.cpu_s


def count_outcomes(
    columns: dict[str, npt.NDArray[Any]], slo_ns: int | npt.NDArray[np.int64]
) -> dict[str, int]:
    """Return the number of queries by outcome; the parts sum to "total"."""
    status = columns["status"]
    ok = int(in_time(columns, slo_ns).sum())
    counts = {"total": len(status), "ok": ok, "late": int((status <= Status.LATE).sum()) - ok}
    for one in STATUSES[2:]:
        counts[one.name.lower()] = int((status == one).sum())
    is_unsent = columns["sent_ns"] < 0
    counts["unanswered"] = int(((status == UNANSWERED) & ~is_unsent).sum())
    counts["unsent"] = int(is_unsent.sum())
    return counts


def summarise(
    trace: Trace,
    slo_ns: int | npt.NDArray[np.int64],
    policy: str,
    columns: dict[str, npt.NDArray[Any]],
    subnets: Sequence[tuple[str, float]],
    noise_p99_9_ns: int | None,
) -> RunResult:
    """Compute the result file's figures from the columns of a run.

    If each query has its own SLO, `slo_ms` is their mean, and send lag is compared with the shortest.
    """
    is_ok = in_time(columns, slo_ns)
    has_output = columns["status"] <= Status.LATE
    was_sent = columns["sent_ns"] >= 0
    queries = count_outcomes(columns, slo_ns)
    latency_ns = (columns["answered_ns"] - columns["due_ns"])[has_output]
    lag_ns = (columns["sent_ns"] - columns["due_ns"])[was_sent]
    duration_s = trace.duration_ns / 1e9
    verdict = judge_validity(
        lag_p99_9_ns=quantile_ns(lag_ns, 999), noise_p99_9_ns=noise_p99_9_ns,
        slo_ns=int(np.min(slo_ns)),
        unsent=queries["unsent"],
    )  # fmt: skip
    served = np.bincount(columns["subnet"][has_output], minlength=len(subnets))
    n_served = max(1, int(has_output.sum()))
    result = RunResult(
        trace=trace.name,
        policy=policy,
        slo_ms=float(np.mean(slo_ns)) / MS,
        duration_s=duration_s,
        offered_qps=trace.n / duration_s,
        realised_qps=int(was_sent.sum()) / duration_s,
        realised_cv2=arrivals_cv2(columns["sent_ns"][was_sent]),
        queries=queries,
        slo_attainment=queries["ok"] / queries["total"],
        mean_accuracy=float(columns["accuracy"][is_ok].mean(dtype=np.float64)) if is_ok.any() else None,
        goodput_qps=queries["ok"] / duration_s,
        latency_ms=quantiles_ms(latency_ns),
        send_lag_ms=quantiles_ms(lag_ns, LAG_QUANTILES),
        batch_size_mean=_mean_batch_size(columns["batch_size"][has_output]),
        subnet_share={name: int(n) / n_served for (name, _), n in zip(subnets, served, strict=False)},
        valid=verdict.valid,
        invalid_because=verdict.reasons,
        disturbed=verdict.disturbed,
        quantiles="exact" if trace.n <= MAX_EXACT else "histogram, 1 %",
    )
    result.check()
    return result


def _mean_batch_size(sizes: npt.NDArray[np.uint16]) -> float | None:
    """Return the mean over batches, not queries: a batch of n appears n times, so each one weighs 1/n."""
    return None if len(sizes) == 0 else float(len(sizes) / (1.0 / sizes).sum())
