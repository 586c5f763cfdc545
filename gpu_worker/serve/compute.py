"""One real GPU or CPU: batches run in a separate thread, so that the sockets are always served.

The server's thread puts batches into a queue, and each report wakes it. The compute thread takes
the next batch by itself, so that the device does not wait for the sockets. If the device has its own
memory, a third thread copies each batch there while the one before it runs.
If a query makes the model raise, its batch runs a second time, one query at a time, and only that
query fails. If the device runs out of memory, the batch is halved until it fits.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from gpu_worker.core.batches import (
    FULL,
    EndedBatch,
    Outcome,
    Refusal,
    end_of,
    expired_reason,
    fault_of,
    mixed,
    refused,
    unexpired,
)
from gpu_worker.core.queue import OWN, GpuQueue, QueueReport, Running, TakenBatch, running_of
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from profiles.table import Profile
    from superserve.clock import Clock
    from superserve.subnet import TensorSpec
    from superserve.wire import Buffer, Directive

_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
_MAX_REASON_CHARS = 1_000  # a model's message may quote whole tensors


class Executor(Protocol):
    """What runs a batch: `TorchExecutor`, or a test's."""

    @property
    def input_spec(self) -> TensorSpec:
        """One query's input."""
        ...

    @property
    def output_spec(self) -> TensorSpec:
        """One query's output."""
        ...

    def execute(self, subnet: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Run `batch` (B, *input) on row `subnet` and return its outputs (B, *output)."""
        ...


class Stager(Protocol):
    """What copies batches to a device ahead of time: a `TorchExecutor` on CUDA, or a test's."""

    def stage(self, batch: npt.NDArray[Any] | Sequence[npt.NDArray[Any]]) -> Any:
        """Start copying B queries (B, *input), or B separate ones, to the device.

        It may wait for room.
        """
        ...

    def run(self, subnet: int, staged: Any) -> npt.NDArray[Any]:
        """Run a staged batch on row `subnet`, once, and return its outputs (B, *output)."""
        ...

    def discard(self, staged: Any) -> None:
        """Release a staged batch that will not run."""
        ...


class _Ended(NamedTuple):
    """How one query ended, and its output or reason."""

    status: Status
    output: Buffer


def run_batch(
    executor: Executor,
    directive: Directive,
    waited_ns: int,
    run_staged: Callable[[], npt.NDArray[Any]] | None = None,
) -> Outcome:
    """Run the queries of a batch that still have slack and fit the model; return how each ended.

    Args:
        executor: What runs them.
        directive: The batch.
        waited_ns: How long it has waited here.
        run_staged: Runs the whole batch from its staged copy; called at most once, and only if every
            query runs.
    """
    ended: list[_Ended | None] = _refusals(executor.input_spec, directive, waited_ns)
    rows = [i for i, end in enumerate(ended) if end is None]
    if not rows:
        return _as_outcome([end for end in ended if end is not None], 0)
    if len(rows) == directive.n:
        return _run_whole(executor, directive, run_staged)
    inputs = _assemble(executor.input_spec, directive, rows)
    for i, end in zip(rows, _run(executor, directive.subnet, inputs), strict=True):
        ended[i] = end
    return _as_outcome([end for end in ended if end is not None], len(rows))


def _refusals(spec: TensorSpec, directive: Directive, waited_ns: int) -> list[_Ended | None]:
    """Return the ends of the queries that must not run, None for the others."""
    expected, alive = spec.n_bytes, unexpired(directive, waited_ns)
    ended: list[_Ended | None] = [
        None if size == expected else _Ended(Status.INVALID, _wrong_size(spec, size))
        for size in map(len, directive.payload_list())
    ]
    if alive is not None:
        reason = expired_reason(waited_ns)
        for i in np.flatnonzero(~alive):
            ended[i] = _Ended(Status.EXPIRED, reason)
    return ended


def _wrong_size(spec: TensorSpec, size: int) -> bytes:
    return f"payload: expected {spec.n_bytes} bytes ({spec.dtype} {spec.shape}), got {size}".encode()


def _assemble(spec: TensorSpec, directive: Directive, rows: Sequence[int]) -> npt.NDArray[Any]:
    """Return the inputs of `rows` as one array, (len(rows), *shape); copied only if they are separate."""
    segments = directive.segments
    if len(segments) == 1 and segments[0].packed and len(rows) == directive.n:
        data: Buffer = segments[0].payloads[0]
    else:
        payloads = directive.payload_list()
        data = b"".join([payloads[i] for i in rows])
    return np.frombuffer(data, np.dtype(spec.dtype)).reshape(len(rows), *spec.shape)


def _where_they_lie(spec: TensorSpec, directive: Directive) -> npt.NDArray[Any] | Sequence[npt.NDArray[Any]]:
    """Return a batch's inputs without copying: one array if they are contiguous, else one for each query."""
    segments = directive.segments
    if len(segments) == 1 and segments[0].packed:
        return _assemble(spec, directive, range(directive.n))
    dtype = np.dtype(spec.dtype)
    return [np.frombuffer(payload, dtype).reshape(spec.shape) for payload in directive.payload_list()]


def _run_whole(
    executor: Executor, directive: Directive, run_staged: Callable[[], npt.NDArray[Any]] | None
) -> Outcome:
    """Run a batch whose queries are all valid: the usual case, in which outputs stay together.

    A staged batch is not assembled here again: the device would wait for the copy.
    """
    subnet, n = directive.subnet, directive.n

    def inputs() -> npt.NDArray[Any]:
        return _assemble(executor.input_spec, directive, range(n))

    try:
        outputs = executor.execute(subnet, inputs()) if run_staged is None else run_staged()
        _check(executor, outputs, n)
    except Exception as error:  # noqa: BLE001  the model's, of any kind
        return _as_outcome(_rerun(executor, subnet, inputs(), error), n)
    return Outcome(n, executor.output_spec.n_bytes, outputs.tobytes())


def _run(executor: Executor, subnet: int, inputs: npt.NDArray[Any]) -> list[_Ended]:
    try:
        outputs = executor.execute(subnet, inputs)
        _check(executor, outputs, len(inputs))
    except Exception as error:  # noqa: BLE001  the model's, of any kind
        return _rerun(executor, subnet, inputs, error)
    return [_Ended(Status.OK, output.tobytes()) for output in outputs]


def _rerun(executor: Executor, subnet: int, inputs: npt.NDArray[Any], error: Exception) -> list[_Ended]:
    """Run in smaller pieces what raised `error`; a query that raises alone is at fault."""
    n = len(inputs)
    if n == 1:
        reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
        return [_Ended(Status.FAILED, reason.encode(errors="replace"))]
    piece = (n + 1) // 2 if isinstance(error, _OUT_OF_MEMORY) else 1
    return [
        end for start in range(0, n, piece) for end in _run(executor, subnet, inputs[start : start + piece])
    ]


def _check(executor: Executor, outputs: npt.NDArray[Any], n: int) -> None:
    """Raise TypeError unless these are the outputs of `n` queries."""
    spec = executor.output_spec
    expected = (n, *spec.shape)
    if outputs.shape != expected or outputs.dtype != np.dtype(spec.dtype):
        raise TypeError(f"outputs: expected {spec.dtype} {expected}, got {outputs.dtype} {outputs.shape}")


def _as_outcome(ended: Sequence[_Ended], n_run: int) -> Outcome:
    outputs = [end.output for end in ended]
    if all(end.status is Status.OK for end in ended):
        return Outcome(n_run, len(outputs[0]), b"".join(outputs))
    return mixed([end.status for end in ended], outputs, n_run)


@dataclass(slots=True)
class _Job:
    batch: TakenBatch[Directive]
    staged: Any = None  # set by the staging thread before the compute thread sees the job
    is_dropped: bool = False  # set by the server's thread, read once by the compute thread


class _ThreadReport(NamedTuple):
    job: _Job
    outcome: Outcome
    started_ns: int
    ended_ns: int


class ComputeGpu:
    """One real device, as the server sees it; `start` begins its threads, `close` ends them.

    Args:
        executor: What runs a batch; used only by the compute thread, except for staging.
        profile: How long batches are expected to take.
        clock: The process's clock.
        wake: Called by the compute thread after each report.
        stager: Copies batches to the device ahead of time, in another thread; None if there is nothing
            to copy.
    """

    n_slots = 1

    def __init__(
        self,
        executor: Executor,
        profile: Profile,
        clock: Clock,
        wake: Callable[[], None],
        *,
        stager: Stager | None = None,
    ) -> None:
        self._executor = executor
        self._stager = stager
        self._profile = profile
        self._clock = clock
        self._wake = wake
        self._queue: GpuQueue[Directive] = GpuQueue()
        # Passed to the thread and not reported: batches of the queue, and those dropped from it.
        self._outstanding: deque[_Job] = deque()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._reports: SimpleQueue[_ThreadReport | BaseException] = SimpleQueue()
        self._prepared: SimpleQueue[BaseException | None] = SimpleQueue()
        # Daemons: a batch that never ends must not keep the process from ending.
        self._threads = [threading.Thread(target=self._compute, name="compute", daemon=True)]
        self._entrance = self._jobs
        if stager is not None:
            self._entrance = SimpleQueue()
            self._threads.append(threading.Thread(target=self._stage_all, name="staging", daemon=True))

    def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Start its threads; return once `prepare` has run in the one that will run batches.

        cuDNN keeps its choice of kernels for each thread: a model warmed up in another thread would
        be slow at every new shape.

        Raises:
            BaseException: Whatever `prepare` raised; no thread runs then.
        """
        compute, *others = self._threads
        self._prepare = prepare
        compute.start()
        error = self._prepared.get()
        if error is not None:
            compute.join()
            raise error
        for thread in others:
            thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """End the threads after the running batch, or abandon them after `timeout_s` seconds each."""
        for job in self._outstanding:
            job.is_dropped = True
        self._entrance.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def submit(self, order: Directive, received_ns: int, source: int = OWN) -> Refusal | None:
        """Pass a batch to the compute thread and return None, or why not: see `Gpus.submit`."""
        fault = fault_of(self._profile, order)
        if fault is not None:
            return fault
        batch = self._queue.take(order, received_ns, source)
        if batch is None:
            return FULL
        job = _Job(batch)
        self._outstanding.append(job)
        self._entrance.put(job)
        return None

    def next_event_ns(self) -> int | None:
        """Return None: the compute thread wakes the server."""
        return None

    def finish_due(self, now_ns: int) -> list[EndedBatch]:
        """Return the batches that the compute thread has reported, except those dropped before they ran.

        Raises:
            RuntimeError: The compute thread ended with an error.
        """
        found = []
        while not self._reports.empty():
            report = self._reports.get()
            if isinstance(report, BaseException):
                raise RuntimeError("the compute thread ended") from report
            job = self._outstanding.popleft()
            assert job is report.job, "one thread reports in the order of submission"
            if job.batch is self._queue.running:
                found.append(self._ended(report, now_ns))
        return found

    def report(self, slot: int, now_ns: int, source: int = OWN) -> QueueReport:
        """Return the device's report to the router of a source as of `now_ns`."""
        assert slot == 0, "a compute process has one GPU"
        return self._queue.report(now_ns, source)

    def running(self, slot: int) -> Running | None:
        """Return what runs on the device; None if it is idle."""
        assert slot == 0, "a compute process has one GPU"
        return running_of(self._queue.running, self._profile)

    def forget_held(self, source: int = OWN) -> int:
        """Make the thread skip what it has not started of a source; return how many batches that is."""
        for job in self._outstanding:
            if job.batch.source == source:
                job.is_dropped = True
        return len(self._queue.forget_held(source))

    def is_idle(self) -> bool:
        """Return whether nothing is outstanding."""
        return not self._outstanding

    def _ended(self, report: _ThreadReport, now_ns: int) -> EndedBatch:
        batch = report.job.batch
        self._queue.end(report.ended_ns)
        after = self._queue.report(now_ns, batch.source)
        return end_of(batch, report.outcome, after, report.started_ns, report.ended_ns)

    def _compute(self) -> None:
        """Prepare, then run batches until `close`. The thread's outermost loop."""
        try:
            self._prepare()
        except BaseException as error:  # noqa: BLE001  raised again by `start`
            self._prepared.put(error)
            return
        self._prepared.put(None)
        try:
            while (job := self._jobs.get()) is not None:
                self._reports.put(self._run_job(job))
                self._wake()
        except BaseException as error:  # noqa: BLE001  raised again by the server's thread
            self._reports.put(error)
            self._wake()

    def _run_job(self, job: _Job) -> _ThreadReport:
        started_ns = self._clock.now_ns()
        # The report keeps the job, and must not keep its staged batch.
        staged, job.staged = job.staged, None
        ran = False

        def run_staged() -> npt.NDArray[Any]:
            nonlocal ran
            ran = True
            assert self._stager is not None, "it staged this"
            return self._stager.run(job.batch.order.subnet, staged)

        try:
            if job.is_dropped:
                return _ThreadReport(
                    job, refused(job.batch.order, Status.CANCELLED, "dropped"), started_ns, started_ns
                )
            outcome = run_batch(
                self._executor,
                job.batch.order,
                started_ns - job.batch.received_ns,
                None if staged is None else run_staged,
            )
            return _ThreadReport(job, outcome, started_ns, self._clock.now_ns())
        finally:
            if staged is not None and not ran:
                assert self._stager is not None, "it staged this"
                self._stager.discard(staged)

    def _stage_all(self) -> None:
        """Stage batches in order until `close`. The staging thread's outermost loop."""
        try:
            while (job := self._entrance.get()) is not None:
                if not job.is_dropped:
                    job.staged = self._staged(job.batch.order)
                self._jobs.put(job)
        except BaseException as error:  # noqa: BLE001  raised again by the server's thread
            self._reports.put(error)
            self._wake()
        self._jobs.put(None)

    def _staged(self, directive: Directive) -> Any:
        """Return the staged batch; None if one of its queries will be refused, or there is no room.

        Such a batch runs from host memory, where each query gets its own answer.
        """
        assert self._stager is not None, "this thread runs only where there is one"
        spec = self._executor.input_spec
        if any(size != spec.n_bytes for size in map(len, directive.payload_list())):
            return None
        try:
            return self._stager.stage(_where_they_lie(spec, directive))
        except Exception:  # noqa: BLE001  it will be raised again when the batch runs, query by query
            return None
