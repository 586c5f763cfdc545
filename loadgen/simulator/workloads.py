"""Workloads with different queries, and clusters with different GPUs: from options and cells to columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loadgen.options import profile_and_n
from profiles.table import load_profile
from superserve.clock import MS
from superserve.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

    from loadgen.traces.trace import Trace
    from profiles.table import Profile

MAX_GPUS = 65_536
"""Most GPUs of a simulated cluster."""

_LONGEST_MS = 86_400_000.0  # a day, the wire's limit for a slack


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Queries, each with its own terms, in the order of due instants.

    Attributes:
        trace: When they are due.
        slo_ns: From due to deadline: one for all, or shape (n,).
        min_accuracy: Accuracy floors, percent, 0 for none, shape (n,); or None.
        priority: Priority classes, shape (n,); or None.
    """

    trace: Trace
    slo_ns: int | npt.NDArray[np.int64] = 36 * MS
    min_accuracy: npt.NDArray[np.float32] | None = None
    priority: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        for name in ("slo_ns", "min_accuracy", "priority"):
            column = getattr(self, name)
            if isinstance(column, np.ndarray) and column.shape != (self.trace.n,):
                raise ConfigError(
                    f"workload: {name}: expected one for each of {self.trace.n} queries, got {column.shape}"
                )
        if np.min(self.slo_ns) <= 0:
            raise ConfigError(f"workload: slo_ns: expected more than 0, got {np.min(self.slo_ns)}")


def slowed(profile: Profile, factor: float) -> Profile:
    """Return the profile of a device on which everything takes `factor` times as long."""
    subnets = [
        replace(
            subnet,
            latency_ns=tuple(round(factor * ns) for ns in subnet.latency_ns),
            latency_p99_ns=tuple(round(factor * ns) for ns in subnet.latency_p99_ns),
        )
        for subnet in profile.subnets
    ]
    provenance = f"{profile.provenance} All latencies times {factor:g}."
    return replace(profile, name=f"{profile.name}*{factor:g}", provenance=provenance, subnets=tuple(subnets))


def parse_cluster(text: str, option: str = "--emulate") -> list[Profile]:
    """Return a profile for each GPU of `PROFILE:N[,PROFILE:N...]`.

    `PROFILE*F` is the profile of a device on which everything takes F times as long. Equal parts
    share one object, and therefore a policy.

    Raises:
        ConfigError: The text is malformed, or there is no such profile.
    """
    gpus: list[Profile] = []
    for part in text.split(","):
        spec, n_gpus = profile_and_n(part, option, most=MAX_GPUS)
        name, star, factor = spec.partition("*")
        profile = load_profile(name)
        if star:
            profile = slowed(profile, _number(factor, option, part, most=1_000.0))
        gpus += [profile] * n_gpus
    if len(gpus) > MAX_GPUS:
        raise ConfigError(f"{option}: expected at most {MAX_GPUS} GPUs, got {len(gpus)}")
    return gpus


def parse_slos(text: str, option: str = "--slo-ms") -> list[tuple[int, float]]:
    """Return (SLO in ns, share) of each part of `MS[:WEIGHT][,MS[:WEIGHT]...]`; the shares sum to 1."""
    found = []
    for part in text.split(","):
        slo, _, weight = part.partition(":")
        slo_ms = _number(slo, option, part, most=_LONGEST_MS)
        found.append((int(slo_ms * MS), _number(weight or "1", option, part, most=1e6)))
    total = sum(weight for _, weight in found)
    return [(slo_ns, weight / total) for slo_ns, weight in found]


def parse_floor(text: str, option: str = "--floor") -> tuple[float, float]:
    """Return (accuracy, share of the queries) of `ACCURACY[:SHARE]`."""
    accuracy, _, share = text.partition(":")
    return (_number(accuracy, option, text, most=100.0), _number(share or "1", option, text, most=1.0))


def _number(text: str, option: str, part: str, *, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= most:
        raise ConfigError(f"{option}: expected a number above 0 and up to {most:g}, got {text!r} in {part!r}")
    return value


def mixed_workload(
    trace: Trace, slos: list[tuple[int, float]], floor: tuple[float, float] | None = None, *, seed: int = 0
) -> Workload:
    """Return a trace whose queries draw their SLOs, and whether they have the floor, from a seed."""
    rng = np.random.default_rng([seed, 0x510])
    slo_ns: int | npt.NDArray[np.int64] = slos[0][0]
    if len(slos) > 1:
        kinds = np.array([one for one, _ in slos], np.int64)
        slo_ns = kinds[rng.choice(len(slos), trace.n, p=[share for _, share in slos])]
    floors = None
    if floor is not None:
        floors = np.where(rng.random(trace.n) < floor[1], floor[0], 0.0).astype(np.float32)
    return Workload(trace, slo_ns, floors)
