"""Which pairs a seed gives, and the sample that every test run takes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.environments.commands import COMMANDS
from tests.environments.hostile import FAMILIES

if TYPE_CHECKING:
    from tests.environments.hostile import Hostile

SAMPLED = 44
"""How many pairs the sample has."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A command in a hostile environment.

    Attributes:
        family: The environment's family.
        variant: What its variant is drawn from.
        command: What is run.
    """

    family: str
    variant: str
    command: str

    @property
    def hostile(self) -> Hostile:
        """The environment."""
        return FAMILIES[self.family](random.Random(self.variant))

    def __str__(self) -> str:
        return f"{self.command} / {self.family}: {self.hostile.what}".replace("\n", "\\n").rstrip(": ")


ONCE_WRONG = (
    Pair("python variables", "0/600", "report"),
    Pair("strange tmpdir", "0/780", "cluster up"),
    Pair("few descriptors", "0/956", "router record"),
    Pair("small files", "0/971", "run"),
)
"""Pairs that failed in no environment of the sample: a library's warning, a folder's name, and two limits."""


def pairs(seed: int, count: int) -> list[Pair]:
    """Return the pairs of a seed: all families beside all commands, in random order."""
    rng = random.Random(seed)
    product = [(family, command) for family in FAMILIES for command in COMMANDS]
    found: list[Pair] = []
    while len(found) < count:
        rng.shuffle(product)
        found += [
            Pair(family, f"{seed}/{len(found) + number}", command)
            for number, (family, command) in enumerate(product[: count - len(found)])
        ]
    return found


def sample() -> list[Pair]:
    """Return pairs that have every family and every command, and those that were wrong once."""
    commands, families = list(COMMANDS), list(FAMILIES)
    random.Random(1).shuffle(commands)
    n = max(SAMPLED, len(commands), len(families))
    drawn = [
        Pair(families[number % len(families)], f"sample/{number}", commands[number % len(commands)])
        for number in range(n)
    ]
    return [*drawn, *ONCE_WRONG]
