"""What GPU time is worth to a router, and which GPUs count: its own that are here, and guests that lend."""

from __future__ import annotations

import pytest

from router.core.events import Pulled, WorkerJoined, WorkerLeft
from router.core.price import HIGHEST_PRICE
from router.serve.listed import ready_gpus
from superserve.clock import MS
from superserve.wire import Pull, PullRow
from tests.router.core.harness import CNN, World


def busy_world(n_gpus: int) -> World:
    """Return a world to which 100 queries came in 100 ms, when all of them have been answered."""
    world = World()
    world.client()
    for i in range(n_gpus):
        world.join(f"w{i}", CNN)
    world.core.price.at(world.now_ns)
    for _ in range(100):
        world.run(1)
        world.submit(500)
    return world


def pulled(world: World, key: str, credit: int, running_for_ns: int = 0) -> None:
    """Let a process report one GPU."""
    row = PullRow(0, credit, 0, 0, 0, 0, running_for_ns, 0, 0.0, 0.0)
    world.core.handle(Pulled(key, Pull(world.core.peers[key].epoch, [row])), world.now_ns)
    world.core.check()


def guest(world: World) -> None:
    """Let a process of another router visit."""
    world.core.handle(WorkerJoined("guest", "guest", 99, [CNN], is_guest=True), world.now_ns)


def test_a_router_without_work_asks_for_nothing() -> None:
    """0 at first, and again when work has ended."""
    world = World()
    world.client()
    assert world.core.price.at(world.now_ns) == 0.0
    world.join("w0", CNN)
    assert world.core.price.at(world.now_ns) == 0.0

    world = busy_world(1)
    for _ in range(3):
        world.core.price.at(world.now_ns)
        world.run(1_000)
    assert world.core.price.at(world.now_ns) < 1e-6


def test_the_price_is_the_share_of_gpu_time_that_the_smallest_subnet_needs() -> None:
    """A query a millisecond: its cost over a millisecond, and half of it with twice the GPUs."""
    one = busy_world(1)
    two = busy_world(2)

    price = one.core.price.at(one.now_ns)
    assert price == pytest.approx(CNN.unit_cost_ns / MS, rel=0.25)
    assert two.core.price.at(two.now_ns) == pytest.approx(price / 2, rel=0.2)


def test_without_gpus_it_is_the_highest() -> None:
    """Work waits, and nothing is there for it."""
    world = busy_world(1)
    world.core.handle(WorkerLeft("w0", orderly=True), world.now_ns)

    assert world.core.price.at(world.now_ns) == HIGHEST_PRICE


def test_a_gpu_counts_where_its_time_is() -> None:
    """Lent away it counts for nothing, nor while another router's batch runs on it; then it is back."""
    world = World()
    world.client()
    for key in ("w0", "w1"):
        world.join(key, CNN)
    fleet = world.core.fleet
    assert fleet.n_present == 2

    pulled(world, "w0", credit=0)
    assert fleet.n_present == 1
    pulled(world, "w0", credit=1, running_for_ns=-5 * MS)
    assert fleet.n_present == 1
    assert world.core.peers["w0"].workers[0].free_at_ns > world.now_ns + 4 * MS, (
        "it is free when that has ended"
    )
    pulled(world, "w0", credit=2)
    assert fleet.n_present == 2


def test_a_guest_counts_while_it_lends() -> None:
    """It is no GPU of this router's, gets batches against its credit alone, and is counted as borrowed."""
    world = World()
    world.client()
    guest(world)
    core = world.core
    assert (core.fleet.n_present, ready_gpus(core), list(core.residents())) == (0, 0, [])
    world.core.handle(WorkerJoined("own", "own", 1, [CNN]), world.now_ns)
    world.submit(500)
    assert core.n_batches == 0

    pulled(world, "guest", credit=1)
    assert core.fleet.n_present == 2
    core.advance(world.now_ns)

    assert (core.n_batches, core.n_borrowed) == (1, 1)
    assert core.fleet.n_present == 2, "it counts until its batch has ended"
    assert not core.peers["guest"].workers[0].may_take


def test_what_a_guest_had_is_served_by_others() -> None:
    """A guest that leaves counts no more, and its queries are queued again."""
    world = World()
    world.client()
    guest(world)
    world.submit(500)
    pulled(world, "guest", credit=1)
    world.core.advance(world.now_ns)
    assert len(world.core.queue) == 0

    world.core.handle(WorkerLeft("guest", orderly=True), world.now_ns)

    assert (len(world.core.queue), world.core.fleet.n_present) == (1, 0)
    world.core.check()
