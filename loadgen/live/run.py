"""A run: offer a trace to a router from several senders, and say what came of it."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import zmq

from gpu_worker.core.played import AS_PROFILED, Pace
from gpu_worker.serve.eventlog import check_logs
from loadgen.live.progress import Seconds
from loadgen.live.sender import COLUMNS, UNANSWERED, SenderPlan
from loadgen.results.result import (
    LAG_QUANTILES,
    MAX_EXACT,
    NoiseProbe,
    RunResult,
    judge_validity,
    quantile_ns,
    quantiles_ms,
)
from loadgen.results.run import Run, in_time
from loadgen.traces.arrivals import arrivals_cv2
from superserve.clock import SECOND
from superserve.errors import ConfigError, WireError
from superserve.net.connection import ask_status
from superserve.net.sockets import bind_router, receive, send
from superserve.roles.processes import ProcessGroup
from superserve.wire import (
    STATUSES,
    RunProgress,
    RunReady,
    RunReport,
    RunStart,
    RunStop,
    Status,
    decode_run,
    encode_run,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from gpu_worker.serve.eventlog import EventLogReport
    from loadgen.live.progress import Watch
    from loadgen.traces.trace import Trace
    from superserve.roles.processes import RoleProcess
    from superserve.status import RouterStatus
    from superserve.wire import Ping, Pong, RunMessage

MS = 1_000_000
_START_AFTER_NS = 300 * MS
"""From the order to start until the first instant: every sender has it by then."""
_STOP_AFTER_NS = 400 * MS
"""From the order to stop until that instant: a sender looks for orders four times a second."""
_LAST_WORDS_MS = 1_000
"""What an ended sender sent last comes within this, however busy the machine: it was sent before it ended."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a trace is offered.

    Attributes:
        slo_ns: From a query's due instant to its deadline.
        n_senders: Sender processes; the trace is dealt out to them query by query.
        payload_bytes: Bytes of each payload where none are given.
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
        n_gpus: Emulated GPUs, dealt out to the processes.
        policy: What the router runs.
        n_processes: Worker processes that hold them.
        folder: Where logs are written.
        record: Whether the router records its event log there.
        pace: Of the GPUs beside their profile; drift counts from their start.
    """

    profile: str
    n_gpus: int
    policy: str = "slackfit"
    n_processes: int = 1
    folder: Path | None = None
    record: bool = False
    pace: Pace = AS_PROFILED


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster, as a run sees it; `router` and `workers` are its processes, if it is private."""

    client_endpoint: str
    event_logs: tuple[Path, ...] = ()
    record: Path | None = None
    router: RoleProcess | None = None
    workers: tuple[RoleProcess, ...] = ()


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a run that is part of a larger one leaves to that.

    Attributes:
        start: Called once every sender is ready; returns the instant to start at, of this host's clock.
        stop: Once set, nothing more is sent; the run is reported up to there.
    """

    start: Callable[[], int]
    stop: threading.Event


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
        router = group.start("router", argv if record is None else [*argv, "--record", str(record)])
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


def _shares(n: int, parts: int) -> list[int]:
    parts = min(n, parts)
    return [n // parts + (i < n % parts) for i in range(parts)]


def run_emulated(
    trace: Trace,
    settings: RunSettings,
    emulation: Emulation,
    on_progress: Callable[[dict[str, int]], None] | None = None,
    watch: Watch | None = None,
) -> tuple[Run, EventLogReport]:
    """Offer `trace` to a private cluster, then prove from its event logs that no GPU cheated."""
    with contextlib.ExitStack() as stack:
        if emulation.folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="superserve-")))
            emulation = replace(emulation, folder=folder)
        with emulated(emulation) as cluster:
            run = run_trace(trace, settings, cluster.client_endpoint, on_progress, watch)
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
    """Offer `trace` to the router at `endpoint`, open loop, and merge what the senders saw.

    If `watch` or `hooks` ends it early, the result is that of the trace up to there, and marked as partial.

    Raises:
        ConfigError: No router answers, or the payloads are not what its model takes.
        ProcessError: A sender died.
        KeyboardInterrupt: It was ended before any query was due.
    """
    if trace.n == 0:
        raise ConfigError(f"trace {trace.name}: expected at least one query")
    before = ask_status(endpoint, keys=settings.keys)
    with tempfile.TemporaryDirectory(prefix="superserve-run-") as name, zmq.Context() as context:
        folder = Path(name)
        control, control_endpoint = bind_router(context, "tcp://127.0.0.1:*")
        probe = NoiseProbe()
        try:
            plans = _plan(trace, settings, endpoint, control_endpoint, folder, is_watched=watch is not None)
            with ProcessGroup() as group:
                for plan in plans:
                    path = folder / f"{plan.name}.json"
                    path.write_bytes(orjson.dumps(asdict(plan)))
                    group.start(plan.name, ["-m", "loadgen.live.sender", str(path)])
                group.wait_ready(60.0)
                coordinator = _Coordinator(control, group, len(plans), hooks)
                with contextlib.nullcontext() if watch is None else watch.interrupts():
                    start_ns = coordinator.start()
                    probe.start()
                    if watch is not None:
                        coordinator.watch(watch, _seconds(trace, settings, plans, start_ns, watch))
                    coordinator.follow(on_progress)
                noise_ns = probe.stop()
                router_cpu_s = _router_cpu_s(endpoint, settings.keys, before)
        finally:
            control.close(0)
        columns = _merge(trace, settings, plans, start_ns)
    is_partial = coordinator.stop_ns is not None and coordinator.stop_ns < trace.duration_ns
    if is_partial:
        trace, columns = _until(trace, columns, coordinator.stop_ns or 0)
    noise = quantile_ns(noise_ns, 999)
    policy = before.router.policy
    result = summarise(trace, settings.slo_ns, policy, columns, coordinator.subnets, noise)
    if is_partial:
        result = replace(result, partial=True)
    return Run(
        result, columns, coordinator.subnets, coordinator.reasons, router_cpu_s, coordinator.n_duplicates,
        noise, (probe.woke_ns - start_ns, noise_ns),
    )  # fmt: skip


def _until(
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


def _seconds(
    trace: Trace, settings: RunSettings, plans: Sequence[SenderPlan], start_ns: int, watch: Watch
) -> Seconds:
    """Return what reads the senders' rows while they run."""
    n = settings.n_senders
    feeds = {plan.name: (plan.live_path, trace.due_ns[i::n]) for i, plan in enumerate(plans)}
    return Seconds(
        feeds, start_ns=start_ns, duration_ns=trace.duration_ns, slo_ns=settings.slo_ns,
        on_second=watch.on_second,
    )  # fmt: skip


