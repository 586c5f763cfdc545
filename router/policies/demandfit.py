"""DemandFit: spend GPU time where it buys most accuracy, at the price that demand sets.

SlackFit reads the load off one number, the head's slack. That number says little once queries differ:
an urgent head is short of slack in an idle cluster, and drags the patient ones behind it down. DemandFit
asks what SlackFit cannot see. Demand is how many queries must be served a nanosecond, from the rate of
arrivals and from what waits; with the cluster's capacity it says how much GPU time there is for a query,
the *budget*. The budget sets a *price* for GPU time: how much accuracy the last nanosecond bought, if all
queries were served as well as the budget allows. The batch chosen is the one whose queries are worth most
after paying for it, among those that meet the head's deadline.

    need    = 3/4 * rate + length / patience            queries a nanosecond
    budget  = capacity / need                           nanoseconds a query
    price   = slope of accuracy over cost at budget     percent a nanosecond
    batch   = argmax over fitting (subnet, size) of accuracy - price * latency / min(size, length)

Patience is the harmonic mean of the slack on arrival, less what the way takes. Holding a quarter of it
in the queue is the set point: at that length need equals rate. A longer queue raises the price until it
drains, a shorter one lowers it; averages over a patience keep single batches from moving it.
docs/demandfit.md says how much each constant matters.

Once even the smallest subnet cannot keep up, serving a head that is too late for a full batch costs the
time of many queries behind it. Such heads are shed, of the lowest priority class first.

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
"""Share of the patience that a query spends in the queue when need equals rate."""

_GRACE = 1.25
"""Batches count as possible up to this many times the head's slack, lest each fluctuation move the price."""

_LATE = 0.5
"""In overload full batches are at most this share of the patience long, and heads with less of it are late
while a lower class is queued."""

_STEEPEST = 4.0
"""The price at the least budget, over that of the step between the two cheapest subnets."""

_N_LIMITS = 24
"""Frontiers that prices are kept of: by how long a batch may take within the patience."""

_MAX_SIZES = 6
"""Batch sizes weighed in one decision; of a profile with more, those spread evenly among its sizes."""


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
        # The best one does not fit: of those that do, the last, or the last of the hull.
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

    Between two neighbours on the profile's frontier any mix is optimal at one price, their slope. It
    is the price at the middle between their costs; in between it is interpolated, so that a small
    change of demand changes few choices.
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
    if not budgets:  # a single subnet: time buys larger batches only
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
        """Return the batch that is worth most at today's price; None if no batch fits the head's slack."""
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
            if worth >= best_worth:
                best_row, best_size, best_worth = row, size.size, worth
            if size.size >= length:
                break
        return Choice(best_row, best_size) if best_size else None

    def _budget_ns(self, queue: QueueView, worker: WorkerView, slack_ns: int) -> tuple[float, float]:
        """Return how long a query can wait and run on this worker, and how much of its time there is for it.

        Both as the profile counts time.
        """
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
        """Return what to refuse if the head is too late for a full batch, and such batches are all needed."""
        demand = queue.demand
        if demand is None or slack_ns >= max(self.sizes[-1].p99_ns[0], _LATE * patience_ns):
            return None
        full = self.sizes[0]
        for size in self.sizes:
            if size.p99_ns[0] > _LATE * patience_ns:
                break
            full = size
        # Lower classes give way before the head is late, not when it is.
        is_late = slack_ns < (_LATE * patience_ns if queue.outranks else full.p99_ns[0])
        n_gpus = demand.capacity * self._unit_cost_ns
        if not is_late or budget_ns >= full.latency_ns[0] / full.size or queue.length <= full.size * n_gpus:
            return None
        begin_ns = max(now_ns, worker.free_at_ns)
        before_ns = begin_ns + worker.allowance_ns + int(full.p99_ns[0] * worker.slowdown)
        # A part of what is too much, and then the policy is asked again: few steps, however long the queue.
        n = max(full.size, int(queue.length - full.size * n_gpus) // 4)
        return Shed(max(before_ns, queue.head_deadline_ns + 1), n)
