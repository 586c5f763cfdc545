"""The simulator: the same `RouterCore` that serves live, on a virtual clock.

It is a third host of the core, besides the live router and the replay of a recorded log: it passes
events in and carries actions out, and decides nothing. Around it are simulated, from one seed:

    router     the loop around the core, as `router.serve.loop`             loadgen/simulator/world.py
    clients    open loop, as `loadgen.live.sender`                          loadgen/simulator/clients.py
    network    a delay for each message, in order for each peer             loadgen/simulator/links.py
    workers    profiles instead of GPUs, in processes that rest             loadgen/simulator/workers.py
    faults     kill, freeze, slow, revive, and trouble on the way      loadgen/simulator/faults.py

Equal arguments give equal results, byte for byte.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.live.run import summarise
from loadgen.results.run import Run
from loadgen.simulator.workloads import Workload, slowed
from loadgen.simulator.world import START_NS, WITHOUT_HOST, SimSettings, Simulation
from superserve.clock import MS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from loadgen.results.result import RunResult
    from loadgen.simulator.clients import OpenLoopClient
    from loadgen.simulator.faults import Fault
    from loadgen.traces.trace import Trace
    from profiles.table import Profile

__all__ = (
    "START_NS", "WITHOUT_HOST", "SimSettings", "Simulated", "Simulation", "Workload", "simulate", "slowed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Simulated:
    """The result of a simulation.

    Attributes:
        run: Its figures and columns, in the form of a live run's.
        digest: SHA-256 of every query's outcome: equal arguments give equal digests.
        n_passes: Passes of the router.
        n_batches: Batches dispatched.
        until_ns: The router's clock at the end.
    """

    run: Run
    digest: str
    n_passes: int
    n_batches: int
    until_ns: int

    @property
    def result(self) -> RunResult:
        """The figures of the run result file."""
        return self.run.result

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The outcome of each query: see `loadgen.results.run.Run`."""
        return self.run.columns

    @property
    def accuracy_per_query(self) -> float:
        """Summed accuracy of the queries answered in time, over all queries, percent."""
        result = self.result
        return (result.slo_attainment or 0.0) * (result.mean_accuracy or 0.0)


def simulate(
    trace: Trace | Workload,
    cluster: Sequence[Profile],
    *,
    policy: str = "slackfit",
    slo_ns: int | npt.NDArray[np.int64] = 36 * MS,
    seed: int = 0,
    faults: Iterable[Fault] = (),
    settings: SimSettings | None = None,
) -> Simulated:
    """Serve a trace on a simulated cluster and return the result.

    Args:
        trace: When the queries are due; or a `Workload`, which contains SLOs, floors and classes too.
        cluster: A profile for each GPU; equal ones share a policy.
        policy: As `router.policies.registry.make_policy` takes it.
        slo_ns: From due to deadline: one for all, or shape (n,).
        seed: Of the network's delays.
        faults: What goes wrong, and when.
        settings: The delays of machine and network.

    Raises:
        ConfigError: The policy is unknown, a column has the wrong length, or a fault's peer does not exist.
    """
    workload = trace if isinstance(trace, Workload) else Workload(trace, slo_ns)
    found = Simulation(cluster, policy=policy, seed=seed, faults=faults, settings=settings)
    clients = found.offer(workload)
    with uncollected():
        found.run()
    return summarised(workload, found, clients, policy)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Suspend garbage collection, like the live router: nothing in a query's path makes cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def summarised(
    workload: Workload, found: Simulation, clients: Sequence[OpenLoopClient], policy: str
) -> Simulated:
    """Put the clients' columns back into the order of the trace, and summarise them."""
    trace, n = workload.trace, len(clients)
    columns: dict[str, npt.NDArray[Any]] = {}
    n_duplicates = 0
    reasons: dict[str, str] = {}
    for i, client in enumerate(clients):
        of_client, doubled = client.columns()
        n_duplicates += doubled
        reasons = {**client.reasons, **reasons}
        for name, column in of_client.items():
            columns.setdefault(name, np.empty(trace.n, column.dtype))[i::n] = column
    for name in ("due_ns", "sent_ns", "answered_ns"):
        column = columns[name]
        columns[name] = np.where(column < 0, -1, column - START_NS)
    profile = found.processes[0].gpus[0].profile
    subnets = [(subnet.name, subnet.accuracy) for subnet in profile.subnets]
    result = summarise(trace, workload.slo_ns, policy, columns, subnets, None)
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    run = Run(result, columns, subnets, reasons, n_duplicates=n_duplicates)
    return Simulated(run, digest.hexdigest(), found.n_passes, found.core.n_batches, found.now_ns)
