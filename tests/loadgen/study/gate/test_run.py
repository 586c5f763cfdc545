"""PolicyGate runs: what is simulated and what is taken from the store, and what the figures come to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from loadgen.simulator.workloads import parse_cluster
from loadgen.study.compare import Cell, Figures, bound_in, serve
from loadgen.study.gate import run as gate_run
from loadgen.study.gate.draft import GateCell
from loadgen.study.gate.run import PolicyGate
from loadgen.study.gate.show import markdown_lines, summary_lines, table_lines, to_dict
from loadgen.study.gate.store import BOUND, FigureStore, code_version, reached
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(60)

BAD = "fixed:largest"
"""It serves the most accurate subnet alone, and so misses most of a load that needs the small ones."""

HEAVY = GateCell("tiny", Cell("tiny heavy", "poisson:rate=2000", "cnn-8gpu-modelled:2", duration_s=0.3), True)
LIGHT = GateCell("tiny", Cell("tiny light", "poisson:rate=100", "cnn-8gpu-modelled:2", duration_s=0.3),
                 is_held_out=True)  # fmt: skip
AWAY = replace(LIGHT, cell=replace(LIGHT.cell, name="tiny away"), skipped="no file")

COMPARATORS = ("slackfit", "mincost", "mincost@0.8", "demandfit", "slackfit@0.95", "demandfit@0.95")


def gate(folder: Path, policy: str = BAD, seeds: tuple[int, ...] = (1, 2)) -> PolicyGate:
    """Return a gate that keeps its figures in a folder."""
    return PolicyGate(policy, "demandfit", seeds, FigureStore(folder))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each simulation, and each bound, adds who it was of."""
    found: list[str] = []

    def counted(*args: object, **options: object) -> Figures:
        found.append(str(args[3]))
        return serve(*args, **options)  # type: ignore[arg-type]  # handed on as they came

    def bounded(*args: object) -> Figures:
        found.append(BOUND)
        return bound_in(*args)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(gate_run, "serve", counted)
    monkeypatch.setattr(gate_run, "bound_in", bounded)
    return found


def test_a_bad_policy_fails_and_a_good_one_does_not(tmp_path: Path) -> None:
    """The largest subnet alone attains little under load; a lone query costs it nothing."""
    heavy, light = gate(tmp_path).run([HEAVY, AWAY, LIGHT])
    good, _ = gate(tmp_path, "demandfit").run([HEAVY, LIGHT])

    assert {"a", "b", "c"} <= {one.line for one in heavy.fails}
    assert not light.fails
    assert not good.fails
    assert heavy.standing.candidate.attainment < 0.5
    slower, mincost = heavy.standing.slower.mean_batch, heavy.standing.mincost.mean_batch
    assert slower is not None
    assert mincost is not None
    assert slower > mincost  # the same queries take a quarter more of its time


def test_verdicts_are_said_as_cells_end(tmp_path: Path) -> None:
    """How much there is to do first, then each cell's figures and verdict once its last seed is done."""
    said: list[str] = []

    heavy, _ = gate(tmp_path).run([HEAVY, LIGHT], say=said.append)

    assert said[0] == "2 cells, 2 seeds: 32 figures to compute"
    assert len(said) == 3
    assert said[1].startswith(f"tiny heavy: {heavy.standing.candidate.attainment:.5f} ")
    assert "FAILS a -0." in said[1]
    assert said[2].startswith("tiny light: 1.00000 80.160  holds ")


def test_figures_are_those_of_the_simulations(tmp_path: Path) -> None:
    """Each policy serves the queries of its seed, and the bound is theirs; two processes find the same."""
    [judged] = gate(tmp_path / "one").run([HEAVY])
    [again] = gate(tmp_path / "two").run([HEAVY], n_processes=2)

    assert judged.result == again.result
    workload, cluster = HEAVY.cell.workload(None, 2), parse_cluster(HEAVY.cell.cluster)
    for policy in (*COMPARATORS, BAD):
        assert judged.result.policies[policy][1] == serve(HEAVY.cell, workload, cluster, policy, seed=2)
    assert judged.result.bounds is not None
    assert judged.result.bounds[1] == bound_in(HEAVY.cell, workload, cluster)


def test_a_second_run_simulates_the_candidate_alone(tmp_path: Path, served: list[str]) -> None:
    """The comparators and the bound are known then; a further seed is not; figures stay the same."""
    first = gate(tmp_path).run([HEAVY])
    assert sorted(served) == sorted([*COMPARATORS, BOUND, BAD] * 2)
    served.clear()

    second = gate(tmp_path).run([HEAVY])

    assert served == [BAD, BAD]
    assert first[0].result == second[0].result
    served.clear()
    gate(tmp_path, "slackfit", (1, 2)).run([HEAVY])
    assert served == []
    gate(tmp_path, "slackfit", (2, 3)).run([HEAVY])
    assert sorted(served) == sorted([*COMPARATORS, BOUND])


