"""With several routers the promises hold whatever becomes of them, and the checker finds broken parts."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from gpu_worker.core.lending import Lender
from loadgen.simulator.chaos.routers import draw, main, run_schedule, run_schedules
from tests.loadgen.simulator import lending_mutants, router_mutants

MUTANTS = router_mutants.MUTANTS | lending_mutants.MUTANTS


def test_whatever_becomes_of_the_routers_every_query_ends_once() -> None:
    """Deaths, stops, drains and partitions break no promise; a failure prints its replay."""
    tally = run_schedules(0, 12)

    assert not tally.failures, "\n".join(tally.lines())
    assert tally.n_redispatched > 0, "no query was sent to a second router"


def test_credits_move_and_are_never_at_two_routers() -> None:
    """In a world that lends all it can, batches run on GPUs of other routers, and all promises hold."""
    lenders: list[Lender[Any]] = []

    def make(*args: Any, **options: Any) -> Lender[Any]:
        lenders.append(Lender(*args, **options))
        return lenders[-1]

    found = run_schedule(5, make_lender=make)

    assert found.violation is None
    assert sum(lender.counts.used for lender in lenders) > 0


@pytest.mark.slow
def test_more_worlds_hold() -> None:
    """And each kind of fault is among them."""
    tally = run_schedules(1_000, 300)  # of the 10,000 of `make chaos`, what a minute of two cores holds

    assert not tally.failures, "\n".join(tally.lines())
    kinds = {fault.kind for seed in range(1_000, 1_300) for fault in draw(seed).faults}
    assert kinds == {"kill", "freeze", "drain", "cut"}


def test_a_seed_gives_the_same_world_each_time() -> None:
    """A failing seed can be looked at."""
    assert run_schedule(3).digest == run_schedule(3).digest


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_part_is_found(name: str) -> None:
    """Each mutant is caught by its schedule, for what is wrong with it."""
    mutant = MUTANTS[name]

    found = run_schedule(mutant.seed, **mutant.parts)

    assert found.violation is not None, f"{name}: seed {mutant.seed} shows nothing"
    assert re.search(mutant.said, found.violation), found.violation
    assert run_schedule(mutant.seed).violation is None, "the schedule shows something else"


def test_a_seed_can_be_run_alone() -> None:
    """The command prints the faults and the result."""
    result = CliRunner().invoke(main, ["--seed", "1"])

    assert result.exit_code == 0, result.output
    assert "kill router:" in result.output
    assert "1 schedules: 1 hold" in result.output


def test_a_failure_names_the_command_that_plays_it_again() -> None:
    """The one for several routers, wherever the lines are printed."""
    outcome = replace(run_schedule(0), violation="0.000 ms: broken on purpose")
    tally = run_schedules(0, 0)
    tally.add(outcome)

    assert "  replay: python -m loadgen.simulator.chaos.routers --seed 0" in "\n".join(tally.lines())
