"""STATUS: a router's report on itself, as dataclasses; and the one rule for whether a worker is well.

Fields have the order and the names of the JSON object's keys, unless noted. The router writes a STATUS,
`ask_status` reads it, and all code in between reads attributes. Fields that an older router does not send
have a default; fields that a newer one adds are ignored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from superserve.fields import KEY, OMITTED, body_of, read
from superserve.hello import ModelSpec  # noqa: TC001  read at run time: the fields' types are the format

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

LIVE = "live"
"""The state of a worker process that has answered heartbeats lately."""
READY = "ready"
"""The state of a GPU that answers in time and does not drain."""

SHORT_S, LONG_S = 10, 60
"""The windows of `Recent`, seconds."""
_SHORT_KEY, _LONG_KEY = f"{SHORT_S}s", f"{LONG_S}s"


def is_well(process: str, state: str) -> bool:
    """Return whether the router gives a GPU work: its process is live, and it neither drains nor overruns."""
    return process == LIVE and state == READY


@dataclass(frozen=True, slots=True)
class EndCounts:
    """How many queries ended with each status; the fields are those of `superserve.wire.Status`, in order."""

    ok: int = 0
    late: int = 0
    expired: int = 0
    infeasible: int = 0
    overloaded: int = 0
    failed: int = 0
    worker_lost: int = 0
    invalid: int = 0
    cancelled: int = 0
    draining: int = 0

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield each status's name and count."""
        for one in dataclasses.fields(self):
            yield one.name, getattr(self, one.name)

    @property
    def total(self) -> int:
        """All queries that ended."""
        return sum(n for _, n in self.items())

    @property
    def wanted(self) -> int:
        """All that were not cancelled: attainment is the share of these that ended OK."""
        return self.total - self.cancelled

    def since(self, before: EndCounts) -> EndCounts:
        """Return how many ended since `before`."""
        return EndCounts(*(n - then for (_, n), (_, then) in zip(self.items(), before.items(), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterInfo:
    """The router's process.

    Attributes:
        draining: Whether it takes no new queries.
        version: Of its code; "" if an older router does not send it.
        build: Whether that code runs as pure Python or "compiled"; "" if an older router does not send it.
        epoch: Identifies this run of the router: in another epoch all counters start from 0.
        policy: As `--policy` takes it.
        cpu_s: CPU time, user and system.
        loop_s: Time spent in the loop's passes.
        max_queries: Most queries held; 0 if an older router does not send it.
        max_bytes: Most payload bytes held; 0 if an older router does not send it.
        margin_ms: Slack held back for late messages; None for what is measured.
        settings_error: Why the settings file's present content is not in force; "" if it is.
    """

    draining: bool
    pid: int
    host: str
    version: str = ""
    build: str = ""
    epoch: int
    policy: str
    client_endpoint: str
    worker_endpoint: str
    cpu_s: float
    loop_s: float
    max_queries: int = 0
    max_bytes: int = 0
    margin_ms: float | None = None
    settings_error: str = ""


@dataclass(frozen=True, slots=True)
class QueryCounts:
    """The router's queries; received = answered + queued + in flight.

    Attributes:
        redispatched: Queued again after their worker was lost or overran.
        ok_accuracy: Percent, summed over the queries that ended OK.
        executed: Queries of the batches that workers have reported done.
        busy_s: GPU time of those batches.
    """

    received: int
    in_flight: int
    answered: EndCounts
    redispatched: int
    ok_accuracy: float
    executed: int
    busy_s: float
    payload_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """The queries that wait.

    Attributes:
        head_slack_ms: Time left to the earliest deadline; None if the queue is empty.
        held_bytes: Payload bytes of all queries that have not ended.
    """

    length: int
    head_slack_ms: float | None
    held_bytes: int


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """The router's batches; `stale` counts reports of batches given up, or of an older epoch."""

    dispatched: int
    in_flight: int
    stale: int


@dataclass(frozen=True, slots=True)
class RecentWindow:
    """What happened in the last seconds: differences of counters, as in `QueryCounts`.

    Attributes:
        seconds: How long that was: less than the window if the router is younger.
    """

    seconds: float
    received: int
    answered: EndCounts
    ok_accuracy: float
    busy_s: float
    executed: int


@dataclass(frozen=True, slots=True)
class Recent:
    """The recent past; in JSON the keys are "10s" and "60s"."""

    short: RecentWindow = field(metadata={KEY: _SHORT_KEY})
    long: RecentWindow = field(metadata={KEY: _LONG_KEY})


@dataclass(frozen=True, slots=True)
class GpusNeeded:
    """GPUs that the arrivals of the short window need: as served now, and with only the smallest subnet."""

    as_served: float
    at_least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStatus:
    """One GPU of a worker process.

    Attributes:
        name: Of the process.
        slot: Which of its GPUs.
        state: Whether it may get work: `READY`, or why not.
        process: Whether the process answers: `LIVE`, or why not.
        history: The last changes of `state`, oldest first.
        profile: Name of its profile.
        device: What it is, in words.
        credit: Batches that it can take now.
        outstanding: Batches that it has not answered.
        free_in_ms: Time until it has nothing left to run.
        transport_ms: Median time to its process and back.
        slowdown: Measured over profiled latency.
        batches: Sent to it.
        queries: Sent to it.
        busy_s: Time that it executed batches, as it reports.
        last_subnet: Of its last batch; None before the first.
        gauges: `memory_bytes`, `utilisation` and `temperature_c`, as far as it reports them.
        host: The machine that it runs on; "" if not reported.
        version: Of its code; "" if not reported.
    """

    name: str
    slot: int
    state: str
    process: str
    history: tuple[str, ...] = ()
    profile: str
    device: str
    credit: int
    outstanding: int
    free_in_ms: float
    transport_ms: float
    slowdown: float
    batches: int
    queries: int
    busy_s: float
    last_subnet: str | None
    gauges: dict[str, float | None]
    host: str = ""
    version: str = ""

    @property
    def is_well(self) -> bool:
        """Whether the router gives it work."""
        return is_well(self.process, self.state)

    @property
    def condition(self) -> str:
        """Its condition in one word: its own state, or its process's state if that is not live."""
        return self.state if self.process == LIVE else self.process


@dataclass(frozen=True, slots=True)
class ListedKeys:
    """The names of the keys that a router admits."""

    clients: tuple[str, ...]
    workers: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RouterShare:
    """One of several routers.

    Attributes:
        endpoint: Where its clients connect.
        answers: Whether it answers.
        draining: Whether it takes no new queries.
        gpus: GPUs that get work there.
        queued: Queries that wait there.
        received: Queries that arrived there.
    """

    endpoint: str
    answers: bool = False
    draining: bool = False
    gpus: int = 0
    queued: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSummary:
    """STATUS without the GPUs: what costs the same for any number of workers.

    Attributes:
        lost_processes: Worker processes that fell silent or could not be reached.
        model: What the workers serve; None before one has joined.
        clients: How many are connected.
        counts: Messages, loops and faults, by name; what has never happened may be missing.
        workers_ready: GPUs that get work.
    """

    router: RouterInfo
    queries: QueryCounts
    queue: QueueStatus
    batches: BatchCounts
    lost_processes: int
    model: ModelSpec | None
    clients: int
    counts: dict[str, int]
    recent: Recent
    workers_ready: int
    workers_needed: GpusNeeded


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus(RouterSummary):
    """All of STATUS.

    Attributes:
        workers: Each GPU; those of a process are adjacent.
        keys: The admitted keys; None from a router without keys.
        routers: Each of several routers, of which this is the whole; None from one router.
    """

    workers: tuple[GpuStatus, ...]
    keys: ListedKeys | None = field(default=None, metadata=OMITTED)
    routers: tuple[RouterShare, ...] | None = field(default=None, metadata=OMITTED)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a STATUS, from a router or from a file.

        Raises:
            WireError: A field is missing or not what it should be; the error names it.
        """
        return read(cls, body, "status")

    def body(self) -> dict[str, Any]:
        """Return the body of the message: JSON once orjson has written it."""
        recent = {_SHORT_KEY: self.recent.short, _LONG_KEY: self.recent.long}
        return {**body_of(self), "recent": recent}

    def processes(self) -> dict[str, tuple[GpuStatus, ...]]:
        """Return the GPUs by the name of their worker process."""
        found: dict[str, list[GpuStatus]] = {}
        for gpu in self.workers:
            found.setdefault(gpu.name, []).append(gpu)
        return {name: tuple(gpus) for name, gpus in found.items()}

    def well(self) -> set[str]:
        """Return the worker processes that are well: the router gives work to all of their GPUs."""
        return {name for name, gpus in self.processes().items() if all(gpu.is_well for gpu in gpus)}
