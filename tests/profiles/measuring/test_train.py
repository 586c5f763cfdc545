"""`profiles train`: from a user's module and data to weights that serve."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from gpu_worker.engines.torch_executor import TorchExecutor
from profiles.measuring.train import train_command
from superserve.subnet import Subnet
from tests.gpu_worker.training import mine

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

HERE = "tests.gpu_worker.training.mine"
USUAL = (
    "--supernet", f"{HERE}:build", "--example-input", "5:float32", "--data", f"{HERE}:interrupting",
    "--learning-rate", "0.01",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_interrupts() -> None:
    mine.Interrupting.at, mine.Interrupting.times = None, 1
    mine.Interrupting.signal = signal.SIGINT


def run(*words: Any) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(train_command, [str(word) for word in words])


def assert_same(found: Path, expected: Path) -> None:
    """Compare two files of weights bit for bit."""
    own, others = load_file(found), load_file(expected)
    assert own.keys() == others.keys()
    assert all(np.array_equal(own[name].numpy(), others[name].numpy()) for name in own)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights after two passes and three more steps."""
    out = tmp_path_factory.mktemp("whole") / "weights.safetensors"
    result = run(*USUAL, "--steps", 13, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_weights_are_trained_judged_and_served(tmp_path: Path) -> None:
    """The table names both ends; a worker loads the file; the checkpoint is gone."""
    out = tmp_path / "new" / "weights.safetensors"
    result = run(*USUAL, "--epochs", 4, "--test-data", f"{HERE}:loader", "--judged", 2, "--out", out)

    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert f"wrote {out} after 20 steps" in result.output
    assert ["subnet", "control", "tuple", "%", "right"] in rows
    ends = {row[0]: row[1:] for row in rows if row and row[0] in ("smallest", "largest")}
    assert ends["smallest"][:-1] == ["d", "[1]", "w", "[0.25]"]
    assert ends["largest"][:-1] == ["d", "[3]", "w", "[1]"]
    assert "step 20 of 20: loss" in result.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["steps"] == "20"
    whole = [Subnet("whole", {"d": [3], "w": [1.0]})]
    executor = TorchExecutor.load(f"{HERE}:build@5:float32", whole, weights=str(out))
    data = mine.Augmented()
    found = executor.execute(0, data.inputs.numpy())
    right = 100 * float((found.argmax(1) == data.labels.numpy()).mean())
    assert right > 40  # the file's own statistics are those of the largest: without them it guesses


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_the_training_and_resume_goes_on_exactly(
    number: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    """It ends after the step with 128 and the signal's number, says how to go on, and loses nothing."""
    out = tmp_path / "weights.safetensors"
    mine.Interrupting.at, mine.Interrupting.signal = 7, number
    before = signal.getsignal(number)
    stopped = run(*USUAL, "--steps", 13, "--out", out)

    assert stopped.exit_code == 128 + number, stopped.output
    assert (
        f"stopped after step 8 of 13, kept in {out}.training: the same command with --resume"
        in stopped.stderr
    )
    assert signal.getsignal(number) is before
    assert not out.exists()
    again = run(*USUAL, "--steps", 13, "--out", out)
    assert again.exit_code == 1
    assert f"{out}.training: a training that was interrupted is kept here: --resume goes on" in again.output
    gone_on = run(*USUAL, "--steps", 13, "--out", out, "--resume")
    assert gone_on.exit_code == 0, gone_on.output
    assert_same(out, uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    """The last checkpoint stays, and the training goes on from it."""
    out = tmp_path / "weights.safetensors"
    mine.Interrupting.at, mine.Interrupting.times = 7, 2
    stopped = run(*USUAL, "--steps", 13, "--checkpoint-every", 5, "--out", out)

    assert stopped.exit_code == 1
    assert "Aborted!" in stopped.output
    gone_on = run(*USUAL, "--steps", 13, "--checkpoint-every", 5, "--out", out, "--resume")
    assert gone_on.exit_code == 0
    assert "after 13 steps" in gone_on.output


def test_one_alone_is_trained_and_judged_alone(tmp_path: Path) -> None:
    """To compare with: another subnet would guess."""
    out = tmp_path / "weights.safetensors"
    result = run(*USUAL, "--steps", 5, "--alone", "smallest", "--out", out)

    assert result.exit_code == 0, result.output
    assert "judged on data that it learned from: give --test-data" in result.output
    assert "smallest" in result.output
    assert "largest" not in result.output
    left = load_file(out)["blocks.2.wide.weight"]
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["subnets"] == "smallest"
    assert left.shape == (12, 6)


def test_it_learns_without_targets(tmp_path: Path) -> None:
    """From inputs alone, by the direction of outputs."""
    out = tmp_path / "weights.safetensors"
    words = ["--data", f"{HERE}:unlabelled", "--loss", "cosine", "--epochs", 2, "--out", out]
    result = run(*USUAL, *words)

    assert result.exit_code == 0, result.output
    assert "mean cosine" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected one of --steps and --epochs"),
        (("--steps", 5, "--epochs", 2), "expected one of --steps and --epochs"),
        (("--steps", 5, "--data", "mine"), "--data: expected module:function, got 'mine'"),
        (("--steps", 5, "--data", f"{HERE}:absent"), "--data tests.gpu_worker.training.mine:absent: module"),
        (("--steps", 5, "--data", f"{HERE}:BATCH"), "expected a function, got int"),
        (("--steps", 5, "--data", f"{HERE}:build"), "that returns a DataLoader, got Supernet"),
        (("--steps", 5, "--test-data", "absent:one"), "--test-data absent:one: No module named 'absent'"),
        (("--steps", 5, "--device", "cuda:77"), "device: cuda:77: this machine has"),
        (("--steps", 5, "--learning-rate", "-1"), "learning_rate: expected a number above 0, got -1.0"),
        (("--steps", 5, "--resume"), "there is no checkpoint of a training to go on with"),
        (("--steps", 5, "--loss", "mse"), r"targets: expected floats of shape \(8, 3\)"),
        (
            ("--steps", 5, "--example-input", "2x3x5:float32"),
            r"as clients send them, float32 of shape \(B, 2, 3, 5\), got torch.float32 \(8, 5\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_line(words: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    """Without a traceback, and nothing is written."""
    result = run(*USUAL, *words, "--out", tmp_path / "weights.safetensors")

    assert result.exit_code == 1
    assert re.search(message, result.output), result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("--seed", -1),
        ("--threads", 0),
        ("--drawn", -1),
        ("--judged", -1),
        ("--checkpoint-every", 0),
        ("--steps", 0),
    ],
)
def test_numbers_out_of_range_are_refused(words: tuple[Any, ...], tmp_path: Path) -> None:
    """Before anything is loaded."""
    result = run(*USUAL, "--steps", 5, *words, "--out", tmp_path / "weights.safetensors")

    assert result.exit_code == 2
    assert f"Invalid value for '{words[0]}'" in result.output


def test_a_pass_without_a_length_needs_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs cannot be counted then."""
    monkeypatch.delattr(mine.Interrupting, "__len__")
    result = run(*USUAL, "--epochs", 2, "--out", tmp_path / "weights.safetensors")

    assert result.exit_code == 1
    assert "--epochs: the data do not tell their length: expected --steps" in result.output
