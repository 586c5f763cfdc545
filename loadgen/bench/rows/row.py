"""One figure of the benchmarks, and the machine that it was measured on."""

from __future__ import annotations

import datetime as dt
import functools
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from superserve.build import build
from superserve.roles.version import cpu_name


class SkippedError(Exception):
    """A row cannot be measured here; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One figure: the fields of its file, except machine and date.

    Attributes:
        name: The file's name without .json.
        value: None if nothing was found.
        unit: Of the value and the reference.
        reference: What it is compared with.
        reference_value: None if nothing was found.
        conditions: How it was measured.
        noise_p99_9_ms: The noise probe's p99.9 meanwhile; None if none ran.
    """

    name: str
    value: float | None
    unit: str
    reference: str
    reference_value: float | None
    conditions: dict[str, Any] = field(default_factory=dict)
    noise_p99_9_ms: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value over reference."""
        if self.value is None or not self.reference_value:
            return None
        return self.value / self.reference_value

    def to_dict(self) -> dict[str, Any]:
        """Return the file's fields."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "machine": machine(),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }


@functools.cache
def machine() -> str:
    """Return the machine in words: processor, cores, system, Python, and how the core runs on it."""
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return f"{cpu_name()}, {cores} cores, {platform.system()}, Python {python}, {build()} core"
