"""The core's tuning constants."""

from __future__ import annotations

from dataclasses import dataclass

from superserve.clock import MS


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """The core's tuning constants, each with its reason.

    Attributes:
        dispatch_ahead_ns: Decide a worker's next batch at most this long (plus the measured
            transport) before it is free. Long enough to cover a late wake-up on a busy host,
            short enough not to decide on a stale queue: a whole batch ahead costs SlackFit a point.
        margin_ns: Slack held back for transport that the estimate has not seen yet.
        max_queries: Most queries queued or in flight; more are OVERLOADED.
        max_bytes: Most payload bytes held; more are OVERLOADED.
        heartbeat_ns: Each worker sends something at least this often.
        suspect_after: Missed heartbeats after which a worker gets no more work.
        dead_after: Missed heartbeats after which its queries are dispatched again.
        overrun_factor: A batch that takes this many times its profiled p99 has overrun.
        overrun_grace_ns: Added to that, so that a scheduler hiccup does not condemn short batches.
        give_up_ns: A batch that has no answer this long after it overran is given up.
    """

    dispatch_ahead_ns: int = 2 * MS
    margin_ns: int = MS
    max_queries: int = 200_000
    max_bytes: int = 2 << 30
    heartbeat_ns: int = 100 * MS
    suspect_after: int = 3
    dead_after: int = 6
    overrun_factor: int = 3
    overrun_grace_ns: int = 10 * MS
    give_up_ns: int = 1000 * MS
