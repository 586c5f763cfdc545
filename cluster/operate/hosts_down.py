"""Stop a cluster on several hosts: the router drains first, then everything ends everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.remote import record as records

if TYPE_CHECKING:
    from cluster.operate.engine import Stopped, SupervisorEngine


def down(engine: SupervisorEngine) -> Stopped:
    """Stop everything; return when it has ended on every host that can be reached.

    Once nothing of the cluster is left, its record is removed. If a host cannot be reached, the record stays,
    for another try.
    """
    done = engine.stop()
    if not done.wrong:
        records.forget(engine.record.name)
    return done
