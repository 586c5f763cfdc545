"""The simulated network: one direction of one peer's connection, on a virtual clock.

Messages from one peer to another arrive in the order in which they were sent, as with TCP. Messages of
different peers overtake each other freely, because each connection draws its own delays. Trouble is
a window of time: a message sent within it is delayed, held back, lost or sent twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

FAR_NS = 1 << 62
"""Later than everything."""


@dataclass(frozen=True, slots=True)
class Way:
    """How long a message takes without trouble: `least_ns`, plus uniformly up to `jitter_ns`."""

    least_ns: int
    jitter_ns: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """A window of time in which a connection misbehaves; several add up.

    Attributes:
        from_ns: First instant of sending that it affects.
        until_ns: First instant that it does not affect.
        delay_ns: Added to each message's time.
        jitter_ns: Added uniformly at random, up to this.
        loss: Share of the messages that are lost. TCP loses none, but a connection that breaks and is
            made again does, and so does a full buffer.
        doubled: Share of the messages that arrive twice, as if the peer had sent them again.
        is_cut: The connection is interrupted: messages arrive when the window ends, as with TCP.
    """

    from_ns: int
    until_ns: int
    delay_ns: int = 0
    jitter_ns: int = 0
    loss: float = 0.0
    doubled: float = 0.0
    is_cut: bool = False


class SimLink:
    """One direction of one connection: determines when messages arrive.

    Args:
        way: How long a message takes.
        seed: Of this link's own delays.
        troubles: Its windows of trouble.
    """

    __slots__ = ("_jitter_ns", "_last_ns", "_least_ns", "_random", "_rng", "_troubles")

    def __init__(self, way: Way, seed: str, troubles: tuple[Trouble, ...] = ()) -> None:
        self._least_ns = way.least_ns
        self._jitter_ns = way.jitter_ns
        self._rng = random.Random(seed)
        self._random = self._rng.random
        self._last_ns = 0
        self._troubles = troubles

    def arrivals(self, sent_ns: int) -> tuple[int, ...]:
        """Return when a message sent now arrives: once, twice, or never.

        Instants of sending must not decrease from call to call.
        """
        at_ns = sent_ns + self.way_ns(sent_ns)
        if self._troubles:
            return self._troubled(sent_ns, at_ns)
        if at_ns < self._last_ns:
            at_ns = self._last_ns
        self._last_ns = at_ns
        return (at_ns,)

    def way_ns(self, _sent_ns: int) -> int:
        """Return how long a message sent now takes, without trouble and without waiting for earlier ones."""
        return self._least_ns + int(self._jitter_ns * self._random())

    def arrivals_of(self, sent_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return when each of many messages arrives, the first time; -1 for a lost one.

        For a link whose messages are known beforehand; it must not be used otherwise then.
        """
        if self._troubles:
            found = [self.arrivals(at_ns) for at_ns in sent_ns.tolist()]
            return np.array([instants[0] if instants else -1 for instants in found], np.int64)
        draws = np.random.default_rng(self._rng.getrandbits(64)).random(len(sent_ns))
        ways_ns = self._least_ns + (self._jitter_ns * draws).astype(np.int64)
        return np.asarray(np.maximum.accumulate(sent_ns + ways_ns), np.int64)

    def _troubled(self, sent_ns: int, at_ns: int) -> tuple[int, ...]:
        copies = 1
        for trouble in self._troubles:
            if not trouble.from_ns <= sent_ns < trouble.until_ns:
                continue
            if trouble.loss and self._random() < trouble.loss:
                return ()
            if trouble.doubled and self._random() < trouble.doubled:
                copies = 2
            at_ns += trouble.delay_ns + int(trouble.jitter_ns * self._random())
            if trouble.is_cut:
                at_ns = max(at_ns, trouble.until_ns + self._least_ns)
        self._last_ns = at_ns = max(at_ns, self._last_ns)
        return (at_ns,) * copies
