"""The lanes of GPUs in a run's worst two seconds, as the result file's `lanes` has them.

{"duration_ms", "missed", "gpus": [name, ...], "subnets": [[name, accuracy], ...],
 "batches": [[gpu, start ms, duration ms, subnet, queries], ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class GpuLanes:
    """Batches of two seconds.

    Attributes:
        duration_ms: How long that is.
        missed: Queries that missed then.
        gpus: Their names.
        subnets: Name and accuracy of each row.
        batches: GPU, start, duration, subnet and queries of each.
    """

    duration_ms: float
    missed: int
    gpus: tuple[str, ...]
    subnets: tuple[tuple[str, float], ...]
    batches: tuple[tuple[int, float, float, int, int], ...]


def lanes_from(raw: Mapping[str, Any]) -> GpuLanes:
    """Read a result's `lanes`.

    Raises:
        ConfigError: It is not what the module's docstring says; the error names the field.
    """
    field = "duration_ms"
    try:
        duration_ms = float(raw["duration_ms"])
        field = "missed"
        missed = int(raw["missed"])
        field = "gpus"
        gpus = tuple(str(name) for name in raw["gpus"])
        field = "subnets"
        subnets = tuple((str(name), float(accuracy)) for name, accuracy in raw["subnets"])
        field = "batches"
        batches = tuple(
            (int(gpu), float(start), float(took), int(subnet), int(n))
            for gpu, start, took, subnet, n in raw["batches"]
        )
        if not all(0 <= one[0] < len(gpus) and 0 <= one[3] < len(subnets) for one in batches):
            raise ValueError("a GPU or subnet that is not named")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"lanes.{field}: {error!r}") from error
    return GpuLanes(duration_ms, missed, gpus, subnets, batches)
