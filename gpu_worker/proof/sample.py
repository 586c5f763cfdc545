"""Which subnets a proof looks at: few, in which each size and each set of blocks occurs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpu_worker.supernet.control import Control, Controls, ControlSpace, Sizes

    Trait = tuple[object, ...]


class ProofSample(NamedTuple):
    """Subnets to look at.

    Attributes:
        subnets: The first `n_needed` of them have every size and set of blocks; others join them.
        n_needed: How many must be looked at.
    """

    subnets: tuple[Subnet, ...]
    n_needed: int


def covering(subnets: Sequence[Subnet], controls: Controls, most: int) -> ProofSample:
    """Return subnets in which every size and every set of blocks of all of them occurs.

    Where fewer than `most` suffice, others that are spread over the rest join them.
    """
    traits = [_traits(controls.sizes_of(subnet.control)) for subnet in subnets]
    missing = set().union(*traits)
    chosen: list[int] = []
    while missing:
        best = max(range(len(subnets)), key=lambda row: len(traits[row] & missing))
        chosen.append(best)
        missing -= traits[best]
    n_needed = len(chosen)
    rest = [row for row in range(len(subnets)) if row not in chosen]
    n_more = min(len(rest), max(0, most - n_needed))
    if n_more:
        chosen += [rest[int(i)] for i in np.linspace(0, len(rest) - 1, n_more)]
    return ProofSample(tuple(subnets[row] for row in chosen), n_needed)


def _traits(sizes: Sizes) -> set[Trait]:
    """Return what a subnet is a case of: each size that it keeps, and which blocks of each stage."""
    kept: set[Trait] = {("size", name, n) for name, n in sizes.outputs.items()}
    return kept | {("stage", number, *blocks) for number, blocks in enumerate(sizes.blocks)}


def drawn(controls: Controls, most: int) -> ProofSample:
    """Return at most `most` of all subnets there are; each choice of each entry occurs if that fits."""
    space, rng = controls.space, np.random.default_rng(0)
    n = max((len(entry.choices) for row in space.entries.values() for entry in row), default=1)
    rounds = _latin(space, min(n, max(0, most - 2)), rng)
    found = {str(control): control for control in (space.smallest, space.largest, *rounds)}
    while len(found) < min(most, n + 4, space.n_tuples):
        control = space.random(rng)
        found[str(control)] = control
    subnets = tuple(Subnet(f"drawn {i}", control) for i, control in enumerate(found.values()))
    return ProofSample(subnets, len(subnets))


def _latin(space: ControlSpace, n: int, rng: np.random.Generator) -> Iterable[Control]:
    """Yield `n` control tuples, over which each entry goes through its choices in an own order."""
    orders = {
        key: [rng.permutation(max(n, len(entry.choices))) for entry in row]
        for key, row in space.entries.items()
    }
    for i in range(n):
        yield {
            key: [
                entry.choices[int(order[i]) % len(entry.choices)]
                for entry, order in zip(row, orders[key], strict=True)
            ]
            for key, row in space.entries.items()
        }
