"""Norms: SubnetNorm, which keeps statistics for each subnet, and those that need none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.operators.base import Operator
from gpu_worker.supernet.operators.fused_norm import finished, is_fused, norm_relu
from superserve.errors import ConfigError


class Statistics(NamedTuple):
    """Mean and variance of one BatchNorm's input under one subnet, each (C,), float32."""

    mean: torch.Tensor
    variance: torch.Tensor


@dataclass(slots=True)
class NormCalibration:
    """A SubnetNorm's setting while its statistics are gathered: means over all examples.

    Attributes:
        mean: (all channels,), float64; the first `channels` are in use.
        variance: The same.
        channels: Of the activations seen; 0 until the norm has run.
        n_examples: Examples folded in.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    channels: int = 0
    n_examples: int = 0

    def fold(self, mean: torch.Tensor, variance: torch.Tensor, n_examples: int) -> None:
        """Add a batch's mean and variance, each (C,), weighted by its number of examples."""
        self.channels = len(mean)
        self.n_examples += n_examples
        share = n_examples / self.n_examples
        for kept, seen in ((self.mean, mean), (self.variance, variance)):
            first = kept[: self.channels]
            first += share * (seen - first)


class SlicedLayerNorm(Operator, nn.LayerNorm):
    """A LayerNorm over as many features as it is given: whole, unless its width is elastic."""

    def forget(self) -> None:
        """Drop the views of scale and shift."""
        self.affine: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the trailing axes, the last of which may be a part: (..., C) to (..., C)."""
        features = x.shape[-1]
        if features == self.normalized_shape[-1]:
            return super().forward(x)
        shape = (*self.normalized_shape[:-1], features)
        return F.layer_norm(x, shape, *self._affine(features), self.eps)

    def _affine(self, features: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        # Without an affine part torch has None in place of both.
        weight, bias = cast("torch.Tensor | None", self.weight), cast("torch.Tensor | None", self.bias)
        if torch.is_grad_enabled():
            return _first(weight, features), _first(bias, features)
        if features not in self.affine:
            self.affine[features] = (
                None if weight is None else _first(weight.detach(), features),
                None if bias is None else _first(bias.detach(), features),
            )
        return self.affine[features]


def _first(tensor: torch.Tensor | None, n: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[..., :n]


class SubnetNorm(Operator):
    """A BatchNorm with a mean and a variance for each subnet, and one scale and shift for all.

    Its setting is the actuated subnet's statistics. A subnet that was not calibrated uses the
    first of the layer's own running statistics, as a supernet without SubnetNorm would. While
    the setting is a `NormCalibration` it normalises by the batch and folds the batch into it. In
    training it normalises by the batch and leaves all statistics alone: they are calibrated
    afterwards.
    """

    weight: nn.Parameter  # None without an affine part, though torch's own annotation is this
    bias: nn.Parameter
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    eps: float
    num_features: int
    training: bool

    def forget(self) -> None:
        """Drop the views of scale, shift and running statistics."""
        self.parts: dict[int, tuple[torch.Tensor | None, ...]] = {}

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, rectifies: bool = False
    ) -> torch.Tensor:
        """Normalise by the actuated subnet's statistics, or by the batch: (B, C, ...).

        Args:
            x: (B, C, ...).
            residual: Added to the normalised x, in models that use `normed`.
            rectifies: Whether a ReLU comes last, in models that use `normed`.
        """
        channels = x.shape[1]
        setting: Statistics | NormCalibration | None = self.cursor.settings[self.place]
        if isinstance(setting, NormCalibration):
            return finished(self._calibrate(x, setting), residual, rectifies=rectifies)
        if torch.is_grad_enabled():
            weight, bias, mean, variance = self._part(channels, is_recorded=True)
        else:
            part = self.parts.get(channels)
            if part is None:
                part = self.parts[channels] = self._part(channels)
            weight, bias, mean, variance = part
        if self.training:
            by_batch = F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
            return finished(by_batch, residual, rectifies=rectifies)
        if setting is not None:
            mean, variance = setting
        if mean is None or variance is None:  # track_running_stats=False: always by the batch
            by_batch = F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
            return finished(by_batch, residual, rectifies=rectifies)
        return norm_relu(x, mean, variance, weight, bias, self.eps, residual, rectifies=rectifies)

    def trim(self, channels: int) -> None:
        """Keep only the first `channels` scales, shifts and running statistics."""
        for name in ("weight", "bias"):
            parameter: nn.Parameter | None = getattr(self, name)
            if parameter is not None:
                kept = parameter.detach()[:channels].clone()
                setattr(self, name, nn.Parameter(kept, parameter.requires_grad))
        for name in ("running_mean", "running_var"):
            buffer: torch.Tensor | None = getattr(self, name)
            if buffer is not None:
                setattr(self, name, buffer[:channels].clone())
        self.num_features = channels
        self.forget()

    def _part(self, channels: int, *, is_recorded: bool = False) -> tuple[torch.Tensor | None, ...]:
        if channels > self.num_features:
            raise ConfigError(f"{self.path}: expected at most {self.num_features} channels, got {channels}")
        whole: tuple[torch.Tensor | None, ...]
        whole = (self.weight, self.bias, self.running_mean, self.running_var)
        return tuple(
            None if tensor is None else (tensor if is_recorded else tensor.detach())[:channels]
            for tensor in whole
        )

    def _calibrate(self, x: torch.Tensor, setting: NormCalibration) -> torch.Tensor:
        channels = x.shape[1]
        if setting.channels not in (0, channels):
            raise ConfigError(
                f"{self.path}: expected {setting.channels} channels, as in the pass before, got {channels}"
            )
        weight, bias, _, _ = self._part(channels)
        # Not torch's own training mode: it refuses one value a channel, as the last batch may have, and
        # keeps the unbiased variance, which grows without bound for small batches.
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        setting.fold(mean, variance, len(x))
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)


class SubnetNorm1d(SubnetNorm, nn.BatchNorm1d):
    """SubnetNorm of (B, C) or (B, C, L)."""


class SubnetNorm2d(SubnetNorm, nn.BatchNorm2d):
    """SubnetNorm of (B, C, H, W)."""


class SubnetNorm3d(SubnetNorm, nn.BatchNorm3d):
    """SubnetNorm of (B, C, D, H, W)."""


def normed(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None, *, rectifies: bool = False
) -> torch.Tensor:
    """Return relu(norm(x) + residual), without the parts that are not asked for; (B, C, ...).

    In inference on CUDA one kernel does all three for a model that calls this; anywhere else it is the same
    as three lines of plain torch.
    """
    if isinstance(norm, SubnetNorm):
        found: torch.Tensor = norm(x, residual, rectifies)
        return found
    if isinstance(norm, nn.BatchNorm2d) and not norm.training:
        parts = norm.running_mean, norm.running_var, norm.weight, norm.bias
        if parts[0] is not None and parts[1] is not None and is_fused(x, residual, parts):
            return norm_relu(
                x, parts[0], parts[1], norm.weight, norm.bias, norm.eps, residual, rectifies=rectifies
            )
    return finished(norm(x), residual, rectifies=rectifies)
