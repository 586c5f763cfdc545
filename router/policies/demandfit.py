"""DemandFit: spend GPU time where it buys most accuracy, at the price that demand sets.

SlackFit reads the load off one number, the head's slack. That number misleads once queries differ: an
urgent head is short of slack in an idle cluster too, and drags the patient queries behind it down.
DemandFit looks at demand: how many queries must be served per nanosecond, given the rate of arrivals and
the length of the queue. Capacity divided by demand is the GPU time available for a query, the *budget*.
The budget sets a *price* for GPU time: how much accuracy the last nanosecond buys if all queries are
served as well as the budget allows. DemandFit chooses, among the batches that meet the head's deadline,
the one whose queries are worth most after paying that price.

    need    = 3/4 * rate + length / patience            queries a nanosecond
    budget  = capacity / need                           nanoseconds a query
    price   = slope of accuracy over cost at budget     percent a nanosecond
    batch   = argmax over fitting (subnet, size) of accuracy - price * latency / min(size, length)

Patience is the harmonic mean of the slack on arrival, less the transport. The set point is a queue of a
quarter of a patience: at that length need equals rate. A longer queue raises the price until it drains, a
shorter one lowers it; averaging over a patience keeps single batches from moving it.
docs/demandfit.md shows how much each constant matters.

Once even the smallest subnet cannot keep up, serving a head that is too late for a full batch costs the
time of many queries behind it. DemandFit sheds such heads, the lowest priority class first.

Source: ours. The price is the dual of the fluid program in docs/demandfit.md, estimated online.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from router.policies import Choice, Shed, usable_slack_ns
from router.policies.pricing import limits_of, make_prices, sizes_of
from superserve.build import mypyc_attr
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from profiles.table import Profile
    from router.policies import QueueView, WorkerView

_SET_POINT = 0.25
"""Share of the patience that a query spends in the queue when need equals rate. 0.2 to 0.3 differ by less
than 0.05 points on 8 GPUs; lower sends batches half empty, higher leaves no slack for bursts."""

_GRACE = 1.25
"""Prices count batches up to this many times the head's slack, so that ordinary fluctuations do not move
them: without it the MAF trace loses 0.018 points."""

_LATE = 0.5
"""In overload a full batch takes at most this share of the patience, and a head with less of it left is
late while a lower class is queued. With 1.0 an SLO of 10 ms sheds queries that it could serve."""


@mypyc_attr(allow_interpreted_subclasses=True)
class DemandFit:
    """The batch whose queries are worth most after paying for GPU time at the price that demand sets.

    Args:
        profile: Latencies by row and batch size.
        argument: None; it takes no argument.

    Raises:
        ConfigError: There is an argument.
    """

    name = "demandfit"
    sees_demand = True

    def __init__(self, profile: Profile, argument: str | None = None) -> None:
        if argument is not None:
            raise ConfigError(f"demandfit: expected no argument, got {argument!r}")
        self.sizes = sizes_of(profile)
        self.limits_ns = limits_of(profile)
        self.prices = tuple(make_prices(profile, limit_ns) for limit_ns in self.limits_ns)
        self._accuracies = tuple(subnet.accuracy for subnet in profile.subnets)
        self._unit_cost_ns = profile.unit_cost_ns

    def choose(self, queue: QueueView, worker: WorkerView, now_ns: int) -> Choice | Shed | None:
        """Return the batch that is worth most at the current price; None if none fits the head's slack."""
        slack_ns = usable_slack_ns(queue, worker, now_ns)
        patience_ns, budget_ns = self._budget_ns(queue, worker, slack_ns)
        shed = self._shed(queue, worker, now_ns, slack_ns, patience_ns, budget_ns)
        if shed is not None:
            return shed
        limit_ns = min((1.0 - _SET_POINT) * patience_ns, _GRACE * slack_ns)
        limit = bisect_right(self.limits_ns, limit_ns) - 1
        price = self.prices[max(0, limit)].at(budget_ns)
        floor, length, accuracies = queue.head_floor, queue.length, self._accuracies
        best_row, best_size, best_worth = -1, 0, float("-inf")
        for size in self.sizes:
            each = price / min(size.size, length)
            row = size.best(each, floor, slack_ns, accuracies)
            if row is None:
                break  # P1: no larger batch fits either
            worth = accuracies[row] - each * size.latency_ns[row]
            if worth >= best_worth:  # of equals the larger: it leaves fewer queries waiting
                best_row, best_size, best_worth = row, size.size, worth
            if size.size >= length:
                break
        return Choice(best_row, best_size) if best_size else None

    def _budget_ns(self, queue: QueueView, worker: WorkerView, slack_ns: int) -> tuple[float, float]:
        """Return the patience on this worker and the GPU time available for a query, in profiled time."""
        demand = queue.demand
        if demand is None or demand.capacity <= 0.0:  # as if this worker were alone, and nothing arrived
            return max(1.0, slack_ns), max(1.0, slack_ns) / queue.length
        patience_ns = max(1.0, demand.slack_ns - worker.allowance_ns)
        need = (1.0 - _SET_POINT) * demand.rate + queue.length / patience_ns
        return patience_ns / worker.slowdown, demand.capacity * self._unit_cost_ns / need

    def _shed(
        self,
        queue: QueueView,
        worker: WorkerView,
        now_ns: int,
        slack_ns: int,
        patience_ns: float,
        budget_ns: float,
    ) -> Shed | None:
        """Return what to refuse: the head is too late for a full batch, and only full batches keep up."""
        demand = queue.demand
        if demand is None or slack_ns >= max(self.sizes[-1].p99_ns[0], _LATE * patience_ns):
            return None
        full = self.sizes[0]
        for size in self.sizes:
            if size.p99_ns[0] > _LATE * patience_ns:
                break
            full = size
        # Lower classes give way while the head still has time; once it is late, that no longer helps it.
        is_late = slack_ns < (_LATE * patience_ns if queue.outranks else full.p99_ns[0])
        n_gpus = demand.capacity * self._unit_cost_ns
        if not is_late or budget_ns >= full.latency_ns[0] / full.size or queue.length <= full.size * n_gpus:
            return None
        begin_ns = max(now_ns, worker.free_at_ns)
        before_ns = begin_ns + worker.allowance_ns + int(full.p99_ns[0] * worker.slowdown)
        # A quarter of the excess at a time, then the core asks again: few steps, however long the queue.
        n = max(full.size, int(queue.length - full.size * n_gpus) // 4)
        return Shed(max(before_ns, queue.head_deadline_ns + 1), n)
