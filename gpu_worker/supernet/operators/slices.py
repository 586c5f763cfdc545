"""WeightSlice: layers of which a subnet uses the first outputs and the first inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

from gpu_worker.supernet.operators.base import ElasticOperator, Parameters, first_fits, taken, version_of
from superserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gpu_worker.supernet.operators.base import Cursor, Spans

Key = tuple[Any, ...]
"""Outputs and inputs that a slice has; the spans of its inputs too, where they are not the first."""


class WeightSlice(ElasticOperator):
    """A layer of which a subnet uses the first outputs and the first inputs.

    A slice is a view of the resident parameters, made once for each size and shared by all
    subnets that use it. While gradients are recorded, each pass makes new slices, as autograd
    requires. `pack` replaces a view by a contiguous copy. A slice of several parts, of outputs or of
    inputs, is a copy from the start. No copy is used after its parameters were written.
    """

    weight: torch.Tensor  # (out, in, ...), or as the axes say
    bias: Any  # a parameter (out,) or None, which torch annotates differently in each layer
    out_axis: ClassVar[int] = 0
    in_axis: ClassVar[int] = 1

    def forget(self) -> None:
        """Drop all slices, copies too."""
        self.slices: dict[Key, Parameters] = {}
        self.packed: dict[Key, Parameters] = {}
        self.gathered: dict[Key, Parameters] = {}
        self.copied: int | None = None  # the parameters' version, if there are copies

    @property
    def copied_bytes(self) -> int:
        """Bytes of packed slices and of those of several parts."""
        copies = (*self.packed.values(), *self.gathered.values())
        return sum(copy.weight.numel() * copy.weight.element_size() for copy in copies)

    @property
    def n_outputs(self) -> int:
        """Outputs of the whole layer, or of its smallest part."""
        return min(self.parts) if self.parts else self.weight.shape[self.out_axis]

    @property
    def n_inputs(self) -> int:
        """Inputs of the layer."""
        return self.weight.shape[self.in_axis]

    def slice_in_use(self, inputs: int) -> Parameters:
        """Return the actuated subnet's part of the parameters, for an activation of `inputs` channels."""
        cursor = self.cursor
        key: Key = (cursor.settings[self.place], inputs)
        if self.is_joined:
            key = (*key, cursor.layouts.get(self.place))
        if torch.is_grad_enabled():
            return self._slice(self.weight, self.bias, *key)
        parameters, held = self.__dict__["_parameters"], self.held
        if parameters.get("weight") is not held[0] or parameters.get("bias") is not held[1]:
            self.renew()
        elif self.copied is not None and self.copied != version_of(self.weight, self.bias):
            self.forget()
        found = self.slices.get(key)
        return self._first_use(key) if found is None else found

    def _first_use(self, key: Key) -> Parameters:
        found = self.slices[key] = self._slice(self.weight.detach(), self._bias(), *key)
        if found.weight.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
            self.gathered[key] = found
            self.copied = version_of(self.weight, self.bias)
        return found

    def _slice(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: int,
        inputs: int,
        spans: Spans | None = None,
    ) -> Parameters:
        first_fits(self.path, "inputs", inputs, self.n_inputs)
        kept = self.kept(outputs)
        part = taken(taken(weight, self.in_axis, spans or ((0, inputs),)), self.out_axis, kept)
        return Parameters(part, None if bias is None else taken(bias, 0, kept))

    def pack(self, key: Key) -> None:
        """Replace the view `key` by a contiguous copy, in the weight's memory format."""
        view = self.slices[key]
        # A bias's slice is contiguous as it is.
        self.slices[key] = self.packed[key] = Parameters(self._copied(view.weight), view.bias)
        self.copied = version_of(self.weight, self.bias)

    def trim(self, keys: Collection[Key]) -> None:
        """Keep only what the slices `keys` use of the parameters; nothing if there are none."""
        outputs, inputs = (max((key[axis] for key in keys), default=0) for axis in (0, 1))
        if self.is_joined and keys:
            inputs = self.n_inputs  # the last of its parts may be in use
        kept = self._slice(self.weight.detach(), self._bias(), outputs, inputs)
        self.weight = nn.Parameter(self._copied(kept.weight), self.weight.requires_grad)
        if kept.bias is not None:
            self.bias = nn.Parameter(kept.bias.clone(), self.bias.requires_grad)
        if self.parts and outputs < min(self.parts):
            self.parts = tuple(n for _, n in self.kept(outputs))
        self.renew()

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


