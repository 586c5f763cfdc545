"""A user's own examples: what is read, how they are split, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gpu_worker.models.examples import read_examples
from superserve.errors import ConfigError
from superserve.subnet import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

SPEC = TensorSpec("float32", (2,))
INPUTS = np.arange(12, dtype=np.float32).reshape(6, 2)
LABELS = np.arange(6, dtype=np.int32)


def test_examples_are_dealt_out_in_turns(tmp_path: Path) -> None:
    """Half choose and half judge; none does both; calibration is its own."""
    path = tmp_path / "examples.npz"
    np.savez(path, inputs=INPUTS, labels=LABELS, calibration=INPUTS[:2] + 100)
    data = read_examples(path, SPEC)

    assert data.selection.labels.tolist() == [0, 2, 4]
    assert data.held_out.labels.tolist() == [1, 3, 5]
    assert np.array_equal(data.held_out.inputs, INPUTS[1::2])
    assert np.array_equal(data.calibration, INPUTS[:2] + 100)


def test_without_calibration_the_inputs_calibrate(tmp_path: Path) -> None:
    """All of them."""
    path = tmp_path / "examples.npz"
    np.savez(path, inputs=INPUTS, labels=LABELS)

    assert np.array_equal(read_examples(path, SPEC).calibration, INPUTS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "inputs: missing"),
        ({"inputs": INPUTS}, "labels: missing"),
        ({"inputs": INPUTS, "labels": LABELS, "extra": LABELS}, "extra: expected inputs, labels and perhaps"),
        ({"inputs": INPUTS[:1], "labels": LABELS[:1]}, "inputs: expected at least 2 examples"),
        (
            {"inputs": INPUTS.astype(np.float64), "labels": LABELS},
            "inputs: expected dtype float32, got float64",
        ),
        ({"inputs": INPUTS[:, :1], "labels": LABELS}, r"inputs: expected shape \(2,\), got \(1,\)"),
        (
            {"inputs": INPUTS, "labels": LABELS[:5]},
            r"labels: expected 6 whole numbers, got int32 of shape \(5,\)",
        ),
        ({"inputs": INPUTS, "labels": LABELS / 2}, "labels: expected 6 whole numbers, got float64"),
        ({"inputs": INPUTS, "labels": LABELS, "calibration": LABELS}, "calibration: expected dtype float32"),
    ],
)
def test_what_is_wrong_is_named(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The error names the file and the array."""
    path = tmp_path / "examples.npz"
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match=message) as raised:
        read_examples(path, SPEC)

    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"junk", b"", None])
def test_what_is_no_such_file_is_said(content: bytes | None, tmp_path: Path) -> None:
    """Mere bytes, nothing, and no file at all."""
    path = tmp_path / "examples.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"expected a file that np.savez wrote"):
        read_examples(path, SPEC)


def test_pickled_objects_are_not_read(tmp_path: Path) -> None:
    """A file cannot run code."""
    path = tmp_path / "examples.npz"
    np.savez(path, inputs=np.array([{}, {}], dtype=object), labels=LABELS[:2])
    with pytest.raises(ConfigError, match=r"expected a file that np.savez wrote"):
        read_examples(path, SPEC)
