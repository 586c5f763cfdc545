"""Policies are compared on the same queries; headlines and gains are what paper.md's rules give."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gpu_worker.core.played import Pace
from loadgen.results.run import in_time
from loadgen.simulator.faults import Fault, jitter_faults
from loadgen.simulator.simulate import SimSettings, Workload, simulate
from loadgen.study.compare import (
    Cell,
    CellResult,
    Comparison,
    Figures,
    baselines,
    bound_in,
    bound_of,
    contender,
    headline,
    headline_lines,
    lines,
    paper_cells,
    serve,
    to_dict,
)
from loadgen.study.verdict import verdict_lines
from loadgen.traces.trace import load_trace
from profiles.table import load_profile
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CNN = load_profile("cnn-8gpu-modelled")
CELL = Cell("small", "poisson:rate=1500", "cnn-8gpu-modelled:2")


def result_of(policies: Mapping[str, tuple[float, float]]) -> CellResult:
    """Return a cell's result with one seed: attainment and accuracy by policy."""
    figures: dict[str, tuple[Figures, ...]] = {}
    for name, (share, accuracy) in policies.items():
        figures[name] = (Figures(share, accuracy, share * accuracy),)
    return CellResult(CELL, (0,), figures, None)


def test_the_headlines_follow_their_rules() -> None:
    """The most accurate baseline of equal attainment, mincost, and the nearest that is no less accurate."""
    result = result_of(
        {
            "ours": (0.9999, 78.8),
            "fixed:a": (1.0, 76.0),
            "fixed:b": (0.9995, 78.2),
            "fixed:c": (0.4, 79.4),
            "fixed:d": (0.2, 80.2),
            "mincost": (1.0, 73.8),
        }
    )

    found = headline(result, "ours")

    assert found.over == "fixed:b"
    assert found.accuracy_gain == pytest.approx(0.6)
    assert found.mincost_gain == pytest.approx(5.0)
    assert found.at == "fixed:c"
    assert found.attainment_ratio == pytest.approx(0.9999 / 0.4)
    assert len(headline_lines([result])) == 1


def test_a_baseline_that_misses_more_is_no_equal() -> None:
    """An attainment lower by more than 0.001 does not count, however accurate."""
    found = headline(result_of({"ours": (1.0, 78.0), "fixed:a": (0.9985, 78.2)}), "ours")

    assert found.over is None
    assert found.accuracy_gain is None
    assert found.mincost_gain is None


def test_a_comparison_is_paired_and_does_not_depend_on_processes() -> None:
    """Each policy serves the very same queries of a seed; two processes find what one finds."""
    policies = ("slackfit", "mincost")
    comparison = Comparison(policies, (0, 1), 0.5, with_bound=True, settings=SimSettings())

    alone = comparison.run([CELL])
    beside = comparison.run([CELL], n_processes=2)

    assert alone == beside
    for policy, figures in alone[0].policies.items():
        trace = load_trace(CELL.trace, duration_s=0.5, seed=1)
        direct = simulate(trace, [CNN] * 2, policy=policy, seed=1)
        assert figures[1].per_query == pytest.approx(direct.accuracy_per_query)
    gain, error = alone[0].gain("mincost", "slackfit")
    assert gain < -3
    assert error > 0
    limit = alone[0].mean_bound()
    assert limit is not None
    assert alone[0].mean("slackfit").per_query <= limit.per_query
    text = json.loads(json.dumps(to_dict(comparison, alone)))
    assert text["cells"][0]["policies"]["slackfit"][0]["attainment"] > 0.9
    assert any("(bound)" in line for line in lines(alone))


def test_the_papers_cells_are_all_there() -> None:
    """MAF, nine bursty, nine accelerating, three mixes, unequal GPUs and a floor; each has its queries."""
    cells = paper_cells("cnn-8gpu-modelled", 8, None)

    assert len(cells) == 24
    assert len({cell.name for cell in cells}) == 24
    for cell in cells:
        workload = cell.workload(1.0, seed=0)
        assert workload.trace.n > 1_000, cell.name


