"""`loadgen simulate`, `loadgen compare` and the figures: what they print, write and refuse."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from loadgen.cli import cli
from loadgen.paper import figures
from loadgen.paper.figures import Point, ablation, draw_ablation, draw_range, svg_of, throughput_range
from loadgen.results.result import load_run
from loadgen.simulator.faults import Fault, faults_json
from profiles.table import load_profile
from superserve.clock import MS

if TYPE_CHECKING:
    from pathlib import Path

CNN = load_profile("cnn-8gpu-modelled")
SIMULATE = [
    "simulate",
    "--trace",
    "poisson:rate=2000",
    "--duration",
    "0.5",
    "--emulate",
    "cnn-8gpu-modelled:4",
]


def run(*args: str) -> tuple[int, str]:
    """Return the exit code of a command and what it printed."""
    result = CliRunner().invoke(cli, list(args))
    return result.exit_code, result.output


def test_a_simulation_prints_its_digest_and_writes_a_result(tmp_path: Path) -> None:
    """Equal options print equal digests; the file is a run result, and says that it was simulated."""
    path = tmp_path / "run.json"

    code, output = run(*SIMULATE, "--slo-ms", "18,36", "--floor", "78:0.3", "--json", str(path))
    _, again = run(*SIMULATE, "--slo-ms", "18,36", "--floor", "78:0.3")

    assert code == 0, output
    digests = [re.findall(r"digest +([0-9a-f]{64})", text) for text in (output, again)]
    assert digests[0]
    assert digests[0] == digests[1]
    result = load_run(path)
    assert result.trace.endswith("(simulated)")
    assert result.queries["total"] == result.queries["ok"]
    assert result.slo_ms == pytest.approx(27, abs=1)


def test_faults_of_a_seed_can_be_saved_and_given_again(tmp_path: Path) -> None:
    """A run under --fault-seed and one under the file that it saved are the same."""
    path = tmp_path / "faults.json"

    code, drawn = run(*SIMULATE, "--fault-seed", "5", "--save-faults", str(path), "--gpus-per-process", "1")
    _, read = run(*SIMULATE, "--faults", str(path), "--gpus-per-process", "1")

    assert code == 0, drawn
    assert re.findall(r"digest +(\w+)", drawn) == re.findall(r"digest +(\w+)", read)
    assert "fault " in drawn


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "slackfitt"), "did you mean 'slackfit'"),
        (("--slo-ms", "-3"), "--slo-ms: expected a number above 0"),
        (("--floor", "178"), "--floor: expected a number above 0 and up to 100"),
        (("--json", "/dev/null/run.json"), "--json: /dev/null: expected a folder"),
    ],
)
def test_wrong_options_are_refused_by_name(args: tuple[str, str], said: str) -> None:
    """The exit code is 1 and the message names the option and what was expected."""
    code, output = run(*SIMULATE, *args)

    assert code == 1
    assert said in output


def test_a_fault_of_a_process_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The message says which processes there are."""
    path = tmp_path / "faults.json"
    path.write_text(faults_json([Fault("kill", MS, "worker:7")]))

    code, output = run(*SIMULATE, "--faults", str(path))

    assert code == 1
    assert "peer: expected worker:0 to worker:0, got worker:7" in output


def test_compare_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    """Each policy has a line, the bound too; the file has every seed's figures."""
    path = tmp_path / "compare.json"

    code, output = run(
        "compare", "--simulate", "--policy", "slackfit", "--policy", "maxacc", "--trace", "poisson:rate=1500",
        "--emulate", "cnn-8gpu-modelled:2", "--duration", "0.3", "--seeds", "2", "--baselines",
        "--processes", "1", "--json", str(path),
    )  # fmt: skip

    assert code == 0, output
    for text in ("slackfit", "maxacc", "mincost", "fixed:cnn-80.16", "(bound)", "at equal attainment"):
        assert text in output
    written = json.loads(path.read_text())
    assert len(written["cells"][0]["policies"]["maxacc"]) == 2
    assert written["environment"]["machine"]["cores"] >= 1


