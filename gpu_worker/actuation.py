"""Actuation: from one subnet to another between two batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from gpu_worker.operators import Cursor
    from superserve.subnet import Subnet


class Actuated(Protocol):
    """What can be actuated: hosted subnets, and the cursor that its operators read."""

    @property
    def cursor(self) -> Cursor:
        """The word that says which subnet runs."""
        ...

    @property
    def subnets(self) -> tuple[Subnet, ...]:
        """The hosted subnets, in the order of their rows."""
        ...


def actuate(supernet: Actuated, subnet: int) -> None:
    """Make `subnet`, a row of the hosted subnets, the one that the next batch runs.

    Every view was made when the subnets were hosted, so this is one store: no
    memory is allocated or moved, whatever the supernet's size.

    Raises:
        ConfigError: If no subnet is hosted in that row.
    """
    if not 0 <= subnet < len(supernet.subnets):
        raise ConfigError(f"subnet: expected a row from 0 to {len(supernet.subnets) - 1}, got {subnet}")
    supernet.cursor.row = subnet
