"""Client: submit a query, await its reply. Thread-safe; one I/O thread behind it.

    with Client("tcp://127.0.0.1:5555") as client:
        reply = client.infer(image, slo_ms=36)              # blocks; raises a QueryError
        future = client.submit(image, slo_ms=36)            # a concurrent.futures.Future
        print(future.result().output, future.result().subnet)

What has gathered since the last send goes out as one message, so a busy process pays for
few messages and an idle one waits for nobody. Every future ends: with a Reply (on time, or
marked late), with the router's refusal, or with an UnansweredError.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import itertools
import os
import threading
import time
from array import array
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from superserve.connection import Connection, no_router
from superserve.errors import (
    CancelledQueryError,
    DrainingError,
    ExpiredError,
    InfeasibleError,
    InvalidQueryError,
    ModelFailedError,
    OverloadedError,
    QueryError,
    SuperServeError,
    UnansweredError,
    WorkerLostError,
)
from superserve.sockets import ZERO_COPY_BYTES, Waiter
from superserve.wire import HAS_OUTPUT, MAX_QUERIES, MAX_SLACK_NS, VARIED, Queries, Status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from superserve.subnet import TensorSpec
    from superserve.wire import Group

MS = 1_000_000
_TICK_NS = 50 * MS
_GRACE_NS = 1_000 * MS
"""How long past its deadline a query waits for a LATE answer, while a router is there."""

_CLOSED = "the client was closed before the answer came"

_ERRORS: dict[int, type[QueryError]] = {
    Status.EXPIRED: ExpiredError,
    Status.INFEASIBLE: InfeasibleError,
    Status.OVERLOADED: OverloadedError,
    Status.FAILED: ModelFailedError,
    Status.WORKER_LOST: WorkerLostError,
    Status.INVALID: InvalidQueryError,
    Status.CANCELLED: CancelledQueryError,
    Status.DRAINING: DrainingError,
}


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where a query's time went, in milliseconds, as the router and the worker measured it."""

    queued_ms: float
    to_start_ms: float
    executing_ms: float
    returning_ms: float


@dataclass(slots=True)
class Reply:
    """An answer with an output.

    Attributes:
        output: An array of the model's output dtype and shape, or bytes where the model does not say.
        is_late: It came after its deadline.
        subnet: Name of the subnet that served it.
        accuracy: That subnet's profiled accuracy, percent.
        batch_size: Queries that shared its batch.
        timeline: Where the time went.
        latency_ms: From submit to reply, by this process's clock.
    """

    output: Any
    is_late: bool
    subnet: str
    accuracy: float
    batch_size: int
    timeline: Timeline
    latency_ms: float


