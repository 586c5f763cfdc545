"""SubNetAct's operators: one resident supernet, any subnet of it in place.

An operator is an ordinary torch layer whose class was changed: `WeightSliceConv2d` is an
`nn.Conv2d`, `SubnetNorm2d` an `nn.BatchNorm2d`, with the same parameters under the same names. So a
checkpoint loads before and after insertion, and code that looks for `nn.Conv2d` still finds it.

All operators of a supernet share one `Cursor`. Its `settings` are one tuple with an entry for
each operator: outputs that are kept, a switch, a pair of statistics. A subnet is such a tuple,
and actuation is one store of it.

Only outputs are chosen. Inputs follow the activation: a layer that is given 48 channels uses
the first 48 of its inputs, a norm the first 48 of its scales, a depthwise convolution the first
48 of its groups. So you need not declare which layer feeds which, and residual streams work. Only
a concatenation does not work: the first n of it are not the first of each part.

Source: SubNetAct, SuperServe (NSDI '25).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.fused_norm import finished, is_fused, norm_relu
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    Settings = tuple[Any, ...]


class Cursor:
    """What all operators of one supernet read.

    Attributes:
        settings: What the running forward pass uses, one entry an operator.
        chosen: What the next forward pass will use. Actuation is one store of it, and a pass takes it
            over once, at its start; so no pass is half of one subnet and half of another.
    """

    __slots__ = ("chosen", "settings")

    def __init__(self, chosen: Prepared) -> None:
        self.chosen = chosen
        self.settings = chosen.settings

    @property
    def row(self) -> int:
        """The subnet that the next forward pass runs."""
        return self.chosen.row


class Prepared(NamedTuple):
    """A subnet that is ready to run.

    Attributes:
        row: Of the hosted subnets.
        settings: One entry for each operator.
    """

    row: int
    settings: Settings


class Parameters(NamedTuple):
    """A layer's weight and bias, or a subnet's part of them."""

    weight: torch.Tensor
    bias: torch.Tensor | None


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


class Operator:
    """What every operator has beside its layer: a cursor, its place in the settings, its path."""

    channel_axis: ClassVar[int] = 1
    cursor: Cursor
    place: int
    path: str

    def attach(self, cursor: Cursor, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        self.cursor, self.place, self.path = cursor, place, path
        self.forget()

    def forget(self) -> None:
        """Drop everything that looks into parameters: they have moved, or changed."""

    # Moving a module to a device or a dtype replaces its parameters.
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[misc]  # an nn.Module's, beside which this is mixed in
        self.forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]  # as above
        self.forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # as above
        self.forget()  # the views in a deep copy are not views of the copy's parameters


class LayerSelect:
    """The boolean switches of one stage's blocks.

    Each block keeps its place in the model, and becomes a `Switched` block: where its switch
    is off, it gives back its first argument.
    """

    def __init__(self, blocks: tuple[Switched, ...]) -> None:
        self.blocks = blocks

    def choose(self, kept: tuple[int, ...], settings: list[Any]) -> None:
        """Write into `settings` that the blocks numbered `kept` run and no others do."""
        for number, block in enumerate(self.blocks):
            settings[block.switch_place] = number in kept


class Switched:
    """Mixed into a block's own class: runs the block if its switch is on."""

    switch_cursor: Cursor
    switch_place: int

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or return `x` as it is."""
        if self.switch_cursor.settings[self.switch_place]:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # the block's own
        return x


_switched_classes: dict[type[nn.Module], type[nn.Module]] = {}


def switched(block: nn.Module, cursor: Cursor, place: int) -> Switched:
    """Change `block` in place into one that its switch, entry `place`, turns on and off."""
    cls = type(block)
    if cls not in _switched_classes:
        _switched_classes[cls] = type(f"Switched{cls.__name__}", (Switched, cls), {})
    block.__class__ = _switched_classes[cls]
    changed = cast("Switched", block)
    changed.switch_cursor, changed.switch_place = cursor, place
    return changed


class WeightSlice(Operator):
    """A layer of which a subnet uses the first outputs and the first inputs.

    A slice is a view of the resident parameters, made once for each size and shared by all
    subnets that use it. While gradients are recorded, each pass makes new slices, as autograd
    requires. `pack` replaces a view by a contiguous copy.
    """

    weight: torch.Tensor  # (out, in, ...)
    bias: Any  # a parameter (out,) or None, which torch annotates differently in each layer

    def forget(self) -> None:
        """Drop all slices, packed ones too."""
        self.slices: dict[tuple[int, int], Parameters] = {}
        self.packed: dict[tuple[int, int], Parameters] = {}

    @property
    def n_outputs(self) -> int:
        """Outputs of the whole layer."""
        return len(self.weight)

    def slice_in_use(self, inputs: int) -> Parameters:
        """Return the actuated subnet's part of the parameters, for an activation of `inputs` channels."""
        key = (self.cursor.settings[self.place], inputs)
        if torch.is_grad_enabled():
            return self._slice(self.weight, self.bias, *key)
        found = self.slices.get(key)
        return self._first_use(key) if found is None else found

    def _first_use(self, key: tuple[int, int]) -> Parameters:
        found = self.slices[key] = self._slice(self.weight.detach(), self._bias(), *key)
        return found

    def _slice(
        self, weight: torch.Tensor, bias: torch.Tensor | None, outputs: int, inputs: int
    ) -> Parameters:
        if inputs > weight.shape[1]:
            raise ConfigError(f"{self.path}: expected at most {weight.shape[1]} inputs, got {inputs}")
        return Parameters(weight[:outputs, :inputs], None if bias is None else bias[:outputs])

    def pack(self, key: tuple[int, int]) -> None:
        """Replace the view `key` by a contiguous copy, in the weight's memory format."""
        view = self.slices[key]
        # A bias's slice is contiguous as it is.
        self.slices[key] = self.packed[key] = Parameters(self._copied(view.weight), view.bias)

    def trim(self, keys: Collection[tuple[int, int]]) -> None:
        """Keep only what the slices `keys` use of the parameters; nothing if there are none."""
        outputs, inputs = (max((key[axis] for key in keys), default=0) for axis in (0, 1))
        kept = self._slice(self.weight.detach(), self._bias(), outputs, inputs)
        self.weight = nn.Parameter(self._copied(kept.weight), self.weight.requires_grad)
        if kept.bias is not None:
            self.bias = nn.Parameter(kept.bias.clone(), self.bias.requires_grad)
        self.forget()

    def _bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.detach()

    def _copied(self, weight: torch.Tensor) -> torch.Tensor:
        is_last = self.weight.dim() == 4 and self.weight.is_contiguous(memory_format=torch.channels_last)
        return weight.clone(memory_format=torch.channels_last if is_last else torch.contiguous_format)

    def unpack(self) -> None:
        """Go back to views."""
        for key in self.packed:
            del self.slices[key]
        self.packed = {}


