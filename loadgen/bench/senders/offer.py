"""Offer a Poisson schedule one query at a time, from sender processes, and gather what came of it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson
import psutil  # type: ignore[import-untyped]  # it has no stubs

from loadgen.bench.senders.sender import COLUMNS, SinglePlan
from loadgen.results.result import NoiseProbe, quantile_ns
from superserve.clock import MS
from superserve.errors import ProcessError
from superserve.roles.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from superserve.roles.processes import RoleProcess

_START_AFTER_NS = 300 * MS
_OVERTIME_S = 10.0
"""How long after its last possible answer a sender may take to write its columns."""


@dataclass(frozen=True, slots=True)
class Offered:
    """What became of a schedule.

    Attributes:
        due_ns: Instants counted from the start, ascending, shape (n_queries,).
        sent_ns: Likewise, -1 where it did not happen.
        answered_ns: Likewise.
        noise_ns: p99.9 of the noise probe's lateness.
        server_cpu_s: CPU time that the measured process took.
    """

    due_ns: npt.NDArray[np.int64]
    sent_ns: npt.NDArray[np.int64]
    answered_ns: npt.NDArray[np.int64]
    noise_ns: int
    server_cpu_s: float

    @property
    def latency_ns(self) -> npt.NDArray[np.int64]:
        """From due to answered, of the queries that were answered."""
        return (self.answered_ns - self.due_ns)[self.answered_ns >= 0]


def offer_singly(
    plan: SinglePlan, due_ns: npt.NDArray[np.int64], *, n_senders: int, server_pid: int | None = None
) -> Offered:
    """Deal the schedule out to `n_senders` processes and run it.

    Args:
        plan: What each sender does; its name and folder are filled in here.
        due_ns: Offsets from the start, ascending.
        n_senders: Sender processes.
        server_pid: The process whose CPU time is wanted.

    Raises:
        ProcessError: A sender failed, or did not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="superserve-bench-") as folder, ProcessGroup() as group:
        plans = [replace(plan, name=f"single-{i}", folder=folder) for i in range(n_senders)]
        for i, one in enumerate(plans):
            np.save(one.path("due_ns"), due_ns[i::n_senders])
            path = Path(folder) / f"{one.name}.json"
            path.write_bytes(orjson.dumps(asdict(one)))
            group.start(one.name, ["-m", "loadgen.bench.senders.sender", str(path)])
        group.wait_ready(30.0)
        server = None if server_pid is None else psutil.Process(server_pid)
        cpu_before_s = _cpu_s(server)
        probe = NoiseProbe()
        start_ns = _order_start(plans[0].start_path)
        probe.start()
        last_s = (int(due_ns[-1]) + plan.slo_ns + plan.grace_ns) / 1e9
        try:
            _await_end(group.processes, last_s + _OVERTIME_S)
        finally:
            noise_ns = quantile_ns(probe.stop(), 999) or 0
        cpu_s = _cpu_s(server) - cpu_before_s
        columns = {what: _merged(plans, what, len(due_ns)) for what in COLUMNS}
    since = {what: np.where(column < 0, -1, column - start_ns) for what, column in columns.items()}
    return Offered(due_ns, since["sent_ns"], since["answered_ns"], noise_ns, cpu_s)


def _order_start(path: Path) -> int:
    """Write the instant at which all begin, whole at once; return it."""
    start_ns = time.monotonic_ns() + _START_AFTER_NS
    draft = path.with_suffix(".draft")
    draft.write_text(str(start_ns))
    draft.rename(path)
    return start_ns


def _await_end(processes: Sequence[RoleProcess], timeout_s: float) -> None:
    give_up_s = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if time.monotonic() > give_up_s:
            raise ProcessError(f"senders: expected to end within {timeout_s:.0f} s")
        time.sleep(0.02)
    for process in processes:
        if process.poll() != 0:
            raise ProcessError(f"{process.name} ended with exit code {process.poll()}: {process.tail()}")


def _cpu_s(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


def _merged(plans: Sequence[SinglePlan], what: str, n: int) -> npt.NDArray[np.int64]:
    merged = np.empty(n, np.int64)
    for i, plan in enumerate(plans):
        merged[i :: len(plans)] = np.load(plan.path(what))
    return merged