def _router_cpu_s(endpoint: str, keys: str, before: RouterStatus) -> float:
    """Return the router's CPU time since `before`; NaN if it is gone, or another one."""
    try:
        after = ask_status(endpoint, keys=keys)
    except (ConfigError, WireError):
        return math.nan  # what the senders saw still counts
    if after.router.pid != before.router.pid:
        return math.nan
    return after.router.cpu_s - before.router.cpu_s


def _plan(
    trace: Trace,
    settings: RunSettings,
    endpoint: str,
    control: str,
    folder: Path,
    *,
    is_watched: bool = False,
) -> list[SenderPlan]:
    """Deal the trace out, and write what each sender needs."""
    rng = np.random.default_rng(settings.seed)
    pick = None
    if settings.payloads is not None:
        np.save(folder / "payloads.npy", settings.payloads)
        pick = rng.integers(0, len(settings.payloads), trace.n)
        np.save(folder / "pick.npy", pick)
    plans = []
    for i in range(min(settings.n_senders, trace.n)):
        plan = SenderPlan(
            endpoint, control, f"sender-{i}", str(folder), settings.slo_ns, settings.payload_bytes,
            settings.grace_ns, settings.keep_outputs, is_watched, settings.keys,
        )  # fmt: skip
        np.save(plan.path("due"), trace.due_ns[i :: settings.n_senders])
        if pick is not None:
            np.save(plan.path("pick"), pick[i :: settings.n_senders])
        plans.append(plan)
    return plans


