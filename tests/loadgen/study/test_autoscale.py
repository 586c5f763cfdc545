"""Fleets that follow their load against fixed ones, simulated: figures that can be worked out by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from loadgen.cli import cli
from loadgen.simulator.workloads import parse_cluster
from loadgen.study.autoscale import ScaledFleet, fixed, fleets, lines, run
from loadgen.traces.trace import Trace
from router.report.scaler import NEEDS, ScalerSettings
from superserve.clock import MS, SECOND
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

PROFILE = parse_cluster("cnn-8gpu-modelled*20:1")[0]
SLO_NS = 720 * MS


def _trace(*steps: tuple[float, float]) -> Trace:
    """Return a trace of equal gaps: for so many seconds, so many queries a second."""
    due: list[float] = []
    begin_s = 0.0
    for seconds, rate_qps in steps:
        due += [begin_s + i / rate_qps for i in range(int(seconds * rate_qps))]
        begin_s += seconds
    return Trace(
        "steps", np.array(np.array(due) * SECOND, np.int64), int(begin_s * SECOND), "drawn by a test"
    )


def test_a_fixed_fleet_costs_its_size() -> None:
    """GPU-hours are workers times hours; nothing changes."""
    found = run(_trace((36.0, 5.0)), PROFILE, fixed(3), policy="planfit", slo_ns=SLO_NS)

    assert found.gpu_hours == pytest.approx(0.03)
    assert (found.most, found.n_changes, found.sizes) == (3, 0, ((0.0, 3),))
    assert found.attainment == 1.0


def test_a_fleet_follows_its_load_up_and_down() -> None:
    """It serves what one worker could not, and costs less than the most workers all the time."""
    trace = _trace((20.0, 2.0), (60.0, 150.0), (60.0, 2.0))
    own = ScalerSettings(floor=1, ceiling=4, up_cool_s=5.0, down_cool_s=5.0, down_after_s=20.0)
    scaled = ScaledFleet("as-served", own, start_s=5.0, every_s=1.0)

    small, large, found = (
        run(trace, PROFILE, one, policy="planfit", slo_ns=SLO_NS) for one in (fixed(1), fixed(4), scaled)
    )

    assert small.attainment < found.attainment
    assert found.attainment > 0.9
    assert found.gpu_hours < large.gpu_hours
    assert found.most == 4
    assert found.sizes[-1][1] == 1
    assert found.sizes[1][0] >= 20.0, "nothing is started before it is needed"


def test_equal_seeds_give_equal_figures() -> None:
    """As in every simulation."""
    trace = _trace((30.0, 60.0))
    scaled = ScaledFleet("as-served", ScalerSettings(ceiling=3), start_s=1.0)

    assert len({run(trace, PROFILE, scaled, policy="planfit", slo_ns=SLO_NS, seed=3) for _ in range(2)}) == 1


def test_a_study_has_fixed_fleets_and_one_for_each_need() -> None:
    """In the order asked for."""
    found = fleets([2, 4], ScalerSettings(ceiling=8), start_s=30.0)

    assert [one.name for one in found] == ["fixed:2", "fixed:4", *NEEDS]
    with pytest.raises(ConfigError, match="--fixed: expected numbers of workers from 1 on, got 0"):
        fleets([0], ScalerSettings(), start_s=1.0)


def test_the_command_prints_what_it_writes(tmp_path: Path) -> None:
    """A table, the figures as JSON, and a picture."""
    done = CliRunner().invoke(
        cli,
        [
            "autoscale", "--trace", "poisson:rate=40", "--duration", "20", "--emulate",
            "cnn-8gpu-modelled*20", "--slo-ms", "720", "--fixed", "1,2", "--ceiling", "2", "--start-s", "1",
            "--processes", "1", "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.svg"),
        ],
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    fleets_found = json.loads((tmp_path / "a.json").read_text())["fleets"]
    assert [one["fleet"]["name"] for one in fleets_found] == ["fixed:1", "fixed:2", *NEEDS]
    assert f"{fleets_found[1]['attainment']:.5f}" in done.output
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    wrong = CliRunner().invoke(cli, ["autoscale", "--trace", "poisson:rate=40", "--fixed", "1,,2"])
    assert "--fixed: expected numbers of workers with commas between, got '1,,2'" in wrong.output


def test_the_table_has_a_line_for_each_fleet() -> None:
    """With its figures."""
    found = run(_trace((3.0, 5.0)), PROFILE, fixed(2), policy="planfit", slo_ns=SLO_NS)

    head, line = lines([found])
    assert head.split() == ["fleet", "attainment", "accuracy", "GPU-hours", "most", "changes"]
    assert line.split()[:2] == ["fixed:2", "1.00000"]
