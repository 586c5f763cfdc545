"""Offer a schedule one query at a time, from sender processes, and collect the outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it has no stubs

from loadgen.live.coordinator import Offering, coordinated
from loadgen.results.result import quantile_ns

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from loadgen.live.records import SenderPlan
    from loadgen.traces.trace import Trace


@dataclass(frozen=True, slots=True)
class Offered:
    """The outcome of a schedule.

    Attributes:
        due_ns: Instants counted from the start, ascending, shape (n_queries,).
        sent_ns: Instants of the same kind; -1 if it was not sent.
        answered_ns: Instants of the same kind; -1 if it was not answered.
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


def offer_singly(plan: SenderPlan, trace: Trace, *, n_senders: int, server_pid: int | None = None) -> Offered:
    """Split the trace among `n_senders` processes and run it.

    Args:
        plan: What each sender does.
        trace: When queries are due.
        n_senders: Sender processes.
        server_pid: The process whose CPU time is measured.

    Raises:
        ProcessError: A sender failed.
    """
    with coordinated(plan, Offering(trace, n_senders), module="loadgen.bench.senders.sender") as senders:
        cpu_before_s = _cpu_s(server_pid)
        senders.start()
        senders.follow()
        cpu_s = _cpu_s(server_pid) - cpu_before_s
        columns = senders.columns()
    noise_ns = quantile_ns(senders.noise[1], 999) or 0
    return Offered(trace.due_ns, columns["sent_ns"], columns["answered_ns"], noise_ns, cpu_s)


def _cpu_s(pid: int | None) -> float:
    times = None if pid is None else psutil.Process(pid).cpu_times()
    return 0.0 if times is None else float(times.user + times.system)
