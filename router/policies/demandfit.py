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

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from router.policies import Choice, Shed, usable_slack_ns
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

_STEEPEST = 4.0
"""The price at the least budget, over that of the step between the two cheapest subnets: something steep,
so that overload takes full batches of the smallest. 1.5 to 16 give the same figures."""

_N_LIMITS = 24
"""For how many limits on a batch's time prices are built, offline: neighbours differ by a constant ratio."""

_MAX_SIZES = 6
"""Batch sizes compared in one decision, to keep it below 20 us; of a profile with more, an even selection."""


@dataclass(frozen=True, slots=True)
class Size:
    """One batch size of the profile.

    Attributes:
        size: Queries.
        latency_ns: Median by row, shape (n_subnets,).
        p99_ns: 99th percentile by row.
        hull: Rows on the concave hull of accuracy over this size's latency, ascending.
        slopes: Minus what each of them gains on the one before, percent a nanosecond; ascending.
    """

    size: int
    latency_ns: tuple[int, ...]
    p99_ns: tuple[int, ...]
    hull: tuple[int, ...]
    slopes: tuple[float, ...]

    def best(self, price: float, floor: int, slack_ns: int, accuracies: tuple[float, ...]) -> int | None:
        """Return the row from `floor` up that fits and is worth most after paying; None if none fits.

        Args:
            price: What a nanosecond costs each query of the batch, percent.
            floor: The smallest row allowed.
            slack_ns: What the batch may take, at p99.
            accuracies: Percent by row.
        """
        last = bisect_right(self.p99_ns, slack_ns) - 1
        if last < floor:
            return None
        row = self.hull[bisect_right(self.slopes, -price)]
        if row <= floor:
            return floor
        if row <= last:
            return row
        # The best row does not fit. The best that does is the last one, or the last one on the hull.
        below = max(floor, self.hull[bisect_right(self.hull, last) - 1])
        gain = accuracies[last] - accuracies[below]
        return last if gain >= price * (self.latency_ns[last] - self.latency_ns[below]) else below


def make_size(profile: Profile, column: int) -> Size:
    """Return what is looked up of the profile's batch size in `column`."""
    latency_ns = tuple(subnet.latency_ns[column] for subnet in profile.subnets)
    accuracy = [subnet.accuracy for subnet in profile.subnets]

    def slope(one: int, other: int) -> float:
        return (accuracy[other] - accuracy[one]) / max(1, latency_ns[other] - latency_ns[one])

    hull: list[int] = []
    for row in range(profile.n_subnets):
        while len(hull) > 1 and slope(hull[-1], row) >= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(row)
    slopes = tuple(-slope(one, other) for one, other in pairwise(hull))
    p99_ns = tuple(subnet.latency_p99_ns[column] for subnet in profile.subnets)
    return Size(profile.batch_sizes[column], latency_ns, p99_ns, tuple(hull), slopes)


@dataclass(frozen=True, slots=True)
class Prices:
    """The price of GPU time by the budget of a query: piecewise linear, falling to 0.

    Between two neighbours on the profile's frontier any mix is optimal at one price, their slope. That
    price holds halfway between their costs; elsewhere it is interpolated, so that a small change of
    demand changes few choices.
    """

    budgets_ns: tuple[float, ...]
    prices: tuple[float, ...]

    def at(self, budget_ns: float) -> float:
        """Return the price, percent of accuracy a nanosecond of this profile's GPU."""
        budgets, prices = self.budgets_ns, self.prices
        i = bisect_left(budgets, budget_ns)
        if i == 0:
            return prices[0]
        if i == len(budgets):
            return prices[-1]
        part = (budget_ns - budgets[i - 1]) / (budgets[i] - budgets[i - 1])
        return prices[i - 1] + part * (prices[i] - prices[i - 1])


def make_prices(profile: Profile, limit_ns: int) -> Prices:
    """Return the prices of the profile's frontier of batches that take at most `limit_ns`."""
    frontier = profile.frontier(limit_ns=limit_ns)
    worth = [profile.subnets[row].accuracy for row, _ in frontier]
    costs_ns = [cost_ns for _, cost_ns in frontier]
    budgets, prices = [], []
    for i in range(1, len(frontier)):
        budgets.append((costs_ns[i - 1] + costs_ns[i]) / 2)
        prices.append((worth[i] - worth[i - 1]) / (costs_ns[i] - costs_ns[i - 1]))
    if not budgets:  # a single subnet: more time buys larger batches, not accuracy
        budgets, prices = [1.25 * costs_ns[0]], [0.1 * worth[0] / costs_ns[0]]
    budgets = [costs_ns[0], *budgets, 1.5 * costs_ns[-1]]
    prices = [_STEEPEST * prices[0], *prices, 0.0]
    return Prices(tuple(budgets), tuple(prices))


def _limits_ns(profile: Profile) -> tuple[int, ...]:
    """Return the limits that prices are made for: from the quickest batch to the longest, evenly in ratio."""
    first, last = profile.subnets[0].latency_ns[0], profile.subnets[-1].latency_ns[-1]
    steps = (int(first * (last / first) ** (i / _N_LIMITS)) for i in range(_N_LIMITS))
    return tuple(sorted({first, *steps, last}))


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
        n_sizes = len(profile.batch_sizes)
        n_weighed = min(n_sizes, _MAX_SIZES)
        columns = sorted({round(i * (n_sizes - 1) / max(1, n_weighed - 1)) for i in range(n_weighed)})
        self.sizes = tuple(make_size(profile, column) for column in columns)
        self.limits_ns = _limits_ns(profile)
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