def test_compare_plays_faults_jitter_classes_and_clients(tmp_path: Path) -> None:
    """What the options say stands in the file's cells; a slowdown costs attainment, and so does a speed."""
    faults, path = tmp_path / "faults.json", tmp_path / "compare.json"
    faults.write_text(faults_json([Fault("slow", 0, "worker:0", None, 1.6)]))
    common = ["compare", "--simulate", "--policy", "mincost", "--policy", "mincost@0.8", "--trace",
              "poisson:rate=3900", "--emulate", "cnn-8gpu-modelled:2", "--duration", "0.5", "--seeds", "1",
              "--no-bound", "--processes", "1", "--json", str(path)]  # fmt: skip

    code, output = run(*common)
    plain = json.loads(path.read_text())["cells"][0]
    assert code == 0, output
    code, output = run(
        *common, "--faults", str(faults), "--jitter-ms", "2", "--priority", "1:0.2", "--clients", "3"
    )
    assert code == 0, output
    cell = json.loads(path.read_text())["cells"][0]

    assert cell["faults"] == [{"kind": "slow", "at_ms": 0, "peer": "worker:0", "factor": 1.6}]
    assert (cell["jitter_ms"], cell["priority"], cell["clients"]) == (2, "1:0.2", 3)
    of_plain, of_slower = (plain["policies"][name][0]["attainment"] for name in ("mincost", "mincost@0.8"))
    assert cell["policies"]["mincost"][0]["attainment"] < of_plain - 0.2
    assert of_slower < of_plain
    assert cell["policies"]["mincost"][0]["top"] is not None


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--priority", "0:1"), "--priority: expected CLASS:SHARE with a class from 1 to 255"),
        (("--policy", "mincost@x"), "policy 'mincost@x': expected a speed from 0.01 to 100"),
        (("--faults", "/dev/null"), "/dev/null: expected JSON"),
        (("--cell", "nothing"), "--cell: no cell's name holds nothing"),
    ],
)
def test_compare_refuses_wrong_options_by_name(args: tuple[str, str], said: str) -> None:
    """The message names the option and what was expected, before anything is simulated."""
    code, output = run("compare", "--simulate", "--trace", "poisson:rate=100", *args)

    assert code == 1
    assert said in output


def test_compare_live_wants_to_know_which_cells() -> None:
    """All of the paper's would take hours live."""
    code, output = run("compare")

    assert code == 1
    assert "expected --trace or --cell, or --simulate" in output


def test_an_actuation_delay_costs_more_the_longer_it_is() -> None:
    """Loading a model for 100 ms misses more SLOs, at less accuracy, than actuating one in place."""
    points = list(ablation(CNN, "maf-like:rate=6400", duration_s=2.0, policy="slackfit"))

    assert [point.at for point in points] == list(figures.DELAYS_MS)
    assert points[0].attainment == 1.0
    assert points[3].attainment < points[2].attainment <= points[1].attainment
    assert points[0].accuracy is not None
    assert points[3].accuracy is not None
    assert points[3].accuracy < points[0].accuracy
    assert svg_of(draw_ablation(points)) == svg_of(draw_ablation(points))


def test_an_adaptive_policy_spans_what_fixed_subnets_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as accurate as the largest at a low rate, and holds one that the largest does not."""
    monkeypatch.setattr(figures, "RATES_QPS", (1_000, 5_000))

    points = list(throughput_range(CNN, duration_s=1.0, policies=("slackfit", "fixed:largest")))

    found = {(point.policy, point.at): point for point in points}
    assert found["slackfit", 1_000].accuracy == pytest.approx(80.16, abs=0.05)
    assert found["slackfit", 5_000].attainment > figures.ENOUGH
    assert found["fixed:largest", 5_000].attainment < figures.ENOUGH
    assert "<svg" in svg_of(draw_range(points))


@pytest.mark.parametrize("rate_qps", [3_500.0, 17_000.0])
def test_the_name_of_a_fixed_subnet_stays_within_the_frame(rate_qps: float) -> None:
    """Also where the subnet holds nearly the highest rate that the picture has, or is the most accurate."""
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    low, high = Point(1_000.0, "slackfit", 1.0, 73.9), Point(rate_qps, "fixed:cnn-80.16", 1.0, 80.16)

    draw_range([low, high])(axes)
    figure.draw_without_rendering()

    frame, name = axes.get_window_extent(), axes.texts[0].get_window_extent()
    assert frame.x0 < name.x0
    assert name.x1 < frame.x1
    assert frame.y0 < name.y0
    assert name.y1 < frame.y1