def is_packed_already(weight: torch.Tensor) -> bool:
    """Return whether a slice has the memory layout of a separate layer of that size."""
    return weight.is_contiguous() or (
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


class _WeightSliceConv(WeightSlice):
    """A convolution; one with groups keeps the groups that its input fills."""

    groups: int
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _reversed_padding_repeated_twice: list[int]
    convolve: ClassVar[Callable[..., torch.Tensor]]

    def _slice(
        self, weight: torch.Tensor, bias: torch.Tensor | None, outputs: int, inputs: int
    ) -> Parameters:
        if self.groups == 1:
            return super()._slice(weight, bias, outputs, inputs)
        groups = self._groups(inputs)
        outputs = groups * (len(weight) // self.groups)
        return Parameters(weight[:outputs], None if bias is None else bias[:outputs])

    def trim(self, keys: Collection[tuple[int, int]]) -> None:
        """Keep only what the slices `keys` use, whole groups where there are several."""
        n_groups = self._groups(max((inputs for _, inputs in keys), default=0))
        super().trim(keys)
        self.groups = max(1, n_groups)

    def _groups(self, inputs: int) -> int:
        if self.groups == 1:
            return 1
        a_group = self.weight.shape[1]
        if inputs % a_group or inputs > a_group * self.groups:
            raise ConfigError(
                f"{self.path}: expected a multiple of {a_group} inputs, those of one group, "
                f"up to {a_group * self.groups}, got {inputs}"
            )
        return inputs // a_group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve with the actuated slice: (B, in, ...) to (B, out, ...)."""
        inputs = x.shape[1]
        weight, bias = self.slice_in_use(inputs)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        groups = 1 if self.groups == 1 else self._groups(inputs)
        return self.convolve(x, weight, bias, self.stride, padding, self.dilation, groups)


class WeightSliceConv1d(_WeightSliceConv, nn.Conv1d):
    """A one-dimensional convolution sliced by output and input channels."""

    convolve = staticmethod(F.conv1d)


class WeightSliceConv2d(_WeightSliceConv, nn.Conv2d):
    """A two-dimensional convolution sliced by output and input channels."""

    convolve = staticmethod(F.conv2d)


class WeightSliceConv3d(_WeightSliceConv, nn.Conv3d):
    """A three-dimensional convolution sliced by output and input channels."""

    convolve = staticmethod(F.conv3d)


class WeightSliceLinear(WeightSlice, nn.Linear):
    """A linear layer sliced by outputs and inputs."""

    channel_axis = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the actuated slice: (..., in) to (..., out)."""
        weight, bias = self.slice_in_use(x.shape[-1])
        return F.linear(x, weight, bias)


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


def operators_in(model: nn.Module) -> Iterator[Operator]:
    """Yield every operator of a model, in the order of its modules."""
    for module in model.modules():
        if isinstance(module, Operator):
            yield module
