"""Run a cluster on an engine that chooses the machines: start what differs, wait until all is ready.

As over ssh, ready means registered with the router, every step can be repeated, and the record is written
before anything is started. There is no preflight: which machine a role will get, only the engine knows.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.engines.placed import placing
from cluster.engines.placed.opening import open_placed
from cluster.operate.hosts_up import HostsUp, await_ready
from cluster.remote import record as records
from cluster.spec.engines import SLURM

if TYPE_CHECKING:
    from cluster.engines.describe import Description
    from cluster.remote.record import Record


def up(description: Description, *, ready_timeout_s: float) -> HostsUp:
    """Run the described cluster; return what was done, and what is wrong.

    Args:
        description: The cluster, of an engine other than ssh.
        ready_timeout_s: How long the workers may take to register, waiting for a machine included.

    Raises:
        ConfigError: Nothing was started: the file does not allow it, or the engine is not installed here.
        RemoteError: Nothing was started: the engine cannot be reached.
    """
    before = records.load(description.name)
    placing.check_engine(description, before)
    folder = placing.folder_of(description)
    # Slurm's nodes have this machine's file system; Ray's have a Python of their own.
    python = sys.executable if description.hosts.engine == SLURM else ""
    plans, files = placing.plans_of(description, folder, python)
    record = placing.record_of(description, folder)
    if before is not None and before.hosts[0].folder == str(folder):
        client, worker = before.client_endpoint, before.worker_endpoint
        if _ports(before) == _ports(record):  # where the routers were is the first place to ask
            record = replace(record, client_endpoint=client, worker_endpoint=worker)
    done = HostsUp(description.name, [])
    with open_placed(record) as engine:
        records.save(record)
        for name, applied in engine.apply(plans, files).items():
            if applied.error:
                done.wrong.append(applied.error)
            done.changed[name] = applied.changed
            if applied.files:
                done.sent[name] = applied.files
        await_ready(engine, dict(record.slots), done, ready_timeout_s)
    return done


def _ports(record: Record) -> list[str]:
    ends = f"{record.client_endpoint},{record.worker_endpoint}".split(",")
    return [end.rpartition(":")[2] for end in ends]
