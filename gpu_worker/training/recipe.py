"""How a supernet is trained, and the random numbers of each of its parts."""

from __future__ import annotations

import dataclasses
import math
import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpu_worker.training.objectives import OBJECTIVES, Objective
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu_worker.supernet.control import Control, ControlSpace

SUBNETS = ("sandwich", "largest", "smallest")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By name, what products are computed in; weights stay in float32."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a supernet is trained.

    Attributes:
        steps: Batches in all.
        seed: Of the subnets drawn, the data's order and whatever else is random.
        objective: A name of `OBJECTIVES`.
        learning_rate: The highest; it rises to it and falls, as `OneCycleLR` does.
        weight_decay: Of AdamW.
        clip_norm: Longest gradient of a step.
        n_drawn: Subnets drawn in a step, beside the largest and the smallest.
        distilled: Share of the largest's teaching in what the others learn, 0 to 1; the rest is the targets'.
        subnets: "sandwich"; or "largest" or "smallest", to train one alone and compare.
        precision: A name of `PRECISIONS`.
    """

    steps: int
    seed: int = 0
    objective: str = "cross-entropy"
    learning_rate: float = 3e-4
    weight_decay: float = 0.02
    clip_norm: float = 2.0
    n_drawn: int = 2
    distilled: float = 0.5
    subnets: str = "sandwich"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seed", 0), ("n_drawn", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        for name in ("learning_rate", "clip_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay: expected a number of at least 0, got {self.weight_decay}")
        if not 0 <= self.distilled <= 1:
            raise ConfigError(f"distilled: expected a share from 0 to 1, got {self.distilled}")
        for name, known in (("objective", OBJECTIVES), ("subnets", SUBNETS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def learnt(self) -> Objective:
        """Return the objective itself."""
        return OBJECTIVES[self.objective]

    def controls(self, space: ControlSpace, step: int) -> list[Control]:
        """Return the subnets of a step, the one that teaches the others first."""
        if self.subnets != "sandwich":
            return [space.largest if self.subnets == "largest" else space.smallest]
        rng = np.random.default_rng(seed_of(self.seed, "subnets", step))
        return [space.largest, space.smallest, *(space.random(rng) for _ in range(self.n_drawn))]

    def as_dict(self) -> dict[str, Any]:
        """Return all that decides the outcome."""
        return dataclasses.asdict(self)


def seed_of(seed: int, part: str, *numbers: int) -> int:
    """Return the seed of one part of a training, such as its data in one epoch; 63 bits."""
    words = np.random.SeedSequence([seed, *part.encode(), *numbers]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def seed_all(seed: int) -> None:
    """Seed every generator that data or a model may draw from by default."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def apart() -> Iterator[None]:
    """Leave the random numbers that follow this block as they are, whatever is drawn in it.

    A step draws from seeds of its own. Between two steps only the data draw, as they do in a training that
    goes on and runs no step on the way.
    """
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
