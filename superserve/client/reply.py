"""The outcome of a query: a Reply or an error, made from its group of RESULTS when it is first read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from superserve.errors import (
    CancelledQueryError,
    DrainingError,
    ExpiredError,
    InfeasibleError,
    InvalidQueryError,
    ModelFailedError,
    OverloadedError,
    QueryError,
    WorkerLostError,
)
from superserve.wire import HAS_OUTPUT, Status

if TYPE_CHECKING:
    from superserve.subnet import TensorSpec
    from superserve.wire import Group

MS = 1_000_000

ERRORS: dict[int, type[QueryError]] = {
    Status.EXPIRED: ExpiredError,
    Status.INFEASIBLE: InfeasibleError,
    Status.OVERLOADED: OverloadedError,
    Status.FAILED: ModelFailedError,
    Status.WORKER_LOST: WorkerLostError,
    Status.INVALID: InvalidQueryError,
    Status.CANCELLED: CancelledQueryError,
    Status.DRAINING: DrainingError,
}
"""The error of each status that has no output."""

_HAS_OUTPUT = tuple(int(status) for status in HAS_OUTPUT)
_LATE = int(Status.LATE)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Where a query's time went, in milliseconds, as router and worker measured it."""

    queued_ms: float
    to_start_ms: float
    executing_ms: float
    returning_ms: float


@dataclass(slots=True)
class Reply:
    """An answer with an output.

    Attributes:
        output: A read-only array of the model's output dtype and shape, or bytes if the model has no
            spec. Queries that were answered together share its memory: copy it to keep it for long.
        is_late: It arrived after its deadline.
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


class Answers:
    """One group of RESULTS, kept as received until a query's share of it is read.

    Args:
        group: The group, as decoded.
        subnet: Name of the subnet that served it.
        spec: The model's output; None if unknown.
        arrived_ns: When it arrived, by this process's clock.
    """

    __slots__ = (
        "_arrived_ns", "_ends", "_group", "_has_output", "_last_timeline", "_rows", "_spec", "_subnet",
        "_waits_us",
    )  # fmt: skip

    def __init__(self, group: Group, subnet: str, spec: TensorSpec | None, arrived_ns: int) -> None:
        self._group = group
        self._subnet = subnet
        self._spec = spec
        self._arrived_ns = arrived_ns
        self._has_output = group.status in _HAS_OUTPUT
        self._rows: Any = None
        self._ends: list[int] | None = None
        self._waits_us: list[int] | None = None
        self._last_timeline: Timeline | None = None

    def outcome(self, i: int, submitted_ns: int) -> Reply | QueryError:
        """Return the outcome of query `i` of the group: its reply, or the error with the reason."""
        if not self._has_output:
            return self._error(i)
        group = self._group
        if self._rows is None:
            self._rows = self._arrays()
        output = self._alone(i) if self._rows is False else self._rows[i, ...]
        timeline = self._timeline(self._queued_ms(i))
        latency_ms = (self._arrived_ns - submitted_ns) / MS
        is_late = group.status == _LATE
        return Reply(output, is_late, self._subnet, group.accuracy, group.batch_size, timeline, latency_ms)

    def _arrays(self) -> Any:
        """Return all outputs as one array, (count, *shape); False if they do not all have its size."""
        group, spec = self._group, self._spec
        if spec is None or group.output_bytes != spec.n_bytes:
            return False
        rows = np.frombuffer(group.output, spec.dtype).reshape(group.count, *spec.shape)
        rows.flags.writeable = False
        return rows

    def _alone(self, i: int) -> Any:
        """Return output `i` of a group whose outputs differ in size.

        If a query of the batch failed, its empty output is among full ones.
        """
        part, spec = self._part(i), self._spec
        if spec is None or len(part) != spec.n_bytes:
            return part
        return np.ndarray(spec.shape, spec.dtype, part)  # read-only, as bytes are

    def _timeline(self, queued_ms: float) -> Timeline:
        """Return the timeline for a wait of `queued_ms`; queries that arrived together share one object."""
        last = self._last_timeline
        if last is None or last.queued_ms != queued_ms:
            group = self._group
            self._last_timeline = last = Timeline(
                queued_ms, group.to_start_ns / MS, group.executing_ns / MS, group.returning_ns / MS
            )
        return last

    def _queued_ms(self, i: int) -> float:
        group = self._group
        if group.queued_us is None:
            return group.queued_ns / MS
        if self._waits_us is None:
            self._waits_us = memoryview(group.queued_us).cast("I").tolist()
        return self._waits_us[i] / 1000

    def _error(self, i: int) -> QueryError:
        group = self._group
        reason = self._part(i) if group.lengths is not None else bytes(group.output)
        return ERRORS[group.status](reason.decode(errors="replace") or Status(group.status).name)

    def _part(self, i: int) -> bytes:
        """Return the bytes of query `i` from the group's buffer."""
        group = self._group
        view = memoryview(group.output)
        if group.lengths is None:
            each = group.output_bytes
            return bytes(view[i * each : (i + 1) * each])
        if self._ends is None:
            self._ends = [0, *accumulate(memoryview(group.lengths).cast("I").tolist())]
        return bytes(view[self._ends[i] : self._ends[i + 1]])
