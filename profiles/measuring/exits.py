"""How well each exit of an encoder or reranker ranks, against full depth or against scores of your own.

The pairs are one NumPy file:

    first, second  (N, *input): for an encoder, the two texts of each pair
    inputs         (N, *input): for a reranker, whose output is one score
    scores         (N,), optional: what each pair or input should score; without it, what full depth says

An encoder's pair scores the cosine of its two vectors. The figure is 100 times Spearman's rank correlation:
100 means that an exit puts all pairs in the same order. It is no share of right answers; a policy only
compares it and adds it up. What is written is what `profiles measure --subnets` takes, and you may edit it.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from gpu_worker.engines.torch_executor import TorchExecutor
from gpu_worker.models.kinds import fitted, supernet_kind
from profiles.measuring.flops import meta_supernet
from superserve.errors import ConfigError, InvalidQueryError
from superserve.files import write_whole
from superserve.subnet import Subnet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from gpu_worker.engines.torch_executor import Placement
    from superserve.subnet import TensorSpec

    Floats = npt.NDArray[np.float64]

_BATCH = 32  # inputs at a time
_LEAST = 2  # pairs; a single one has no order
_FIRST, _SECOND, _INPUTS, _SCORES = "first", "second", "inputs", "scores"


class RankedExit(NamedTuple):
    """An exit and how well it ranks.

    Attributes:
        subnet: Its name and control tuple.
        percent: 100 times Spearman's correlation, and 0 where that is negative.
        is_kept: Whether every shallower exit ranks worse: a deeper one that does not is only slower.
    """

    subnet: Subnet
    percent: float
    is_kept: bool


def ranked_exits(supernet: str, weights: str | None, pairs: Path, placement: Placement) -> list[RankedExit]:
    """Run every exit on the pairs of a file; return them from the shallowest to full depth.

    Raises:
        ConfigError: The supernet chooses more than its depth, or an array of the file does not fit.
    """
    kind = fitted(supernet_kind(supernet), weights)
    entries = meta_supernet(kind).controls.space.entries
    if set(entries) != {"d"} or len(entries["d"]) != 1:
        raise ConfigError(
            f"supernet {kind.name}: expected one that chooses one depth, got the keys {', '.join(entries)}"
        )
    arrays = _read(pairs, kind.input_spec)
    subnets = [Subnet(f"depth-{depth}", {"d": [depth]}) for depth in entries["d"][0].choices]
    executor = TorchExecutor.load(supernet, subnets, weights=weights, placement=placement)
    try:
        found = [_scores(executor, row, arrays) for row in range(len(subnets))]
        expected = arrays.get(_SCORES, found[-1])
        percents = [max(0.0, round(100 * spearman(one, expected), 4)) for one in found]
    except ConfigError as error:
        raise ConfigError(f"{pairs}: {error}") from error
    best_before = np.maximum.accumulate([-1.0, *percents[:-1]])
    return [
        RankedExit(subnet, percent, percent > best)
        for subnet, percent, best in zip(subnets, percents, best_before.tolist(), strict=True)
    ]


def write_subnets(exits: Sequence[RankedExit], path: Path) -> None:
    """Write the exits worth keeping as a list for `profiles measure --subnets`."""
    rows = [
        {"name": one.subnet.name, "control": one.subnet.control, "accuracy": one.percent}
        for one in exits
        if one.is_kept
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def spearman(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Return Spearman's rank correlation of two lists; ties have their mean rank.

    Raises:
        ConfigError: One of them is constant, or holds what is no number: it has no order.
    """
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(scores: npt.ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        raise ConfigError("scores: expected finite numbers that are not all equal")
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray(ends - (counts - 1) / 2)[place]


def _scores(executor: TorchExecutor, row: int, arrays: Mapping[str, npt.NDArray[Any]]) -> Floats:
    if _INPUTS in arrays:
        outputs = _run(executor, row, arrays[_INPUTS])
        if outputs.shape[1] != 1:
            raise ConfigError(f"{_INPUTS}: expected a model with one score, got {outputs.shape[1]} outputs")
        return outputs[:, 0]
    one, other = (_run(executor, row, arrays[name]) for name in (_FIRST, _SECOND))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny))


def _run(executor: TorchExecutor, row: int, inputs: npt.NDArray[Any]) -> Floats:
    parts = [executor.execute(row, inputs[start : start + _BATCH]) for start in range(0, len(inputs), _BATCH)]
    return np.concatenate(parts).reshape(len(inputs), -1).astype(np.float64)


def _read(path: Path, spec: TensorSpec) -> dict[str, npt.NDArray[Any]]:
    """Return a file's arrays.

    Raises:
        ConfigError: Naming the file, and the array that is missing, unknown or of another dtype or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: expected a file that np.savez wrote: {error}") from error
    texts = {name: array for name, array in arrays.items() if name != _SCORES}
    if set(texts) not in ({_FIRST, _SECOND}, {_INPUTS}):
        raise ConfigError(
            f"{path}: expected the arrays {_FIRST} and {_SECOND}, or {_INPUTS}, and perhaps {_SCORES}, "
            f"got {', '.join(arrays) or 'none'}"
        )
    n = max((len(array) for array in arrays.values() if array.ndim), default=0)
    for name, array in arrays.items():
        if not array.ndim or len(array) != n or n < _LEAST:
            raise ConfigError(f"{path}: {name}: expected {max(n, _LEAST)} rows, got shape {array.shape}")
    for name, array in texts.items():
        try:
            spec.check(array[0], name)
        except InvalidQueryError as error:
            raise ConfigError(f"{path}: {error}") from error
    scores = arrays.get(_SCORES)
    if scores is not None and (scores.ndim != 1 or not np.issubdtype(scores.dtype, np.number)):
        raise ConfigError(f"{path}: {_SCORES}: expected numbers, got {scores.dtype} of shape {scores.shape}")
    return arrays
