"""Simulated GPUs reckon as emulated ones do, and simulated processes speak as real ones."""

from __future__ import annotations

import random
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.serve import batches, server
from gpu_worker.serve.emulated import EmulatedGpu
from loadgen.simulator import workers as sim_workers
from loadgen.simulator import world as simulation
from loadgen.simulator.workers import SimGpu
from profiles.table import load_profile
from router.core.edf import Cohort
from router.core.workers import Batch, Peer, Worker
from router.policies.slackfit import SlackFit
from router.serve.directives import directive_of
from superserve.clock import MS
from superserve.wire import DoneRow, Queries

CNN = load_profile("cnn-8gpu-modelled")


def test_what_is_played_has_the_numbers_of_what_it_plays() -> None:
    """Capacity and periods are those of the worker's own files."""
    assert sim_workers.CAPACITY == batches.CAPACITY
    assert simulation.HELLO_EVERY_NS == server.HELLO_EVERY_NS
    assert simulation.HEARTBEAT_NS == server.HEARTBEAT_NS
    assert simulation.PULL_EVERY_NS == server.PULL_EVERY_NS


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
        dispatched_ns=now_ns, begin_ns=now_ns, expected_ns=0, limit_ns=0,
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_simulated_gpu_does_what_an_emulated_one_does(seed: int) -> None:
    """The same batches at the same instants give the same reports: times, credit, and who expired."""
    rng = random.Random(seed)
    emulated, simulated = EmulatedGpu(CNN), SimGpu(CNN)
    now_ns = 1_000 * MS
    for batch_id in range(1, 12):
        now_ns += rng.randrange(20 * MS)
        reports = emulated.finish_due(now_ns)
        rows = []
        while simulated.running is not None and simulated.running.ended_ns <= now_ns:
            rows.append(simulated.finish(now_ns))
        assert [told(report.row) for report in reports] == [told(row) for row in rows]
        if simulated.n_outstanding < sim_workers.CAPACITY:
            batch = batch_of(rng, batch_id, now_ns - rng.randrange(2 * MS))
            assert emulated.submit(directive_of(batch), now_ns)
            simulated.submit(batch, now_ns)
        state = emulated.state(now_ns)
        assert simulated.state(now_ns) == (state.credit, state.held, state.free_in_ns)
        assert simulated.last_batch == state.last_batch


def told(row: DoneRow) -> tuple[object, ...]:
    """Return what a report says, but for outputs, which are not simulated."""
    return (
        row.batch_id, row.slot, row.credit, row.held, row.n, row.waited_ns, row.executing_ns,
        row.last_batch, row.free_in_ns, None if row.statuses is None else bytes(row.statuses),
    )  # fmt: skip


def test_actuation_is_paid_when_the_subnet_changes() -> None:
    """A GPU that goes over to another subnet takes that much longer; one that stays does not."""
    gpu = SimGpu(CNN, actuation_ns=7 * MS)
    rng = random.Random(1)
    took = []
    for batch_id, subnet in enumerate([2, 2, 3], 1):
        batch = batch_of(rng, batch_id, 0)
        batch.subnet = subnet
        gpu.submit(batch, 0)
        assert gpu.running is not None
        n_run = gpu.n_run
        row = gpu.finish(gpu.running.ended_ns)
        took.append(row.executing_ns - CNN.latency_ns(subnet, row.n))
        assert n_run > 0
    assert took == [7 * MS, 0, 7 * MS]
