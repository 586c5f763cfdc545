"""Stop a cluster of this machine: drained if there is time, and gone in any case."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.host import folder as folders
from cluster.host.folder import HeldError
from superserve.errors import ConfigError
from superserve.roles import local
from superserve.roles.local import Liveness

if TYPE_CHECKING:
    from pathlib import Path

    from superserve.roles.local import LocalCluster

_KILLED_S = 5.0  # roles end with their keeper; this allows for a very busy machine


@dataclass(frozen=True, slots=True)
class Down:
    """What was stopped.

    Attributes:
        cluster: As in its state file.
        was_alive: Whether it ran; if not, only the remains of a dead keeper were removed.
        was_killed: Whether it had to be killed.
    """

    cluster: LocalCluster
    was_alive: bool
    was_killed: bool = False


def down(name: str, timeout_s: float) -> Down | None:
    """Stop a cluster; return when all of its processes have ended, or None if there was none.

    Args:
        name: The cluster.
        timeout_s: How long it may drain before it is killed.

    Raises:
        ConfigError: Its file is malformed, or was written on another host; or a process still runs.
    """
    if not 0 < timeout_s <= 86_400:
        raise ConfigError(f"--timeout-s: expected seconds above 0 and up to a day, got {timeout_s}")
    folder = local.cluster_folder(name)
    cluster = local.load(folder)
    if cluster is None:
        _tidy_unnamed(folder)
        return None
    liveness = cluster.liveness()
    if liveness is Liveness.ELSEWHERE:
        raise ConfigError(f"the cluster {name!r} {local.remains(cluster)}")
    if liveness is Liveness.GONE:
        left = folders.tidy(folder)
        return None if left is None else Down(left, was_alive=False)
    cluster.keeper.signal(signal.SIGTERM)
    killed = folders.end([cluster.keeper], wait_s=timeout_s)
    folders.end(folders.outliving(folder), wait_s=_KILLED_S)
    # Processes that could not be killed keep their files, so that `down` can be typed again.
    alive = [one.pid for one in (cluster.keeper, *folders.outliving(folder)) if one.is_alive()]
    if alive:
        raise ConfigError(f"the cluster {name!r}: processes {alive} run on: they could not be killed")
    folders.tidy(folder)
    return Down(cluster, was_alive=True, was_killed=bool(killed))


def _tidy_unnamed(folder: Path) -> None:
    """Remove what a killed `up` left before its keeper started, unless another command works there."""
    if folder.is_dir():
        with contextlib.suppress(HeldError), folders.alone(folder, wait_s=0.0):
            folders.tidy_unowned(folder)
