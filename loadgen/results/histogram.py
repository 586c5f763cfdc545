"""Durations by size in bounded memory: a log-linear histogram, merged by addition.

Each power of two is divided into `PER_OCTAVE` bins of equal width, and durations below `2 * PER_OCTAVE`
nanoseconds have a bin each. So a bin's width is at most 1 / `PER_OCTAVE` of the durations in it, and a
quantile, given as its bin's upper end, is exact or at most 0.8 % too high; the maximum is exact.

Source: the layout of HdrHistogram (Tene), with 7 bits of mantissa.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BITS = 7
PER_OCTAVE = 1 << _BITS
"""Bins in each power of two."""
RELATIVE_ERROR = 1 / PER_OCTAVE
"""Most that a quantile may exceed the exact one by, as a share."""
LONGEST_NS = (1 << 53) - 1
"""104 days: longer durations count as this one."""
_N_BINS = ((53 - _BITS - 1) << _BITS) + 2 * PER_OCTAVE
_AT_ONCE = 1 << 20  # values in a piece, because each piece makes several arrays of its size


def rank(n: int, permille: int) -> int:
    """Return which of n ascending values is the quantile, from 1: the nearest rank."""
    return -(-n * permille // 1000)


class Histogram:
    """Counts of durations: 46 kB for any number of them.

    Attributes:
        n: Durations counted.
        max_ns: The longest of them; -1 of none.
    """

    def __init__(self) -> None:
        self.n = 0
        self.max_ns = -1
        self._counts = np.zeros(_N_BINS, np.int64)

    def add(self, ns: npt.NDArray[np.int64]) -> None:
        """Count durations, shape (n,), negative ones as 0; in parts, to bound the memory too."""
        for low in range(0, len(ns), _AT_ONCE):
            self._add(np.clip(ns[low : low + _AT_ONCE], 0, LONGEST_NS))

    def _add(self, ns: npt.NDArray[np.int64]) -> None:
        bit_length = np.frexp(ns.astype(np.float64))[1].astype(np.int64)  # exact below 2 ** 53
        shift = np.maximum(bit_length - _BITS - 1, 0)
        self._counts += np.bincount((shift << _BITS) + (ns >> shift), minlength=_N_BINS)
        self.n += len(ns)
        self.max_ns = max(self.max_ns, int(ns.max()))

    def merge(self, other: Histogram) -> None:
        """Add another histogram's counts: the same as if its durations had been added here."""
        self._counts += other._counts
        self.n += other.n
        self.max_ns = max(self.max_ns, other.max_ns)

    def quantile_ns(self, permille: int, *, n_slower: int = 0) -> int | None:
        """Return a quantile, at most `RELATIVE_ERROR` above the exact one.

        Args:
            permille: 1 to 1000; 1000 is the maximum.
            n_slower: How many more are longer than all counted ones, by an unknown amount.

        Returns:
            Nanoseconds; None if it is among `n_slower`, or nothing was counted.
        """
        place = rank(self.n + n_slower, permille)
        if not self.n or place > self.n:
            return None
        at = int(np.searchsorted(np.cumsum(self._counts), place))
        shift = max((at >> _BITS) - 1, 0)
        upper_ns = ((at - (shift << _BITS) + 1) << shift) - 1
        return min(upper_ns, self.max_ns)
