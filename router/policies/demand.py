"""Demand: how fast queries arrive, how long they can wait, and how much capacity there is to serve them.

Kept only for policies that ask (`sees_demand`). `arrived` counts each message; `settle` updates the
averages before a decision. Rate and patience are smoothed over the time that a query may wait: whatever
came before that is answered, and whatever comes after it meets a different queue.
"""

from __future__ import annotations

from math import exp, sqrt

from router.policies.surge import Surge

MS = 1_000_000
_SETTLE_NS = MS // 2
"""At most this often are averages updated, for all arrivals since: each update costs an exponential, and
half a millisecond is short against the slack that the averages are smoothed over."""

_EARLY = 0.125
"""Before a patience has passed, an average over it knows only a part, and is divided by that part, or by this
if it is more: the first millisecond of many a recorded trace holds more than ten that follow. Without it
such a trace at 12 % load gets 0.3 points less; at 0.25 a cold start at 80 % load with jitter of 4.5 ms loses
1 query in 1,000 more."""

_HURRIES = 16.0
"""How long a class can wait is averaged over about so many queries."""

_ALL = 0.999
"""From this part on an average knows everything."""

_SIGMAS = 4.0
"""So many standard deviations below what has come, so that a few queries are no high rate. At 2 that trace
gets 0.06 points less; at 0, 0.1."""


class PatienceClass:
    """Queries whose slacks lie within a factor of two, and how many come.

    Args:
        slack_ns: About how long they can wait.

    Attributes:
        rate: Queries a nanosecond, smoothed over that; over what has passed since the first, if that is less.
        own_ns: How long those that came last could wait, the least patient of each message; at first 0.
        surge: How many more may come at once.
        n: Queries since the last update.
        hurry_ns: The sum over these of how long they, or the least patient of their message, can wait.
    """

    __slots__ = ("_known", "_smoothed", "hurry_ns", "n", "own_ns", "rate", "slack_ns", "surge")

    def __init__(self, slack_ns: float) -> None:
        self.slack_ns = slack_ns
        self.rate = 0.0
        self._smoothed = 0.0
        self._known = 0.0
        self.n = 0
        self.own_ns = 0.0
        self.hurry_ns = 0.0
        self.surge = Surge()

    def settle(self, passed_ns: int) -> None:
        """Update the rate with what has come in the time that has passed."""
        keep = exp(-passed_ns / self.slack_ns)
        smoothed = self._smoothed = self._smoothed * keep + (1.0 - keep) / passed_ns * self.n
        self.rate = smoothed
        if self.n:
            own_ns = self.hurry_ns / self.n
            self.own_ns += (own_ns - self.own_ns) * (self.n / (self.n + _HURRIES) if self.own_ns else 1.0)
            self.hurry_ns = 0.0
            self.n = 0
        if self._known < _ALL and smoothed > 0.0:
            self._known = 1.0 - (1.0 - self._known) * keep
            part = max(_EARLY, self._known)
            sure = 1.0 - _SIGMAS / sqrt(smoothed * self.slack_ns)
            if sure > part:
                self.rate = smoothed * (sure / part)


class Demand:
    """What arrives and what can serve it. Mutable: the core's own, overwritten in place.

    Attributes:
        rate: Queries a nanosecond, smoothed over `slack_ns`.
        slack_ns: Harmonic mean of the slack of queries on arrival, smoothed over itself. Harmonic,
            because a few very patient queries do not make the others more patient.
        capacity: Queries a nanosecond that the cluster serves at each GPU's unit cost: the sum over
            the GPUs that take work of 1 / (unit cost * slowdown); see `Profile.unit_cost_ns`.
        calm_rate: Queries a nanosecond, each kind smoothed over its own slack: patient ones can wait out a
            peak.
        surge: How many more may come at once.
    """

    __slots__ = (
        "_haste",
        "_hastes",
        "_n",
        "_until_ns",
        "calm_rate",
        "capacity",
        "classes",
        "rate",
        "slack_ns",
        "surge",
    )

    def __init__(self, *, rate: float = 0.0, slack_ns: float = 0.0, capacity: float = 0.0) -> None:
        self.rate = rate
        self.slack_ns = slack_ns
        self.capacity = capacity
        self.calm_rate = rate
        self._haste = rate / slack_ns if slack_ns else 0.0  # the sum over arrivals of 1 / slack, a nanosecond
        self._n = 0
        self._hastes = 0.0
        self._until_ns: int | None = None
        self.classes: dict[int, PatienceClass] = {}
        self.surge = Surge()

    def arrived(self, slacks_ns: list[int], now_ns: int = 0) -> None:
        """Count queries with these slacks. Less than a millisecond, or none left, counts as a millisecond."""
        self._n += len(slacks_ns)
        self.surge.arrived(len(slacks_ns), now_ns, self.slack_ns)
        least_ns = max(MS, min(slacks_ns))
        shortest = least_ns.bit_length()
        if shortest == max(MS, *slacks_ns).bit_length():
            self._came(shortest, len(slacks_ns), len(slacks_ns) * least_ns, now_ns)
        else:
            kinds: dict[int, list[int]] = {}
            for slack_ns in slacks_ns:
                one_ns = max(MS, slack_ns)
                kinds.setdefault(one_ns.bit_length(), []).append(one_ns)
            for bits in kinds:
                self._kind(bits)
            for bits, several_ns in kinds.items():
                self._came(bits, len(several_ns), sum(several_ns), now_ns)
        first_ns = slacks_ns[0]
        # One SLO in a message is the usual case: count() compares in C, the sum below is a loop.
        if slacks_ns[-1] == first_ns and slacks_ns.count(first_ns) == len(slacks_ns):
            self._hastes += len(slacks_ns) / max(MS, first_ns)
        else:
            self._hastes += sum([1.0 / max(MS, slack_ns) for slack_ns in slacks_ns])

    def _kind(self, bits: int) -> PatienceClass:
        kind = self.classes.get(bits)
        if kind is None:
            kind = self.classes[bits] = PatienceClass(0.75 * (1 << bits))
        return kind

    def _came(self, bits: int, n: int, hurry_ns: int, now_ns: int) -> None:
        """Count `n` queries of one class."""
        kind = self._kind(bits)
        kind.n += n
        kind.hurry_ns += hurry_ns
        if len(self.classes) > 1:  # a single class has the surge of all
            kind.surge.arrived(n, now_ns, kind.slack_ns)

    def settle(self, now_ns: int) -> None:
        """Update the averages with what has arrived by `now_ns`.

        Both averages are exponential with a time constant of one mean slack. The mean slack is their
        ratio, so that every query has the same weight, whatever message it came in.
        """
        if self._until_ns is None or self.slack_ns <= 0.0:
            self._until_ns = now_ns
            self.slack_ns = self._n / self._hastes if self._n else 0.0
            return
        passed_ns = now_ns - self._until_ns
        if passed_ns < _SETTLE_NS:
            return
        keep = exp(-passed_ns / self.slack_ns)
        gain = (1.0 - keep) / passed_ns
        self.rate = self.rate * keep + gain * self._n
        self._haste = self._haste * keep + gain * self._hastes
        # Without arrivals both averages fade alike, so their ratio stays; in the end both underflow to 0.
        if self._n and self._haste > 0.0:
            self.slack_ns = self.rate / self._haste
        for kind in self.classes.values():
            kind.settle(passed_ns)
        self.calm_rate = sum([kind.rate for kind in self.classes.values()])
        self._n, self._hastes = 0, 0.0
        self._until_ns = now_ns
        self.surge.foresee(now_ns)
