"""How many workers a fleet should have, from what its router needs: for fleets whose engine adds none.

A pure core: instants and needs in, a number of workers out. `cluster autoscale` drives `cluster scale` with
it, and `loadgen autoscale` simulates it on traces.

    up      as soon as more is needed than there is, to all that is needed: a burst is short
    down    to the most that was needed within `down_after_s`, and `margin`: the next burst comes soon
    never   below `floor`, above `ceiling`, or twice within a cool-down; but bounds count at once

What is needed is one of the two figures of `workers_needed` in STATUS, each with a reserve already
(`TARGET_UTILISATION`). AS_SERVED keeps the accuracy of the last seconds, and grows a fleet in a few steps
until there is no better one. AT_LEAST meets deadlines at the lowest accuracy: bursts are left to the policy.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from superserve.status import GpusNeeded


AS_SERVED, AT_LEAST = NEEDS = ("as-served", "at-least")
"""Which need a fleet follows: see above."""


def need_of(needed: GpusNeeded, which: str) -> float:
    """Return the GPUs that a load needs, by one of NEEDS."""
    assert which in NEEDS, which
    return needed.as_served if which == AS_SERVED else needed.at_least


@dataclass(frozen=True, slots=True)
class ScalerSettings:
    """How a fleet follows its load.

    Attributes:
        floor: The fewest workers.
        ceiling: The most workers.
        gpus_per_worker: GPUs of each worker process, which the router counts one by one.
        margin: Share of what is needed that stays beside it on the way down: without it a need on the edge of
            a worker would take that worker away and bring it back.
        up_cool_s: Least time between a change and the next one upwards: what is new is not counted yet.
        down_cool_s: Least time between a change and the next one downwards.
        down_after_s: How long more than is needed must have been there.
    """

    floor: int = 1
    ceiling: int = 1
    gpus_per_worker: int = 1
    margin: float = 0.1
    up_cool_s: float = 15.0
    down_cool_s: float = 60.0
    down_after_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.floor <= self.ceiling:
            raise ConfigError(
                f"scaler: expected a floor of 1 or more and a ceiling not below it, got {self.floor} and "
                f"{self.ceiling}"
            )
        if self.gpus_per_worker < 1:
            raise ConfigError(f"scaler: gpus_per_worker: expected 1 or more, got {self.gpus_per_worker}")
        for name in ("margin", "up_cool_s", "down_cool_s", "down_after_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"scaler: {name}: expected 0 or more, got {value}")


class Scaler:
    """Decides again and again how many workers there should be.

    Args:
        settings: How to follow the load.
    """

    def __init__(self, settings: ScalerSettings) -> None:
        self._settings = settings
        self._needs: deque[tuple[float, float]] = deque()  # falling: each is the most since its instant
        self._since_s: float | None = None
        self._changed_s = -math.inf

    def decide(self, now_s: float, needed: float, n: int) -> int:
        """Return how many workers there should be.

        Args:
            now_s: The instant; never earlier than the one before.
            needed: GPUs that the load needs now, a fraction: `workers_needed` of STATUS.
            n: Workers that there are, those that are starting too.
        """
        own = self._settings
        self._note(now_s, needed)
        target = n
        workers = math.ceil(needed / own.gpus_per_worker)
        if workers > n and now_s - self._changed_s >= own.up_cool_s:
            target = workers
        elif self._since_s is not None and now_s - self._since_s >= own.down_after_s:
            most = math.ceil(self._needs[0][1] * (1 + own.margin) / own.gpus_per_worker)
            if most < n and now_s - self._changed_s >= own.down_cool_s:
                target = most
        target = min(max(target, own.floor), own.ceiling)
        if target != n:
            self._changed_s = now_s
        return target

    def _note(self, now_s: float, needed: float) -> None:
        """Keep the most that was needed since each instant of the window, in falling order."""
        if self._since_s is None:
            self._since_s = now_s
        while self._needs and self._needs[-1][1] <= needed:
            self._needs.pop()
        self._needs.append((now_s, needed))
        while self._needs[0][0] < now_s - self._settings.down_after_s:
            self._needs.popleft()
