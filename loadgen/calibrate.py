"""What the load generator can do alone: the same senders, at the same rate, against a null sink.

A run's lag has three makers: the generator, the machine under it, and whatever shares the machine, the
server included. Against a sink that answers at once only the first two are left, and the noise probe tells
the second. So a run that lags where its calibration did not was disturbed by its server or by others, and
one whose calibration lags too asks too much of the generator.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from loadgen.run import run_trace
from loadgen.trace import load_trace
from superserve.clock import MS
from superserve.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadgen.run import RunSettings

SECONDS = 1.0
"""How long a run's own calibration takes."""
_SEED = 0xCA11
_GRACE_NS = 1_000 * MS


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a generator did against a null sink.

    Attributes:
        rate_qps: What was asked of it: Poisson arrivals at this mean.
        sent_qps: What was sent.
        seconds: For so long.
        senders: By so many processes.
        send_lag_ms: From due to sent, by quantile.
        latency_ms: From due to answered by the sink.
        noise_p99_9_ms: What the noise probe saw meanwhile.
        unsent: Queries that were not sent.
        valid: Whether such a run would have counted, by the SLO of the run that this is for.
    """

    rate_qps: float
    sent_qps: float
    seconds: float
    senders: int
    send_lag_ms: dict[str, float | None]
    latency_ms: dict[str, float | None]
    noise_p99_9_ms: float | None
    unsent: int
    valid: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    def to_lines(self) -> list[str]:
        """Return it as lines of a table."""
        lag = "  ".join(
            f"{name.replace('_', '.')} {value:.3f}"
            for name, value in self.send_lag_ms.items()
            if value is not None
        )
        noise = "-" if self.noise_p99_9_ms is None else f"{self.noise_p99_9_ms:.3f} ms"
        verdict = "counts" if self.valid else "would NOT count: this is more than the generator can send"
        sent = f"{self.sent_qps:,.0f} q/s sent of {self.rate_qps:,.0f}"
        return [
            f"  null sink        {sent}, {self.senders} senders, {self.seconds:g} s; {verdict}",
            f"  its send lag     {lag} ms, noise p99.9 {noise}",
        ]


@contextlib.contextmanager
def null_sink() -> Iterator[str]:
    """Run a null sink; yields its endpoint, and ends it with the block."""
    with ProcessGroup() as group:
        sink = group.start("null-sink", ["-m", "loadgen.null_sink"])
        group.wait_ready(20.0)
        yield sink.ready["endpoint"]


def calibrate(rate_qps: float, settings: RunSettings, seconds: float = SECONDS) -> Calibration:
    """Offer Poisson arrivals to a null sink, with the senders and payloads of a run.

    Raises:
        ConfigError: The rate is none.
        ProcessError: A process did not start, or died.
    """
    trace = load_trace(f"poisson:rate={rate_qps:.6g}", duration_s=seconds, seed=_SEED)
    plain = replace(settings, payloads=None, keep_outputs=False, grace_ns=_GRACE_NS)
    with null_sink() as endpoint:
        run = run_trace(trace, plain, endpoint)
    result = run.result
    return Calibration(
        rate_qps=rate_qps,
        sent_qps=result.realised_qps,
        seconds=seconds,
        senders=settings.n_senders,
        send_lag_ms=dict(result.send_lag_ms),
        latency_ms=dict(result.latency_ms),
        noise_p99_9_ms=None if run.noise_p99_9_ns is None else run.noise_p99_9_ns / MS,
        unsent=result.queries["unsent"],
        valid=result.valid,
    )
