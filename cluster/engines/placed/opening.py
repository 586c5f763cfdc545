"""The engine of a record, opened: Slurm's commands need nothing, Ray and Kubernetes a connection."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cluster.spec.engines import KUBERNETES, RAY, SLURM
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.engines.placed.base import PlacedEngine
    from cluster.remote.record import Record


@contextlib.contextmanager
def open_placed(record: Record) -> Iterator[PlacedEngine]:
    """Give the engine of a cluster on Slurm, Ray or Kubernetes.

    Raises:
        ConfigError: The record's engine is unknown to this version, or Ray is not installed.
        RemoteError: The Ray cluster cannot be reached.
    """
    if record.engine == SLURM:
        from cluster.engines.placed.slurm import SlurmEngine  # noqa: PLC0415  what one engine needs, no other does

        yield SlurmEngine(record)
    elif record.engine == RAY:
        from cluster.engines.placed.ray_engine import connected  # noqa: PLC0415

        with connected(record) as engine:
            yield engine
    elif record.engine == KUBERNETES:
        from cluster.engines.placed import kubernetes_engine  # noqa: PLC0415

        with kubernetes_engine.connected(record) as engine:
            yield engine
    else:
        raise ConfigError(
            f"{record.name}: engine {record.engine!r}: written by another version of this package"
        )
