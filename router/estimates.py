"""Estimates that the core keeps of its peers: integer arithmetic, no clock of its own."""

from __future__ import annotations

from collections import deque


class WindowedMin:
    """The least value seen within the last `window_ns`, in O(1) amortised.

    Source: the ascending-minima deque; as a base delay for one-way queueing, LEDBAT (RFC 6817).
    """

    __slots__ = ("_minima", "_window_ns")

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._minima: deque[tuple[int, int]] = deque()

    def add(self, value: int, now_ns: int) -> int:
        """Record `value` at `now_ns` and return the least of the window."""
        minima = self._minima
        while minima and minima[-1][1] >= value:
            minima.pop()
        minima.append((now_ns, value))
        while minima[0][0] < now_ns - self._window_ns:
            minima.popleft()
        return minima[0][1]


class Spread:
    """A smoothed mean and mean deviation; `bound()` covers nearly all of what was seen.

    Source: the retransmission timer of TCP (RFC 6298), gains 1/8 and 1/4.
    """

    __slots__ = ("deviation_ns", "mean_ns")

    def __init__(self, mean_ns: int, deviation_ns: int) -> None:
        self.mean_ns = mean_ns
        self.deviation_ns = deviation_ns

    def add(self, value_ns: int) -> None:
        """Take one measurement into account."""
        error = value_ns - self.mean_ns
        self.mean_ns += error >> 3
        self.deviation_ns += (abs(error) - self.deviation_ns) >> 2

    def bound_ns(self, deviations: int = 4) -> int:
        """Return the mean plus so many mean deviations."""
        return self.mean_ns + deviations * self.deviation_ns


class TransitClock:
    """How much longer than the quickest a peer's stamped message was under way.

    Clocks of two hosts are never compared: only differences between stamps of the same
    peer, whose unknown offset the windowed minimum removes. Drift of 100 ppm over the
    10 s window is 1 ms at most.
    """

    __slots__ = ("_base",)

    def __init__(self, window_ns: int = 10_000_000_000) -> None:
        self._base = WindowedMin(window_ns)

    def excess_ns(self, sent_ns: int, now_ns: int) -> int:
        """Return the time in buffers of a message stamped `sent_ns` that is handled now; at least 0."""
        offset = now_ns - sent_ns
        return offset - self._base.add(offset, now_ns)
