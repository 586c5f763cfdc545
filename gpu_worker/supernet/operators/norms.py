"""Norms: SubnetNorm, which keeps statistics for each subnet, and those that need none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.operators.base import Operator, first_fits, taken
from gpu_worker.supernet.operators.fused_norm import finished, is_fused, norm_relu
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu_worker.supernet.operators.base import Spans

Vectors = tuple[torch.Tensor | None, ...]


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


class VectorOperator(Operator):
    """A layer whose parameters are vectors, one number a channel, of which it uses those that it is given."""

    whole: int
    """Channels of the whole layer."""

    def attach(self, cursor: Any, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        self.whole = self.n_channels()
        super().attach(cursor, place, path)

    @property
    def n_inputs(self) -> int:
        """Channels of the layer."""
        return self.whole

    def n_channels(self) -> int:
        """Return the channels of the whole layer."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop the views of the vectors."""
        self.parts: dict[int, Vectors] = {}

    def vectors(self, channels: int) -> Vectors:
        """Return the watched vectors of the channels in use, None where the layer has none."""
        if torch.is_grad_enabled():
            return self._part(channels, self.spans, is_recorded=True)
        self.look()
        if self.is_joined and self.spans is not None:
            return self._part(channels, self.spans)  # a copy, which would not see its vector change
        part = self.parts.get(channels)
        if part is None:
            part = self.parts[channels] = self._part(channels, None)
        return part

    def _part(self, channels: int, spans: Spans | None, *, is_recorded: bool = False) -> Vectors:
        first_fits(self.path, "channels", channels, self.whole)
        whole: Vectors = tuple(getattr(self, name, None) for name in self.watched)
        return tuple(
            None if tensor is None
            else taken(tensor if is_recorded else tensor.detach(), -1, spans or ((0, channels),))
            for tensor in whole
        )  # fmt: skip


