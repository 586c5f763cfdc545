"""A trace dealt out to routers that each have a part of the GPUs, on one virtual clock.

Workers and routers are those of `loadgen.simulator.routers`, so credits move between the routers as they do
live. Clients are columns: nothing that happens moves a query, and none is sent again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpu_worker.core.choice import RouterChoice
from gpu_worker.core.lending import Lender
from loadgen.simulator.clients import OpenLoopClient
from loadgen.simulator.links import FAR_NS, SimLink, Way
from loadgen.simulator.routers import SimRouter, SimWorker, World
from loadgen.simulator.simulate import uncollected
from router.core import RouterCore
from router.core.events import ClientJoined
from router.policies.registry import make_policy
from superserve.clock import MS
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from loadgen.simulator.routers import Conn
    from profiles.table import Profile
    from router.core.events import Answer

START_NS = 1_000 * MS
"""When the trace begins; workers have joined by then."""
_GRACE_NS = 1_000 * MS
_WAY = Way(100_000, 50_000)
_REST_NS = 600_000
_SEND_EVERY_NS = 500_000
_GPUS_PER_PROCESS = 8


class ShardFigures(NamedTuple):
    """What all routers together attained.

    Attributes:
        attainment: Share of all queries answered in time.
        accuracy: Percent, the mean of those.
        n_batches: Batches in all.
        n_borrowed: Those that ran on a GPU of another router.
    """

    attainment: float
    accuracy: float
    n_batches: int
    n_borrowed: int


class _Settled(RouterChoice):
    """A process that belongs to one router from the beginning, and stays."""

    def better(self, _now_ns: int) -> int | None:
        """Know of none."""
        return None


class _Shard:
    """The queries of one router.

    Args:
        world: Where they are.
        router: Where they go.
        due_ns: Instants, ascending, shape (n,).
        slo_ns: From due to deadline.
    """

    def __init__(self, world: World, router: SimRouter, due_ns: npt.NDArray[np.int64], slo_ns: int) -> None:
        self.number = router.number
        self._world = world
        self._router = router
        self._conn: Conn = world.connect(f"client:{router.number}", router.number)
        link = SimLink(_WAY, f"shard:{router.number}")
        self.columns = OpenLoopClient(
            self._conn.key, due_ns, due_ns + slo_ns, link, every_ns=_SEND_EVERY_NS
        )  # fmt: skip
        router.clients[self._conn.key] = (self, self._conn)
        router.core.handle(ClientJoined(self._conn.key, router.number + 1), world.now_ns)
        self._plan()

    def _plan(self) -> None:
        if self.columns.next_ns < FAR_NS:
            self._world.later(self.columns.next_ns, self._arrive)

    def _arrive(self, now_ns: int) -> None:
        self._router.take(self._read, self._conn, now_ns)

    def _read(self, now_ns: int) -> None:
        if self.columns.next_ns <= now_ns:
            for read_ns, event in self.columns.arrived(now_ns):
                self._router.core.handle(event, read_ns)
        self._plan()

    def answered(self, _router: int, _life: int, answer: Answer, now_ns: int) -> None:
        """Take an answer."""
        self.columns.answered(answer, now_ns)

    def reach(self, _i: int, _now_ns: int) -> None:
        """Be there already."""

    def told_gpus(self, _i: int, _n_gpus: int, _now_ns: int) -> None:
        """Go on: what is dealt is dealt."""


def serve_shards(
    due_ns: npt.NDArray[np.int64],
    routers: npt.NDArray[np.int64],
    profile: Profile,
    n_gpus: int,
    n_routers: int,
    *,
    policy: str,
    slo_ns: int,
    make_lender: Callable[..., Lender[Any]] | None = Lender,
) -> ShardFigures:
    """Serve queries by routers with `n_gpus` GPUs in all.

    Args:
        due_ns: When each is due, ascending, shape (n,).
        routers: The router that each goes to, shape (n,).
        profile: Of every GPU.
        n_gpus: GPUs of all routers together, shared out evenly.
        n_routers: How many routers.
        policy: As `make_policy` takes it.
        slo_ns: From due to deadline.
        make_lender: Builds what lends the credits of a process; None if none move.
    """
    world = World(0, _WAY, {})
    for i in range(n_routers):
        core = partial(RouterCore, partial(make_policy, policy))
        router = SimRouter(world, i, core, _REST_NS, lambda _router: None)
        router.is_pricing = make_lender is not None
        world.routers.append(router)
    for router in world.routers:
        router.serve([])
    each = n_gpus // n_routers
    for i in range(n_routers):
        for lo in range(0, each, _GPUS_PER_PROCESS):
            n = min(_GPUS_PER_PROCESS, each - lo)
            worker = SimWorker(
                world, len(world.workers), [profile] * n, partial(_choice, i), make_lender or Lender
            )
            worker.rest_ns = _REST_NS if n > 1 else 0
            world.workers.append(worker)
            worker.begin(0)
    shards = [
        _Shard(world, router, due_ns[routers == router.number] + START_NS, slo_ns) for router in world.routers
    ]
    with uncollected():
        world.run(int(due_ns[-1]) + START_NS + slo_ns + _GRACE_NS)
    return _figures(world, shards, profile, slo_ns)


def _choice(
    own: int, endpoints: list[str], n_gpus: int, now_ns: int, jitter: Callable[[], float]
) -> _Settled:
    found = _Settled(endpoints, n_gpus, now_ns, jitter)
    found.own = own
    return found


def _figures(world: World, shards: list[_Shard], profile: Profile, slo_ns: int) -> ShardFigures:
    accuracies = np.array([subnet.accuracy for subnet in profile.subnets])
    n, n_ok, total = 0, 0, 0.0
    for shard in shards:
        columns, _ = shard.columns.columns()
        answered_ns, status = columns["answered_ns"], columns["status"]
        ok = (answered_ns >= 0) & (answered_ns <= columns["due_ns"] + slo_ns)
        ok &= (status == Status.OK) | (status == Status.LATE)
        n, n_ok = n + shard.columns.n, n_ok + int(ok.sum())
        total += float(accuracies[columns["subnet"][ok]].sum())
    cores = [router.core for router in world.routers]
    return ShardFigures(
        n_ok / n, total / n_ok if n_ok else 0.0, sum(core.n_batches for core in cores),
        sum(core.fleet.n_borrowed for core in cores),
    )  # fmt: skip
