"""RouterCore and workers that come, drain, die, hang, fall silent, come back or lie."""

from __future__ import annotations

import pytest

from router.core.events import (
    CoreSettings,
    Dispatch,
    DrainWorker,
    Fence,
    Finished,
    Pulled,
    Released,
    WorkerHeard,
    WorkerLeft,
)
from router.core.workers import PeerState, WorkerState
from superserve.clock import MS
from superserve.errors import ConfigError, WireError
from superserve.wire import Done, Pull, PullRow, Status
from tests.router.core.harness import CNN, START_NS, TRANSFORMER, Gpu, World
from tests.router.core.test_core import make_world


def test_silence_makes_a_worker_suspect_then_dead() -> None:
    """Suspect 300 to 400 ms after it was last heard, dead after 600 to 700; heard again it is live."""
    world = make_world()
    peer = world.core.peers["w0"]
    world.run(110)
    world.kill("w0", seen=False)  # last heard at 100 ms
    seen: dict[PeerState, int] = {}
    while "w0" in world.core.peers:
        world.run(1)
        seen.setdefault(peer.machine.state, (world.now_ns - START_NS) // MS)

    assert 400 <= seen[PeerState.SUSPECT] <= 501
    assert 700 <= seen[PeerState.DEAD] <= 801


def test_a_suspect_gets_no_work_until_it_is_heard() -> None:
    """A query waits while its only worker is suspect, and goes when it speaks."""
    world = make_world()
    world.processes["w0"].alive = False
    world.run(420)
    world.submit(100)
    assert not world.dispatches()
    world.processes["w0"].alive = True
    world.do(WorkerHeard("w0"))

    assert len(world.dispatches()) == 1


def test_a_stall_of_the_router_itself_condemns_nobody() -> None:
    """If the router did not run for two seconds, no worker was silent for two seconds."""
    world = make_world(3)
    world.run(500)
    world.now_ns += 2_000 * MS
    world.core.advance(world.now_ns)

    assert all(peer.machine.state is PeerState.LIVE for peer in world.core.peers.values())


def test_queries_of_a_killed_worker_run_elsewhere() -> None:
    """With slack left a lost batch is dispatched once more and answered OK."""
    world = make_world(2)
    (query,) = world.submit(100)
    world.kill(world.dispatches()[0].peer, seen=True)
    world.run(100)

    assert world.status(query) is Status.OK
    assert len({dispatch.peer for dispatch in world.dispatches()}) == 2
    assert world.core.n_redispatched == 1


def test_a_query_whose_worker_dies_twice_is_lost() -> None:
    """The second loss ends it WORKER_LOST, with the reason: it may be what kills them."""
    world = make_world(3)
    (query,) = world.submit(200)
    world.kill(world.dispatches()[0].peer, seen=True)
    world.kill(world.dispatches()[1].peer, seen=True)

    assert world.status(query) is Status.WORKER_LOST
    assert "so did the one before it" in world.answers["client", query].reason
    assert len(world.dispatches()) == 2


def test_a_query_without_slack_is_lost_with_its_worker() -> None:
    """Found dead by silence, a worker leaves no slack: WORKER_LOST, not another try."""
    world = make_world(2)
    (query,) = world.submit(12)
    world.kill(world.dispatches()[0].peer, seen=False)
    world.run(1_000)

    assert world.status(query) is Status.WORKER_LOST
    assert "no slack was left" in world.answers["client", query].reason


def test_queries_of_a_client_that_left_are_not_run_again() -> None:
    """A dead client's queries cost no second batch when their worker dies."""
    world = make_world(2)
    world.submit(200)
    world.leave()
    world.kill(world.dispatches()[0].peer, seen=True)
    world.run(50)

    assert len(world.dispatches()) == 1
    assert world.core.n_answered == world.core.received


def test_an_overrun_costs_credit_and_the_first_answer_wins() -> None:
    """A batch beyond 3 x p99 loses its worker credit at once; its query runs elsewhere, answered once."""
    world = make_world(2)
    world.processes["w0"].gpus[0].factor = 20.0
    (query,) = world.submit(800)
    slow = world.dispatches()[0]
    batch = slow.batch
    world.run((batch.begin_ns + batch.limit_ns - world.now_ns) / MS + 1)

    assert world.worker(slow.peer).machine.state is WorkerState.OVERRUN
    assert len(world.dispatches()) == 2
    world.run(2_000)
    assert world.status(query) is Status.OK
    assert world.worker(slow.peer).machine.state is WorkerState.READY
    assert world.core.n_answered == 1


def test_an_overrun_of_a_lone_worker_ends_when_it_answers() -> None:
    """With nobody else the query waits queued, and the late worker's own answer counts."""
    world = make_world()
    world.processes["w0"].gpus[0].factor = 10.0
    (query,) = world.submit(800)
    world.run(1_500)

    assert world.status(query) is Status.OK
    assert len(world.dispatches()) == 1


def test_a_gpu_that_hangs_is_given_up() -> None:
    """While its process beats, a hung GPU's queries end within limit and give_up; it gets no more work."""
    world = make_world(1, CoreSettings(give_up_ns=300 * MS))
    world.processes["w0"].gpus[0].hang()
    (query,) = world.submit(12)
    world.run(1_000)

    assert world.status(query) is Status.WORKER_LOST
    assert not world.core.ledger.batches
    assert "w0" in world.core.peers
    world.submit(100)
    assert len(world.dispatches()) == 1


def test_an_answer_of_a_batch_given_up_is_stale_and_brings_the_worker_back() -> None:
    """It answers no query, is counted, and shows that the GPU is alive."""
    world = make_world(1, CoreSettings(give_up_ns=300 * MS))
    process = world.processes["w0"]
    process.gpus[0].hang()
    (query,) = world.submit(12)
    world.run(1_000)
    world.revive(process)
    world.run(1)

    assert world.core.n_stale == 1
    assert world.worker("w0").machine.state is WorkerState.READY
    (again,) = world.submit(36)
    world.run(50)
    assert world.statuses([query, again]) == [Status.WORKER_LOST, Status.OK]


def test_an_epoch_that_is_over_is_fenced() -> None:
    """A worker that was dropped for its silence, or is unknown, must send HELLO; its reports are ignored."""
    world = make_world()
    row = PullRow(0, 2, 0, 0, 0, 0, 0)
    process = world.processes["w0"]
    world.do(WorkerLeft("w0", orderly=False))

    actions = world.do(Pulled("w0", Pull(process.epoch, [row])))
    assert [type(action) for action in actions] == [Fence]
    world.join("w0", CNN)
    actions = world.do(Pulled("w0", Pull(process.epoch, [row])))
    assert [type(action) for action in actions] == [Fence]
    assert world.core.n_stale == 2


def test_a_worker_that_says_hello_again_gives_its_batches_back() -> None:
    """A process restarted on the same connection leaves nothing behind: its queries run again."""
    world = make_world()
    (query,) = world.submit(100)
    assert len(world.dispatches()) == 1
    world.processes["w0"].alive = False
    world.join("w0", CNN)
    world.run(100)

    assert world.status(query) is Status.OK
    assert len(world.dispatches()) == 2


def test_a_worker_gets_no_more_than_its_credit() -> None:
    """A worker that offers nothing is sent nothing, however long the queue."""
    world = make_world()
    process = world.processes["w0"]
    world.do(Pulled("w0", Pull(process.epoch, [PullRow(0, 0, 0, 0, 0, 0, 0)])))
    world.submit(*[36.0] * 100)
    assert not world.dispatches()
    world.do(Pulled("w0", Pull(process.epoch, [PullRow(0, 1, 0, 0, 0, 0, 0)])))
    world.run(3)

    assert len(world.dispatches()) == 1


def test_one_slow_gpu_does_not_refuse_what_others_can_serve() -> None:
    """A GPU throttled to a third is idle first and too slow: the query goes to another that is in time."""
    world = World()
    world.join("throttled", CNN, speed=3.0)
    for _ in range(40):
        world.submit(100)
        world.run(110)
    world.join("healthy", CNN)
    world.run(200)
    tight = world.submit_spaced(6, n=5, gap_ms=20)

    assert world.statuses(tight) == [Status.OK] * 5


def test_a_stall_does_not_refuse_queries_for_good() -> None:
    """After one answer that took a second to arrive, the next queries are served as before."""
    world = make_world()
    (first,) = world.submit(5_000)
    world.stall_ns = 1_000 * MS
    world.run(1_500)
    world.stall_ns = 0
    world.run(200)
    ids = world.submit_spaced(36, n=5, gap_ms=200)

    assert world.status(first) is Status.OK
    assert world.statuses(ids) == [Status.OK] * 5


def test_every_directive_goes_to_a_live_epoch() -> None:
    """Through kills and returns every directive carries the epoch of the process that is there."""
    world = make_world(2)
    epochs: list[bool] = []

    def note(dispatch: Dispatch, gpu: Gpu) -> None:
        epochs.append(gpu in world.processes[dispatch.peer].gpus)

    world.on_dispatch = note
    for k in range(20):
        world.submit(*[36.0] * 5)
        world.run(5)
        world.kill(f"w{k % 2}", seen=True)
        world.join(f"w{k % 2}", CNN)
    world.run(100)

    assert len(epochs) >= 20
    assert all(epochs)


def test_a_draining_worker_is_released_once_it_holds_nothing() -> None:
    """It gets no new batch, answers the one it has, and then receives BYE."""
    world = make_world()
    (query,) = world.submit(36)
    assert not [a for a in world.do(DrainWorker("w0", None)) if isinstance(a, Released)]
    world.submit(20)
    world.run(50)

    assert world.status(query) is Status.OK
    assert len(world.dispatches()) == 1
    assert [action for _, action in world.actions if isinstance(action, Released)]


def test_a_report_of_another_length_is_a_wire_error() -> None:
    """A worker that answers for three of two queries loses its connection, not ours its count."""
    world = make_world()
    world.submit(36, 36)
    (dispatch,) = world.dispatches()
    process = world.processes["w0"]
    row = world.done_row(dispatch)
    row.n = 3

    with pytest.raises(WireError, match="expected 2 queries, got 3"):
        world.do(Finished("w0", Done(process.epoch, [row])))
    world.core.check()


def test_a_slot_that_is_not_there_is_a_wire_error() -> None:
    """A worker process may report only on the GPUs in its HELLO."""
    world = make_world()
    world.submit(36)
    process = world.processes["w0"]
    row = world.done_row(world.dispatches()[0])
    row.slot = 5

    with pytest.raises(WireError, match="w0 has 1 GPUs, got slot 5"):
        world.do(Finished("w0", Done(process.epoch, [row])))


def test_workers_of_other_subnets_are_refused() -> None:
    """A worker that hosts another supernet is a ConfigError, and changes nothing."""
    world = make_world()

    with pytest.raises(ConfigError, match="transformer-8gpu-modelled: expected the subnets of cnn"):
        world.join("other", TRANSFORMER)
    assert set(world.core.peers) == {"w0"}
