"""The promises hold whatever goes wrong, and their checker finds cores that are broken."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from loadgen.simulator import chaos
from loadgen.simulator.chaos import run_schedule, run_schedules
from tests.loadgen.simulator.mutants import MUTANTS, find_violation


@pytest.mark.parametrize("first", range(0, 300, 60))
def test_whatever_goes_wrong_what_must_hold_holds(first: int) -> None:
    """Kills, freezes, partitions, losses and delays break no promise; a failure prints its replay."""
    tally = run_schedules(first, 60)

    assert not tally.failures, "\n".join(tally.lines())
    assert tally.n_redispatched > 0
    assert {"OK", "LATE", "EXPIRED", "INFEASIBLE", "WORKER_LOST", "CANCELLED"} <= set(tally.ends)


def test_a_seed_gives_the_same_schedule_each_time() -> None:
    """Every directive and every end is the same, so that a failing seed can be looked at."""
    assert run_schedule(11).digest == run_schedule(11).digest
    assert run_schedule(11).digest != run_schedule(12).digest


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_core_is_found(name: str) -> None:
    """Each mutant is caught within a hundred schedules, for what is wrong with it."""
    mutant, said = MUTANTS[name]

    found = find_violation(mutant, at_most=100)

    assert found is not None, f"{name}: 100 schedules show nothing"
    assert re.search(said, str(found.violation)), found.violation


def test_a_failing_seed_prints_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed of a broken core is a command line, and that prints the faults of the seed."""
    broken, _ = MUTANTS["re-dispatch dropped"]
    found = find_violation(broken, at_most=100)
    assert found is not None
    monkeypatch.setattr(chaos, "run_schedule", lambda seed: run_schedule(seed, broken))

    result = CliRunner().invoke(chaos.main, ["--seed", str(found.seed)])

    assert result.exit_code == 1
    assert f"replay: python -m loadgen.simulator.chaos --seed {found.seed}" in result.output
    assert '"faults"' in result.output