def test_a_recorded_trace_is_as_long_as_it_is(tmp_path: Path) -> None:
    """Without a duration a file's own length counts, specs are drawn for 30 s; a cell's own goes first."""
    path = tmp_path / "one.trace"
    load_trace("poisson:rate=300", duration_s=2.5, seed=1).save(path)

    def length_ns(cell: Cell, duration_s: float | None) -> int:
        return cell.workload(duration_s, seed=0).trace.duration_ns

    assert length_ns(Cell("file", str(path), "cnn-8gpu-modelled:1"), None) == 2.5 * SECOND
    assert length_ns(Cell("file", str(path), "cnn-8gpu-modelled:1"), 2.0) == 2 * SECOND
    assert length_ns(replace(CELL, duration_s=1.5), 2.0) == 1.5 * SECOND
    assert length_ns(CELL, None) == 30 * SECOND


def test_seeds_take_other_minutes_of_a_counted_trace(tmp_path: Path) -> None:
    """A cell with a number of minutes plays that stretch alone, another one for each seed."""
    path = tmp_path / "counts.csv"
    counts = range(100, 110)
    minutes = ",".join(str(minute) for minute in range(1, 11))
    row = ",".join(str(count) for count in counts)
    path.write_text(f"HashOwner,HashApp,HashFunction,Trigger,{minutes}\no,a,f,http,{row}\n")
    cell = Cell("counts", str(path), "cnn-8gpu-modelled:1", minutes=2)

    found = {cell.workload(4.0, seed).trace.n for seed in range(9)}

    assert found == {count + count + 1 for count in counts[:-1]}


def test_troubles_classes_and_clients_reach_the_simulation() -> None:
    """A cell under jitter, with slow GPUs, classes and clients is what `simulate` makes of the same."""
    slow = Fault("slow", 0, "worker:0", None, 1.5)
    cell = replace(CELL, faults=(slow,), jitter_ms=3, priority="2:0.25", n_clients=3, speed=0.9)
    workload = cell.workload(0.5, seed=4)
    assert workload.priority is not None
    jitter = jitter_faults(3 * MS, n_processes=1, n_clients=3)
    settings = SimSettings(pace=Pace(0.9 * 0.8), n_clients=3)

    found = serve(cell, workload, [CNN] * 2, "demandfit@0.8", seed=4)
    direct = simulate(
        workload, [CNN] * 2, policy="demandfit", seed=4, faults=(slow, *jitter), settings=settings
    )

    is_in_time = in_time(direct.columns, workload.slo_ns)
    assert found.per_query == pytest.approx(direct.accuracy_per_query)
    assert found.top == is_in_time[workload.priority == 2].mean()
    assert found.mean_batch == direct.result.batch_size_mean
    assert found.top is not None
    assert 0 < found.top < 1
    plain = serve(CELL, CELL.workload(0.5, seed=4), [CNN] * 2, "demandfit", seed=4)
    assert plain.attainment == 1
    assert plain.top is None


def test_a_policy_on_slower_gpus_attains_less() -> None:
    """`mincost@0.8` has GPUs that are a quarter slower: near the edge it falls behind, and is not judged."""
    cell = Cell("edge", "poisson:rate=4200", "cnn-8gpu-modelled:2")
    comparison = Comparison(("slackfit", "mincost", "mincost@0.8"), (0,), 1.0, False, SimSettings())

    [found] = comparison.run([cell])

    assert found.mean("mincost@0.8").attainment < found.mean("mincost").attainment - 0.05
    assert not any("mincost@0.8" in line for line in (*verdict_lines([found]), *headline_lines([found])))


@pytest.mark.parametrize("text", ["mincost@", "mincost@fast", "mincost@0", "mincost@nan", "mincost@1000"])
def test_a_speed_that_is_none_is_refused(text: str) -> None:
    """The error names the policy and the range."""
    with pytest.raises(ConfigError, match=r"mincost@.*: expected a speed from 0.01 to 100 after @"):
        contender(text)


