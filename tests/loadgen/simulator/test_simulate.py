"""The simulator serves a trace with the real core, the same way each time."""

from __future__ import annotations

import numpy as np
import pytest

from loadgen.simulator.faults import Fault
from loadgen.simulator.links import Way
from loadgen.simulator.simulate import WITHOUT_HOST, SimSettings, Simulation, Workload, simulate
from loadgen.traces.trace import Trace, load_trace
from profiles.table import load_profile
from router.core import ledger
from superserve.clock import MS
from superserve.errors import ConfigError
from superserve.wire import Status

CNN = load_profile("cnn-8gpu-modelled")
TRACE = load_trace("poisson:rate=3000", duration_s=0.5, seed=1)


def test_equal_arguments_give_equal_results() -> None:
    """Every column is the same byte for byte, and another seed of the network gives another run."""
    faults = [Fault("kill", 100 * MS, "worker:0"), Fault("loss", 0, "worker:1", 200 * MS, 0.3)]
    settings = SimSettings(gpus_per_process=2)

    digests = [
        simulate(TRACE, [CNN] * 8, seed=seed, faults=faults, settings=settings).digest for seed in (3, 3, 4)
    ]

    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_every_query_of_a_calm_run_is_answered_in_time() -> None:
    """At a third of what eight GPUs can do nothing is lost, and the figures add up."""
    found = simulate(TRACE, [CNN] * 8)

    assert found.result.queries["ok"] == TRACE.n
    assert found.run.n_duplicates == 0
    assert found.accuracy_per_query == pytest.approx(found.result.mean_accuracy)


def test_clients_get_their_own_queries_back() -> None:
    """Dealt out to three clients, each query keeps its place in the trace."""
    found = simulate(TRACE, [CNN] * 8, settings=SimSettings(n_clients=3))

    assert found.result.queries["ok"] == TRACE.n
    assert (found.columns["due_ns"] == TRACE.due_ns).all()
    assert (found.columns["sent_ns"] >= TRACE.due_ns).all()


def test_each_query_keeps_its_own_terms() -> None:
    """A query with a floor is served by a subnet that reaches it, one that cannot be served is refused."""
    n = TRACE.n
    slo_ns = np.where(np.arange(n) % 2 == 0, MS, 100 * MS).astype(np.int64)
    floors = np.where(np.arange(n) % 3 == 0, 80.0, 0.0).astype(np.float32)
    workload = Workload(TRACE, slo_ns, floors)

    found = simulate(workload, [CNN] * 16)

    patient = np.arange(n) % 2 == 1
    assert (found.columns["status"][~patient] != Status.OK).all()
    assert (found.columns["status"][patient] == Status.OK).all()
    assert found.columns["accuracy"][patient & (floors > 0)].min() > 80


def test_a_column_of_the_wrong_length_is_refused() -> None:
    """The error names the column, the number expected and the one found."""
    with pytest.raises(ConfigError, match=r"slo_ns: expected one for each of \d+ queries, got \(3,\)"):
        simulate(TRACE, [CNN], slo_ns=np.full(3, MS, np.int64))


def test_queries_of_a_killed_process_are_served_by_another() -> None:
    """One of two processes ends in the middle, and still every query is answered in time."""
    trace = Trace("even", np.arange(0, 500 * MS, MS // 2), 500 * MS, "made by a test")
    faults = [Fault("kill", 200 * MS, "worker:1")]

    found = simulate(trace, [CNN] * 8, faults=faults, settings=SimSettings(gpus_per_process=4))

    assert found.result.queries["ok"] + found.result.queries["late"] == trace.n
    assert found.result.slo_attainment is not None
    assert found.result.slo_attainment > 0.99


@pytest.mark.parametrize("policy", ["slackfit", "demandfit"])
@pytest.mark.parametrize("n_clients", [1, 2])
def test_skipped_passes_change_nothing_that_was_decided(
    n_clients: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading what cannot matter yet later than a live router would gives the same batches to all."""
    # A client's way is known after a hundred messages that were read apart: skipped passes read fewer.
    monkeypatch.setattr(ledger, "_ENOUGH_SAMPLES", 0)
    # Without rests every message takes the same way: what a run samples of it cannot differ.
    settings = SimSettings(way=Way(100_000, 0), router_rest_ns=0, n_clients=n_clients)
    workload = Workload(TRACE, np.where(np.arange(TRACE.n) % 5, 36 * MS, 20 * MS).astype(np.int64))
    found = []
    for is_watched in (False, True):
        simulation = Simulation([CNN] * 2, policy=policy, settings=settings)
        clients = simulation.offer(workload)
        if is_watched:  # a watched simulation makes every pass
            simulation.on_pass = lambda _now_ns, _actions: None
        simulation.run()
        found.append((simulation.n_passes, [client.columns()[0] for client in clients]))
    (n_skipping, skipping), (n_whole, whole) = found
    # A policy that sees demand has every pass made: to it, it matters in what parts queries came.
    assert n_skipping < n_whole or policy == "demandfit"
    for one, other in zip(skipping, whole, strict=True):
        for name in ("answered_ns", "status", "subnet", "batch_size"):
            assert (one[name] == other[name]).all(), name


def test_without_the_host_a_query_takes_what_its_batch_takes() -> None:
    """No message, pass or rest takes time, and the core holds back nothing beyond its first guess."""
    trace, slo_ns = load_trace("poisson:rate=20", duration_s=1, seed=1), CNN.latency_p99_ns(0, 1) + MS // 2

    alone, hosted = [
        simulate(trace, [CNN] * 8, policy="mincost", slo_ns=slo_ns, settings=settings)
        for settings in (WITHOUT_HOST, SimSettings())
    ]

    assert alone.result.queries["ok"] == trace.n
    assert set(alone.columns["answered_ns"] - alone.columns["due_ns"]) == {CNN.latency_ns(0, 1)}
    assert hosted.result.queries["infeasible"] == trace.n
