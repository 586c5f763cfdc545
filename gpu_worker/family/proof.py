"""A proof before serving: a member answers a query alike, alone or in any batch, here or run directly.

**Whatever lies beside it.** A batch runs twice, the second time with every other query replaced. The queries
that stay have to be answered as before, to the last digits: they lie in the same rows of a batch of the same
size. So a model whose rows depend on each other (BatchNorm in training mode, a mean over the batch), or that
draws random numbers (dropout), is refused.

**As run directly.** The direct run is on the CPU, one query at a time, from the file as it is: ONNX Runtime
without any optimisation of the graph, torch as it was exported. What serves runs batches, padded with zeros,
optimised, on its device. Both have to agree at the smallest and the largest batch size. So a device, or an
optimisation, that computes something else is refused. More is allowed here: kernels for other sizes add in
another order, which a network may amplify. A published classifier of file types is 0.6 % off on noise.

What is not proved: that the members are accurate, and other queries than those tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

BESIDE_OTHERS = 1e-4
"""Largest change of an answer with the queries beside it, as a share of the largest number of the answers."""

FROM_DIRECT = 0.02
"""Largest deviation from the direct run, by the same measure: what half precision is allowed elsewhere."""

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
    direct: DirectRun, run: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], batch_sizes: tuple[int, ...]
) -> None:
    """Compare a settled member with itself beside other queries, and with its direct run.

    Args:
        direct: What it answers directly.
        run: Runs a batch (B, *input) as the worker does.
        batch_sizes: Sizes that batches are padded to; () pads none.

    Raises:
        FamilyProofError: A query is answered otherwise; the error says in which batch, and by how much.
    """
    n = len(direct.queries)
    largest = min(batch_sizes[-1] if batch_sizes else n, MOST_ROWS)
    for size in sorted({1, largest}):
        # Each query at another place than in the file, so that no answer is right by its place alone.
        places = np.arange(1, size + 1) % n
        got = _run(direct, run, places)
        others = places.copy()
        others[1::2] = (others[1::2] + 1) % n
        _check_alone(_run(direct, run, others)[::2], got[::2], size)
        _check_direct(got, direct.answers[places], size)


def _run(
    direct: DirectRun, run: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], places: npt.NDArray[np.intp]
) -> npt.NDArray[Any]:
    got, expected = run(direct.queries[places]), (len(places), *direct.answers.shape[1:])
    if got.shape != expected:
        raise FamilyProofError(
            f"expected answers {list(expected)} to a batch of {len(places)}, got {list(got.shape)}"
        )
    return got


def _check_alone(got: npt.NDArray[Any], expected: npt.NDArray[Any], size: int) -> None:
    error = deviation(got, expected)
    if not error <= BESIDE_OTHERS:
        raise FamilyProofError(
            f"its answers in a batch of {size} change by {error:.3g} with the queries beside them (at most "
            f"{BESIDE_OTHERS:g} is expected): its rows depend on each other or on chance; was it exported "
            f"after .eval()? {_MORE}"
        )


def _check_direct(got: npt.NDArray[Any], expected: npt.NDArray[Any], size: int) -> None:
    error = deviation(got, expected)
    if not error <= FROM_DIRECT:
        raise FamilyProofError(
            f"its answers in a batch of {size} are {error:.3g} off those of a direct run on the CPU, query "
            f"by query (at most {FROM_DIRECT:g} is expected): what runs it here computes "
            f"something else. {_MORE}"
        )


_MORE = "docs/families.md explains the proof; --unproven serves it all the same"


def deviation(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest difference as a share of the largest number; infinite where only one is finite."""
    if not np.issubdtype(expected.dtype, np.floating):  # class numbers: the share of others
        return float((got != expected).mean())
    ours, theirs = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(theirs)
    if not np.array_equal(finite, np.isfinite(ours)):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float(np.abs(theirs[finite]).max())
    return float(np.abs(ours[finite] - theirs[finite]).max()) / max(largest, 1e-12)
