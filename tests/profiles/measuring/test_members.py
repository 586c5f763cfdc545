"""A family measured: accuracies from its examples, latencies from a clock that is moved by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

from gpu_worker.family.engine import FamilyExecutor
from profiles.cli import cli
from profiles.measuring.measure import Device, Measurement, Setting
from profiles.measuring.members import measure_family
from profiles.table import load_profile
from superserve.clock import MS
from superserve.errors import ConfigError
from tests.clock import VirtualClock
from tests.gpu_worker.family.models import WIDTH, centred, exported, linear, queries, weights_of, written

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SEEDS = {"small": 1, "medium": 2, "large": 3}
TOOK_MS = {"small": 1, "medium": 2, "large": 4, "slow": 5}
N = 90
MEASURED = Setting((1, 2), 10)


def examples(folder: Path) -> dict[str, float]:
    """Write examples whose labels are the large model's answers; return what each gets right, percent."""
    inputs = queries(N)
    answers = {name: (inputs @ weights_of(seed)).argmax(1) for name, seed in SEEDS.items()}
    np.savez(folder / "examples.npz", inputs=inputs, labels=answers["large"])
    return {name: 100 * float((found == answers["large"]).mean()) for name, found in answers.items()}


def measured(path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """Measure a family on a clock that each run moves, by its member and its batch size."""
    clock, execute = VirtualClock(), FamilyExecutor.execute

    def run(self: FamilyExecutor, row: int, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        clock.advance(TOOK_MS[self.subnets[row].name] * len(batch) * MS)
        return execute(self, row, batch)

    monkeypatch.setattr(FamilyExecutor, "execute", run)
    return measure_family(path, MEASURED, Device(), name="here", clock=clock)


def test_accuracy_is_the_share_of_labels_that_a_member_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all examples, for each member by its own file; rows ascend in it, whatever the file's order."""
    expected = examples(tmp_path)
    for name, seed in SEEDS.items():
        linear(tmp_path / f"{name}.onnx", seed)
    members = [f"name: {name}, model: {name}.onnx" for name in ("large", "small", "medium")]
    found = measured(written(tmp_path, *members, head="examples: examples.npz"), monkeypatch)

    rows = sorted(SEEDS, key=lambda name: expected[name])
    fast = [name for name in rows if all(TOOK_MS[name] < TOOK_MS[o] for o in rows[rows.index(name) + 1 :])]
    profile = found.profile
    assert [row.name for row in profile.subnets] == fast
    assert [row.accuracy for row in profile.subnets] == pytest.approx([expected[name] for name in fast])
    assert [row.latency_ns for row in profile.subnets] == [
        (TOOK_MS[name] * MS, TOOK_MS[name] * 2 * MS) for name in fast
    ]
    assert (profile.supernet, profile.source) == ("tiny", "measured")
    assert {len((row.control or {})["digest"]) for row in profile.subnets} == {16}
    assert (
        f"Accuracy of large, small, medium is measured on {N} examples of examples.npz." in profile.provenance
    )
    assert "small by ONNX Runtime" in profile.provenance
    assert "Memory: 3 members, all resident" in profile.provenance
    assert "onnxruntime" in profile.versions


def test_given_accuracies_win_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure in the file is taken as it stands."""
    expected = examples(tmp_path)
    for name in ("small", "large"):
        linear(tmp_path / f"{name}.onnx", SEEDS[name])
    members = ("name: small, model: small.onnx, accuracy: 12.5", "name: large, model: large.onnx")
    profile = measured(written(tmp_path, *members, head="examples: examples.npz"), monkeypatch).profile

    assert [row.accuracy for row in profile.subnets] == [12.5, expected["large"]]
    assert "Other accuracies are those that family.yaml states." in profile.provenance


def test_a_member_that_is_slower_and_no_better_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less accurate and slower, or as accurate and slower: no policy would use it."""
    for name in TOOK_MS:
        linear(tmp_path / f"{name}.onnx", len(name))
    accuracies = {"small": 70, "medium": 60, "large": 80, "slow": 80}
    members = [f"name: {name}, model: {name}.onnx, accuracy: {accuracies[name]}" for name in TOOK_MS]
    for order in (
        members,
        members[::-1],
    ):  # of equals the file's first is not the one to keep, but the faster
        found = measured(written(tmp_path, *order), monkeypatch)
        monkeypatch.undo()

        assert [row.name for row in found.profile.subnets] == ["small", "large"]
        assert set(found.dropped) == {"medium", "slow"}


def test_an_answer_without_classes_needs_an_accuracy(tmp_path: Path) -> None:
    """Labels are compared with the largest of a row of numbers, and with nothing else."""
    exported(tmp_path / "a.pt2", nn.Unflatten(1, (1, WIDTH)))
    np.savez(tmp_path / "examples.npz", inputs=queries(4), labels=np.arange(4))
    path = written(tmp_path, "name: a, model: a.pt2", head="examples: examples.npz")

    with pytest.raises(
        ConfigError, match=r"examples.npz: labels: expected members .*\[1, 5\]: write `accuracy`"
    ):
        measure_family(path, MEASURED, Device(), name="here", clock=VirtualClock())


def test_examples_have_to_be_of_the_members(tmp_path: Path) -> None:
    """Another number of labels than inputs, or other inputs."""
    linear(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx", head="examples: examples.npz")
    for inputs, expected in (
        (queries(4), "labels: expected 4"),
        (queries(5)[:, :3], "inputs: expected shape"),
    ):
        np.savez(tmp_path / "examples.npz", inputs=inputs, labels=np.arange(5))
        with pytest.raises(ConfigError, match=f"examples.npz: {expected}"):
            measure_family(path, MEASURED, Device(), name="here", clock=VirtualClock())


def test_what_no_worker_would_serve_is_not_measured(tmp_path: Path) -> None:
    """The proof runs here already."""
    centred(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")

    with pytest.raises(ConfigError, match="its rows depend on each other"):
        measure_family(path, MEASURED, Device(), name="here", clock=VirtualClock())


def test_the_command_writes_a_profile_that_loads(tmp_path: Path) -> None:
    """One member, so that no latency decides what is kept."""
    linear(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 61.5")
    out = tmp_path / "out" / "here.json"
    options = ["--batch-sizes", "1,2", "--repeats", "5"]
    result = CliRunner().invoke(cli, ["measure", "--family", str(path), *options, "--out", str(out)])

    assert result.exit_code == 0, result.output
    profile = load_profile(out)
    assert (profile.name, profile.supernet, profile.batch_sizes) == ("here", "tiny", (1, 2))
    assert [(row.name, row.accuracy) for row in profile.subnets] == [("a", 61.5)]
    assert f"wrote {out}" in result.output


@pytest.mark.parametrize(
    "option", [("--supernet", "digits"), ("--subnets", "x"), ("--weights", "x"), ("--eager",)]
)
def test_options_of_supernets_are_refused_beside_a_family(option: tuple[str, ...], tmp_path: Path) -> None:
    """Each is named."""
    linear(tmp_path / "a.onnx")
    path = written(tmp_path, "name: a, model: a.onnx, accuracy: 1")
    result = CliRunner().invoke(
        cli, ["measure", "--family", str(path), *option, "--out", str(tmp_path / "x.json")]
    )

    assert result.exit_code == 1
    assert (
        result.output == f"Error: {option[0]}: expected none beside --family, whose file lists its models\n"
    )
