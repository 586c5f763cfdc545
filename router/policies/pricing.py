"""The price of GPU time, and what each batch size buys for it: look-ups built offline, from a profile.

If all queries were served as well as a budget of GPU time allows, some would get one subnet of the profile's
frontier and the rest the next better one. What the step between them gains per nanosecond is the price.

Source: ours. The price is the dual of the fluid program in docs/demandfit.md, estimated online.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profiles.table import Profile

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


def limits_of(profile: Profile) -> tuple[int, ...]:
    """Return the limits that prices are made for: from the quickest batch to the longest, evenly in ratio."""
    first, last = profile.subnets[0].latency_ns[0], profile.subnets[-1].latency_ns[-1]
    steps = (int(first * (last / first) ** (i / _N_LIMITS)) for i in range(_N_LIMITS))
    return tuple(sorted({first, *steps, last}))


def sizes_of(profile: Profile) -> tuple[Size, ...]:
    """Return the look-ups of the batch sizes that decisions compare."""
    n_sizes = len(profile.batch_sizes)
    n_weighed = min(n_sizes, _MAX_SIZES)
    columns = sorted({round(i * (n_sizes - 1) / max(1, n_weighed - 1)) for i in range(n_weighed)})
    return tuple(make_size(profile, column) for column in columns)