class _Coordinator:
    """Starts the senders at one instant and listens to them until all are done."""

    def __init__(
        self, control: zmq.Socket[bytes], group: ProcessGroup, n_senders: int, hooks: Hooks | None = None
    ) -> None:
        self.subnets: list[tuple[str, float]] = []
        self.reasons: dict[str, str] = {}
        self.n_duplicates = 0
        self.stop_ns: int | None = None
        self._control = control
        self._group = group
        self._n_senders = n_senders
        self._progress: dict[bytes, RunProgress] = {}
        self._n_done = 0
        self._senders: set[bytes] = set()
        self._start_ns = 0
        self._hooks = hooks
        self._stop_asked = None if hooks is None else hooks.stop
        self._seconds: Seconds | None = None

    def start(self) -> int:
        """Wait for every sender, then tell all of them the instant to start at; return it."""
        while len(self._senders) < self._n_senders:
            for key, message in self._messages():
                if isinstance(message, RunReady):
                    self._senders.add(key)
        hooks = self._hooks
        self._start_ns = time.monotonic_ns() + _START_AFTER_NS if hooks is None else hooks.start()
        self._order(RunStart(at_ns=self._start_ns))
        return self._start_ns

    def watch(self, watch: Watch, seconds: Seconds) -> None:
        """Have `follow` tell of each second, and stop when told to."""
        self._seconds = seconds
        self._stop_asked = watch.stop

    def _order(self, message: RunStart | RunStop) -> None:
        order = encode_run(message)
        for key in self._senders:
            send(self._control, [key, *order])

    def _stop(self) -> None:
        """Tell every sender the one instant from which on nothing is sent; it is when all know of it."""
        self.stop_ns = max(0, time.monotonic_ns() - self._start_ns) + _STOP_AFTER_NS
        if self._seconds is not None:
            self._seconds.duration_ns = min(self._seconds.duration_ns, self.stop_ns)
        self._order(RunStop(self.stop_ns))

    def follow(self, on_progress: Callable[[dict[str, int]], None] | None) -> None:
        """Pass progress on until every sender is done."""
        while self._n_done < self._n_senders:
            if self._stop_asked is not None and self._stop_asked.is_set() and self.stop_ns is None:
                self._stop()
            for key, message in self._messages():
                if isinstance(message, RunReport):
                    self._finish(message)
                elif isinstance(message, RunProgress):
                    self._note(key, message)
                    if on_progress is not None:
                        on_progress(self._total())

    def _finish(self, report: RunReport) -> None:
        if self._seconds is not None and report.rows is not None:
            self._seconds.read(report.name, report.rows, self._seconds.duration_ns)
        self._n_done += 1
        self.n_duplicates += report.duplicates
        self.reasons |= report.reasons
        self.subnets = report.subnets

    def _note(self, key: bytes, progress: RunProgress) -> None:
        if self._seconds is not None and progress.rows is not None:
            self._seconds.read(progress.name, progress.rows, progress.until_ns)
        self._progress[key] = progress

    def _total(self) -> dict[str, int]:
        parts = self._progress.values()
        return {what: sum(getattr(part, what) for part in parts) for what in ("due", "sent", "answered")}

    def _messages(self) -> Iterator[tuple[bytes, RunMessage | Ping | Pong]]:
        if not self._control.poll(200) and self._n_done < self._n_senders:
            self._check_senders()
        while (frames := receive(self._control)) is not None:
            yield bytes(frames[0]), decode_run(frames[1:])

    def _check_senders(self) -> None:
        """Raise ProcessError if a sender died; one that is done may have ended, its report on the way."""
        n_running = sum(process.poll() is None for process in self._group.processes)
        if n_running < self._n_senders - self._n_done and not self._control.poll(_LAST_WORDS_MS):
            self._group.check()


def _merge(
    trace: Trace, settings: RunSettings, plans: Sequence[SenderPlan], start_ns: int
) -> dict[str, npt.NDArray[Any]]:
    """Put the senders' columns back into the order of the trace; instants count from the start."""
    columns: dict[str, npt.NDArray[Any]] = {"due_ns": trace.due_ns}
    for name in COLUMNS:
        parts = [np.load(plan.path(name)) for plan in plans]
        merged = np.empty(trace.n, parts[0].dtype)
        for i, part in enumerate(parts):
            merged[i :: settings.n_senders] = part
        columns[name] = merged
    for name in ("sent_ns", "answered_ns"):
        column = columns[name]
        columns[name] = np.where(column < 0, -1, column - start_ns)
    folder = Path(plans[0].folder)
    if (folder / "pick.npy").exists():
        columns["payload"] = np.load(folder / "pick.npy")
    if settings.keep_outputs and all(plan.path("outputs").exists() for plan in plans):
        parts = [np.load(plan.path("outputs")) for plan in plans]
        outputs = np.zeros((trace.n, parts[0].shape[1]), np.uint8)
        for i, part in enumerate(parts):
            outputs[i :: settings.n_senders] = part
        columns["outputs"] = outputs
    return columns


def count_outcomes(
    columns: dict[str, npt.NDArray[Any]], slo_ns: int | npt.NDArray[np.int64]
) -> dict[str, int]:
    """Return how many queries ended in which way; the parts sum to "total"."""
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

    Where each query has its own SLO, `slo_ms` is their mean, and send lag is held against the shortest.
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
    """Mean over batches, not queries: a batch of n is seen n times, so each sight weighs 1/n."""
    return None if len(sizes) == 0 else float(len(sizes) / (1.0 / sizes).sum())
