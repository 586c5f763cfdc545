"""The engine of clusters on Slurm: a job for each role.

A heterogeneous job would be one object, and so one fate: it cannot grow, a node that dies requeues all of it,
router included, and a preemption takes every worker. So `up` submits a job for each role, which Slurm
requeues, preempts and places alone; `cluster render slurm` prints the heterogeneous job for those who submit
by hand.

    superserve:NAME:ROLE    the job's name, by which every command finds it again

In each job `slurm_keeper` looks where the routers' jobs run, starts the role as a step, and drains it by
SIGTERM: of `cluster drain`, of a time limit or of a preemption. The folder must be on a file system that the
nodes share.
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from cluster.engines.engine import TAIL_LINES, RoleSeen, tail
from cluster.engines.placed import slurm_commands as slurm
from cluster.engines.placed.base import PlacedEngine, read_here, tail_lines
from cluster.spec.engines import SlurmSettings
from cluster.spec.roles import is_router

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from cluster.engines.placed.base import Started
    from cluster.engines.placed.slurm_commands import Job
    from cluster.remote.record import Record

PREFIX = "superserve"

# Slurm's states in supervisor's words; what is missing has ended badly.
_STATES = {
    "PENDING": "STARTING", "CONFIGURING": "STARTING", "REQUEUED": "STARTING", "REQUEUE_HOLD": "STARTING",
    "SPECIAL_EXIT": "STARTING", "RESIZING": "RUNNING", "SIGNALING": "RUNNING", "STAGE_OUT": "STOPPING",
    "RUNNING": "RUNNING", "SUSPENDED": "UNKNOWN", "STOPPED": "UNKNOWN", "COMPLETING": "STOPPING",
    "COMPLETED": "EXITED", "CANCELLED": "STOPPED",
}  # fmt: skip
_TAIL_BYTES = 8_192


class SlurmEngine(PlacedEngine):
    """A job for each role. Its verbs are those of `cluster.engines.engine.ClusterEngine`."""

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self._settings = record.slurm or SlurmSettings()

    def settings(self, kind: str) -> tuple[str, ...]:
        """Return the options of sbatch for a role's job."""
        own = self._settings
        more = own.router_options if kind == "router" else own.worker_options
        return (f"--signal=B:USR1@{own.notice_s}", *own.options, *more)

    def start(self, role: Started) -> None:
        """Submit a role's job."""
        self._log(role.name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        slurm.submit(script(self.record.name, role, self.folder))

    def end(self, name: str) -> None:
        """Drain a role; a job that waits is cancelled."""
        job = self._jobs().get(name)
        if job is None or _state(job) in ("EXITED", "STOPPED", "FATAL"):
            return
        if job.state == "RUNNING":
            slurm.drain(job.id)
        else:
            slurm.cancel(job.id)

    def gone(self, names: Iterable[str]) -> None:
        """Cancel what is left of roles' jobs; most have ended by themselves."""
        found = self._jobs()
        for name in names:
            job = found.get(name)
            if job is not None and _state(job) in ("STARTING", "RUNNING", "UNKNOWN"):
                slurm.cancel(job.id)

    def seen(self) -> dict[str, RoleSeen]:
        """Return every role with a job, those that ended lately too."""
        return {name: self._seen(name, job) for name, job in self._jobs().items()}

    def router_addresses(self) -> dict[str, str]:
        """Return the address of each router's node, by name; without those whose job does not run."""
        nodes = router_nodes(self.record.name, self.routers)
        return {name: slurm.address_of(node) for name, node in nodes.items()}

    def logs(self, role: str, n_lines: int = TAIL_LINES) -> list[str]:
        """Return the last lines of a role's log."""
        self.record.host_of(role)  # an error that lists the roles
        return self._tail(role, n_lines)

    def follow(self, role: str, n_lines: int) -> subprocess.Popen[bytes]:
        """Start what prints the last lines of a role's log and then each new one: this machine sees it."""
        return read_here(tail(str(self._log(role)), n_lines))

    def _jobs(self) -> dict[str, Job]:
        """Return the newest job of each role."""
        head = f"{PREFIX}:{self.record.name}:"
        found: dict[str, Job] = {}
        for job in sorted(slurm.jobs(), key=lambda job: job.id):
            if job.name.startswith(head):
                found[job.name.removeprefix(head)] = job
        return found

    def _seen(self, name: str, job: Job) -> RoleSeen:
        path = self._path(name)
        role = self.last(name) if path.exists() else None
        state = _state(job)
        is_well = state in ("RUNNING", "STOPPED", "EXITED")
        why = "" if is_well else f"job {job.id} is {job.state}" + (f": {job.reason}" if job.reason else "")
        where = f"job {job.id} on {job.node}" if job.node else f"job {job.id}"
        return RoleSeen(
            "" if role is None else role.host, name, "router" if is_router(name) else "worker",
            "" if role is None else role.serves, state, None, job.up_s, 0, str(self._log(name)),
            tuple(self._tail(name, TAIL_LINES)) if state == "FATAL" else (), why=why, place=where,
        )  # fmt: skip

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _tail(self, name: str, n_lines: int) -> list[str]:
        try:
            with self._log(name).open("rb") as log:
                log.seek(max(0, self._log(name).stat().st_size - _TAIL_BYTES))
                return tail_lines(log.read().decode(errors="replace"), n_lines)
        except OSError:
            return []


def _state(job: Job) -> str:
    return _STATES.get(job.state, "FATAL")


def router_nodes(cluster: str, names: Sequence[str]) -> dict[str, str]:
    """Return the node of each of a cluster's routers, by its name; without those whose job does not run."""
    head = f"{PREFIX}:{cluster}:"
    found = slurm.running_nodes([f"{head}{name}" for name in names])
    return {job.removeprefix(head): node for job, node in found.items()}


def script(cluster: str, role: Started, folder: Path) -> str:
    """Return the batch script of a role's job."""
    gpus = (f"--gres=gpu:{role.gpus}",) if role.gpus else ()
    options = (
        f"--job-name={PREFIX}:{cluster}:{role.name}", f"--output={folder / role.name}.log",
        "--open-mode=append", "--ntasks=1", "--requeue", *gpus, *role.settings,
    )  # fmt: skip
    keeper = (
        role.interpreter or sys.executable, "-P", "-m", "cluster.engines.placed.slurm_keeper",
        str(folder / "roles" / f"{role.name}.json"), cluster,
    )  # fmt: skip
    return "\n".join(
        [
            "#!/bin/sh",
            *(f"#SBATCH {option}" for option in options),
            "# Written by `cluster up`.",
            # A step takes its CPUs from its own options, and no longer from its job's.
            'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
            f"exec {shlex.join(keeper)}",
            "",
        ]
    )
