"""WeightSlice: layers of which a subnet uses the first outputs and the first inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.operators.base import Operator, Parameters
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


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
