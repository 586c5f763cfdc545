"""The engine of a cluster, and its section in hosts.yaml: plain data, also kept in the cluster's record.

engine: slurm
slurm:
  folder: /shared/superserve/prod
  options: [--account=ml]
  worker_options: [--partition=gpu, --time=24:00:00]

engine: ray
ray: {address: auto, spread: true}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

SSH, SLURM, RAY = "ssh", "slurm", "ray"
EngineName = Literal["ssh", "slurm", "ray"]

# Options for pydantic: no unknown keys, and no "5" for 5.
_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """How roles become jobs.

    Attributes:
        folder: For scripts, keys and logs: a path that this machine and every node of the jobs see; None for
            one in the state folder, which is in the home folder.
        options: Options of sbatch for every job, one an item: "--account=ml".
        router_options: Options of the router's job, besides.
        worker_options: Options of each worker's job, besides; its GPU is asked for without them.
        notice_s: How long before its time limit, or before a preemption, a job is warned: it drains, and is
            queued again.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    folder: str | None = None
    options: tuple[str, ...] = ()
    router_options: tuple[str, ...] = ()
    worker_options: tuple[str, ...] = ()
    notice_s: int = 60


@dataclass(frozen=True, slots=True)
class RaySettings:
    """How roles become actors.

    Attributes:
        address: Of the Ray cluster: "auto" for the one of this machine, HOST:PORT, or ray://HOST:PORT.
        router_node: Address of the node for the router; None for where Ray places it first.
        spread: Whether Ray puts workers on different nodes as far as it can.
        worker_cpus: CPUs that Ray counts for each worker; 0 counts none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    address: str = "auto"
    router_node: str | None = None
    spread: bool = False
    worker_cpus: float = 1.0
