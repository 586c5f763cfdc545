"""What fails the demo and what is only a warning: a broken serve is found, other work is forgiven."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loadgen.demo import serve
from loadgen.demo.load import burst_spec, capacity_qps
from loadgen.demo.machine import MachineUse, MachineWatch, use_of
from loadgen.demo.serve import Served, until_met
from loadgen.demo.verdict import MISSED, judge_serving, missed_by_adapting
from loadgen.options import DEFAULT_POLICY
from loadgen.results.run import Run
from loadgen.simulator.simulate import simulate
from loadgen.simulator.workloads import slowed
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS

PROFILE = load_profile("digits-cpu")
TRACE = load_trace(
    burst_spec(capacity_qps(PROFILE.batch_sizes, PROFILE.subnets[-1].latency_ns)), duration_s=2.0
)
BUSY = "other work took 1.4 of this machine's 2 cores"


def served(policy: str, *, slower: float = 1.0, noise: str = "") -> Served:
    """Return the demo's load as a worker serves it that is slower than its profile by a factor."""
    profile = slowed(PROFILE, slower) if slower != 1.0 else PROFILE
    run = simulate(TRACE, [profile], policy=policy, slo_ns=150 * MS).run
    return Served(policy, run, noise)


def with_result(one: Served, **changes: object) -> Served:
    """Return the same run with other figures."""
    run = Run(replace(one.result, **changes), one.run.columns, one.run.subnets)  # type: ignore[arg-type]
    return Served(one.policy, run, one.noise)


HONEST = tuple(served(policy) for policy in MISSED)


def test_an_honest_serve_passes() -> None:
    """The default policy meets the deadlines of the demo's load, and the largest subnet alone does not."""
    verdict = judge_serving(HONEST)

    assert (verdict.failures, verdict.warnings, verdict.exit_code) == ((), (), 0)
    adaptive, largest = (one.result.slo_attainment or 0.0 for one in (HONEST[0], HONEST[-1]))
    assert adaptive > 0.999
    assert largest < 0.7


def test_a_worker_that_takes_three_times_as_long_has_headroom() -> None:
    """The load leaves the smallest subnet room: the default policy still meets the deadlines."""
    assert missed_by_adapting(served(DEFAULT_POLICY, slower=3.0)) == []


@pytest.mark.parametrize("slower", [20.0, 100.0])
def test_a_broken_serve_fails_on_a_calm_machine(slower: float) -> None:
    """A worker far slower than it was measured misses deadlines, and nothing excuses it."""
    verdict = judge_serving([served(DEFAULT_POLICY, slower=slower), *HONEST[1:]])

    assert verdict.exit_code == 1
    assert f"attainment under {DEFAULT_POLICY}: expected at least 0.99" in verdict.failures[0]


@pytest.mark.parametrize(("attained", "fails"), [(0.98, False), (0.94, True)])
def test_few_misses_on_a_calm_machine_are_a_warning(attained: float, fails: bool) -> None:
    """Few beside those of the largest subnet alone, on the same machine: a warning that names a stall."""
    largest = with_result(HONEST[-1], slo_attainment=0.2)
    verdict = judge_serving([with_result(HONEST[0], slo_attainment=attained), HONEST[1], largest])

    (line,) = verdict.failures if fails else verdict.warnings
    assert line.startswith(f"attainment under {DEFAULT_POLICY}: expected at least 0.99, got {attained:.4f}")
    assert fails or "(a stall: the largest subnet alone got 0.2000 here)" in line
    assert verdict.exit_code == fails


def test_few_misses_do_not_excuse_a_run_that_does_not_count() -> None:
    """Queries that a worker lost are a failure all the same."""
    lost = {**HONEST[0].result.queries, "worker_lost": 5}
    verdict = judge_serving([with_result(HONEST[0], slo_attainment=0.98, queries=lost), *HONEST[1:]])

    assert verdict.failures == (f"5 queries worker_lost under {DEFAULT_POLICY}",)


def test_deadlines_that_other_work_cost_are_a_warning() -> None:
    """The same misses, with the machine seen busy; the line says what was seen."""
    slow = served(DEFAULT_POLICY, slower=8.0, noise=BUSY)
    verdict = judge_serving([slow, *(served(one, slower=8.0, noise=BUSY) for one in tuple(MISSED)[1:])])

    assert missed_by_adapting(slow)
    assert verdict.exit_code == 0
    assert BUSY in verdict.warnings[0]


