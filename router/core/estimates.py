"""Estimates that the core keeps of its peers: integer arithmetic, no clock."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

_FRESH = 8  # values that gather before the window is updated
_WAKE_NS = 100_000
"""Beyond nearly the latest: how much longer the kernel may take to wake a thread than it did so far."""

# Ten batches of a GPU that becomes 1.5 times slower, on three of six subnets: 1.46 of each of these, 1.30 of
# the others; of one subnet 3 times slower beside one as profiled, in turn: 2.7 and 1.13.
_GAIN, _GAIN_OF_SUBNET, _SHARED = 1 / 8, 1 / 6, 1 / 32
"""Exponents: how far the GPU and the subnet move to a measurement, and how much of it the GPU takes over."""
_FAR = 1.6  # a batch counts as at most this many times the estimate: a longer one is a stall of the process
_FIRST_FAR, _N_FIRST = 2.5, 2
"""The same of the first two batches. Until they are in, a device of which nothing is known may be that slow:
at 1.6 it took a GPU ten batches to be known as 2.5 times slower than its profile, and all ten were late."""
_FIRST_GAIN = 0.8
"""Over how many batches: the exponent of the first ones after a surprise. At 0.5 the first says half of what
it could."""
_EVER_FIRST_GAIN, _EVER_FIRST_GAIN_OF_SUBNET = 0.95, 1 / 32
"""The same of the first batches ever: a GPU that is slow is slow on all subnets, until one is seen to differ.
With 0.8 and 1/6 other subnets of a GPU that is 1.6 times slower counted as 1.45 times, and when eight such
began to serve at a third of their load 1 query in 100 of the first two seconds was late."""
_SURPRISE = 1.25
"""A batch that takes this many times the estimate puts the GPU in doubt again. When eight GPUs become twice
as slow, 2 queries in 100 of the next seconds are late, and 3 in 100 if the doubt stays where it was."""

_DOUBT = 0.6
"""What each measurement leaves of the doubt: 2.5, 1.9, 1.54, 1.32, ... At 0.4 queries of a slow GPU are late,
at 0.8 sixty-four GPUs serve their first half second 0.1 points worse."""
_EASE, _FIRST_EASE = 1 / 8, 1 / 2
"""What an idle GPU forgets of its slowdown at each heartbeat; the second while only the first two batches,
which count for so much, speak of it: a stall of one refuses what fits for three heartbeats, not nine."""
_LEAST, _MOST = 0.25, 16.0  # bounds of a ratio, whatever a worker reports
_AS_PROFILED = 1.001
"""A slowdown below this counts as none, so that easing ends."""


class WindowedMin:
    """The least value seen within the last `window_ns`, in O(1) amortised.

    Keeps at most one value per 64th of the window, so that a peer's stamps cannot make it grow:
    a value may be forgotten that much too early.

    Source: the ascending-minima deque; as a base delay for one-way queueing, LEDBAT (RFC 6817).
    """

    __slots__ = ("_minima", "_step_ns", "_window_ns")

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._step_ns = window_ns >> 6
        self._minima: deque[tuple[int, int]] = deque()

    def add(self, value: int, now_ns: int) -> int:
        """Record `value` at `now_ns` and return the minimum of the window."""
        minima = self._minima
        while minima and minima[-1][1] >= value:
            minima.pop()
        if not minima or now_ns - minima[-1][0] >= self._step_ns:
            minima.append((now_ns, value))
        while minima[0][0] < now_ns - self._window_ns:
            minima.popleft()
        return minima[0][1]


class RecentQuantiles:
    """The median and the 99th percentile of the last `window` durations.

    A percentile, not a mean with deviations: one stall does not predict the next message, and a
    smoothed deviation would hold back every batch until it has decayed.

    Most values are never read: they are sorted in together, when the percentile is read or `_FRESH`
    of them have gathered.

    Attributes:
        median_ns: The middle of the window; may lack the last few values.
    """

    __slots__ = ("_bound_ns", "_fresh", "_recent", "_sorted", "_window", "median_ns")

    def __init__(self, first_ns: list[int], window: int = 256) -> None:
        self._window = window
        self._fresh: list[int] = []
        self._recent = deque(first_ns)
        self._sorted = sorted(first_ns)
        self._refresh()

    def __len__(self) -> int:
        """Return how many measurements the window holds."""
        return len(self._recent) + len(self._fresh)

    def add(self, value_ns: int) -> None:
        """Add one measurement, and forget the oldest of a full window.

        One far above all others counts as twice the 99th percentile plus a millisecond: while
        the window holds fewer than 100, that percentile is the maximum.
        """
        self._fresh.append(value_ns)
        if len(self._fresh) >= _FRESH:
            self._settle()

    def fade(self, value_ns: int) -> None:
        """Forget the older quarter and add `value_ns`: unconfirmed measurements count less and less."""
        self._settle()
        if len(self._recent) < 4 and self._sorted[-1] <= value_ns:
            return  # nothing is left to forget
        for _ in range(len(self._recent) // 4):
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self.add(value_ns)

    def bound_ns(self) -> int:
        """Return the 99th percentile: the allowance of a careful decision."""
        if self._fresh:
            self._settle()
        return self._bound_ns

    def _settle(self) -> None:
        recent, ordered, most_ns = self._recent, self._sorted, 2 * self._bound_ns + 1_000_000
        for value_ns in self._fresh:
            is_far = value_ns > most_ns
            recent.append(most_ns if is_far else value_ns)
            insort(ordered, recent[-1])
            if len(recent) > self._window:
                del ordered[bisect_left(ordered, recent.popleft())]
            if is_far:
                most_ns = 2 * ordered[len(ordered) * 99 // 100] + 1_000_000
        self._fresh.clear()
        self._refresh()

    def _refresh(self) -> None:
        n = len(self._sorted)
        self.median_ns = self._sorted[n >> 1]
        self._bound_ns = self._sorted[n * 99 // 100]


class Punctuality:
    """How late a loop comes to a decision that was due, and so how far ahead of need it must decide.

    A GPU idles for as long as the router comes too late; a decision made early does not know what arrives
    meanwhile. So decisions are due as much ahead as nearly the latest of the last ones came late: on a
    machine with nothing else to do that is a tenth of what a shared one needs.

    Args:
        least_ns: Least time ahead.
        most_ns: Most time ahead, and what is assumed until measured.

    Attributes:
        ahead_ns: How far ahead of need to decide.
    """

    __slots__ = ("_due_ns", "_late", "_least_ns", "_most_ns", "_n_late", "ahead_ns")

    def __init__(self, least_ns: int, most_ns: int) -> None:
        self._least_ns = min(least_ns, most_ns)
        self._most_ns = most_ns
        self._late = RecentQuantiles([most_ns] * 16)
        self._n_late = 0
        self._due_ns: int | None = None
        self.ahead_ns = most_ns

    def expect(self, due_ns: int | None) -> None:
        """Note when the next decision is due; None if no event but another one makes it due."""
        self._due_ns = due_ns

    def came(self, now_ns: int) -> None:
        """Note that the loop decides now: late, if what it expected was due before."""
        due_ns = self._due_ns
        if due_ns is not None and now_ns >= due_ns:
            self._due_ns = None
            self._late.add(now_ns - due_ns)
            self._n_late += 1
            if self._n_late % _FRESH == 0:  # when they have just been sorted in
                ahead_ns = self._late.bound_ns() + _WAKE_NS
                self.ahead_ns = max(self._least_ns, min(self._most_ns, ahead_ns))


class Correction:
    """How much slower one GPU is than its profile: as a whole, and by subnet.

    A subnet's ratio is the GPU's times the subnet's own difference. Each measurement moves both towards it,
    and a small part of the subnet's difference becomes the GPU's. So a subnet without recent measurements
    follows the GPU: a device that throttles is slow on all of them.

    A ratio far above the estimate counts as `_FAR` times the estimate: a stall of the process is no property
    of the device, and must not refuse queries that fit. A lasting slowdown is followed all the same. The
    first two batches count for more, since nothing else is known: a stall of one is forgotten with the next
    sound batch, or soon if none comes.

    Attributes:
        overall: Measured over profiled latency of the whole GPU; 1.0 means as profiled.
        n: Batches measured since the last surprise.
    """

    __slots__ = ("_differs", "_is_known", "_is_slow", "n", "overall")

    def __init__(self, n_subnets: int) -> None:
        self.overall = 1.0
        self._differs = [1.0] * n_subnets
        self.n = 0
        self._is_slow = False
        self._is_known = False  # more than the first batches have been measured, ever

    def of_subnet(self, subnet: int) -> float:
        """Return measured over profiled latency of `subnet`."""
        ratio = self.overall * self._differs[subnet]
        return ratio if _LEAST <= ratio <= _MOST else _bounded(ratio)

    def doubt(self, n_beside: int = 0) -> float:
        """Return how many times longer than estimated a batch may take while few have been measured.

        Args:
            n_beside: Batches measured on GPUs of the same process; they count for a quarter.
        """
        return 1.0 + (_FIRST_FAR - 1.0) * _DOUBT ** (self.n + n_beside / 4 if n_beside else self.n)

    def measure(self, subnet: int, ratio: float) -> None:
        """Add the ratio of one batch."""
        n = self.n = self.n + 1
        if ratio > _AS_PROFILED:
            self._is_slow = True
        if not _LEAST <= ratio <= _MOST:
            ratio = _bounded(ratio)
        step = ratio / self.of_subnet(subnet)
        if step == 1.0:
            return
        if n <= _N_FIRST:
            step = min(step, _FIRST_FAR)
        else:
            self._is_known = True
        if n > _N_FIRST and step > _SURPRISE:
            # A hiccup, or the device has become another: the next batches tell, and weigh as the first did.
            step = min(step, _FAR)
            self.n = 0
        gain, gain_of_subnet = _FIRST_GAIN, _GAIN_OF_SUBNET
        if not self._is_known:
            gain, gain_of_subnet = _EVER_FIRST_GAIN, _EVER_FIRST_GAIN_OF_SUBNET
            if step < 1.0:  # a stall makes a batch longer, never shorter: of these the quicker one counts
                gain *= n
        differs = self._differs[subnet] * step**gain_of_subnet
        shared = differs**_SHARED
        self._differs[subnet] = differs / shared
        # The first measurements weigh more: nothing is known yet about this device.
        overall = self.overall * shared * step ** max(_GAIN, gain / n)
        self.overall = _bounded(overall)

    def ease(self) -> None:
        """Move each slowdown an eighth of the way back to 1; half of it while few batches were measured."""
        if not self._is_slow:
            return
        part = _EASE if self._is_known else _FIRST_EASE
        self.overall -= max(0.0, self.overall - 1.0) * part
        self._differs = [ratio - max(0.0, ratio - 1.0) * part for ratio in self._differs]
        self._is_slow = max(self.overall, *self._differs) > _AS_PROFILED


def _bounded(ratio: float) -> float:
    if ratio > _MOST:
        return _MOST
    return max(_LEAST, ratio)


class TransitClock:
    """How much longer than the quickest one a peer's stamped message was under way.

    Clocks of two hosts are never compared: only differences between stamps of the same
    peer, and the windowed minimum removes their unknown offset. A drift of 100 ppm over the
    10 s window is at most 1 ms.
    """

    __slots__ = ("_base", "_base_ns", "_step_ns", "_until_ns")

    def __init__(self, window_ns: int = 10_000_000_000) -> None:
        self._base = WindowedMin(window_ns)
        self._base_ns: int | None = None
        self._step_ns = window_ns >> 6
        self._until_ns = 0

    def excess_ns(self, sent_ns: int, now_ns: int) -> int:
        """Return how long a message stamped `sent_ns` and handled now was in buffers; at least 0."""
        offset = now_ns - sent_ns
        base_ns = self._base_ns
        if base_ns is None or offset < base_ns or now_ns >= self._until_ns:
            # Otherwise the window would not keep it either: skip the call.
            self._base_ns = base_ns = self._base.add(offset, now_ns)
            self._until_ns = now_ns + self._step_ns
        return offset - base_ns
