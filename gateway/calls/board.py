"""Counters that the processes of a gateway share: each writes a row of its own, and any reads all.

A row is 64-bit numbers in a mapped file. One process writes it, so nothing is locked; a reader sees each
number whole, and different ones at slightly different instants. A process that is started again keeps its
row's counts: Prometheus and callers that subtract see no counter fall.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from typing import TYPE_CHECKING

from gateway.v2.describe import ModelTotals, Total
from superserve.roles.exposition import LATENCY_BOUNDS_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gateway.v2.verdicts import RefusalKind
    from superserve.client import Reply

STATUSES = (200, 400, 401, 404, 405, 408, 413, 415, 417, 429, 431, 499, 500, 502, 503, 504)
_SPANS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cancelled")
_NUMBERS = (
    *(f"status_{status}" for status in STATUSES),
    "success_n", "fail_n", "cancelled_n", *(f"{name}_ns" for name in _SPANS),
    "inferences", "execution_parts", "last_ms", "connections", "connections_total", "bytes_in", "bytes_out",
    "in_flight", "is_connected", "ignored_traceparents", "latency_ns",
    *(f"latency_{i}" for i in range(len(LATENCY_BOUNDS_S) + 1)),
)  # fmt: skip
FIELDS = {name: at for at, name in enumerate(_NUMBERS)}
_WIDTH = 128
"""Numbers of a row: rows of two processes share no cache line."""
UNKNOWN = 2**64 - 1
_PARTS = 1_000_000
"""A row of a request counts as this many parts of an execution, over its batch's size."""
_HEADER = _WIDTH
_WORKERS_AT = 0
_BOUNDS_NS = tuple(int(bound * 1e9) for bound in LATENCY_BOUNDS_S)
_STATUS_AT = {status: FIELDS[f"status_{status}"] for status in STATUSES}
(
    _SUCCESS_N, _SUCCESS_NS, _QUEUE_NS, _INPUT_NS, _INFER_NS, _OUTPUT_NS, _INFERENCES, _EXECUTION_PARTS,
    _LAST_MS, _LATENCY_NS, _FIRST_BUCKET,
) = (
    FIELDS[name] for name in (
        "success_n", "success_ns", "queue_ns", "compute_input_ns", "compute_infer_ns", "compute_output_ns",
        "inferences", "execution_parts", "last_ms", "latency_ns", "latency_0",
    )
)  # fmt: skip
assert len(FIELDS) <= _WIDTH, "a row is wide enough"


class Board:
    """The shared counters.

    Args:
        path: The file; made by `Board.make`.
        row: This process's row; None only reads.
    """

    def __init__(self, path: Path, row: int | None = None) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._all = memoryview(self._map).cast("Q")
        start = 0 if row is None else _HEADER + row * _WIDTH
        self._row = self._all[start : start + _WIDTH]
        self.n_rows = (len(self._all) - _HEADER) // _WIDTH
        if row is not None:
            for name in ("connections", "in_flight", "is_connected"):  # a process before this one left them
                self.put(name, 0)

    @staticmethod
    def make(path: Path, n_rows: int) -> None:
        """Make the file, all counts 0, for this user alone."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(fd, 8 * (_HEADER + n_rows * _WIDTH))
            os.pwrite(fd, UNKNOWN.to_bytes(8, "little"), 8 * _WORKERS_AT)
        finally:
            os.close(fd)

    # --- one process writes --------------------------------------------------------------

    def add(self, name: str, n: int = 1) -> None:
        """Add to one of this process's numbers."""
        self._row[FIELDS[name]] += n

    def put(self, name: str, value: int) -> None:
        """Set one of this process's numbers."""
        self._row[FIELDS[name]] = value

    def count_status(self, status: int) -> None:
        """Count an answer by its HTTP status, or by the one that its gRPC code stands for."""
        self._row[_STATUS_AT.get(status, _STATUS_AT[500])] += 1

    def count_success(self, replies: Sequence[Reply], took_ns: int, now_ms: int) -> None:
        """Count a request whose rows all have an output."""
        row = self._row
        first = replies[0] if len(replies) == 1 else max(replies, key=_took_ms)
        timeline = first.timeline
        row[_SUCCESS_NS] += took_ns
        row[_QUEUE_NS] += int(timeline.queued_ms * 1e6)
        row[_INPUT_NS] += int(timeline.to_start_ms * 1e6)
        row[_INFER_NS] += int(timeline.executing_ms * 1e6)
        row[_OUTPUT_NS] += int(timeline.returning_ms * 1e6)
        row[_SUCCESS_N] += 1  # the others' numbers are the same: see `totals`
        row[_INFERENCES] += len(replies)
        for one in replies:
            row[_EXECUTION_PARTS] += _PARTS // (one.batch_size or 1)
        row[_LAST_MS] = now_ms
        self._observe(took_ns)

    def count_failure(self, verdict: RefusalKind, took_ns: int) -> None:
        """Count a request that got no output; one whose caller left counts as cancelled."""
        what = "cancelled" if verdict.http == 499 else "fail"
        self.add(f"{what}_n")
        self.add(f"{what}_ns", took_ns)
        if what == "fail":
            self._observe(took_ns)

    def _observe(self, took_ns: int) -> None:
        row = self._row
        row[_FIRST_BUCKET + bisect_left(_BOUNDS_NS, took_ns)] += 1
        row[_LATENCY_NS] += took_ns

    def set_workers(self, n_ready: int | None) -> None:
        """Set how many GPUs are ready; None if the router did not say."""
        self._all[_WORKERS_AT] = UNKNOWN if n_ready is None else n_ready

    # --- any process reads ---------------------------------------------------------------

    @property
    def workers_ready(self) -> int | None:
        """How many GPUs are ready, as the router last said; None if unknown."""
        n = self._all[_WORKERS_AT]
        return None if n == UNKNOWN else n

    def get(self, row: int, name: str) -> int:
        """Return a number of a row."""
        return self._all[_HEADER + row * _WIDTH + FIELDS[name]]

    def sum(self, name: str, rows: Sequence[int] | None = None) -> int:
        """Return the sum of a number over some rows; over all if None."""
        return sum(self.get(row, name) for row in (range(self.n_rows) if rows is None else rows))

    def totals(self) -> ModelTotals:
        """Return what all processes have served."""
        n = {name: self.sum(f"{name}_n") for name in ("success", "fail", "cancelled")}
        spans = {name: Total(n.get(name, n["success"]), self.sum(f"{name}_ns")) for name in _SPANS}
        return ModelTotals(
            **spans,
            inferences=self.sum("inferences"),
            executions=-(-self.sum("execution_parts") // _PARTS),
            last_ms=max(self.get(row, "last_ms") for row in range(self.n_rows)),
        )

    def latencies(self, rows: Sequence[int]) -> tuple[tuple[int, ...], float]:
        """Return the counts by bucket of `LATENCY_BOUNDS_S` over some rows, and the sum in ns."""
        counts = tuple(self.sum(f"latency_{i}", rows) for i in range(len(_BOUNDS_NS) + 1))
        return counts, float(self.sum("latency_ns", rows))


def _took_ms(reply: Reply) -> float:
    return reply.timeline.queued_ms + reply.timeline.executing_ms