class SlicedLayerNorm(VectorOperator, nn.LayerNorm):
    """A LayerNorm over as many features as it is given: whole, unless its width is elastic."""

    channel_axis = -1

    def n_channels(self) -> int:
        """Return the features of the last axis."""
        return int(self.normalized_shape[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the trailing axes, the last of which may be a part: (..., C) to (..., C)."""
        features = x.shape[-1]
        if features == self.whole:
            return super().forward(x)
        weight, bias = self.vectors(features)
        return F.layer_norm(x, (*self.normalized_shape[:-1], features), weight, bias, self.eps)


class SlicedRMSNorm(VectorOperator, nn.RMSNorm):
    """An RMSNorm over as many features as it is given."""

    channel_axis = -1
    watched = ("weight",)

    def n_channels(self) -> int:
        """Return the features of the last axis."""
        return int(self.normalized_shape[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the trailing axes, the last of which may be a part: (..., C) to (..., C)."""
        features = x.shape[-1]
        if features == self.whole:
            return super().forward(x)
        (weight,) = self.vectors(features)
        return F.rms_norm(x, (*self.normalized_shape[:-1], features), weight, self.eps)


class SlicedOwnNorm(VectorOperator):
    """A norm of a class of its own over the last axis: its forward runs with the first of its scales.

    `gpu_worker.supernet.recognition` has found by trial that it then is an RMSNorm or a LayerNorm of that
    width.
    """

    channel_axis = -1
    _parameters: dict[str, torch.Tensor | None]

    def attach(self, cursor: Any, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        self.watched = tuple(self._parameters)
        super().attach(cursor, place, path)

    def n_channels(self) -> int:
        """Return how many scales it has."""
        return max(len(vector) for vector in self._parameters.values() if vector is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last axis, which may be a part: (..., C) to (..., C)."""
        features = x.shape[-1]
        if features == self.whole:
            return cast("torch.Tensor", super().forward(x))  # type: ignore[misc]  # the layer's own
        values = dict(zip(self.watched, self.vectors(features), strict=True))
        with in_place_of(self, values):
            return cast("torch.Tensor", super().forward(x))  # type: ignore[misc]  # as above


class SlicedGroupNorm(VectorOperator, nn.GroupNorm):
    """A GroupNorm that keeps the groups that its channels fill."""

    def n_channels(self) -> int:
        """Return the channels of all groups."""
        return self.num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each group: (B, C, ...)."""
        channels = x.shape[1]
        if channels == self.whole:
            return super().forward(x)
        a_group = self.whole // self.num_groups
        if any(n % a_group or start % a_group for start, n in self.spans or ((0, channels),)):
            raise ConfigError(
                f"{self.path}: expected whole groups of {a_group} channels, got {channels}: "
                f"give the size multiple_of={a_group}"
            )
        weight, bias = self.vectors(channels)
        return F.group_norm(x, channels // a_group, weight, bias, self.eps)


class _SlicedInstanceNorm(VectorOperator):
    """An InstanceNorm of the channels that it is given, by each instance's own statistics."""

    num_features: int
    eps: float

    def n_channels(self) -> int:
        """Return the channels of the whole layer."""
        return self.num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each channel of each instance: (B, C, ...) or (C, ...)."""
        weight, bias = self.vectors(x.shape[self.channel_axis])
        is_single = x.dim() == -self.channel_axis
        normed = F.instance_norm(x[None] if is_single else x, None, None, weight, bias, eps=self.eps)
        return normed[0] if is_single else normed


class SlicedInstanceNorm1d(_SlicedInstanceNorm, nn.InstanceNorm1d):
    """An InstanceNorm of (B, C, L)."""

    channel_axis = -2


class SlicedInstanceNorm2d(_SlicedInstanceNorm, nn.InstanceNorm2d):
    """An InstanceNorm of (B, C, H, W)."""

    channel_axis = -3


class SlicedInstanceNorm3d(_SlicedInstanceNorm, nn.InstanceNorm3d):
    """An InstanceNorm of (B, C, D, H, W)."""

    channel_axis = -4


class SlicedPReLU(VectorOperator, nn.PReLU):
    """A PReLU with a slope for each channel, of which it uses those of its channels."""

    watched = ("weight",)

    def attach(self, cursor: Any, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        super().attach(cursor, place, path)
        self.follows_inputs = self.whole > 1

    def n_channels(self) -> int:
        """Return how many slopes there are."""
        return self.num_parameters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return max(0, x) + slope * min(0, x), (B, C, ...)."""
        if self.whole == 1:
            return super().forward(x)
        (weight,) = self.vectors(x.shape[1])
        return F.prelu(x, cast("torch.Tensor", weight))


class in_place_of:  # noqa: N801  a context manager that reads as a function
    """Puts other tensors in the place of a module's parameters and buffers, within the block."""

    def __init__(self, module: Any, values: dict[str, torch.Tensor | None]) -> None:
        self._module, self._values = module, values

    def __enter__(self) -> None:
        self._before: list[tuple[dict[str, Any], str, Any]] = []
        for name, value in self._values.items():
            for held in (self._module._parameters, self._module._buffers):
                if name in held:
                    self._before.append((held, name, held[name]))
                    held[name] = value

    def __exit__(self, *_: object) -> None:
        for held, name, value in self._before:
            held[name] = value


class SubnetNorm(VectorOperator):
    """A BatchNorm with a mean and a variance for each subnet, and one scale and shift for all.

    Its setting is the actuated subnet's statistics. A subnet that was not calibrated uses the
    first of the layer's own running statistics, as a supernet without SubnetNorm would. While
    the setting is a `NormCalibration` it normalises by the batch and folds the batch into it. In
    training it normalises by the batch and leaves all statistics alone: they are calibrated
    afterwards.
    """

    watched = ("weight", "bias", "running_mean", "running_var")
    weight: nn.Parameter  # None without an affine part, though torch's own annotation is this
    bias: nn.Parameter
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    eps: float
    num_features: int
    training: bool

    def n_channels(self) -> int:
        """Return the channels of the whole layer."""
        return self.num_features

    def vectors(self, channels: int) -> Vectors:
        """Return scale, shift, mean and variance of the channels in use, None where the layer has none."""
        if self.is_joined or torch.is_grad_enabled():
            return super().vectors(channels)
        # As `look`, written out: it is done for every norm of every pass.
        attributes = self.__dict__
        parameters, buffers, held = attributes["_parameters"], attributes["_buffers"], self.held
        if (
            parameters.get("weight") is not held[0]
            or parameters.get("bias") is not held[1]
            or buffers.get("running_mean") is not held[2]
            or buffers.get("running_var") is not held[3]
        ):
            self.renew()
        part = self.parts.get(channels)
        if part is None:
            part = self.parts[channels] = self._part(channels, None)
        return part

    def _now(self) -> Sequence[torch.Tensor | None]:
        parameters, buffers = self.__dict__["_parameters"], self.__dict__["_buffers"]
        return (
            parameters.get("weight"), parameters.get("bias"),
            buffers.get("running_mean"), buffers.get("running_var"),
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, rectifies: bool = False
    ) -> torch.Tensor:
        """Normalise by the actuated subnet's statistics, or by the batch: (B, C, ...).

        Args:
            x: (B, C, ...).
            residual: Added to the normalised x, in models that use `normed`.
            rectifies: Whether a ReLU comes last, in models that use `normed`.
        """
        setting: Statistics | NormCalibration | None = self.cursor.settings[self.place]
        if isinstance(setting, NormCalibration):
            return finished(self._calibrate(x, setting), residual, rectifies=rectifies)
        weight, bias, mean, variance = self.vectors(x.shape[1])
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
        if self.is_joined and channels:
            return  # the last of its parts may be in use
        for name in ("weight", "bias"):
            parameter: nn.Parameter | None = getattr(self, name)
            if parameter is not None:
                kept = parameter.detach()[:channels].clone()
                setattr(self, name, nn.Parameter(kept, parameter.requires_grad))
        for name in ("running_mean", "running_var"):
            buffer: torch.Tensor | None = getattr(self, name)
            if buffer is not None:
                setattr(self, name, buffer[:channels].clone())
        self.num_features = self.whole = channels
        self.renew()

    def _calibrate(self, x: torch.Tensor, setting: NormCalibration) -> torch.Tensor:
        channels = x.shape[1]
        weight, bias, _, _ = self._part(channels, self.spans)
        mean, variance = self._folded(x, setting)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)

    def _folded(self, x: torch.Tensor, setting: NormCalibration) -> Statistics:
        """Fold a batch into the setting; return its own mean and variance, by which it is normalised."""
        channels = x.shape[1]
        if setting.channels not in (0, channels):
            raise ConfigError(
                f"{self.path}: expected {setting.channels} channels, as in the pass before, got {channels}"
            )
        # Not torch's own training mode: it refuses one value a channel, as the last batch may have, and
        # keeps the unbiased variance, which grows without bound for small batches.
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        setting.fold(mean, variance, len(x))
        return Statistics(mean, variance)


class SubnetNormOwn(SubnetNorm):
    """A BatchNorm of a class of its own, such as one with an activation: its forward runs on the statistics.

    That forward finds the actuated subnet's scale, shift, mean and variance in the place of the layer's.
    """

    momentum: float | None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward by the actuated subnet's statistics, or by the batch."""
        setting: Statistics | NormCalibration | None = self.cursor.settings[self.place]
        channels = x.shape[1]
        values = dict(zip(self.watched, self.vectors(channels), strict=True))
        if isinstance(setting, NormCalibration):
            mean, variance = self._folded(x, setting)
            values |= {"running_mean": mean, "running_var": variance}
            return self._own(x, values, args, kwargs, is_calibrating=True)
        if self.training:
            # Copies that it may write into: calibration follows.
            values |= {name: _copy(values[name]) for name in ("running_mean", "running_var")}
        elif setting is not None:
            values |= {"running_mean": setting.mean, "running_var": setting.variance}
        return self._own(x, values, args, kwargs)

    def _own(
        self,
        x: torch.Tensor,
        values: dict[str, torch.Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_calibrating: bool = False,
    ) -> Any:
        attributes = self.__dict__
        before = {name: attributes[name] for name in ("num_features", "training")}
        attributes["num_features"] = x.shape[1]
        if is_calibrating:
            attributes["training"] = False  # it normalises by the statistics that it is given
        try:
            with in_place_of(self, values):
                return super(SubnetNorm, self).forward(x, *args, **kwargs)  # type: ignore[misc]  # its own
        finally:
            attributes.update(before)


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


class SubnetNorm1d(SubnetNorm, nn.BatchNorm1d):
    """SubnetNorm of (B, C) or (B, C, L)."""


class SubnetNorm2d(SubnetNorm, nn.BatchNorm2d):
    """SubnetNorm of (B, C, H, W)."""


class SubnetNorm3d(SubnetNorm, nn.BatchNorm3d):
    """SubnetNorm of (B, C, D, H, W)."""


class SubnetNormSync(SubnetNorm, nn.SyncBatchNorm):
    """SubnetNorm of (B, C, ...), in place of a norm that was trained on several devices together."""


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
