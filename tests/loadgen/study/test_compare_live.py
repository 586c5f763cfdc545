"""Policies compared live: what is refused, and that figures and what spoilt them come back together."""

from __future__ import annotations

import pytest

from loadgen.simulator.faults import Fault
from loadgen.simulator.simulate import SimSettings
from loadgen.study.compare import Cell, Comparison
from loadgen.study.compare_live import check_live, compare_live
from superserve.errors import ConfigError

TWO = "cnn-8gpu-modelled:2"
KILL = Fault("kill", 0, "worker:0")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell("a", "poisson:rate=10", TWO, slo_ms="18,36"), "cell a: a live sender has one SLO"),
        (Cell("b", "poisson:rate=10", TWO, floor="78"), "cell b: a live sender has one SLO"),
        (Cell("c", "poisson:rate=10", "cnn-8gpu-modelled*2:2"), "cell c: live GPUs are of one profile"),
        (Cell("e", "poisson:rate=10", TWO, faults=(KILL,)), "cell e: faults, .* are only simulated"),
        (Cell("f", "poisson:rate=10", TWO, priority="1:0.5"), "cell f: .*priorities"),
        (Cell("g", "poisson:rate=10", TWO, n_clients=2), "cell g: .*several clients"),
        (Cell("h", "poisson:rate=10", TWO, speed=0.5), "cell h: .*other speeds"),
    ],
)
def test_what_cannot_be_offered_live_is_refused_before_anything_starts(cell: Cell, message: str) -> None:
    """Mixes, floors and unequal GPUs are named by their cell."""
    with pytest.raises(ConfigError, match=message):
        check_live([cell])


def test_a_policy_on_slower_gpus_is_not_compared_live() -> None:
    """A speed after @ is only simulated."""
    with pytest.raises(ConfigError, match=r"policy 'mincost@0.8': a speed after @ is only simulated"):
        check_live([Cell("a", "poisson:rate=10", TWO)], ("slackfit", "mincost@0.8"))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_policies_take_turns_on_the_same_queries() -> None:
    """Each policy has its figures for each seed, in the order of the rounds, and what each run said."""
    comparison = Comparison(("fixed:cnn-73.82", "fixed:cnn-80.16"), (0, 1), 1.0, False, SimSettings())
    said: list[str] = []

    results, notes = compare_live(
        comparison, [Cell("small", "poisson:rate=100", "cnn-8gpu-modelled:2", slo_ms="500")], said.append
    )

    rounds = [(note.seed, note.policy) for note in notes]
    one, other = comparison.policies
    assert rounds == [(0, one), (0, other), (1, other), (1, one)], "nobody always goes first"
    assert [note.violations for note in notes] == [0] * 4
    assert len(said) == 4
    for policy, accuracy in (("fixed:cnn-73.82", 73.82), ("fixed:cnn-80.16", 80.16)):
        known = [one.accuracy for one in results[0].policies[policy] if one.accuracy is not None]
        assert known == pytest.approx([accuracy] * 2, abs=1e-3)