def test_the_bound_is_that_of_the_fastest_that_gpus_come_to_be() -> None:
    """Slower GPUs lower it; a fault that makes one of them faster raises it, so that it stays a bound."""
    cell = Cell("bound", "poisson:rate=6000", "cnn-8gpu-modelled:2")
    workload = cell.workload(0.5, seed=0)

    def attainment(cell: Cell) -> float:
        return bound_in(cell, workload, [CNN] * 2).attainment

    assert attainment(replace(cell, speed=0.5)) < attainment(cell) < 1
    fast = Fault("slow", 0, "worker:0", None, 0.5, 0)
    slow = Fault("slow", 0, "worker:0", None, 2.0, 0)
    assert attainment(replace(cell, faults=(fast,))) > attainment(cell)
    assert attainment(replace(cell, faults=(slow,))) == attainment(cell)


def test_every_subnet_alone_and_the_cheapest_are_the_baselines() -> None:
    """Clipper+ in each version, and INFaaS."""
    assert len(baselines(CNN)) == CNN.n_subnets + 1


def test_no_simulation_exceeds_the_bound() -> None:
    """On an overloaded GPU the bound is above what SlackFit makes of it, in both figures."""
    workload = Workload(load_trace("poisson:rate=3000", duration_s=0.5, seed=4))

    limit = bound_of(workload, [CNN])
    found = simulate(workload, [CNN])

    assert found.result.slo_attainment is not None
    assert found.result.slo_attainment <= limit.attainment < 1
    assert found.accuracy_per_query <= limit.per_query
    assert limit.accuracy is None


def test_a_comparison_goes_on_where_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /dev/shm, as in some containers, Python has no locks for them: this process does it all."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("loadgen.study.compare.ProcessPoolExecutor", refuse)
    comparison = Comparison(("mincost",), (0,), 0.2, with_bound=False, settings=SimSettings())
    assert comparison.run([CELL], n_processes=2) == comparison.run([CELL])


def test_a_pool_is_not_begun_where_no_process_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ever for one that never came; those that were tried are gone."""
    tried: list[int] = []
    fork = os.fork

    def refuse_the_second() -> int:
        if tried:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        child = fork()
        if child:
            tried.append(child)
        return child

    monkeypatch.setattr(os, "fork", refuse_the_second)
    comparison = Comparison(("mincost",), (0,), 0.2, with_bound=False, settings=SimSettings())
    assert comparison.run([CELL], n_processes=2) == comparison.run([CELL])
    with pytest.raises(ChildProcessError):
        os.waitpid(tried[0], os.WNOHANG)


def test_queries_of_the_warm_up_are_served_and_not_counted() -> None:
    """Figures are those of the later queries, in a run in which all were served."""
    cell = replace(CELL, trace="onoff:high=9000,low=200,on=0.2,off=0.3", priority="1:0.2", duration_s=0.5)
    workload, cluster = cell.workload(None, 1), [CNN] * 2
    whole = simulate(workload, cluster, policy="mincost", seed=1)
    later = whole.columns["due_ns"] >= 0.15 * SECOND
    good = in_time(whole.columns, workload.slo_ns)

    found = serve(replace(cell, warm_up_s=0.15), workload, cluster, "mincost", seed=1)

    assert (
        found.attainment == good[later].mean() != serve(cell, workload, cluster, "mincost", seed=1).attainment
    )
    assert workload.priority is not None
    assert found.top == good[later & (workload.priority == 1)].mean()
    assert found.accuracy == pytest.approx(whole.columns["accuracy"][later & good].mean())
    assert found.per_query == pytest.approx(found.attainment * (found.accuracy or 0.0))
    with pytest.raises(ConfigError, match="--warm-up: no query is due after 9 s"):
        serve(replace(cell, warm_up_s=9.0), workload, cluster, "mincost", seed=1)
