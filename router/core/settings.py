"""The core's tuning constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

from superserve.clock import MS


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """The core's tuning constants, each with its reason.

    Attributes:
        dispatch_ahead_ns: Decide a worker's next batch at most this long (plus the measured
            transport) before it is free. Long enough to cover a late wake-up on a busy host,
            short enough not to decide on a stale queue: a whole batch ahead costs SlackFit a point.
        least_ahead_ns: At least this long, on a machine on which the router has not come late.
        margin_ns: Slack held back, at most, for transport that the estimate has not seen yet.
        least_margin_ns: Slack held back at least, where no way took longer than nearly all of them.
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
    least_ahead_ns: int = 2 * MS // 10
    margin_ns: int = MS
    least_margin_ns: int = MS // 10
    max_queries: int = 200_000
    max_bytes: int = 2 << 30
    heartbeat_ns: int = 100 * MS
    suspect_after: int = 3
    dead_after: int = 6
    overrun_factor: int = 3
    overrun_grace_ns: int = 10 * MS
    give_up_ns: int = 1000 * MS

    def with_margin(self, margin_ns: int) -> CoreSettings:
        """Return settings with a margin that is always the same, whatever is measured."""
        return replace(self, margin_ns=margin_ns, least_margin_ns=margin_ns)
