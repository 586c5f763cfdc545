"""The answers to the demo's queries: labels scored, and outputs computed again locally."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_worker.models.names import DIGITS
from profiles.table import load_profile, statistics_path
from superserve.errors import ConfigError
from superserve.subnet import Subnet
from superserve.wire import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from loadgen.results.run import Run

TOLERANCE_POINTS = 1.5
"""How far measured accuracy may be from the profile's, if there are enough answers."""

SAMPLE = 50
"""Answers of each subnet that are computed again locally."""

SIGMAS = 3.0  # chance alone exceeds it once in 370 runs
ALL = "all of them"
"""The name of the score of all subnets together."""

_CLOSE = 1e-4  # relative and absolute; the batch size changes logits by some 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """How well one subnet's answers read the digits.

    Attributes:
        name: The subnet's.
        n: Answers scored.
        n_right: Answers whose largest logit is at the true label.
        profiled: The profile's accuracy, percent.
    """

    name: str
    n: int
    n_right: int
    profiled: float

    @property
    def measured(self) -> float | None:
        """Percent of the answers that are right; None without any."""
        return 100 * self.n_right / self.n if self.n else None

    @property
    def is_judged(self) -> bool:
        """Whether there are enough answers to apply the tolerance."""
        return self.n >= enough(self.profiled)

    @property
    def is_off(self) -> bool:
        """Whether it is outside the tolerance; with too few answers in all, outside their interval."""
        if not self.is_judged:
            low, high = self.interval()
            return self.name == ALL and not low <= self.profiled <= high
        return abs((self.measured or 0.0) - self.profiled) > TOLERANCE_POINTS

    def interval(self) -> tuple[float, float]:
        """Return the accuracies, in percent, that are plausible at 3 sigma given these answers.

        Source: the score interval for a binomial share, Wilson (1927).
        """
        if not self.n:
            return 0.0, 100.0
        z2, share = SIGMAS**2 / self.n, self.n_right / self.n
        middle = (share + z2 / 2) / (1 + z2)
        reach = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
        return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def enough(accuracy: float) -> int:
    """Return how many answers make 3 binomial sigmas fit into the tolerance.

    Payloads are drawn with replacement from the same images that the profile's accuracy was
    measured on, so the answers are independent draws: at this number, a subnet with the profiled
    accuracy is outside the tolerance once in 370 times, and more rarely with more answers.

    Args:
        accuracy: Percent.
    """
    share, tolerance = accuracy / 100, TOLERANCE_POINTS / 100
    n = SIGMAS**2 * share * (1 - share) / tolerance**2
    return max(1, math.ceil(n * (1 - 1e-12)))  # a rounding error must not add one


def score(
    rows: npt.NDArray[np.integer[Any]],
    predicted: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    subnets: Sequence[tuple[str, float]],
) -> list[Score]:
    """Score answers by subnet.

    Args:
        rows: The subnet that each answer names, shape (n,).
        predicted: The digit that each answer reads, shape (n,).
        labels: The digit that was shown, shape (n,).
        subnets: Name and accuracy (percent) of each row.
    """
    n = np.bincount(rows, minlength=len(subnets))
    n_right = np.bincount(rows[predicted == labels], minlength=len(subnets))
    return [
        Score(name, int(n[row]), int(n_right[row]), accuracy) for row, (name, accuracy) in enumerate(subnets)
    ]


def together(scores: Sequence[Score]) -> Score:
    """Return the score of all subnets' answers, and the accuracy that their profile predicts."""
    n = sum(one.n for one in scores)
    profiled = sum(one.n * one.profiled for one in scores) / n if n else 0.0
    return Score(ALL, n, sum(one.n_right for one in scores), profiled)


