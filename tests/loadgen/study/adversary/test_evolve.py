"""The search finds a bad policy's failures and none of a good one's, and the same for equal seeds."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadgen.cli import cli
from loadgen.study.adversary.evolve import (
    GENERATION,
    N_WORST,
    WORST_OF_FAMILY,
    Progress,
    Question,
    Scored,
    evaluated,
    evolve,
)
from loadgen.study.adversary.worst import command
from superserve.errors import ConfigError
from tests.loadgen.study.adversary.test_genome import CNN, PLAIN

pytestmark = pytest.mark.timeout(120)

BAD = Question("fixed:largest", "mincost", CNN, 150)
"""It serves the largest subnet alone: whatever needs more than that is late."""


def test_equal_seeds_find_the_same_with_any_number_of_processes() -> None:
    """Two generations, alone and on two processes; another seed finds others."""
    alone = evolve(BAD, seed=1, is_over=lambda n: n >= 2 * GENERATION)
    beside = evolve(BAD, seed=1, is_over=lambda n: n >= 2 * GENERATION, n_processes=2)
    other = evolve(BAD, seed=2, is_over=lambda n: n >= GENERATION)

    assert alone == beside
    assert alone[:3] != other[:3]


def test_a_bad_policy_is_found_out() -> None:
    """The worst attains far less than mincost, families differ, and the list is in order."""
    said: list[Progress] = []

    worst = evolve(BAD, seed=0, is_over=lambda n: n >= 3 * GENERATION, say=said.append)

    assert worst[0].gap > 0.5
    assert [one.gap for one in worst] == sorted((one.gap for one in worst), reverse=True)
    assert len(worst) == N_WORST
    families = [one.genome.family for one in worst]
    assert max(families.count(family) for family in families) <= WORST_OF_FAMILY
    assert [one.n_evaluations for one in said] == [24, 48, 72]
    assert said[-1].worst == worst[0].gap


def test_a_policy_is_not_behind_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside mincost, mincost has no gap anywhere; so the population starts again when it is stale."""
    said: list[Progress] = []
    monkeypatch.setattr("loadgen.study.adversary.evolve.STALE_GENERATIONS", 2)
    n = 4 * GENERATION

    worst = evolve(
        Question("mincost", "mincost", CNN, 100), seed=0, is_over=lambda done: done >= n, say=said.append
    )

    assert {one.gap for one in worst} == {0.0}
    assert said[-1].n_restarts == 1


def test_what_a_policy_is_compared_with() -> None:
    """The better of the yardstick's two, one policy alone, or the bound; others are refused."""
    yardstick = evaluated(Question("maxacc", "yardstick", CNN, 2_000), PLAIN)
    bound = evaluated(Question("maxacc", "bound", CNN, 2_000), PLAIN)

    best = max(yardstick.attainments["slackfit"], yardstick.attainments["mincost@0.8"])
    assert yardstick.gap == best - yardstick.attainments["maxacc"]
    assert bound.gap == bound.attainments["bound"] - bound.attainments["maxacc"]
    assert set(bound.attainments) == {"maxacc", "bound"}
    with pytest.raises(ConfigError, match="--against: expected one of yardstick, mincost, slackfit, bound"):
        Question("maxacc", "nothing", CNN, 2_000)


def test_what_has_come_once_is_no_surprise() -> None:
    """One spike that fills the GPUs costs PlanFit queries; after it, the same spike does not."""
    spike = replace(PLAIN, rates=((1.0, 0.3),), spikes=((0.5, 0.7),), cycle_s=0.3)
    once, again = [
        evaluated(Question("planfit", "mincost", CNN, 2_000, is_again), spike) for is_again in (False, True)
    ]

    assert once.gap > 0.01 > 0.002 > again.gap
    with pytest.raises(ConfigError, match="--again: the bound is of all queries"):
        Question("planfit", "bound", CNN, 1_000, is_again=True)


def test_the_command_has_every_term() -> None:
    """Trace, GPUs, SLOs, floor, jitter and speed, each where it is one; the bound where it was asked for."""
    rich = replace(PLAIN, floor=(5, 0.25), jitter_ms=1.5, slowness=1.25, slos=((18.0, 1.0), (100.0, 2.0)))

    yardstick = command(Question("maxacc", "yardstick", CNN, 9), Scored(rich, 0.1, {}), Path("a b.trace"))
    bound = command(Question("maxacc", "bound", CNN, 9), Scored(PLAIN, 0.1, {}), Path("x"))

    assert yardstick == (
        ".venv/bin/loadgen compare --simulate --seeds 1 --policy maxacc --policy slackfit "
        "--policy mincost@0.8 --trace 'a b.trace' --emulate cnn-8gpu-modelled:8 --slo-ms 18:1,100:2 "
        "--floor 80.16:0.25 --jitter-ms 1.5 --speed 0.8 --no-bound"
    )
    assert bound == (
        ".venv/bin/loadgen compare --simulate --seeds 1 --policy maxacc "
        "--trace x --emulate cnn-8gpu-modelled:8 --slo-ms 36"
    )


@pytest.mark.parametrize("more", [[], ["--again"]])
def test_the_command_repeats_what_was_found(tmp_path: Path, more: list[str]) -> None:
    """Each of the worst comes as a trace file and a command whose figures are those of the search."""
    path = tmp_path / "found.json"
    found = CliRunner().invoke(
        cli,
        ["adversary", "--policy", "maxacc", "--evaluations", "24", "--queries", "300", "--seed", "4",
         "--processes", "1", "--out", str(tmp_path / "out"), "--json", str(path), *more],
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert re.search(
        r"generation 1: 24 workloads in \d+ families, 0 restarts; the worst is behind by", found.output
    )
    written = json.loads(path.read_text())
    assert len(written["worst"]) == N_WORST

    for one in written["worst"][:3]:
        assert one["command"] in found.output
        assert ("--warm-up" in one["command"]) == bool(more)
        again = CliRunner().invoke(
            cli,
            [*shlex.split(one["command"])[1:], "--processes", "1", "--json", str(tmp_path / "again.json")],
        )
        assert again.exit_code == 0, again.output
        policies = json.loads((tmp_path / "again.json").read_text())["cells"][0]["policies"]
        assert {name: runs[0]["attainment"] for name, runs in policies.items()} == one["attainments"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "slackfitt"), "did you mean 'slackfit'"),
        (("--profile", "nothing"), "nothing"),
        (("--json", "/dev/null/x.json"), "--json: /dev/null: expected a folder"),
        (("--out", "/dev/null/x"), "--out: /dev/null/x: cannot be made"),
    ],
)
def test_wrong_options_are_refused_by_name(args: tuple[str, str], said: str) -> None:
    """The message names the option."""
    found = CliRunner().invoke(
        cli, ["adversary", "--evaluations", "1", "--queries", "100", "--processes", "1", *args]
    )

    assert found.exit_code == 1
    assert said in found.output
