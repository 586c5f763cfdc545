"""What tests read of the core's books and actions, in one place: its parts may move, and facts stay."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from router.core.events import CoreSettings, Finished
from superserve.clock import MS
from superserve.wire import VARIED, Done, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from profiles.table import Profile
    from router.core.edf import Stretch
    from router.core.events import Dispatch
    from tests.router.core.harness import Gpu, World


def numbers(**changed: int) -> CoreSettings:
    """Return the core's numbers with some of them changed."""
    return CoreSettings(**changed)


def slower(profile: Profile, factor: int) -> Profile:
    """Return the same subnets on a device that takes `factor` times as long."""
    subnets = tuple(
        dataclasses.replace(
            subnet,
            latency_ns=tuple(factor * ns for ns in subnet.latency_ns),
            latency_p99_ns=tuple(factor * ns for ns in subnet.latency_p99_ns),
        )
        for subnet in profile.subnets
    )
    return dataclasses.replace(profile, name="slow", subnets=subnets)


class Books(NamedTuple):
    """The counts of one core.

    Attributes:
        waiting: Queries queued.
        ok_accuracy: Percent, summed over the queries that ended OK.
        executed: Queries in the batches that workers ran.
        lost: Worker processes that died or fell silent.
    """

    received: int
    waiting: int
    in_flight: int
    held_bytes: int
    answered: dict[Status, int]
    ok_accuracy: float
    busy_ns: int
    executed: int
    output_bytes: int
    lost: int
    redispatched: int


def books_of(world: World) -> Books:
    """Return the counts of a world's core."""
    core = world.core
    return Books(
        received=core.received,
        waiting=len(core.queue),
        in_flight=core.in_flight,
        held_bytes=core.held_bytes,
        answered={status: n for status in Status if (n := core.answered[status])},
        ok_accuracy=core.ok_accuracy,
        busy_ns=core.busy_ns,
        executed=core.n_executed,
        output_bytes=core.output_bytes,
        lost=core.n_lost_peers,
        redispatched=core.n_redispatched,
    )


class Sent(NamedTuple):
    """One directive."""

    peer: str
    slot: int
    batch_id: int
    subnet: int
    n: int
    stretches: list[Stretch]


def sent(world: World) -> list[Sent]:
    """Return every directive so far, in order."""
    return [_sent(dispatch) for dispatch in world.dispatches()]


def _sent(dispatch: Dispatch) -> Sent:
    batch = dispatch.batch
    worker = batch.worker
    return Sent(worker.peer.key, worker.slot, batch.batch_id, batch.subnet, batch.n, batch.stretches)


def report(
    world: World,
    k: int,
    at_ns: int,
    *,
    statuses: Sequence[Status] | None = None,
    waited_ns: int = 0,
    executing_ns: int = MS,
) -> None:
    """Answer directive `k` from its worker at an instant: all OK, or with a status for each query."""
    world.now_ns = at_ns
    dispatch = world.dispatches()[k]
    batch = _sent(dispatch)
    process = world.processes[batch.peer]
    row = dataclasses.replace(world.done_row(dispatch), waited_ns=waited_ns, executing_ns=executing_ns)
    if statuses is not None:
        row = dataclasses.replace(
            row, output_bytes=VARIED, output=b"", statuses=bytes(statuses), lengths=bytes(4 * batch.n)
        )
    world.do(Finished(process.key, Done(process.epoch, [row])))


def hang(world: World, key: str) -> None:
    """Make the first GPU of a process never end the batches it is sent from now on."""
    world.processes[key].gpus[0].hang()


def run_at(world: World, key: str, factor: float) -> None:
    """Make the first GPU of a process take `factor` times its profile for batches sent from now on."""
    world.processes[key].gpus[0].factor = factor


def earliness(world: World) -> list[int]:
    """Return a list to which every directive from now on adds how much too early it was sent, ns.

    That is the time until its GPU is really free, beyond the lead that the core allows itself.
    """
    early: list[int] = []

    def measure(dispatch: Dispatch, gpu: Gpu) -> None:
        batch = _sent(dispatch)
        way_ns = world.worker(batch.peer, batch.slot).transport.median_ns
        free_at_ns = gpu.free_at_ns(world.now_ns, world.way_ns)
        early.append(free_at_ns - world.now_ns - numbers().dispatch_ahead_ns - way_ns)

    world.on_dispatch = measure
    return early
