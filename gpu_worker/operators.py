"""SubNetAct's three operators: one resident supernet, any subnet of it in place.

A supernet hosts a tuple of subnets. For each, every operator prepares once what
that subnet needs of it: switches, slices, statistics. Which of them is used is
decided by a single word, the `Cursor` that all operators of a supernet share;
so a switch is one store, and no forward pass sees half of it.

Source: SubNetAct, SuperServe (NSDI '25).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Keeps 0.55 * 100 = 55.000000000000007 at 55 channels.
_ROUNDING = 1e-9


class Cursor:
    """The row of the subnet that is actuated, read by every operator of one supernet."""

    __slots__ = ("row",)

    def __init__(self) -> None:
        self.row = 0


class Parameters(NamedTuple):
    """A layer's weight and bias, or a subnet's view of them."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Statistics(NamedTuple):
    """Mean and variance of one BatchNorm's input under one subnet, each (C,)."""

    mean: torch.Tensor
    variance: torch.Tensor


def sliced_size(fraction: float, size: int) -> int:
    """Return ceil(fraction * size), the number of channels, heads or units kept."""
    return math.ceil(fraction * size - _ROUNDING)


def first_blocks(depth: int, n_blocks: int) -> tuple[bool, ...]:
    """Return the switches that run the first `depth` of a stage's `n_blocks` blocks."""
    return tuple(block < depth for block in range(n_blocks))


class LayerSelect(nn.Module):
    """Owns a stage's blocks and one boolean switch for each; runs those that are on."""

    switches: tuple[tuple[bool, ...], ...]

    def __init__(self, blocks: Iterable[nn.Module], cursor: Cursor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.cursor = cursor
        self.host([first_blocks(len(self.blocks), len(self.blocks))])

    def host(self, switches: Sequence[tuple[bool, ...]]) -> None:
        """Keep the switches of each hosted subnet, one tuple a row."""
        assert all(len(row) == len(self.blocks) for row in switches)
        self.switches = tuple(switches)
        # The blocks themselves, so that the forward pass tests no switch.
        self._running = tuple(
            tuple(block for block, on in zip(self.blocks, row, strict=True) if on) for row in self.switches
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks that the actuated subnet switches on."""
        for block in self._running[self.cursor.row]:
            x = block(x)
        return x


class WeightSlice(nn.Module):
    """A layer of which each subnet uses the first outputs and the first inputs.

    The slices are views of the resident parameters, made once when subnets are
    hosted. In training they are made anew in each pass, as autograd needs.
    """

    weight: nn.Parameter  # (out, in, ...)
    bias: nn.Parameter | None  # (out,)

    def __init__(self, weight_shape: tuple[int, ...], cursor: Cursor, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight_shape))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(weight_shape[0])) if bias else None
        self.cursor = cursor
        self.host([(weight_shape[0], weight_shape[1])])

    def host(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Prepare the view of each hosted subnet; `sizes` are its (outputs, inputs), one pair a row."""
        self.sizes = tuple(sizes)
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        # Subnets that use the same slice share its view: 500 of them need only a few.
        views = {size: _slice(weight, bias, *size) for size in set(self.sizes)}
        self._views = tuple(views[size] for size in self.sizes)

    def parameters_in_use(self) -> Parameters:
        """Return the actuated subnet's view of the resident parameters."""
        row = self.cursor.row
        return _slice(self.weight, self.bias, *self.sizes[row]) if self.training else self._views[row]


def _slice(weight: torch.Tensor, bias: torch.Tensor | None, outputs: int, inputs: int) -> Parameters:
    return Parameters(weight[:outputs, :inputs], None if bias is None else bias[:outputs])


class WeightSliceConv2d(WeightSlice):
    """A square convolution sliced by output and input channels; "same" padding for odd kernels."""

    def __init__(
        self, in_channels: int, out_channels: int, cursor: Cursor, *, kernel_size: int, stride: int = 1
    ) -> None:
        # No bias: a SubnetNorm follows every convolution and would cancel it.
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), cursor, bias=False)
        self.stride = stride
        self.padding = kernel_size // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve with the actuated slice."""
        weight, bias = self.parameters_in_use()
        return F.conv2d(x, weight, bias, self.stride, self.padding)  # (B, out, H', W')


class WeightSliceLinear(WeightSlice):
    """A linear layer sliced by outputs and inputs."""

    def __init__(self, in_features: int, out_features: int, cursor: Cursor) -> None:
        super().__init__((out_features, in_features), cursor, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the actuated slice."""
        weight, bias = self.parameters_in_use()
        return F.linear(x, weight, bias)  # (B, out)


class SubnetNorm(nn.Module):
    """A BatchNorm with a mean and a variance for each subnet, and one scale and shift for all.

    In training it normalises by the batch. While `momentum` is set it also
    folds the batch into the actuated subnet's statistics: calibration.
    """

    mean: torch.Tensor  # (subnets, C); a subnet uses the first of its channels
    variance: torch.Tensor  # (subnets, C)
    momentum: float | None

    def __init__(self, channels: int, cursor: Cursor, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.epsilon = epsilon
        self.cursor = cursor
        self.momentum = None
        self.host([channels])

    def host(self, channels: Sequence[int]) -> None:
        """Hold statistics for each hosted subnet, `channels` of them in its row.

        Statistics already held are kept if there is a row for each subnet, and
        start at mean 0 and variance 1 if not.
        """
        shape = (len(channels), len(self.weight))
        if getattr(self, "mean", torch.empty(0)).shape != shape:
            self.register_buffer("mean", torch.zeros(shape, device=self.weight.device))
            self.register_buffer("variance", torch.ones(shape, device=self.weight.device))
        self.channels = tuple(channels)
        weight, bias = self.weight.detach(), self.bias.detach()
        self._affine = tuple(Parameters(weight[:c], bias[:c]) for c in self.channels)
        self._statistics = tuple(
            Statistics(self.mean[row, :c], self.variance[row, :c]) for row, c in enumerate(self.channels)
        )

    def statistics_in_use(self) -> Statistics:
        """Return the actuated subnet's statistics, as views of all."""
        return self._statistics[self.cursor.row]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the actuated subnet's statistics, or by the batch in training."""
        if self.training:
            return self._forward_training(x)
        row = self.cursor.row
        mean, variance = self._statistics[row]
        weight, bias = self._affine[row]
        return F.batch_norm(x, mean, variance, weight, bias, eps=self.epsilon)  # (B, C, H, W)

    def _forward_training(self, x: torch.Tensor) -> torch.Tensor:
        row = self.cursor.row
        channels = self.channels[row]
        mean, variance = (None, None) if self.momentum is None else self._statistics[row]
        momentum = 0.0 if self.momentum is None else self.momentum
        weight, bias = self.weight[:channels], self.bias[:channels]
        return F.batch_norm(
            x, mean, variance, weight, bias, training=True, momentum=momentum, eps=self.epsilon
        )
