"""The gate's cells: enough of them, each its own, each buildable, half of them held out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadgen.simulator.simulate import SimSettings
from loadgen.simulator.workloads import parse_cluster
from loadgen.study.compare import Cell
from loadgen.study.gate.cells import SAMPLE, chosen_cells, gate_cells, sample
from loadgen.study.gate.draft import CNN_8, QUERIES, GateCell, at_load, draft
from loadgen.study.gate.store import content_key
from superserve.errors import ConfigError
from tests.paths import SHARED

if TYPE_CHECKING:
    from pathlib import Path

CELLS = gate_cells()
SETTINGS = SimSettings()
AZURE = SHARED / "traces"


def played() -> list[GateCell]:
    """Return the cells that need no file."""
    return [cell for cell in CELLS if cell.skipped is None]


def test_there_are_enough_and_no_two_are_the_same() -> None:
    """At least 120 without any file; names differ, and so do what they play."""
    assert len(played()) >= 120
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert len({content_key(cell.cell, 1) for cell in played()}) == len(played())


def test_half_of_each_family_is_held_out() -> None:
    """Every second cell, the first of each family being for tuning."""
    for family in {cell.family for cell in CELLS}:
        held_out = [cell.is_held_out for cell in CELLS if cell.family == family]
        assert held_out == [i % 2 == 1 for i in range(len(held_out))], family


@pytest.mark.parametrize("of", played(), ids=lambda cell: cell.name)
def test_a_cell_can_be_built(of: GateCell) -> None:
    """Its queries, its GPUs and its faults are there, and it is as long as its family's rule says."""
    workload, cluster = of.cell.workload(None, seed=1), parse_cluster(of.cell.cluster)

    settings = of.cell.settings(SETTINGS)
    for fault in of.cell.troubles(len(cluster), settings):
        n_processes = -(-len(cluster) // settings.gpus_per_process)
        fault.check([8] * (n_processes - 1) + [len(cluster) - 8 * (n_processes - 1)], settings.n_clients)
    assert of.name.startswith(of.family)
    assert of.n_gpus == len(cluster)
    assert 1_000 <= workload.trace.n <= 40 * QUERIES
    longest_ns = int(np.max(workload.slo_ns))
    assert workload.trace.duration_ns >= 4 * min(longest_ns, 60_000_000)
    again = of.cell.workload(None, seed=1)
    assert (again.trace.due_ns == workload.trace.due_ns).all()


def test_recorded_cells_say_why_they_are_skipped(tmp_path: Path) -> None:
    """Without a folder, and for each file that a folder lacks; a folder that is none is an error."""
    reasons = {cell.skipped for cell in CELLS if cell.family == "recorded"}
    assert reasons == {"its file is not here: no --traces DIR was given"}
    (tmp_path / "AzureLLMInferenceTrace_code.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")

    found = {cell.name: cell.skipped for cell in gate_cells(tmp_path) if cell.family == "recorded"}

    assert found["recorded code at 50%"] is None
    assert found["recorded 2021 at 50%"] == (
        f"its file is not here: {tmp_path} has no AzureFunctionsInvocationTrace*2021*"
    )
    with pytest.raises(ConfigError, match="--traces: expected a folder"):
        gate_cells(tmp_path / "none")


@pytest.mark.skipif(not AZURE.is_dir(), reason="Azure's excerpts are not beside this tree")
def test_recorded_cells_can_be_built() -> None:
    """Each load is the mean rate, and the instants are those recorded: the CV² of the code trace stays."""
    recorded = [cell for cell in gate_cells(AZURE) if cell.family == "recorded"]
    assert len(recorded) == 24
    for of in recorded:
        assert of.skipped is None
        trace = of.cell.workload(None, seed=1).trace
        assert trace.mean_qps == pytest.approx(of.cell.rate_qps, rel=0.01), of.name
        if " code " in of.name:
            assert trace.cv2 is not None
            assert trace.cv2 > 100


def test_cells_are_chosen_by_name_and_family() -> None:
    """Both may be given; a family or a text that is nowhere is refused."""
    found = chosen_cells(CELLS, texts=("cv2 8", "cv2 2 "), families=("gamma",))

    assert [cell.name for cell in found] == [
        "gamma cv2 2 at 2000 q/s",
        "gamma cv2 8 at 2000 q/s",
        "gamma cv2 8 at 50%",
    ]
    with pytest.raises(ConfigError, match=r"--family: expected one of paper, .*, got 'nothing'"):
        chosen_cells(CELLS, families=("nothing",))
    with pytest.raises(ConfigError, match="--cell: no cell's name holds nothing"):
        chosen_cells(CELLS, texts=("nothing",))


def test_a_sample_has_every_family() -> None:
    """Twenty quick cells, at least one of each family that can be played."""
    found = sample(CELLS)

    assert len(found) == SAMPLE
    assert {cell.family for cell in found} == {cell.family for cell in played()}


def test_loads_are_shares_of_full_batches_on_the_smallest_subnet() -> None:
    """Eight GPUs do a batch of 16 in 7.35 ms each."""
    assert at_load(1.0, CNN_8) == pytest.approx(8 * 16 / 7.35e-3, rel=0.001)
    cell = draft("family", "name", "poisson:rate=4800").cell
    assert cell == Cell("family name", "poisson:rate=4800", CNN_8, duration_s=QUERIES / 4800)


def test_what_a_cell_plays_is_what_its_key_is_made_of() -> None:
    """Another seed, rate or GPU is another key; another name is not."""
    cell = played()[0].cell
    key = content_key(cell, 1)

    assert content_key(replace(cell, name="other"), 1) == key
    assert content_key(cell, 2) != key
    assert content_key(replace(cell, jitter_ms=1), 1) != key
    assert content_key(replace(cell, cluster="cnn-8gpu-modelled:7"), 1) != key
