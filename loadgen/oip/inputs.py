"""Real inputs of a run from a file, and the share of answers that are right by its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loadgen.oip.model import payloads_of
from loadgen.results.run import in_time
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from loadgen.results.run import Run

LABELS = "labels"


@dataclass(frozen=True, slots=True)
class LabelledInputs:
    """Inputs of a run.

    Attributes:
        payloads: uint8, shape (n, n_bytes).
        labels: The right class of each; None if answers are not checked.
    """

    payloads: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class CheckedAnswers:
    """How many answers in time were compared with their labels, and how many were right."""

    checked: int
    right: int

    @property
    def accuracy(self) -> float | None:
        """Percent; None if there were none."""
        return 100.0 * self.right / self.checked if self.checked else None

    def to_dict(self) -> dict[str, Any]:
        """Return it for the result file."""
        return {"checked": self.checked, "right": self.right, "accuracy": self.accuracy}


def read_inputs(path: Path, *, is_labelled: bool) -> LabelledInputs:
    """Return the inputs in an .npz file: the array `input`, or the only one beside `labels`.

    Raises:
        ConfigError: The file is missing or malformed, or has no such arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--inputs {path}: expected an .npz file of arrays: {error}") from error
    others = [name for name in arrays if name != LABELS]
    name = "input" if "input" in arrays else others[0] if len(others) == 1 else ""
    if not name or arrays[name].ndim == 0 or not arrays[name].size or arrays[name].dtype.kind not in "biuf":
        raise ConfigError(f"--inputs {path}: expected an array `input` of numbers, got {sorted(arrays)}")
    payloads = payloads_of(arrays[name])
    if not is_labelled:
        return LabelledInputs(payloads)
    labels = arrays.get(LABELS)
    if labels is None or labels.shape != (len(payloads),) or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"--inputs {path}: --labels: expected an array `labels` of {len(payloads)} integers"
        )
    return LabelledInputs(payloads, labels.astype(np.int64))


def checked_answers(run: Run, labels: npt.NDArray[np.int64], slo_ns: int, dtype: str) -> CheckedAnswers:
    """Compare the answers in time with their labels.

    Args:
        run: With outputs.
        labels: Of each payload.
        slo_ns: Of the run.
        dtype: Of the output's elements; the largest names the class, and of an integer the number itself.
    """
    outputs = run.columns.get("outputs")
    rows = np.flatnonzero(in_time(run.columns, slo_ns))
    if outputs is None or not len(rows):
        return CheckedAnswers(0, 0)
    values = np.ascontiguousarray(outputs[rows]).view(np.dtype(dtype)).reshape(len(rows), -1)
    classes = values[:, 0] if values.shape[1] == 1 and values.dtype.kind in "iu" else values.argmax(axis=1)
    right = int((classes == labels[run.columns["payload"][rows]]).sum())
    return CheckedAnswers(len(rows), right)
