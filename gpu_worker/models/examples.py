"""Your own examples, in one NumPy file, for supernets that come without data.

    inputs       (N, *input): queries as clients send them
    labels       (N,): class numbers
    calibration  (M, *input), optional: inputs of the training set, for SubnetNorm's statistics; without
                 it `inputs` calibrate too, which flatters accuracy a little

Every second example is for choosing subnets, the others are for measuring the chosen ones.

    np.savez("examples.npz", inputs=inputs, labels=labels, calibration=calibration)
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from superserve.errors import ConfigError, InvalidQueryError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from superserve.subnet import TensorSpec


class Examples(NamedTuple):
    """Queries and their labels.

    Attributes:
        inputs: (N, *input), as clients send them.
        labels: Class numbers, (N,).
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]


class Data(NamedTuple):
    """What a supernet's subnets are calibrated, chosen and judged on.

    Attributes:
        calibration: Inputs (N, *input) of the training set, for SubnetNorm's statistics.
        selection: Held out of training; a search ranks subnets by it.
        held_out: Held out of both; the accuracy that a profile gives.
    """

    calibration: npt.NDArray[Any]
    selection: Examples
    held_out: Examples


def read_examples(path: Path, spec: TensorSpec) -> Data:
    """Read a file of examples whose inputs are `spec`'s.

    Raises:
        ConfigError: Naming the file, and the array that is missing, unknown or of another dtype or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: expected a file that np.savez wrote: {error}") from error
    try:
        return _data(arrays, spec)
    except (ConfigError, InvalidQueryError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _data(arrays: dict[str, npt.NDArray[Any]], spec: TensorSpec) -> Data:
    for name in ("inputs", "labels"):
        if name not in arrays:
            raise ConfigError(f"{name}: missing")
    unknown = sorted(set(arrays) - {"inputs", "labels", "calibration"})
    if unknown:
        raise ConfigError(f"{unknown[0]}: expected inputs, labels and perhaps calibration alone")
    inputs, labels = arrays["inputs"], arrays["labels"]
    calibration = arrays.get("calibration", inputs)
    for name, array in (("inputs", inputs), ("calibration", calibration)):
        if not array.ndim or len(array) < 2:
            raise ConfigError(f"{name}: expected at least 2 examples, got shape {array.shape}")
        spec.check(array[0], name)
    if labels.shape != (len(inputs),) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"labels: expected {len(inputs)} whole numbers, got {labels.dtype} of shape {labels.shape}"
        )
    labels = labels.astype(np.int64)
    return Data(calibration, Examples(inputs[::2], labels[::2]), Examples(inputs[1::2], labels[1::2]))
