"""What GPU time is worth to a router now: the work that waits and comes, over the GPUs there are for it.

    need  = rate + queued / slack of the head                 queries a nanosecond
    price = need * GPU time of a query on the smallest subnet / GPUs here

At 1 the smallest subnet takes all GPU time; at less, larger ones can be afforded, and the lower it is the
larger. Every router computes it alike, whatever its policy, so that workers can compare.
"""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

from superserve.clock import MS

if TYPE_CHECKING:
    from router.core.fleet import Fleet
    from router.core.ledger import Ledger

_SMOOTH_NS = 50 * MS
"""The rate is smoothed over this time: longer than a message's rhythm, shorter than a burst. The head counts
as having this much slack at least: a price that follows the queue from batch to batch tells nobody where to
lend."""

_LEAST_NS = MS
"""The rate is updated at most this often."""

HIGHEST_PRICE = 1e6
"""Of a router with work and no GPU."""


class Price:
    """Computes it from the ledger's counts and the fleet.

    Args:
        ledger: How many queries came, and wait.
        fleet: The GPUs.
    """

    __slots__ = ("_fleet", "_ledger", "_rate", "_received", "_settled_ns")

    def __init__(self, ledger: Ledger, fleet: Fleet) -> None:
        self._ledger = ledger
        self._fleet = fleet
        self._rate = 0.0
        self._received = 0
        self._settled_ns: int | None = None

    def at(self, now_ns: int) -> float:
        """Return the price as of `now_ns`: 0 without work."""
        self._settle(now_ns)
        need, model = self._rate, self._ledger.model
        head = model.queue.head()
        if head is not None:
            need += len(model.queue) / max(_SMOOTH_NS, head[0] - now_ns)
        profile = model.reference
        if profile is None or need <= 0.0:
            return 0.0
        n_gpus = self._fleet.n_present
        if n_gpus <= 0:
            return HIGHEST_PRICE
        cost_ns = profile.unit_cost_ns * self._fleet.usual_slowdown
        return min(HIGHEST_PRICE, need * cost_ns / n_gpus)

    def _settle(self, now_ns: int) -> None:
        received = self._ledger.received
        if self._settled_ns is None:
            self._settled_ns, self._received = now_ns, received
            return
        passed_ns = now_ns - self._settled_ns
        if passed_ns < _LEAST_NS:
            return
        keep = exp(-passed_ns / _SMOOTH_NS)
        self._rate = self._rate * keep + (1.0 - keep) * (received - self._received) / passed_ns
        self._settled_ns, self._received = now_ns, received
