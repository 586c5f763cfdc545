"""The engine of a cluster, and its section in hosts.yaml: plain data, also kept in the cluster's record.

engine: slurm
slurm:
  folder: /shared/superserve/prod
  options: [--account=ml]
  worker_options: [--partition=gpu, --time=24:00:00]

engine: ray
ray: {address: auto, spread: true}

engine: kubernetes
kubernetes: {context: prod, namespace: serving, image: "registry.example.com/superserve:0.1.0"}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

SSH, SLURM, RAY, KUBERNETES = "ssh", "slurm", "ray", "kubernetes"
EngineName = Literal["ssh", "slurm", "ray", "kubernetes"]

# Options for pydantic: no unknown keys, and no "5" for 5.
_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """How roles become jobs.

    Attributes:
        folder: For scripts, keys and logs: a path that this machine and every node of the jobs see; None for
            one in the state folder, which is in the home folder.
        options: Options of sbatch for every job, one an item: "--account=ml".
        router_options: Options of each router's job, besides.
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
        router_node: Address of the node for the router, or for all; None for where Ray places it first.
        spread: Whether Ray puts workers on different nodes as far as it can.
        worker_cpus: CPUs that Ray counts for each worker; 0 counts none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    address: str = "auto"
    router_node: str | None = None
    spread: bool = False
    worker_cpus: float = 1.0


@dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """How roles become pods.

    Attributes:
        context: Of kubectl's configuration; None for the current one.
        namespace: Where every object is; it must exist.
        image: The image of every role, as deploy/Dockerfile builds it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    context: str | None = None
    namespace: str = "default"
    image: str = "superserve"
