"""Demand: how fast queries arrive, how patient they are, and how much there is to serve them with.

Kept only for policies that ask (`sees_demand`). Arrivals are noted by the message, and taken into
account when somebody asks. Rate and patience are smoothed over as long as a query may wait: what came
longer ago is answered by now, and what comes later than that is not this queue's to serve.
"""

from __future__ import annotations

from math import exp

MS = 1_000_000
_SETTLE_NS = MS // 2
"""Arrivals are taken into account together, at most this often: exponentials cost time."""


class Demand:
    """What arrives and what can serve it. Mutable: the core's own, overwritten in place.

    Attributes:
        rate: Queries a nanosecond, smoothed over `slack_ns`.
        slack_ns: Harmonic mean of the slack of queries on arrival, smoothed over itself. Harmonic,
            because a few very patient queries make nobody else more patient.
        capacity: Queries a nanosecond that the cluster serves at each GPU's unit cost: the sum over
            the GPUs that take work of 1 / (unit cost * slowdown); see `Profile.unit_cost_ns`.
    """

    __slots__ = ("_haste", "_hastes", "_n", "_until_ns", "capacity", "rate", "slack_ns")

    def __init__(self, *, rate: float = 0.0, slack_ns: float = 0.0, capacity: float = 0.0) -> None:
        self.rate = rate
        self.slack_ns = slack_ns
        self.capacity = capacity
        self._haste = rate / slack_ns if slack_ns else 0.0  # the sum over arrivals of 1 / slack, a nanosecond
        self._n = 0
        self._hastes = 0.0
        self._until_ns: int | None = None

    def arrived(self, slacks_ns: list[int]) -> None:
        """Note queries with these slacks; those below a millisecond count as one."""
        self._n += len(slacks_ns)
        first_ns = slacks_ns[0]
        if slacks_ns[-1] == first_ns and slacks_ns.count(first_ns) == len(slacks_ns):
            self._hastes += len(slacks_ns) / max(MS, first_ns)
        else:
            self._hastes += sum([1.0 / max(MS, slack_ns) for slack_ns in slacks_ns])

    def settle(self, now_ns: int) -> None:
        """Take into account what has arrived by now.

        Both averages are of the exponential kind with a time constant of one mean slack; the mean
        slack is their ratio, so that it weighs queries and not messages.
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
        if self._n and self._haste > 0.0:
            self.slack_ns = self.rate / self._haste
        self._n, self._hastes = 0, 0.0
        self._until_ns = now_ns
