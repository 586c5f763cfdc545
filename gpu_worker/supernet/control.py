"""Control tuples: what names a subnet, the bounds that each entry keeps, and what a tuple comes to.

A control tuple is a dictionary of lists, such as {"d": [2, 2, 4], "w": [0.5, 1.0, 1.0]}. A
`ControlSpace` has an `Entry` for each number in it: where it belongs, and which values it may
take. Every supernet has a function that turns a checked tuple into `Sizes`, the only input of
the operators: blocks that run, and outputs that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

Number = int | float
Control = dict[str, list[Any]]
"""A control tuple as profiles hold it."""

# Keeps 0.55 * 100 = 55.000000000000007 at 55 channels.
_ROUNDING = 1e-9


def sliced_size(fraction: float, size: int) -> int:
    """Return ceil(fraction * size), the number of channels, heads or units kept."""
    return math.ceil(fraction * size - _ROUNDING)


def first_blocks(depth: int, n_blocks: int) -> tuple[int, ...]:
    """Return the blocks that a convolutional stage keeps: the first `depth`."""
    return tuple(range(min(depth, n_blocks)))


def spread_blocks(depth: int, n_blocks: int) -> tuple[int, ...]:
    """Return the blocks that a transformer keeps: `depth` of them, spread evenly.

    Source: DynaBERT (NeurIPS '20): the kept ones are floor(i * L / D), i = 0 .. D-1.
    """
    return tuple(i * n_blocks // depth for i in range(depth))


@dataclass(frozen=True, slots=True)
class Entry:
    """One number of a control tuple.

    Attributes:
        where: What it belongs to, such as "stage 1" or "block 3".
        choices: Ascending values that a search draws from; the first and the last are its bounds.
        is_open: Whether values between the choices are allowed too.
    """

    where: str
    choices: tuple[Number, ...]
    is_open: bool = False

    def __post_init__(self) -> None:
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise ConfigError(f"{self.where}: expected ascending choices, got {list(self.choices)}")

    @property
    def expected(self) -> str:
        """What values are allowed, in words."""
        low, high = self.choices[0], self.choices[-1]
        if self._is_whole and self.choices == tuple(range(int(low), int(high) + 1)):
            return f"a whole number from {low} to {high}"
        if self.is_open:
            return f"a fraction from {low:g} to {high:g}"
        return f"one of {', '.join(f'{choice:g}' for choice in self.choices)}"

    def allows(self, value: object) -> bool:
        """Return whether `value` is of the right type and within the bounds."""
        if isinstance(value, bool) or not isinstance(value, int if self._is_whole else int | float):
            return False
        return self.choices[0] <= value <= self.choices[-1] if self.is_open else value in self.choices

    @property
    def _is_whole(self) -> bool:
        return not self.is_open and all(isinstance(choice, int) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class ControlSpace:
    """All control tuples of a supernet: for each key, one entry a number."""

    entries: Mapping[str, tuple[Entry, ...]]

    @property
    def smallest(self) -> Control:
        """The control tuple with every entry at its lower bound."""
        return {key: [entry.choices[0] for entry in row] for key, row in self.entries.items()}

    @property
    def largest(self) -> Control:
        """The control tuple with every entry at its upper bound: the whole supernet."""
        return {key: [entry.choices[-1] for entry in row] for key, row in self.entries.items()}

    @property
    def n_tuples(self) -> int:
        """How many control tuples there are."""
        return math.prod(len(entry.choices) for row in self.entries.values() for entry in row)

    def random(self, rng: np.random.Generator) -> Control:
        """Draw each entry alike from its choices."""
        return {
            key: [entry.choices[int(rng.integers(len(entry.choices)))] for entry in row]
            for key, row in self.entries.items()
        }

    def check(self, control: Mapping[str, Any]) -> None:
        """Raise ConfigError, naming the entry, its value and its bound, unless `control` is of this space."""
        if not isinstance(control, Mapping) or set(control) != set(self.entries):
            got = sorted(control) if isinstance(control, Mapping) else repr(control)
            raise ConfigError(f"control: expected exactly the keys {_listed(self.entries)}, got {got}")
        for key, row in self.entries.items():
            values = control[key]
            if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(row):
                kind = row[0].where.partition(" ")[0] if row else "entry"
                raise ConfigError(f"control {key}: expected {len(row)} entries, one a {kind}, got {values!r}")
            for entry, value in zip(row, values, strict=True):
                if not entry.allows(value):
                    raise ConfigError(
                        f"control {key}, {entry.where}: expected {entry.expected}, got {value!r}"
                    )


def _listed(words: Mapping[str, object]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a control tuple comes to.

    Attributes:
        blocks: For each stage, the numbers of the blocks that run.
        outputs: For each elastic size, by name, the outputs (channels, features or heads) kept.
    """

    blocks: tuple[tuple[int, ...], ...]
    outputs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Controls:
    """A supernet's control tuples and what each comes to.

    Attributes:
        space: The tuples there are.
        sizes: Turns one that is of the space into sizes.
    """

    space: ControlSpace
    sizes: Callable[[Control], Sizes]

    def sizes_of(self, control: Mapping[str, Any] | None) -> Sizes:
        """Check a control tuple and return its sizes.

        Raises:
            ConfigError: Naming the entry, its value and the bound it breaks.
        """
        if control is None:
            raise ConfigError("expected a control tuple, got none")
        self.space.check(control)
        return self.sizes({key: list(values) for key, values in control.items()})
