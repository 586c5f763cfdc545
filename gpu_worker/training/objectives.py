"""What subnets learn: losses from targets and from a teacher, and how well they have learnt it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention

from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Objective:
    """What a model is trained to do.

    Attributes:
        name: What the command line calls it.
        from_targets: From outputs and a batch's targets to a loss, averaged over the batch.
        from_teacher: From outputs and a teacher's to a loss.
        score: From outputs and targets to one number for each query, (B,).
        agreement: The same from outputs and another network's.
        unit: What the mean of the scores is, in words.
        check: Raises ConfigError if targets are none of this objective's.
    """

    name: str
    from_targets: Loss
    from_teacher: Loss
    score: Loss
    agreement: Loss
    unit: str
    check: Callable[[Tensor, Tensor], None]


def _soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(logits, teacher.softmax(1))


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return 100.0 * (logits.argmax(1) == labels)


def _same_class(logits: Tensor, others: Tensor) -> Tensor:
    return 100.0 * (logits.argmax(1) == others.argmax(1))


def _distance(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def _similarity(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cosine_similarity(outputs.flatten(1), targets.flatten(1), dim=1)


def _cosine_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (1 - _similarity(outputs, targets)).mean()


def _check_labels(outputs: Tensor, labels: Tensor) -> None:
    if outputs.dim() != 2:
        raise ConfigError(f"cross-entropy: expected logits (B, classes), got {tuple(outputs.shape)}")
    if labels.dtype != torch.int64 or labels.shape != outputs.shape[:1]:
        raise ConfigError(
            f"cross-entropy: expected {len(outputs)} labels, int64, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= outputs.shape[1]:
        raise ConfigError(
            f"cross-entropy: expected labels from 0 to {outputs.shape[1] - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )


def _check_same_shape(outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape or not targets.is_floating_point():
        raise ConfigError(
            f"targets: expected floats of shape {tuple(outputs.shape)}, as the outputs have, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}"
        )


_ALL = (
    Objective(
        "cross-entropy", F.cross_entropy, _soft_cross_entropy, _right, _same_class, "% right", _check_labels
    ),
    Objective("mse", F.mse_loss, F.mse_loss, _distance, _distance, "mean squared error", _check_same_shape),
    Objective(
        "cosine", _cosine_loss, _cosine_loss, _similarity, _similarity, "mean cosine", _check_same_shape
    ),
)
OBJECTIVES = {objective.name: objective for objective in _ALL}
"""By name: classes, numbers such as a regression's, and embeddings, of which the direction counts."""
