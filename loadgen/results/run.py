"""What one run measured: its result, and the columns behind it, an entry for each query."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from superserve.wire import Status

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from loadgen.results.result import RunResult


@dataclass(slots=True)
class Run:
    """Everything measured: the result file's figures and the columns behind them.

    Attributes:
        columns: Per query of the trace, in its order: due_ns, sent_ns, answered_ns (ns since
            the start, -1 if it did not happen), status, subnet, batch_size, accuracy, queued_ns,
            executing_ns, payload (index), and outputs (n, n_bytes) if they were kept.
        reasons: For each status without an output, one of the router's reasons.
        router_cpu_s: CPU time that the router took during the run; NaN if it ended before it was asked.
        n_duplicates: Answers beyond the first to a query; always 0 unless something is broken.
        noise_p99_9_ns: The noise probe's p99.9; None without a probe.
        noise: When the probe woke, from the start, and how late: ns, ascending by instant.
    """

    result: RunResult
    columns: dict[str, npt.NDArray[Any]]
    subnets: list[tuple[str, float]]
    reasons: dict[str, str] = field(default_factory=dict)
    router_cpu_s: float = math.nan
    n_duplicates: int = 0
    noise_p99_9_ns: int | None = None
    noise: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None


def in_time(
    columns: dict[str, npt.NDArray[Any]], slo_ns: int | npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return which queries were answered with an output within the SLO of their due instant, by our clock.

    `slo_ns` is one for all queries, or one for each, shape (n,).
    """
    has_output = columns["status"] <= Status.LATE
    is_soon: npt.NDArray[np.bool_] = columns["answered_ns"] - columns["due_ns"] <= slo_ns
    return has_output & is_soon
