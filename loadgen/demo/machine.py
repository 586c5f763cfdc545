"""How much of this machine other work took during a measurement.

A sleeper that wakes in time shows little: the scheduler favours it over a worker that computes without pause.
So the cores' own counters are read too: what all processes used, minus the demo's share, is other work's.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]  # it ships no types

from superserve.clock import SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

_SAMPLE_S = 0.25
_OTHERS = 0.1
"""Cores that other work may take: an idle desktop takes less."""
_ROOM = 0.3
"""Idle cores below which the demo's processes have to wait for one."""
_FULL_SHARE = 0.02
"""Of the samples: a fiftieth of the time without a core costs more than a hundredth of the deadlines."""
_NOISE_SHARE = 0.05
"""Share of the SLO that a sleeper may wake late by; a run's validity uses the same share."""


@dataclass(frozen=True, slots=True)
class MachineUse:
    """What else this machine did during a period.

    Attributes:
        n_cores: Of the machine.
        others: CPU time of processes outside the demo, in cores, on average.
        full: Share of the samples in which less than 0.3 of a core was idle.
    """

    n_cores: int
    others: float
    full: float

    @property
    def is_calm(self) -> bool:
        """Whether the demo's processes had the cores that they needed."""
        return self.others < _OTHERS or self.full < _FULL_SHARE

    def noise(self, noise_ns: int | None, slo_ns: int) -> str:
        """Return in words what disturbed a run with this p99.9 of the noise probe; "" if nothing did."""
        words = []
        if not self.is_calm:
            words.append(f"other work took {self.others:.1f} of this machine's {self.n_cores} cores")
        if noise_ns is not None and noise_ns > _NOISE_SHARE * slo_ns:
            words.append(f"the noise probe woke {noise_ns * 1e3 / SECOND:.1f} ms late")
        return " and ".join(words)


class MachineWatch:
    """Reads the cores' counters until `stop`.

    Args:
        pids: Processes of the demo that are not its children: their CPU time is not other work's.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._roles = [psutil.Process(pid) for pid in pids]
        self._stopping = threading.Event()
        self._samples: list[tuple[float, float]] = []  # seconds, and the cores' idle seconds by then
        self._thread = threading.Thread(target=self._run, name="machine-watch", daemon=True)
        self._before = (0.0, 0.0)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._before = (_busy_s(), self._own_s())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def use(self) -> MachineUse:
        """Return the machine's use from the start until now."""
        now_s, idle_s = time.monotonic(), _idle_s()
        samples = [*self._samples, (now_s, idle_s)]
        others_s = _busy_s() - self._before[0] - (self._own_s() - self._before[1])
        return use_of(samples, others_s, psutil.cpu_count() or 1)

    def _run(self) -> None:
        while True:
            self._samples.append((time.monotonic(), _idle_s()))
            if self._stopping.wait(_SAMPLE_S):
                return

    def _own_s(self) -> float:
        """Return the CPU time of this process, of its children that ended, and of the roles."""
        own = psutil.Process().cpu_times()
        total: float = own.user + own.system + own.children_user + own.children_system
        for role in self._roles:
            try:
                times = role.cpu_times()
            except psutil.Error:  # it ended; the run's own figures will show that
                continue
            total += times.user + times.system
        return total


def use_of(samples: Sequence[tuple[float, float]], others_s: float, n_cores: int) -> MachineUse:
    """Sum up samples of a clock and of the cores' idle time, both in seconds and ascending.

    Args:
        samples: At least two.
        others_s: CPU time that other work took from the first to the last.
        n_cores: Of the machine.
    """
    idle = [
        (idle_s - before_idle_s) / max(at_s - before_s, 1e-9)
        for (before_s, before_idle_s), (at_s, idle_s) in pairwise(samples)
    ]
    took_s = max(samples[-1][0] - samples[0][0], 1e-9)
    return MachineUse(n_cores, max(0.0, others_s / took_s), sum(one < _ROOM for one in idle) / len(idle))


def _idle_s() -> float:
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))


def _busy_s() -> float:
    """Return the CPU time of all processes since the machine's start, including time stolen by its host."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")  # those of guests are in the first two
    return float(sum(getattr(times, name, 0.0) for name in names))
