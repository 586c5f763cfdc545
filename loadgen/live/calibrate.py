"""Calibration: the generator on its own, to see whether a run's lag is its fault or the cluster's.

The start of a trace is offered to a null sink (`loadgen.live.sink`) by the same senders, with the same
payloads, at the same rate as in the run that follows. Any lag there is the generator's or the machine's;
the noise probe of the calibration distinguishes these two, as in any run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.live.run import run_trace
from loadgen.live.sink import sink_server
from loadgen.results.result import quantile_ns
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from loadgen.live.run import RunSettings
    from loadgen.traces.trace import Trace

SECONDS = 1.0
"""How much of a trace is offered to the sink: a second's lag shows whether the senders keep up."""
_GRACE_NS = 500 * MS  # the sink answers at once, or never


@dataclass(frozen=True, slots=True)
class Calibration:
    """The generator against a null sink.

    Attributes:
        seconds: How long it was offered.
        offered_qps: Rate of that part of the trace.
        qps: Rate at which it was actually sent.
        senders: Sender processes.
        payload_bytes: Bytes of each query's payload.
        unsent: Queries that the sink's connection did not accept.
        unanswered: Queries that the sink accepted and did not answer in time.
        lag_ms: Quantiles of how late queries were sent, milliseconds.
        latency_p99_ms: From due to answered by a sink that does no work; None without an answer.
        noise_p99_ms: How late this machine woke a thread that only sleeps, meanwhile.
        noise_p99_9_ms: The p99.9 of that, which decides the verdict on a run.
        disturbed: Whether noise explains a lag that would have made a run invalid.
        valid: Whether a run with this lag would count.
    """

    seconds: float
    offered_qps: float
    qps: float
    senders: int
    payload_bytes: int
    unsent: int
    unanswered: int
    lag_ms: dict[str, float | None]
    latency_p99_ms: float | None
    noise_p99_ms: float | None
    noise_p99_9_ms: float | None
    disturbed: bool
    valid: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it in the form of a run's file."""
        return asdict(self)

    def to_line(self) -> str:
        """Return it in a line."""
        lag = ", ".join(f"{name.replace('_', '.')} {value or 0:.3f}" for name, value in self.lag_ms.items())
        noise = "-" if self.noise_p99_ms is None else f"{self.noise_p99_ms:.3f}"
        return (
            f"alone, against a null sink: {self.qps:,.0f} q/s of {self.offered_qps:,.0f} in"
            f" {self.seconds:.1f} s, lag {lag} ms; this machine's noise p99 {noise} ms"
        )


def calibrate(
    trace: Trace, settings: RunSettings, *, seconds: float = SECONDS, answers: bool = True
) -> Calibration:
    """Offer the first `seconds` of a trace to a null sink.

    `answers`: whether the sink answers; if not, only sending is measured.

    Raises:
        ConfigError: There is no query in them.
        ProcessError: The sink or a sender did not start.
    """
    part = _beginning(trace, seconds)
    with sink_server(answers=answers) as endpoint:
        run = run_trace(part, replace(settings, keep_outputs=False, grace_ns=_GRACE_NS), endpoint)
    result, noise_ns = run.result, None if run.noise is None else run.noise[1]
    return Calibration(
        seconds=result.duration_s,
        offered_qps=result.offered_qps,
        qps=result.realised_qps,
        senders=settings.n_senders,
        payload_bytes=settings.payload_bytes if settings.payloads is None else settings.payloads.shape[1],
        unsent=result.queries["unsent"],
        unanswered=result.queries["unanswered"],
        lag_ms=dict(result.send_lag_ms),
        latency_p99_ms=result.latency_ms["p99"],
        noise_p99_ms=None if noise_ns is None else _ms(quantile_ns(noise_ns, 990)),
        noise_p99_9_ms=_ms(run.noise_p99_9_ns),
        disturbed=result.disturbed,
        valid=result.valid,
    )


def _beginning(trace: Trace, seconds: float) -> Trace:
    duration_ns = min(trace.duration_ns, int(seconds * SECOND))
    n = int(np.searchsorted(trace.due_ns, duration_ns))
    if not n:
        raise ConfigError(
            f"trace {trace.name}: expected a query in its first {seconds:g} s to calibrate with"
        )
    return replace(trace, due_ns=trace.due_ns[:n], duration_ns=duration_ns)


def _ms(ns: int | None) -> float | None:
    return None if ns is None else ns / MS
