"""A GPU is played by one piece of code: emulated, simulated, benchmarked and tested ones say the same."""

from __future__ import annotations

import random
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.core import WorkerCore
from gpu_worker.core.played import Pace, PlayedGpu, PlayedGpus
from gpu_worker.core.queue import CAPACITY
from gpu_worker.serve.emulated import emulated_gpus
from loadgen.bench.rows.path import PathShape, _Path
from loadgen.simulator.workers import outcome_of
from loadgen.simulator.world import Simulation
from profiles.table import load_profile
from router.core.edf import Cohort
from router.core.workers import Batch, Peer, Worker
from router.policies.slackfit import SlackFit
from router.serve.directives import directive_of
from superserve.clock import MS
from superserve.wire import Control, Done, DoneRow, Kind, Pull, Queries
from tests.effort import examples
from tests.router.core.harness import World

if TYPE_CHECKING:
    from superserve.wire import Message

CNN = load_profile("cnn-8gpu-modelled")
OF_ANY_CLASS = {"__init__", "__slots__", "__doc__", "__module__", "__orig_bases__", "__parameters__"}
WELCOME = Control(Kind.WELCOME, {"epoch": 1})


def test_simulator_harness_and_benchmark_play_the_same_core() -> None:
    """Each of them has the worker's own core, and GPUs that are the emulated ones' class."""
    world = World()
    cores: list[WorkerCore[Any]] = [
        Simulation([CNN]).processes[0].core,
        world.join("w0", CNN).core,
        next(iter(_Path(PathShape(CNN))._processes.values())),
    ]
    assert {type(core) for core in cores} == {WorkerCore}
    for core in cores:
        assert isinstance(core._gpus, PlayedGpus)
        for gpu in core._gpus.gpus:
            assert isinstance(gpu, PlayedGpu)
            own = {
                name for name in ("submit", "finish_due", "report", "_begin") if name in type(gpu).__dict__
            }
            assert type(gpu) is PlayedGpu or not own, "a subclass must not reckon for itself"


def batch_of(rng: random.Random, batch_id: int, now_ns: int) -> Batch:
    """Return a batch of one or two messages, some of whose queries may expire on the way."""
    stretches = []
    for serial in range(rng.randint(1, 2)):
        slacks = sorted(rng.choice([1, 5, 40, 400]) * MS for _ in range(rng.randint(1, 8)))
        queries = Queries(
            1, now_ns, len(slacks), bytes(8 * len(slacks)), array("q", slacks).tobytes(), 0, (b"",)
        )
        cohort = Cohort(serial, None, [now_ns + slack for slack in slacks], now_ns, now_ns, message=queries)
        stretches.append((cohort, 0, len(slacks)))
    n = sum(hi for _, _, hi in stretches)
    worker = Worker(Peer(0, "process", 1, now_ns), 0, CNN, SlackFit(CNN), now_ns)
    return Batch(
        batch_id=batch_id, worker=worker, subnet=rng.randrange(CNN.n_subnets), n=n, stretches=stretches,
        dispatched_ns=now_ns, begin_ns=now_ns, profiled_ns=0, limit_ns=0,
    )  # fmt: skip


@settings(max_examples=examples(200), deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_simulated_process_says_what_an_emulated_one_does(seed: int) -> None:
    """The same batches at the same instants give the same reports: times, credit, and who expired.

    One is given the wire's directives, the other the core's batches: each has its own rule for which
    queries have expired, and only that.
    """
    rng = random.Random(seed)
    pace = Pace(rng.choice([0.5, 1.0, 1.3]), rng.choice([0.0, -0.5]))
    emulated = WorkerCore(emulated_gpus(CNN, 1, pace=pace), {"name": "w"}, 0)
    simulated: WorkerCore[Batch] = WorkerCore(
        PlayedGpus([PlayedGpu(CNN, outcome_of, pace=pace)]), {"name": "w"}, 0
    )
    now_ns = 1_000 * MS
    emulated.receive(WELCOME, now_ns)
    simulated.receive(WELCOME, now_ns)
    for batch_id in range(1, 12):
        now_ns += rng.randrange(20 * MS)
        assert said(emulated.poll(now_ns)) == said(simulated.poll(now_ns))
        if simulated._gpus.report(0, now_ns).credit:
            batch = batch_of(rng, batch_id, now_ns - rng.randrange(2 * MS))
            emulated.receive(directive_of(batch), now_ns)
            simulated.receive(batch, now_ns)
        assert emulated._gpus.report(0, now_ns) == simulated._gpus.report(0, now_ns)
        assert emulated.next_due_ns() == simulated.next_due_ns()


def said(messages: list[Message]) -> list[object]:
    """Return the messages without outputs, which are not simulated."""
    return [[told(row) for row in one.rows] if isinstance(one, Done) else repr(one) for one in messages]


def told(row: DoneRow) -> tuple[object, ...]:
    """Return a report without its outputs."""
    return (
        row.batch_id, row.slot, row.credit, row.held, row.n, row.waited_ns, row.executing_ns, row.last_batch,
        row.running_batch, row.running_for_ns, None if row.statuses is None else bytes(row.statuses),
    )  # fmt: skip


def test_actuation_is_paid_when_the_subnet_changes() -> None:
    """A GPU that goes over to another subnet takes that much longer; one that stays does not."""
    gpu: PlayedGpu[Batch] = PlayedGpu(CNN, outcome_of, actuation_ns=7 * MS)
    rng = random.Random(1)
    took = []
    for batch_id, subnet in enumerate([2, 2, 3], 1):
        batch = batch_of(rng, batch_id, 0)
        batch.subnet = subnet
        gpu.submit(batch, 0)
        n_run = gpu.n_run
        (ended,) = gpu.finish_due(gpu.ends_ns)
        took.append(ended.row.executing_ns - CNN.latency_ns(subnet, ended.row.n))
        assert n_run > 0
    assert took == [7 * MS, 0, 7 * MS]


def test_every_round_of_a_simulated_process_pulls_and_beats() -> None:
    """Over a second a joined process says ten PINGs and two PULLs, by the core's own clockwork."""
    core: WorkerCore[Batch] = WorkerCore(
        PlayedGpus([PlayedGpu(CNN, outcome_of)]), {"name": "w"}, 0, jitter=partial(float, 1)
    )
    core.receive(WELCOME, 0)
    messages: list[Message] = []
    while (due_ns := core.next_due_ns()) < 1_000 * MS:
        messages += core.poll(due_ns)

    kinds = [message.kind for message in messages]
    assert (kinds.count(Kind.PING), kinds.count(Kind.PULL)) == (10, 2)
    assert [row.credit for one in messages if isinstance(one, Pull) for row in one.rows] == [CAPACITY] * 2