class Grouped(WeightSlice):
    """A convolution; one with groups keeps the groups that its input fills.

    Attributes:
        whole_group: Inputs and outputs of one group.
    """

    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    whole_group: tuple[int, int]

    def attach(self, cursor: Cursor, place: int, path: str) -> None:
        """Become entry `place` of `cursor.settings`; `path` is the layer's name in its model."""
        super().attach(cursor, place, path)
        self.whole_group = self._inputs_a_group, self._outputs_a_group

    @property
    def n_inputs(self) -> int:
        """Inputs of the layer."""
        return self._inputs_a_group * self.groups

    @property
    def _inputs_a_group(self) -> int:
        return self.weight.shape[1]

    def _slice(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: int,
        inputs: int,
        spans: Spans | None = None,
    ) -> Parameters:
        if self.groups == 1:
            return super()._slice(weight, bias, outputs, inputs, spans)
        self._groups(inputs)
        return self._of_groups(weight, bias, spans or ((0, inputs),))

    def _of_groups(self, weight: torch.Tensor, bias: torch.Tensor | None, inputs: Spans) -> Parameters:
        kept = self.outputs_of_groups(inputs)
        return Parameters(taken(weight, 0, kept), None if bias is None else taken(bias, 0, kept))

    def outputs_of_groups(self, inputs: Spans) -> Spans:
        """Return the spans of outputs that the groups of these spans of inputs have."""
        a_group, outputs = self._inputs_a_group, self._outputs_a_group
        if any(start % a_group or n % a_group for start, n in inputs):
            raise ConfigError(
                f"{self.path}: expected parts of whole groups of {a_group} inputs, got {inputs}"
            )
        return tuple((start // a_group * outputs, n // a_group * outputs) for start, n in inputs)

    @property
    def _outputs_a_group(self) -> int:
        return len(self.weight) // self.groups

    def trim(self, keys: Collection[Key]) -> None:
        """Keep only what the slices `keys` use, whole groups where there are several."""
        if self.groups > 1 and self.is_joined and keys:
            return
        n_groups = self._groups(max((key[1] for key in keys), default=0))
        super().trim(keys)
        self.groups = max(1, n_groups)

    def _groups(self, inputs: int) -> int:
        if self.groups == 1:
            return 1
        a_group = self._inputs_a_group
        if inputs % a_group or inputs > a_group * self.groups:
            raise ConfigError(
                f"{self.path}: expected a multiple of {a_group} inputs, those of one group, "
                f"up to {a_group * self.groups}, got {inputs}"
            )
        return inputs // a_group


class _WeightSliceConv(Grouped):
    """A convolution; one with groups keeps the groups that its input fills."""

    padding: str | tuple[int, ...]
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _reversed_padding_repeated_twice: list[int]
    convolve: ClassVar[Callable[..., torch.Tensor]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve with the actuated slice: (B, in, ...) to (B, out, ...)."""
        inputs = x.shape[self.channel_axis]
        weight, bias = self.slice_in_use(inputs)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        groups = 1 if self.groups == 1 else self._groups(inputs)
        return self.convolve(x, weight, bias, self.stride, padding, self.dilation, groups)


class WeightSliceConv1d(_WeightSliceConv, nn.Conv1d):
    """A one-dimensional convolution sliced by output and input channels."""

    channel_axis = -2
    convolve = staticmethod(F.conv1d)


class WeightSliceConv2d(_WeightSliceConv, nn.Conv2d):
    """A two-dimensional convolution sliced by output and input channels."""

    channel_axis = -3
    convolve = staticmethod(F.conv2d)


class WeightSliceConv3d(_WeightSliceConv, nn.Conv3d):
    """A three-dimensional convolution sliced by output and input channels."""

    channel_axis = -4
    convolve = staticmethod(F.conv3d)


class _WeightSliceConvTranspose(Grouped):
    """A transposed convolution, whose weight is (in, out / groups, ...)."""

    out_axis = 1
    in_axis = 0
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    padding: str | tuple[int, ...]
    convolve: ClassVar[Callable[..., torch.Tensor]]

    @property
    def _inputs_a_group(self) -> int:
        return len(self.weight) // self.groups

    @property
    def _outputs_a_group(self) -> int:
        return self.weight.shape[1]

    def _of_groups(self, weight: torch.Tensor, bias: torch.Tensor | None, inputs: Spans) -> Parameters:
        kept = self.outputs_of_groups(inputs)
        return Parameters(taken(weight, 0, inputs), None if bias is None else taken(bias, 0, kept))

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Convolve with the actuated slice: (B, in, ...) to (B, out, ...)."""
        inputs = x.shape[self.channel_axis]
        weight, bias = self.slice_in_use(inputs)
        n_axes = len(self.stride)
        padding = self._output_padding(  # type: ignore[attr-defined]  # torch's own, of the layer beside
            x, output_size, self.stride, self.padding, self.kernel_size, n_axes, self.dilation
        )
        groups = 1 if self.groups == 1 else self._groups(inputs)
        return self.convolve(x, weight, bias, self.stride, self.padding, padding, groups, self.dilation)


class WeightSliceConvTranspose1d(_WeightSliceConvTranspose, nn.ConvTranspose1d):
    """A one-dimensional transposed convolution sliced by output and input channels."""

    channel_axis = -2
    convolve = staticmethod(F.conv_transpose1d)


class WeightSliceConvTranspose2d(_WeightSliceConvTranspose, nn.ConvTranspose2d):
    """A two-dimensional transposed convolution sliced by output and input channels."""

    channel_axis = -3
    convolve = staticmethod(F.conv_transpose2d)


class WeightSliceConvTranspose3d(_WeightSliceConvTranspose, nn.ConvTranspose3d):
    """A three-dimensional transposed convolution sliced by output and input channels."""

    channel_axis = -4
    convolve = staticmethod(F.conv_transpose3d)


class WeightSliceLinear(WeightSlice, nn.Linear):
    """A linear layer sliced by outputs and inputs."""

    channel_axis = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the actuated slice: (..., in) to (..., out)."""
        weight, bias = self.slice_in_use(x.shape[-1])
        return F.linear(x, weight, bias)


class WeightSliceTransposedLinear(WeightSlice):
    """A linear layer whose weight is (in, out): GPT-2's, which Hugging Face calls Conv1D."""

    channel_axis = -1
    out_axis = 1
    in_axis = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the actuated slice: (..., in) to (..., out)."""
        weight, bias = self.slice_in_use(x.shape[-1])
        return F.linear(x, weight.T, bias)


class WeightSliceEmbedding(WeightSlice, nn.Embedding):
    """An embedding of which a subnet uses the first features; its vocabulary stays whole."""

    channel_axis = -1
    out_axis = 1
    in_axis = 0
    bias = None
    follows_inputs = False

    def _slice(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,  # noqa: ARG002  as its base has it
        outputs: int,
        inputs: int,  # noqa: ARG002  they are a length of text, which is no size of the layer
        spans: Spans | None = None,  # noqa: ARG002  as above
    ) -> Parameters:
        return Parameters(taken(weight, 1, self.kept(outputs)), None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up the actuated features: (...) to (..., features)."""
        weight, _ = self.slice_in_use(0)
        return F.embedding(
            ids, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )

    def trim(self, keys: Collection[Key]) -> None:
        """Keep only the features in use; all if it never runs, since models read such a weight too."""
        if keys:
            super().trim(keys)