@dataclass(frozen=True, slots=True)
class DemoComparison:
    """Answers of one subnet, compared with a local forward pass on the same images.

    Attributes:
        name: The subnet's.
        n: Answers compared.
        n_same: Answers that the same subnet gives locally, within 1e-4.
        n_telling: Answers that no neighbouring subnet gives: only these show which subnet ran.
    """

    name: str
    n: int
    n_same: int
    n_telling: int

    @property
    def is_proof(self) -> bool:
        """Whether every answer is this subnet's and could not be a neighbour's."""
        return self.n == self.n_same == self.n_telling


def compare(
    name: str,
    answers: npt.NDArray[np.float32],
    own: npt.NDArray[np.float32],
    neighbours: Sequence[npt.NDArray[np.float32]],
) -> DemoComparison:
    """Compare the returned logits, (n, classes), with those of the subnet and its neighbours."""
    could_be_theirs = np.any([_is_close(own, neighbour) for neighbour in neighbours], axis=0)
    n_telling = len(answers) - int(could_be_theirs.sum())
    return DemoComparison(name, len(answers), int(_is_close(answers, own).sum()), n_telling)


def _is_close(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isclose(a, b, rtol=_CLOSE, atol=_CLOSE).all(axis=1), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class ServedAnswers:
    """The answers of a run that kept outputs, shape (n, ...): subnet rows, images, logits."""

    rows: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]  # index into the held-out set
    logits: npt.NDArray[np.float32]  # (n, classes)
    n_left_out: int = 0  # answers whose output is all zeros, which the logits of an image never are


def answers_of(run: Run) -> ServedAnswers:
    """Extract the answers from a run's columns.

    Raises:
        ConfigError: It has no outputs.
    """
    columns = run.columns
    if "outputs" not in columns:
        raise ConfigError("no query of the run was answered with an output")
    has_output = np.flatnonzero(columns["status"] <= Status.LATE)
    # All zeros: the logits of a real image never are, so this output was not kept.
    kept = has_output[columns["outputs"][has_output].any(axis=1)]
    logits = np.ascontiguousarray(columns["outputs"][kept]).view(np.float32)
    rows = columns["subnet"][kept].astype(np.int64)
    return ServedAnswers(rows, columns["payload"][kept], logits, len(has_output) - len(kept))


def joined(parts: Sequence[ServedAnswers]) -> ServedAnswers:
    """Return the answers of several runs of the same subnets as one."""
    return ServedAnswers(
        np.concatenate([one.rows for one in parts]),
        np.concatenate([one.images for one in parts]),
        np.concatenate([one.logits for one in parts]),
        sum(one.n_left_out for one in parts),
    )


def sample(rows: npt.NDArray[np.int64], row: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the indices of up to `SAMPLE` answers of one subnet, drawn without replacement."""
    found = np.flatnonzero(rows == row)
    return np.sort(rng.choice(found, min(SAMPLE, len(found)), replace=False))


def recompute(
    answers: ServedAnswers,
    pixels: npt.NDArray[np.float32],
    names: Sequence[str],
    forward: Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]],
) -> list[DemoComparison]:
    """Compute a sample of every subnet's answers again, on that subnet and on its neighbours."""
    rng = np.random.default_rng(0)
    comparisons = []
    for row, name in enumerate(names):
        chosen = sample(answers.rows, row, rng)
        if not len(chosen):
            continue
        shown = pixels[answers.images[chosen]]
        neighbours = [forward(near, shown) for near in (row - 1, row + 1) if 0 <= near < len(names)]
        comparisons.append(compare(name, answers.logits[chosen], forward(row, shown), neighbours))
    return comparisons


def local_forward(
    profile: str | Path, names: Sequence[str]
) -> Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """Return a forward pass of the same supernet in this process: from a row and images to logits."""
    from gpu_worker.engines.torch_executor import Placement, TorchExecutor  # noqa: PLC0415  it imports torch

    rows = {row.name: row for row in load_profile(profile).subnets}
    subnets = [Subnet(name, rows[name].control) for name in names]
    executor = TorchExecutor.load(
        DIGITS, subnets, statistics=statistics_path(profile), placement=Placement(threads=1)
    )
    return executor.execute
