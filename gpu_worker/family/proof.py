"""A proof before serving: each member's answers where it serves equal a direct run of it, query by query.

The direct run is on the CPU, one query at a time, from the file as it is: ONNX Runtime without any
optimisation of the graph, torch as it was exported. What serves runs batches, padded with zeros, optimised,
on its device. Both have to agree at the smallest and the largest batch size. So a model whose rows depend on
each other (BatchNorm in training mode, a mean over the batch), or that draws random numbers (dropout), is
refused, and so is a device that computes something else.

What is not proved: that the members are accurate, and other queries than those tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

TOLERANCES = {"float64": 1e-3, "float32": 1e-3, "float16": 0.02}
"""Largest deviation, as a share of the largest number of the answers, by the output's dtype."""

ON_CUDA = 0.02
"""The same on CUDA, whose kernels multiply 32-bit floats with fewer bits by default."""

N_QUERIES = 4
"""Queries that are tried."""

MOST_ROWS = 16
"""Most rows of the largest batch that is tried."""


class FamilyProofError(ConfigError):
    """A member answers a batch otherwise than its queries one by one."""


class DirectRun(NamedTuple):
    """What a member answers directly.

    Attributes:
        queries: (N, *input).
        answers: (N, *output), each from a batch of its own.
    """

    queries: npt.NDArray[Any]
    answers: npt.NDArray[Any]


def prove_member(
    direct: DirectRun,
    run: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    batch_sizes: tuple[int, ...],
    *,
    is_cuda: bool,
) -> None:
    """Compare a settled member with its direct run.

    Args:
        direct: What it answers directly.
        run: Runs a batch (B, *input) as the worker does.
        batch_sizes: Sizes that batches are padded to; () pads none.
        is_cuda: Whether it runs on CUDA.

    Raises:
        FamilyProofError: A query is answered otherwise; the error says in which batch, and by how much.
    """
    n = len(direct.queries)
    largest = min(batch_sizes[-1] if batch_sizes else n, MOST_ROWS)
    for size in sorted({1, largest}):
        # Each query at another place than in the file, beside others than before.
        places = np.arange(size + 1)[1:] % n
        got = run(direct.queries[places])
        if got.shape != (size, *direct.answers.shape[1:]):
            raise FamilyProofError(
                f"expected {size} answers of shape {list(direct.answers.shape[1:])} to a batch of {size}, "
                f"got shape {list(got.shape)}"
            )
        _compare(got, direct.answers[places], size, is_cuda=is_cuda)


def _compare(got: npt.NDArray[Any], expected: npt.NDArray[Any], size: int, *, is_cuda: bool) -> None:
    if not np.issubdtype(expected.dtype, np.floating):
        error, most = float((got != expected).mean()), 0.0
    else:
        most = TOLERANCES.get(str(expected.dtype), 0.02)
        most = max(most, ON_CUDA) if is_cuda else most
        error = deviation(got, expected)
    if not error <= most:
        raise FamilyProofError(
            f"its answers in a batch of {size} are {error:.3g} off those to each query alone "
            f"(at most {most:g} is expected): its rows depend on each other or on chance; was it exported "
            "after .eval()? docs/families.md explains the proof; --unproven serves it all the same"
        )


def deviation(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest difference as a share of the largest number; infinite where only one is finite."""
    ours, theirs = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(theirs)
    if not np.array_equal(finite, np.isfinite(ours)):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(np.abs(theirs[finite]).max())
    return float(np.abs(ours[finite] - theirs[finite]).max()) / max(largest, 1e-12)
