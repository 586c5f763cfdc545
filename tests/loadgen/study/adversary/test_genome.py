"""Genomes: whatever is drawn, mutated or crossed can be built, within its limits, and equally each time."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from loadgen.simulator.workloads import parse_cluster
from loadgen.study.adversary.genome import (
    GPUS,
    MOST_CV2,
    MOST_JITTER_MS,
    MOST_LOAD,
    MOST_PARTS,
    MOST_SECONDS,
    MOST_SLOWNESS,
    MOST_SPIKE,
    SLO_MS,
    Genome,
    crossed,
    drawn,
    mutated,
)
from superserve.clock import MS, SECOND

pytestmark = pytest.mark.timeout(60)

CNN = "cnn-8gpu-modelled"
PLAIN = Genome(CNN, 0.2, ((1.0, 0.5),), (), 1.0, ((36.0, 1.0),), 8, 1.0, 1.0, None, 0.0, 7)


def some(n: int) -> list[Genome]:
    """Return genomes of all origins: drawn, mutated many times, crossed."""
    rng = random.Random(3)
    found = [drawn(rng, CNN) for _ in range(n)]
    for _ in range(n):
        found.append(mutated(rng, rng.choice(found)))
        found.append(mutated(rng, crossed(rng, *rng.sample(found, 2))))
    return found


def test_every_genome_can_be_built_within_its_limits() -> None:
    """Genes stay in their ranges, the arrivals are a trace of bounded size, and the cell is one."""
    for one in some(60):
        assert one.n_gpus in GPUS
        assert 1 <= len(one.rates) <= MOST_PARTS
        assert len(one.spikes) <= MOST_PARTS
        assert sum(share for share, _ in one.rates) == pytest.approx(1)
        assert all(0 <= load <= MOST_LOAD for _, load in one.rates)
        assert all(0 <= place <= 1 and 0 < size <= MOST_SPIKE for place, size in one.spikes)
        assert all(SLO_MS[0] <= ms <= SLO_MS[1] for ms, _ in one.slos)
        assert 0 <= one.cv2 <= MOST_CV2
        assert 1 <= one.slowness <= MOST_SLOWNESS
        assert 0 <= one.jitter_ms <= MOST_JITTER_MS
        workload = one.workload(one.trace(1_000))
        assert 1 <= workload.trace.n <= 3_000
        assert workload.trace.duration_ns <= (MOST_SECONDS + 2) * SECOND
        assert len(parse_cluster(one.cluster)) == one.n_gpus
        assert one.cell("x").speed == pytest.approx(1 / one.slowness, abs=1e-4)


def test_equal_draws_are_equal_genomes_and_arrivals() -> None:
    """All that is random comes from the generator, and arrivals from the genome alone."""
    assert some(5) == some(5)
    for one in some(5):
        assert (one.trace(500).due_ns == one.trace(500).due_ns).all()
        once, twice = one.trace(500), one.trace(500, 2)
        assert twice.duration_ns == 2 * once.duration_ns
        assert (twice.due_ns[once.n :] - once.duration_ns == once.due_ns).all()


def test_search_reaches_every_kind() -> None:
    """Among some hundred genomes there are all kinds of arrivals, and all kinds of terms."""
    families = {one.family for one in some(200)}

    assert {family.partition(", ")[0] for family in families} == {"spikes", "jumps", "bursts", "smooth"}
    terms = {"floors", "mix", "slow", "unequal", "jitter", "plain"}
    assert {family.partition(", ")[2] for family in families} == terms


def test_rates_and_spikes_are_relative_to_what_the_gpus_can_do() -> None:
    """Half of 17,415 q/s; spikes of what the GPUs do within half of the SLO, at their place in each cycle."""
    assert PLAIN.trace(4_000).mean_qps == pytest.approx(0.5 * 17_415, rel=0.05)
    assert replace(PLAIN, slowness=2.0).trace(4_000).mean_qps == pytest.approx(0.25 * 17_415, rel=0.05)

    spiky = replace(PLAIN, rates=((1.0, 0.0),), spikes=((0.25, 0.5),)).trace(1_500)

    instants, counts = np.unique(spiky.due_ns, return_counts=True)
    assert instants.tolist() == [50 * MS + 200 * MS * i for i in range(len(instants))]
    assert counts.tolist() == [313] * 5


def test_stretches_have_their_rates() -> None:
    """A quarter of the cycle at full load, then a quarter of that."""
    trace = replace(PLAIN, rates=((0.25, 1.0), (0.75, 0.25)), cv2=0.0).trace(20_000)

    into = trace.due_ns % (200 * MS)
    assert (into < 50 * MS).mean() == pytest.approx(0.25 / (0.25 + 0.75 * 0.25), abs=0.01)


def test_a_genome_says_what_its_cell_says() -> None:
    """Cluster, SLOs, floor, jitter and speed as `loadgen compare` takes them."""
    one = replace(
        PLAIN, n_gpus=4, unequal=2.5, slos=((18.0, 1.0), (100.0, 2.5)), floor=(5, 0.25), jitter_ms=1.5,
        slowness=1.25,
    )  # fmt: skip

    cell = one.cell("x.trace")

    assert cell.cluster == f"{CNN}:2,{CNN}*2.5:2"
    assert cell.slo_ms == "18:1,100:2.5"
    assert cell.floor == "80.16:0.25"
    assert (cell.jitter_ms, cell.speed) == (1.5, 0.8)
    assert replace(one, n_gpus=1).cluster == f"{CNN}:1"
