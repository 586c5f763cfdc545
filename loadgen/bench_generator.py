"""`generator_qps`: the highest rate that the load generator sends on schedule to a null sink."""

from __future__ import annotations

from typing import Any

from loadgen.calibrate import null_sink
from loadgen.rate_search import Probe
from loadgen.run import RunSettings, run_trace
from loadgen.stats import quantile_ns
from loadgen.trace import load_trace
from superserve.clock import MS

N_SENDERS = 2
LAG_P99_NS = MS
"""A rate is on schedule if all was sent, and 99 % within this of the instant it was due."""
MUST_QPS = 200_000.0
_SLO_NS = 36 * MS
_GRACE_NS = 1_000 * MS
_WARM_UP_S = 0.5


def conditions() -> dict[str, Any]:
    """Return how it is measured, in words and numbers."""
    return {
        "senders": N_SENDERS, "payload_bytes": 64, "lag_p99_ms": LAG_P99_NS / MS,
        "arrivals": "poisson, open loop", "to": "a null sink, which answers every message at once",
    }  # fmt: skip


def offer(rate_qps: float, seconds: float) -> Probe:
    """Send at a rate; the first half second, in which sockets and caches warm up, does not count."""
    trace = load_trace(f"poisson:rate={rate_qps:.6g}", duration_s=_WARM_UP_S + seconds)
    with null_sink() as endpoint:
        run = run_trace(trace, RunSettings(_SLO_NS, N_SENDERS, grace_ns=_GRACE_NS), endpoint)
    counts = run.columns["due_ns"] >= _WARM_UP_S * 1e9
    sent_ns, due_ns = run.columns["sent_ns"][counts], run.columns["due_ns"][counts]
    was_sent = sent_ns >= 0
    lag_ns = (sent_ns - due_ns)[was_sent]
    p99_ns, n_unsent = quantile_ns(lag_ns, 990) or 0, int((~was_sent).sum())
    soon = float((lag_ns <= LAG_P99_NS).sum() / len(sent_ns))
    holds = n_unsent == 0 and p99_ns <= LAG_P99_NS
    return Probe(rate_qps, soon, holds, run.noise_p99_9_ns or 0, p99_ns, n_unsent)