def test_no_noise_excuses_a_serve_that_does_not_adapt() -> None:
    """However busy the machine, the default policy has to meet more deadlines than the largest subnet."""
    dead = with_result(HONEST[0], slo_attainment=0.0)
    verdict = judge_serving([replace(dead, noise=BUSY), HONEST[1], replace(HONEST[2], noise=BUSY)])

    assert verdict.exit_code == 1
    assert "expected more than the largest subnet alone, got 0.0000" in verdict.failures[-1]


@pytest.mark.parametrize("outcome", ["failed", "invalid"])
def test_no_noise_excuses_queries_that_failed(outcome: str) -> None:
    """A model that raised, or refused its input, is no neighbour's fault."""
    one = with_result(HONEST[1], queries={**HONEST[1].result.queries, outcome: 3})
    verdict = judge_serving([HONEST[0], replace(one, noise=BUSY), HONEST[2]])

    assert verdict.failures == (f"3 queries {outcome} under slackfit",)


def test_a_run_that_does_not_count_fails_only_if_nothing_explains_it() -> None:
    """A sender that was late on a calm machine was our own doing."""
    late = with_result(HONEST[2], valid=False, invalid_because=("send lag",))

    assert judge_serving([*HONEST[:2], late]).failures == (
        "the run under fixed:largest does not count: send lag",
    )
    assert judge_serving([*HONEST[:2], replace(late, noise=BUSY)]).exit_code == 0


@pytest.mark.parametrize("noise", ["", BUSY])
def test_a_run_that_missed_is_served_once_more(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is time; the second one counts, for better or worse."""
    monkeypatch.setattr(serve, "await_calm", lambda _: None)
    missed = served(DEFAULT_POLICY, slower=20.0, noise=noise)
    left, worse = iter([missed, HONEST[0]]), iter([missed, replace(missed)])

    assert until_met(lambda: next(left), missed_by_adapting, lambda: True) is HONEST[0]
    assert until_met(lambda: next(worse), missed_by_adapting, lambda: True) is not missed
    assert until_met(lambda: missed, missed_by_adapting, lambda: False) is missed


@pytest.mark.parametrize("first", [HONEST[0], replace(HONEST[0], noise=BUSY)])
def test_a_run_that_passed_is_not_repeated(first: Served) -> None:
    """A disturbed pass is a pass."""
    left = iter([first])

    assert until_met(lambda: next(left), missed_by_adapting, lambda: True) is first


@pytest.mark.parametrize(
    ("idle", "others_s", "is_calm"),
    [
        ((0.9, 0.9, 0.9, 0.9), 0.04, True),  # nothing else
        ((0.0, 0.0, 0.0, 0.0), 0.04, True),  # full, but of our own work
        ((1.0, 0.9, 1.1, 0.8), 0.80, True),  # other work, and a core to spare
        ((0.9, 0.1, 0.9, 0.9), 0.20, False),  # a moment without a core
    ],
)
def test_a_machine_is_calm_unless_other_work_leaves_no_core(
    idle: tuple[float, ...], others_s: float, is_calm: bool
) -> None:
    """Cores that others take count once none is left."""
    at_s, idle_s = np.arange(len(idle) + 1) * 0.25, np.concatenate([[0.0], np.cumsum(idle) * 0.25])
    use = use_of(list(zip(at_s.tolist(), idle_s.tolist(), strict=True)), others_s, 2)

    assert use.is_calm == is_calm
    assert use.others == pytest.approx(others_s / 1.0)


def test_noise_is_told_in_words() -> None:
    """What was seen, and nothing on a calm machine."""
    calm, busy = MachineUse(2, 0.0, 0.0), MachineUse(2, 1.4, 1.0)

    assert calm.noise(1 * MS, 150 * MS) == calm.noise(None, 150 * MS) == ""
    assert busy.noise(8 * MS, 150 * MS) == f"{BUSY} and the noise probe woke 8.0 ms late"


def test_our_own_work_is_not_other_work() -> None:
    """What this process computes while it is watched is not charged to others."""
    with MachineWatch([]) as watch:
        total, began = 0, watch._own_s()
        while watch._own_s() - began < 0.2:
            total += sum(range(1_000))
        use = watch.use()
        took = sum(1 for _ in watch._samples)

    assert total > 0
    assert took >= 1
    assert 0 <= use.others <= use.n_cores + 0.2
