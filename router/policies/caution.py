"""Doubt about more than a GPU: ways that differ, and losses that the queue does not explain.

A batch that is sent ends when it ends, but what it leaves to the next head depends on ways not yet measured.
Where ways differ by much of a patience, a plan that uses all of it fails; so it uses less: `doubt_of_ways`.

A policy plans with what is measured: ways, slowdowns, rates. Where that is not enough, as when messages
jitter by much of the slack or a machine stalls again and again, the plan fails though there would be time,
and heads grow older than any batch of a useful size. No measurement of the parts shows it; the losses do.
So they are fed back: each window with losses and no jam doubles the caution, and without losses it fades,
the more slowly the sooner it was needed again. Policies see it as doubt about every GPU
(`router.policies.WorkerView.doubt`): batches end well before the deadline, and cost more.

Source: ours; increase by a factor and a fade whose time doubles, as congestion control backs off.
"""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

from superserve.clock import MS, SECOND
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

# Eight GPUs, 6,400 q/s, 36 ms, messages that jitter by 5, 6 and 7 ms: of 1,000 queries 25, 459 and 626 are
# lost without this module, and 0, 7 and 17 with it. The figures below are of caution alone, without
# `doubt_of_ways`, with a fade of 1 s: 3, 12 and 22.

_WINDOW_NS = 20 * MS
"""Losses are judged at most this often. 10 ms: 4, 15, 18; 40 ms: 6, 22, 26."""

_SHARE, _FEW = 0.01, 2
"""A window counts as lossy from this share and this many queries on. At 0.3 % and 3 % the same."""

_UP, _MOST = 2.0, 8.0
"""What a lossy window multiplies the caution by, and to how much. By 1.5: 6, 28, 36; to 4: 3, 16, 55."""

_FADE_NS, _LONGEST_FADE_NS = SECOND // 2, 16 * SECOND
"""Time constant of the fade, at first and at most. After GPUs that were twice as slow for a second, 1 s costs
0.4 points of accuracy in the next three. At 0.2 s: 3, 32, 41."""

_RELAPSE = 8
"""Needed again within this many fades, caution fades half as fast from then on."""

_NONE = 1.02
"""A caution below this counts as none, so that fading ends."""

_JAM = 0.6
"""A queue beyond this share of what can be served within a patience explains losses: more has come than the
smallest subnet serves, and caution would not help. At 0.3 the trap itself counts as a jam: 3, 38, 62."""

_STEADY, _UNSTEADY = 0.2, 12.0
"""Ways may differ by this share of a patience without doubt; what is beyond that counts this many times. With
0.1 and 8, jitter of 3 ms and ten clients cost 0.2 points; with 0.25 and 16, jitter of 5 ms 2 queries in
1,000."""


def doubt_of_ways(differ_ns: int, patience_ns: float) -> float:
    """Return how many times longer than estimated a batch may seem to take, since ways differ.

    Args:
        differ_ns: Between the usual way and nearly the worst.
        patience_ns: How long a query can wait and run.
    """
    share = differ_ns / patience_ns if patience_ns > 0 else 0.0
    return 1.0 if share <= _STEADY else 1.0 + _UNSTEADY * (share - _STEADY)


class Caution:
    """How much doubt there is about what is measured, from queries lost without a jam.

    Attributes:
        factor: 1.0 without any; times this longer than estimated may a batch take.
    """

    __slots__ = ("_fade_ns", "_is_jam", "_n_ended", "_n_lost", "_since_ns", "_tripped_ns", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self._since_ns: int | None = None
        self._n_lost = self._n_ended = 0
        self._is_jam = False
        self._fade_ns = _FADE_NS
        self._tripped_ns: int | None = None

    def look(self, answered: Sequence[int], queued: int, servable: float, now_ns: int) -> float:
        """Take note of a decision; return the factor.

        Args:
            answered: Queries that ended so far, by `Status`.
            queued: How many wait.
            servable: How many all GPUs serve within a patience, on the smallest subnet.
            now_ns: This instant.
        """
        if queued > _JAM * servable:
            self._is_jam = True
        since_ns = self._since_ns
        if since_ns is None or now_ns - since_ns >= _WINDOW_NS:
            self._judge(answered, now_ns)
        return self.factor

    def _judge(self, answered: Sequence[int], now_ns: int) -> None:
        n_lost = (
            answered[Status.LATE] + answered[Status.EXPIRED]
            + answered[Status.INFEASIBLE] + answered[Status.OVERLOADED]
        )  # fmt: skip
        n_ended = n_lost + answered[Status.OK]
        lost, ended = n_lost - self._n_lost, n_ended - self._n_ended
        since_ns, is_jam = self._since_ns, self._is_jam
        self._n_lost, self._n_ended, self._since_ns, self._is_jam = n_lost, n_ended, now_ns, False
        if since_ns is None:
            return
        if lost >= _FEW and lost > _SHARE * ended and not is_jam:
            self._rise(now_ns)
        elif self.factor > 1.0:
            factor = 1.0 + (self.factor - 1.0) * exp((since_ns - now_ns) / self._fade_ns)
            self.factor = factor if factor >= _NONE else 1.0

    def _rise(self, now_ns: int) -> None:
        if self.factor == 1.0:
            tripped_ns = self._tripped_ns
            is_relapse = tripped_ns is not None and now_ns - tripped_ns <= _RELAPSE * self._fade_ns
            self._fade_ns = min(_LONGEST_FADE_NS, 2 * self._fade_ns) if is_relapse else _FADE_NS
        self._tripped_ns = now_ns
        self.factor = min(_MOST, self.factor * _UP)
