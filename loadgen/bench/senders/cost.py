"""What processes have cost so far, from /proc: processor time of each thread, and context switches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SWITCHES = ("voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:")


@dataclass(frozen=True, slots=True)
class ProcessCost:
    """Of one process.

    Attributes:
        cpu_s: Processor time of all its threads, seconds.
        main_s: Of its first thread.
        busiest_s: Of the thread that took most.
        switches: Context switches of all its threads.
    """

    cpu_s: float
    main_s: float
    busiest_s: float
    switches: int


@dataclass(frozen=True, slots=True)
class Threads:
    """The counters of a process's threads at one instant: nanoseconds on a processor, and switches."""

    cpu_ns: dict[int, int]
    switches: dict[int, int]

    def since(self, before: Threads) -> ProcessCost:
        """Return what was used from `before` to here; a thread that has ended in between is left out."""
        used = {tid: ns - before.cpu_ns.get(tid, 0) for tid, ns in self.cpu_ns.items()}
        switches = sum(n - before.switches.get(tid, 0) for tid, n in self.switches.items())
        main_s = used[min(used)] / 1e9 if used else 0.0
        return ProcessCost(sum(used.values()) / 1e9, main_s, max(used.values(), default=0) / 1e9, switches)


def threads_of(pid: int) -> Threads:
    """Read the counters of a process's threads; none if it has ended."""
    cpu_ns, switches = {}, {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            cpu_ns[int(task.name)] = int((task / "schedstat").read_text().split()[0])
            lines = (task / "status").read_text().splitlines()
        except OSError:
            continue  # it has just ended
        switches[int(task.name)] = sum(int(line.split()[1]) for line in lines if line.startswith(_SWITCHES))
    return Threads(cpu_ns, switches)
