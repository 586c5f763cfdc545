"""Columns of runs that never were: any number of queries, ended in any way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.live.records import UNANSWERED
from loadgen.live.run import summarise
from loadgen.results.run import Run
from loadgen.traces.trace import Trace
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

MS = 1_000_000
SLO_NS = 36 * MS
SUBNETS = [("small", 70.0), ("middle", 75.5), ("large", 80.0)]
UNSENT = 256
"""An end of a query that no status says."""


def columns_of(
    n: int, *, duration_ns: int, ends: Sequence[int] = (Status.OK,), seed: int = 0
) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of n queries due at random, whose ends are drawn from `ends`."""
    rng = np.random.default_rng(seed)
    due_ns = np.sort(rng.integers(0, duration_ns, n))
    end = rng.choice(np.array(ends), n)
    was_sent = end != UNSENT
    was_answered = was_sent & (end != UNANSWERED)
    sent_ns = due_ns + rng.integers(0, MS, n)
    is_late = rng.random(n) < 0.1
    answered_ns = sent_ns + np.where(is_late, 40 * MS, 0) + rng.integers(2 * MS, 30 * MS, n)
    subnet = rng.integers(0, len(SUBNETS), n)
    return {
        "due_ns": due_ns,
        "sent_ns": np.where(was_sent, sent_ns, -1),
        "answered_ns": np.where(was_answered, answered_ns, -1),
        "status": np.where(was_sent, end, UNANSWERED).astype(np.uint8),
        "subnet": subnet.astype(np.uint16),
        "batch_size": rng.integers(1, 17, n).astype(np.uint16),
        "accuracy": np.array([accuracy for _, accuracy in SUBNETS])[subnet].astype(np.float32),
        "queued_ns": rng.integers(0, 20 * MS, n),
        "executing_ns": np.full(n, 2 * MS),
    }


def noise_of(duration_ns: int, *, late_ns: int = MS) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return what a noise probe would have seen, a moment before and after the run too."""
    rng = np.random.default_rng(5)
    woke_ns = np.arange(-50 * MS, duration_ns + 50 * MS, 2 * MS)
    return woke_ns, rng.integers(0, late_ns, len(woke_ns))


def run_of(
    n: int,
    *,
    duration_s: float = 2.0,
    ends: Sequence[int] = (Status.OK,),
    policy: str = "slackfit",
    seed: int = 0,
) -> tuple[Run, Trace]:
    """Return a run of n queries, and its trace."""
    duration_ns = int(duration_s * 1e9)
    columns = columns_of(n, duration_ns=duration_ns, ends=ends, seed=seed)
    trace = Trace("drawn", columns["due_ns"], duration_ns, "drawn for a test")
    noise = noise_of(duration_ns)
    noise_ns = int(np.sort(noise[1])[-1])
    result = summarise(trace, SLO_NS, policy, columns, SUBNETS, noise_ns)
    reasons = {Status(end).name: f"why {Status(end).name}" for end in ends if 1 < end < len(Status)}
    return Run(result, columns, list(SUBNETS), reasons, noise_p99_9_ns=noise_ns, noise=noise), trace