def test_figures_of_other_code_are_not_taken(
    tmp_path: Path, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version simulates again, unless any version will do; then it is counted."""
    gate(tmp_path).run([HEAVY])
    served.clear()
    monkeypatch.setattr("loadgen.study.gate.store.code_version", lambda _: "of tomorrow")
    store = FigureStore(tmp_path, any_version=True)

    PolicyGate(BAD, "demandfit", (1, 2), store).run([HEAVY])
    assert served == [BAD, BAD]
    assert store.n_stale == 2 * (len(COMPARATORS) + 1)
    served.clear()
    gate(tmp_path).run([HEAVY])
    assert len(served) == 2 * (len(COMPARATORS) + 2)


def test_a_policys_code_is_what_it_reaches() -> None:
    """SlackFit's is not DemandFit's; core, simulator and traces are of both; the table of names is not."""
    slackfit = reached(("loadgen.simulator.simulate", "router.policies.slackfit"))

    assert {
        "router.core.dispatch",
        "loadgen.simulator.world",
        "gpu_worker.core.played",
        "profiles.table",
    } <= set(slackfit)
    assert "router.policies.demandfit" not in slackfit
    assert "router.policies.registry" not in slackfit
    assert "router.policies.demandfit" in reached(("router.policies.demandfit",))
    assert len({code_version(policy) for policy in ("slackfit", "mincost", "demandfit", BOUND)}) == 4
    assert code_version("mincost@0.8") == code_version("mincost")


def test_comments_and_docstrings_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed constant is another version, a changed comment or docstring is not."""
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "one": '"""A policy."""\nX = 1\n',
        "two": '"""A fine policy."""\n# Said better.\nX = 1\n',
        "three": '"""A policy."""\nX = 2\n',
    }
    for name, text in texts.items():
        (tmp_path / f"policy_{name}.py").write_text(text)

    found = [next(iter(reached((f"policy_{name}",)).values())) for name in texts]

    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("text", ["", "[]", '{"figures": {"slackfit": 3}}', '{"figures": 3}'])
def test_a_spoilt_store_is_named(tmp_path: Path, text: str) -> None:
    """The message names the file; it may be removed."""
    gate(tmp_path).run([HEAVY])
    for path in tmp_path.iterdir():
        path.write_text(text)

    with pytest.raises(ConfigError, match=r"\.json: expected figures of the gate; remove it"):
        gate(tmp_path).run([HEAVY])


def test_a_store_of_other_figures_is_filled_again(tmp_path: Path) -> None:
    """A release that kept fewer figures is no error."""
    gate(tmp_path).run([LIGHT])
    for path in tmp_path.iterdir():
        body = json.loads(path.read_text())
        del next(iter(body["figures"]["slackfit"].values()))["mean_batch"]
        path.write_text(json.dumps(body))

    [judged] = gate(tmp_path).run([LIGHT])

    assert judged.standing.slackfit.mean_batch is not None


def test_what_is_printed_and_written_says_it_all(tmp_path: Path) -> None:
    """A line a cell with its verdict, what is skipped and why, counts by line, family and side."""
    asked = gate(tmp_path)
    judged = asked.run([HEAVY, LIGHT])

    table = table_lines(asked, judged, [AWAY])
    heavy = next(line for line in table if line.startswith("tiny heavy"))
    light = next(line for line in table if line.startswith("tiny light"))
    assert "FAILS a -0." in heavy
    assert " tuned " in heavy
    assert light.endswith("holds acd")
    assert " out " in light
    assert table[-1] == "tiny away: skipped: no file"
    summary = summary_lines(asked, judged, 1)
    assert summary[0] == "tuned: 0 of 1 cells hold every line"
    assert summary[1] == "held out: 1 of 1 cells hold every line"
    assert "fails by line: a in 1, b in 1, c in 1" in summary[2]
    assert summary[3:] == [
        "by family: tiny 1 of 2",
        "skipped: 1 cells",
        "fixed:largest breaks its promise in 2 cells",
    ]
    assert len(markdown_lines(asked, judged)) == 4
    body = json.loads(json.dumps(to_dict(asked, judged, [AWAY])))
    assert body["holds"] is False
    assert body["skipped"] == {"tiny away": "no file"}
    assert len(body["cells"][0]["policies"]["mincost@0.8"]) == 2
    assert {line["line"] for line in body["cells"][0]["lines"]} >= {"a", "b", "c"}
