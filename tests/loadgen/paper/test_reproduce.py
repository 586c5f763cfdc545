"""The paper's results made again: the experiments, what the page says of them, and its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from loadgen.live.run import Cluster
from loadgen.paper.experiments import (
    KILL_EVERY_S,
    N_KILLS,
    POLICIES,
    ExperimentEffort,
    faults,
    over_time,
    scaling,
)
from loadgen.paper.figures import svg_of
from loadgen.paper.live_experiments import Kills
from loadgen.paper.page import correlation, page
from loadgen.paper.pictures import pictures
from loadgen.paper.reproduce import LIVE, NAMES, NARROW, WIDE, load, reproduce
from loadgen.simulator.simulate import simulate
from loadgen.traces.trace import load_trace
from profiles.table import load_profile

if TYPE_CHECKING:
    from pathlib import Path

HOW = {
    "environment": {"date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "a CPU", "cores": 2}},
    "has_maf": False, "share": 1.0, "took_s": 60.0,
}  # fmt: skip


def hush(_what: str) -> None:
    """Say nothing of progress, from any process."""


def effort(share: float) -> ExperimentEffort:
    """Return a small part of the work, in one process."""
    return ExperimentEffort(maf=None, n_processes=1, n_seeds=1, share=share, say=hush)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return the figures of every simulated experiment, of a hundredth of its length."""
    made = {name: HOW | {"share": 0.01} for name in (*WIDE, *NARROW)}
    kept: dict[str, Any] = {"made": made}
    reproduce(effort(0.01), (*WIDE, *NARROW), kept.__setitem__)
    return kept


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_page_has_each_experiment_with_the_paper_s_figure_ours_and_the_bound(
    found: dict[str, Any],
) -> None:
    """Every section stands there; accuracies on MAF are those of the figures, and better without the host."""
    text = page(found)

    for title in ("MAF", "Bursty", "Faults", "Policies", "Scaling", "Range", "delay", "Dynamics"):
        assert f"## {title}" in text or f"a {title}" in text, title
    cell = found["maf"]["cells"][0]
    for policy in POLICIES:
        assert f"| {policy} | {cell['policies'][policy][0]['attainment']:.5f}, " in text
        without = cell["without_host"][policy][0]
        assert f"| {without['attainment']:.5f}, {without['accuracy']:.2f} %, " in text
        assert without["per_query"] > cell["policies"][policy][0]["per_query"]
    assert "Durations were cut for maf, transformer, " in text
    assert text.count("\n| bursty ") == text.count("\n| accel ") == 9


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_each_picture_that_the_page_shows_is_drawn_and_always_alike(found: dict[str, Any]) -> None:
    """No picture is missing or left over, and equal figures give equal files."""
    drawn = pictures(found)

    text = page(found)
    assert [stem for stem in drawn if f"({stem}.svg)" not in text] == []
    assert text.count(".svg)") == len(drawn)
    for draw in drawn.values():
        assert svg_of(draw) == svg_of(draw)


def test_a_part_of_the_experiments_makes_a_part_of_the_page() -> None:
    """Figures that are not there leave out their sections, and nothing fails."""
    kept: dict[str, Any] = {"made": {"faults": HOW}, "faults": faults(effort(0.02))}

    text = page(kept)

    assert "## Faults" in text
    assert "## MAF" not in text
    assert list(pictures(kept)) == ["results-faults"]


def test_each_experiment_has_one_name() -> None:
    """A name chooses one experiment."""
    assert len(set(NAMES)) == len(NAMES) == len(WIDE) + len(NARROW) + len(LIVE)


def test_faults_are_told_by_how_many_workers_live() -> None:
    """From eight down to four, all queries are in one span, and accuracy falls as workers go."""
    run = faults(effort(0.1))["runs"]["planfit"]

    assert [span["live"] for span in run["spans"]] == [8, 7, 6, 5, 4]
    assert sum(span["queries"] for span in run["spans"]) == run["queries"]["total"]
    assert run["spans"][-1]["accuracy"] < run["spans"][0]["accuracy"]
    assert KILL_EVERY_S * N_KILLS < 60


def test_scaling_is_by_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the GPUs hold about twice the rate; no rate is far above what full batches give."""
    monkeypatch.setattr("loadgen.paper.experiments.GPUS_OF_SCALING", (1, 2))
    figures = scaling(effort(0.25))

    rates = {(point["policy"], point["gpus"]): point["rate_qps"] for point in figures["points"]}
    for policy in POLICIES:
        assert rates[policy, 2] == pytest.approx(2 * rates[policy, 1], rel=0.1)
    assert max(rates.values()) <= 2 * 1.1 * figures["per_gpu_qps"]


def test_bins_hold_every_query_once() -> None:
    """The rates of the bins add up to the trace."""
    trace = load_trace("poisson:rate=800", duration_s=1.0, seed=3)
    run = simulate(trace, [load_profile("cnn-8gpu-modelled")] * 2).run

    series = over_time(run, 0.25)

    assert sum(qps * 0.25 for qps in series["qps"] if qps is not None) == trace.n
    assert series["at_s"] == [0.0, 0.25, 0.5, 0.75]


def test_each_experiment_keeps_when_and_how_it_was_made() -> None:
    """Figures of two days and two efforts are not passed off as those of one."""
    older = {"environment": {"date": "2025-12-31T00:00:00", "machine": {"cpu": "another", "cores": 4}}}
    kept: dict[str, Any] = {"made": {"faults": HOW, "range": HOW | older | {"share": 0.1, "has_maf": True}}}

    text = page(kept)

    assert "Made on 2025-12-31 to 2026-01-02, a CPU, 2 cores and another, 4 cores, in 2 minutes." in text
    assert "Durations were cut for range" in text
    assert "of some figures a Functions 2019 file" in text


class FakeWorker:
    """Notes that it was killed."""

    def __init__(self, name: str, killed: list[str]) -> None:
        self._name, self._killed = name, killed

    def kill(self) -> int:
        """Note it."""
        self._killed.append(self._name)
        return -9


def test_kills_come_in_order_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker is killed after the planned number of queries, however coarse the progress is."""

    class AtOnce:
        def __init__(self, target: Any) -> None:
            self.start = target

    killed: list[str] = []
    workers: Any = tuple(FakeWorker(name, killed) for name in "abcd")
    monkeypatch.setattr("loadgen.paper.live_experiments.threading.Thread", AtOnce)
    kills = Kills(Cluster("tcp://127.0.0.1:1", workers=workers), after=(10, 20, 30))

    for sent in (0, 9, 10, 11, 35, 40):
        kills.watch({"sent": sent})
        assert killed == {0: [], 9: [], 10: ["a"], 11: ["a"]}.get(sent, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, None, 1.0], -1.0),
        ([1.0, 1.0], [2.0, 3.0], 0.0),
        ([None], [1.0], 0.0),
    ],
)
def test_correlation(one: list[float | None], other: list[float | None], expected: float) -> None:
    """Of what is known of both; 0 where there is nothing to correlate."""
    assert correlation(one, other) == pytest.approx(expected)


def test_earlier_figures_are_added_to(tmp_path: Path) -> None:
    """Without a file there are none; what is no JSON is refused by name."""
    assert load(tmp_path / "results.json") == {"schema": 1, "made": {}}
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(Exception, match="expected the figures of an earlier run"):
        load(tmp_path / "results.json")
