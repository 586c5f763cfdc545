"""Actuation: from one subnet to another between two batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from gpu_worker.supernet.supernet import Supernet


def actuate(supernet: Supernet, subnet: int) -> None:
    """Make `subnet`, a row of the hosted subnets, the one that the next forward pass runs.

    One store, whatever the supernet's size: the pass that is running, if any, ends on the subnet
    with which it began. A subnet that has not run for a while has its statistics brought to the
    device first, in one copy.

    Raises:
        ConfigError: If no subnet is hosted in that row.
    """
    if not 0 <= subnet < len(supernet.subnets):
        raise ConfigError(f"subnet: expected a row from 0 to {len(supernet.subnets) - 1}, got {subnet}")
    supernet.cursor.chosen = supernet.prepared(subnet)