class QueryFuture(concurrent.futures.Future[Reply]):
    """The future of one query. `cancel()` also tells the router, which then drops it unrun."""

    def __init__(
        self, client: Client, query_id: int, payload: Any, deadline_ns: int, submitted_ns: int
    ) -> None:
        super().__init__()
        self.query_id = query_id
        self.payload = payload
        self.deadline_ns = deadline_ns
        self.submitted_ns = submitted_ns
        self.min_accuracy = 0.0
        self.priority = 0
        self._client = client

    def cancel(self) -> bool:
        """Cancel the query wherever it is; False if it has its answer already."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self._client._cancel(self.query_id)
        return is_cancelled


class Client:
    """A connection to a router that any number of threads may share.

    Args:
        endpoint: The router's client endpoint, such as tcp://10.0.0.1:5555.
        max_outstanding: Queries without an answer, at most; `submit` then raises OverloadedError.
        max_bytes: Payload bytes without an answer, at most; likewise.
        connect_timeout_s: How long `connect` waits for a router.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        max_outstanding: int = 20_000,
        max_bytes: int = 1 << 30,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.endpoint = endpoint
        self.max_outstanding = max_outstanding
        self.max_bytes = max_bytes
        self.connect_timeout_s = connect_timeout_s
        self._ids = itertools.count(1)
        self._submitted: deque[QueryFuture] = deque()
        self._cancelled: deque[int] = deque()
        self._pending: dict[int, QueryFuture] = {}
        self._timeouts: list[tuple[int, int]] = []
        self._held_bytes = 0
        self._is_asleep = False
        self._is_closing = False
        self._epoch: int | None = None
        self._model: dict[str, Any] | None = None
        self._input: TensorSpec | None = None
        self._output: TensorSpec | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._welcomed = threading.Event()
        self._ended = threading.Event()
        self._pid = os.getpid()
        self._failure: BaseException | None = None

    # --- for applications ---------------------------------------------------------------

    def __enter__(self) -> Client:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Start the I/O thread and wait until a router has said WELCOME.

        Raises:
            UnansweredError: No router answered within `connect_timeout_s`.
            ConfigError: The endpoint is malformed.
        """
        self._start()
        if not self._welcomed.wait(self.connect_timeout_s):
            self.close()
            raise UnansweredError(no_router(self.endpoint))
        if self._failure is not None:
            raise SuperServeError(f"client: {self._failure}") from self._failure

    def infer(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0
    ) -> Reply:
        """Submit one query and wait for its reply. See `submit`.

        Raises:
            QueryError: It got no output; the class and the message say why.
        """
        return self.submit(payload, slo_ms=slo_ms, min_accuracy=min_accuracy, priority=priority).result()

    def submit(
        self, payload: Any, *, slo_ms: float, min_accuracy: float | None = None, priority: int = 0
    ) -> QueryFuture:
        """Submit one query.

        Args:
            payload: An array of the model's input dtype and shape, or its bytes in C order. An
                array is not copied before it is sent: do not write to it until then.
            slo_ms: From now until the answer is worthless, milliseconds.
            min_accuracy: Least profiled accuracy, percent, that the serving subnet must have.
            priority: Class 0 to 255, for policies that see classes.

        Returns:
            A future; its result is a Reply, its exception a QueryError.

        Raises:
            InvalidQueryError: The payload or an option is not what the model takes.
            OverloadedError: `max_outstanding` or `max_bytes` is reached.
            DrainingError: The client is closed.
        """
        buffer = self._checked(payload)
        slo_ns = _checked_slo(slo_ms)
        floor = 0.0 if min_accuracy is None else _checked_accuracy(min_accuracy)
        priority = _checked_priority(priority)
        if self._thread is None or os.getpid() != self._pid:
            self._start()
        if self._is_closing:
            raise DrainingError("the client is closed: make a new one")
        self._make_room(len(buffer))
        now_ns = time.monotonic_ns()
        future = QueryFuture(self, next(self._ids), buffer, now_ns + slo_ns, now_ns)
        future.min_accuracy, future.priority = floor, priority
        self._submitted.append(future)
        if self._ended.is_set():  # meanwhile: the I/O thread may have looked there for the last time
            _settle(future, None, CancelledQueryError(_CLOSED))
        elif self._is_asleep:
            self._wake()
        return future

    def close(self) -> None:
        """Stop the I/O thread; queries without an answer end as CancelledQueryError."""
        if self._thread is None or self._is_closing or os.getpid() != self._pid:
            self._is_closing = True
            return
        self._is_closing = True
        self._wake()
        if threading.current_thread() is self._thread:
            return  # called by a future's callback: the thread ends by itself
        self._thread.join()
        os.close(self._wake_fd)
        atexit.unregister(self.close)

    @property
    def outstanding(self) -> int:
        """Queries without an answer."""
        return len(self._pending) + len(self._submitted)

    # --- checks -------------------------------------------------------------------------

    def _checked(self, payload: Any) -> Any:
        if isinstance(payload, np.ndarray):
            if self._input is not None:
                self._input.check(payload)
            if payload.dtype.hasobject:
                raise InvalidQueryError("input: expected an array of numbers, got objects")
            return np.ascontiguousarray(payload).reshape(-1).view(np.uint8).data
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise InvalidQueryError(f"input: expected a NumPy array or bytes, got {type(payload).__name__}")
        if isinstance(payload, memoryview) and not payload.c_contiguous:
            raise InvalidQueryError("input: expected bytes in C order, got a memoryview with gaps")
        buffer = payload if isinstance(payload, bytes) else memoryview(payload).cast("B")
        if self._input is not None and len(buffer) != self._input.n_bytes:
            raise InvalidQueryError(
                f"input: expected {self._input.n_bytes} bytes ({self._input.dtype} "
                f"{self._input.shape}), got {len(buffer)}"
            )
        return buffer

    def _make_room(self, n_bytes: int) -> None:
        if self.outstanding >= self.max_outstanding:
            raise OverloadedError(
                f"max_outstanding: {self.outstanding} queries have no answer yet, of at most "
                f"{self.max_outstanding}: await some, or raise the bound"
            )
        if self._held_bytes + n_bytes > self.max_bytes:
            raise OverloadedError(
                f"max_bytes: {self._held_bytes} payload bytes have no answer yet, of at most {self.max_bytes}"
            )
        with self._lock:
            self._held_bytes += n_bytes

    def _start(self) -> None:
        with self._lock:
            if os.getpid() != self._pid:
                raise SuperServeError(
                    "this Client was made before a fork: its thread did not come along. "
                    "Make one Client in each process, after the fork"
                )
            if self._thread is not None:
                return
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
            connection = Connection(self.endpoint, context)
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(
                target=self._run, args=(connection,), name=f"superserve {self.endpoint}", daemon=True
            )
            self._thread.start()
            atexit.register(self.close)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _cancel(self, query_id: int) -> None:
        self._cancelled.append(query_id)
        if self._is_asleep:
            self._wake()

    # --- the I/O thread -----------------------------------------------------------------

    def _run(self, connection: Connection) -> None:
        """Serve until closed. Whatever ends it, no future is left waiting."""
        error: QueryError = CancelledQueryError(_CLOSED)
        try:
            waiter = Waiter((connection.socket,), (self._wake_fd,))
            while not self._is_closing:
                self._pass(connection, waiter)
        except BaseException as failure:
            self._failure = failure
            error = UnansweredError(f"the client's I/O thread failed: {failure!r}")
            raise
        finally:
            self._is_closing = True
            self._ended.set()
            self._welcomed.set()
            connection.close()
            while self._submitted:
                future = self._submitted.popleft()
                self._pending[future.query_id] = future
            for query_id in tuple(self._pending):
                self._end(query_id, error)

    def _pass(self, connection: Connection, waiter: Waiter) -> None:
        now_ns = time.monotonic_ns()
        connection.tick(now_ns)
        self._give_up(connection, now_ns)
        self._is_asleep = True
        if not self._submitted and not self._cancelled and not self._is_closing:
            waiter.wait(self._timeout_ns(now_ns))
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        self._is_asleep = False
        if self._submitted and connection.epoch is not None:
            self._send_submitted(connection)
        elif self._submitted:
            self._hold_submitted()
        if self._cancelled:
            self._send_cancelled(connection)
        for results in connection.receive():
            if connection.model is not self._model:
                self._on_model(connection)
            for group in results.groups:
                self._resolve(connection, group)
        if connection.epoch != self._epoch:
            self._on_epoch(connection)
        if connection.model is not self._model:
            self._on_model(connection)

    def _timeout_ns(self, now_ns: int) -> int:
        if self._timeouts:
            return min(_TICK_NS, max(0, self._timeouts[0][0] - now_ns))
        return _TICK_NS

    def _on_epoch(self, connection: Connection) -> None:
        """A router appeared, vanished or was replaced: send again what has slack left."""
        self._epoch = connection.epoch
        if connection.epoch is None:
            return
        self._on_model(connection)
        self._welcomed.set()
        now_ns = time.monotonic_ns()
        again = [future for future in self._pending.values() if future.deadline_ns > now_ns]
        if again:
            self._send(connection, again, resubmitted=True)

    def _on_model(self, connection: Connection) -> None:
        """The router has told what the model takes and gives: at WELCOME, or once a worker joined."""
        self._model = connection.model
        self._input, self._output = connection.spec("input"), connection.spec("output")

    def _take_submitted(self) -> list[QueryFuture]:
        futures = []
        submitted, pending, timeouts = self._submitted, self._pending, self._timeouts
        for _ in range(min(len(submitted), MAX_QUERIES)):
            future = submitted.popleft()
            pending[future.query_id] = future
            heappush(timeouts, (future.deadline_ns, future.query_id))
            futures.append(future)
        return futures

    def _hold_submitted(self) -> None:
        """No router yet: they are sent when one appears, or end at their deadline."""
        self._take_submitted()

    def _send_submitted(self, connection: Connection) -> None:
        self._send(connection, self._take_submitted(), resubmitted=False)

    def _send(self, connection: Connection, futures: list[QueryFuture], *, resubmitted: bool) -> None:
        large = [future for future in futures if len(future.payload) >= ZERO_COPY_BYTES]
        small = [future for future in futures if len(future.payload) < ZERO_COPY_BYTES] if large else futures
        for part, is_framed in ((small, False), (large, True)):
            if not part:
                continue
            message = _queries(part, connection.epoch or 0, is_framed=is_framed, resubmitted=resubmitted)
            if not connection.send_queries(message):
                # Gone, or stuck: say HELLO again. What still has slack when a WELCOME comes is sent then.
                connection.lose()
                return

    def _send_cancelled(self, connection: Connection) -> None:
        ids = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        for query_id in ids:
            self._forget(query_id)
        if connection.epoch is not None:
            connection.send_cancel(len(ids), array("Q", ids).tobytes())

    def _resolve(self, connection: Connection, group: Group) -> None:
        """Hand a group of answers to their futures."""
        ids = np.frombuffer(group.ids, "<u8").tolist()
        if group.status not in HAS_OUTPUT:
            parts: Sequence[Any] = [group.output] * group.count if group.lengths is None else _split(group)
            for query_id, part in zip(ids, parts, strict=True):
                self._end(query_id, _error(group.status, bytes(part).decode(errors="replace")))
            return
        now_ns = time.monotonic_ns()
        subnets, row = connection.subnets, group.subnet
        name = subnets[row][0] if row < len(subnets) else str(row)
        is_late = group.status == Status.LATE
        timelines = _timelines(group)
        for query_id, output, timeline in zip(ids, self._outputs(group), timelines, strict=True):
            future = self._forget(query_id)
            if future is None:
                continue  # answered, cancelled or given up before: the first end counts
            latency_ms = (now_ns - future.submitted_ns) / MS
            reply = Reply(output, is_late, name, group.accuracy, group.batch_size, timeline, latency_ms)
            _settle(future, reply, None)

    def _outputs(self, group: Group) -> Sequence[Any]:
        spec = self._output
        if spec is not None and group.output_bytes == spec.n_bytes:
            return np.frombuffer(group.output, spec.dtype).reshape(group.count, *spec.shape)  # type: ignore[return-value] # rows of an array
        return [bytes(part) for part in _split(group)]

    def _give_up(self, connection: Connection, now_ns: int) -> None:
        """End what has waited past its deadline: at once without a router, after a grace with one."""
        timeouts = self._timeouts
        while timeouts and timeouts[0][0] <= now_ns:
            at_ns, query_id = heappop(timeouts)
            future = self._pending.get(query_id)
            if future is None:
                continue
            if connection.epoch is not None and at_ns == future.deadline_ns:
                heappush(timeouts, (at_ns + _GRACE_NS, query_id))
            else:
                self._end(query_id, UnansweredError(self._why_unanswered(connection, query_id)))

    def _why_unanswered(self, connection: Connection, query_id: int) -> str:
        if connection.epoch is None:
            return f"query {query_id}: {no_router(self.endpoint)}"
        return f"query {query_id}: the router gave no answer within {_GRACE_NS // MS} ms of its deadline"

    def _forget(self, query_id: int) -> QueryFuture | None:
        future = self._pending.pop(query_id, None)
        if future is not None:
            with self._lock:
                self._held_bytes -= len(future.payload)
            future.payload = b""
        return future

    def _end(self, query_id: int, error: QueryError) -> None:
        future = self._forget(query_id)
        if future is not None:
            _settle(future, None, error)


def _settle(future: QueryFuture, reply: Reply | None, error: QueryError | None) -> None:
    try:
        if error is not None:
            future.set_exception(error)
        elif reply is not None:
            future.set_result(reply)
    except concurrent.futures.InvalidStateError:
        pass  # cancelled a moment ago: that was its end


def _queries(futures: Sequence[QueryFuture], epoch: int, *, is_framed: bool, resubmitted: bool) -> Queries:
    """Return one message for `futures`, whose slack is counted from now."""
    now_ns = time.monotonic_ns()
    ids = array("Q", [future.query_id for future in futures]).tobytes()
    slacks = array("q", [future.deadline_ns - now_ns for future in futures]).tobytes()
    payloads = [future.payload for future in futures]
    each = len(payloads[0])
    lengths = None
    if any(len(payload) != each for payload in payloads):
        lengths = array("I", map(len, payloads)).tobytes()
        each = VARIED
    accuracies = priorities = None
    if any(future.min_accuracy for future in futures):
        accuracies = array("f", [future.min_accuracy for future in futures]).tobytes()
    if any(future.priority for future in futures):
        priorities = bytes([future.priority for future in futures])
    return Queries(
        epoch, now_ns, len(futures), ids, slacks, each, payloads if is_framed else [b"".join(payloads)],
        is_framed, lengths, accuracies, priorities, resubmitted,
    )  # fmt: skip


def _split(group: Group) -> list[memoryview]:
    """Return the outputs of a group, one buffer each."""
    view = memoryview(group.output)
    if group.lengths is None:
        each = group.output_bytes
        return [view[i * each : (i + 1) * each] for i in range(group.count)]
    ends = np.cumsum(np.frombuffer(group.lengths, "<u4")).tolist()
    return [view[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _timelines(group: Group) -> list[Timeline]:
    """Return each query's timeline; queries that waited equally long share one."""
    rest = (group.to_start_ns / MS, group.executing_ns / MS, group.returning_ns / MS)
    if group.queued_us is None:
        return [Timeline(group.queued_ns / MS, *rest)] * group.count
    waits = memoryview(group.queued_us).cast("I").tolist()
    by_wait = {wait_us: Timeline(wait_us / 1000, *rest) for wait_us in set(waits)}
    return [by_wait[wait_us] for wait_us in waits]


def _error(status: int, reason: str) -> QueryError:
    kind = _ERRORS[status]
    return kind(reason or Status(status).name)


def _checked_slo(slo_ms: float) -> int:
    if not isinstance(slo_ms, int | float | np.number) or not 0 < slo_ms <= MAX_SLACK_NS / MS:
        raise InvalidQueryError(f"slo_ms: expected milliseconds above 0 and up to a day, got {slo_ms!r}")
    return int(slo_ms * MS)


def _checked_accuracy(min_accuracy: float) -> float:
    if not isinstance(min_accuracy, int | float | np.number) or not 0 <= min_accuracy <= 100:
        raise InvalidQueryError(f"min_accuracy: expected 0 to 100 percent, got {min_accuracy!r}")
    return float(min_accuracy)


def _checked_priority(priority: int) -> int:
    if not isinstance(priority, int) or not 0 <= priority <= 255:
        raise InvalidQueryError(f"priority: expected a class from 0 to 255, got {priority!r}")
    return priority
